//! Adapters in memory, within a budget of bytes.
//!
//! A cache that evicts whatever is oldest (moka, say) would strike an adapter off its account while
//! a request still paints with it: the memory stays, the account forgets it, and the budget means
//! nothing. Here an entry goes only when the tier holds the last reference to it and nobody pinned
//! it; what is in use is on the account for as long as it is in memory.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{AdapterName, Generation};

/// An adapter in memory. Whoever holds it keeps it there.
#[derive(Debug)]
pub struct Resident<T> {
    pub generation: Generation,
    /// What it takes of the tier's budget.
    pub bytes: u64,
    pub value: T,
}

/// What is in use or pinned leaves no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoRoom {
    pub budget: u64,
    /// Bytes that cannot be freed now.
    pub held: u64,
}

/// What a tier holds at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    pub adapters: usize,
    pub bytes: u64,
    pub budget: u64,
}

/// Adapters by generation, least recently used out first.
#[derive(Debug)]
pub struct Tier<T> {
    label: &'static str,
    budget: u64,
    state: Mutex<State<T>>,
}

#[derive(Debug)]
struct State<T> {
    slots: HashMap<Generation, Slot<T>>,
    /// Whose pins keep what, here or still to come.
    pins: HashMap<Generation, BTreeSet<AdapterName>>,
    /// What leaves with its last use.
    retired: Vec<Generation>,
    used: u64,
    /// Counts uses, in place of a clock.
    now: u64,
}

#[derive(Debug)]
struct Slot<T> {
    resident: Arc<Resident<T>>,
    last_use: u64,
}

impl<T> Slot<T> {
    /// New references are made under the tier's lock or of another reference only, so under the
    /// lock a count of one stays one.
    fn unused(&self) -> bool {
        Arc::strong_count(&self.resident) == 1
    }
}

impl<T> Tier<T> {
    /// An empty tier; `label` names it in the metrics.
    pub fn new(label: &'static str, budget: u64) -> Self {
        let state = State {
            slots: HashMap::new(),
            pins: HashMap::new(),
            retired: Vec::new(),
            used: 0,
            now: 0,
        };
        let tier = Self {
            label,
            budget,
            state: Mutex::new(state),
        };
        // So that the figures are there before the first adapter is.
        tier.account(&tier.lock(), 0);
        tier
    }

    pub fn label(&self) -> &'static str {
        self.label
    }

    /// Nothing under the lock can panic between two halves of a change.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The adapter if it is here, now the most recently used.
    pub fn get(&self, generation: &Generation) -> Option<Arc<Resident<T>>> {
        let mut state = self.lock();
        state.now += 1;
        let now = state.now;
        let slot = state.slots.get_mut(generation)?;
        slot.last_use = now;
        let resident = slot.resident.clone();
        self.sweep(state);
        Some(resident)
    }

    /// Whether it is here, without using it.
    pub fn contains(&self, generation: &Generation) -> bool {
        self.lock().slots.contains_key(generation)
    }

    /// Takes an adapter in, making room if it must. What is here already under the same
    /// generation stays, and the new copy is dropped.
    pub fn insert(
        &self,
        generation: Generation,
        value: T,
        bytes: u64,
    ) -> Result<Arc<Resident<T>>, NoRoom> {
        if let Some(resident) = self.get(&generation) {
            return Ok(resident);
        }
        let resident = Arc::new(Resident {
            generation,
            bytes,
            value,
        });
        // Large buffers are given back outside the lock.
        let mut evicted = Vec::new();
        let mut state = self.lock();
        // Another load of the same content may have come first.
        if let Some(slot) = state.slots.get(&generation) {
            return Ok(slot.resident.clone());
        }
        let idle = state.idle();
        let held = state.used - idle.map(|(_, slot)| slot.resident.bytes).sum::<u64>();
        if held.saturating_add(bytes) > self.budget {
            return Err(NoRoom {
                budget: self.budget,
                held,
            });
        }
        while state.used.saturating_add(bytes) > self.budget {
            let idle = state.idle();
            let Some((&oldest, _)) = idle.min_by_key(|(_, slot)| slot.last_use) else {
                // A lease cannot appear under the lock; should one, the account stays right.
                return Err(NoRoom {
                    budget: self.budget,
                    held: state.used,
                });
            };
            evicted.extend(state.remove(&oldest));
        }
        state.now += 1;
        let last_use = state.now;
        state.used += bytes;
        let slot = Slot {
            resident: resident.clone(),
            last_use,
        };
        state.slots.insert(generation, slot);
        self.account(&state, evicted.len());
        self.sweep(state);
        Ok(resident)
    }

    /// Keeps an adapter here whatever comes, once it is here, or no longer; pins are counted by name.
    pub fn pin(&self, generation: &Generation, name: &AdapterName, pinned: bool) {
        let mut state = self.lock();
        match pinned {
            true => {
                let pins = state.pins.entry(*generation).or_default();
                pins.insert(name.clone());
            }
            false => state.unpin(generation, name),
        }
    }

    /// `name` no longer means this generation: it goes now if it is idle, else with its last use.
    pub fn retire(&self, generation: &Generation, name: &AdapterName) {
        let mut state = self.lock();
        state.unpin(generation, name);
        state.retired.push(*generation);
        self.sweep(state);
    }

    /// All of which this is true are to go as if they were retired.
    pub fn retire_if(&self, gone: impl Fn(&T) -> bool) {
        let mut state = self.lock();
        let here = state.slots.iter();
        let gone = here.filter(|(_, slot)| gone(&slot.resident.value));
        let gone: Vec<Generation> = gone.map(|(generation, _)| *generation).collect();
        state.retired.extend(gone);
        self.sweep(state);
    }

    /// Lets go of what is retired and no longer in use.
    fn sweep(&self, mut state: MutexGuard<State<T>>) {
        if state.retired.is_empty() {
            return;
        }
        let mut gone = Vec::new();
        for generation in std::mem::take(&mut state.retired) {
            match state.slots.get(&generation) {
                // As long as another name pins it, it is that one's.
                Some(slot) if !slot.unused() || state.pins.contains_key(&generation) => {
                    state.retired.push(generation);
                }
                Some(_) => gone.extend(state.remove(&generation)),
                None => {}
            }
        }
        state.retired.sort_unstable();
        state.retired.dedup();
        self.account(&state, 0);
        // Large buffers are given back outside the lock.
        drop(state);
        drop(gone);
    }

    pub fn usage(&self) -> Usage {
        self.sweep(self.lock());
        let state = self.lock();
        Usage {
            adapters: state.slots.len(),
            bytes: state.used,
            budget: self.budget,
        }
    }

    fn account(&self, state: &State<T>, evicted: usize) {
        let tier = self.label;
        metrics::gauge!("lorikeet_adapter_resident_bytes", "tier" => tier).set(state.used as f64);
        metrics::counter!("lorikeet_adapter_evictions_total", "tier" => tier)
            .increment(evicted as u64);
    }
}

impl<T> State<T> {
    /// What may be put out.
    fn idle(&self) -> impl Iterator<Item = (&Generation, &Slot<T>)> {
        let idle = |(generation, slot): &(&Generation, &Slot<T>)| {
            slot.unused() && !self.pins.contains_key(*generation)
        };
        self.slots.iter().filter(idle)
    }

    fn unpin(&mut self, generation: &Generation, name: &AdapterName) {
        if let Some(pins) = self.pins.get_mut(generation) {
            pins.remove(name);
            if pins.is_empty() {
                self.pins.remove(generation);
            }
        }
    }

    fn remove(&mut self, generation: &Generation) -> Option<Slot<T>> {
        let slot = self.slots.remove(generation)?;
        self.used -= slot.resident.bytes;
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn generation(of: u8) -> Generation {
        Generation::of(&[of])
    }

    fn filled(budget: u64, of: &[u8]) -> Tier<u8> {
        let tier = Tier::new("test", budget);
        for &n in of {
            tier.insert(generation(n), n, 10).unwrap();
        }
        tier
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let tier = filled(30, &[1, 2, 3]);
        assert!(tier.get(&generation(1)).is_some());
        tier.insert(generation(4), 4, 10).unwrap();
        let here: Vec<u8> = (1..=4).filter(|&n| tier.contains(&generation(n))).collect();
        assert_eq!(here, [1, 3, 4]);
    }

    #[test]
    fn what_is_leased_or_pinned_stays_and_stays_on_the_account() {
        let tier = filled(30, &[1, 2, 3]);
        let lease = tier.get(&generation(1)).unwrap();
        let name = AdapterName::new("a").unwrap();
        tier.pin(&generation(2), &name, true);
        assert_eq!(
            tier.insert(generation(4), 4, 11).unwrap_err(),
            NoRoom {
                budget: 30,
                held: 20
            }
        );
        // A refusal evicts nothing.
        assert_eq!(
            tier.usage(),
            Usage {
                adapters: 3,
                bytes: 30,
                budget: 30
            }
        );
        tier.insert(generation(4), 4, 10).unwrap();
        assert!(!tier.contains(&generation(3)));

        drop(lease);
        tier.pin(&generation(2), &name, false);
        tier.insert(generation(5), 5, 30).unwrap();
        assert_eq!(
            tier.usage(),
            Usage {
                adapters: 1,
                bytes: 30,
                budget: 30
            }
        );
    }

    #[test]
    fn a_retired_generation_lives_as_long_as_its_lease() {
        let tier = filled(30, &[1]);
        let name = AdapterName::new("a").unwrap();
        let lease = tier.get(&generation(1)).unwrap();
        tier.retire(&generation(1), &name);
        assert_eq!((lease.value, tier.usage().bytes), (1, 10));
        drop(lease);
        assert_eq!(tier.usage().bytes, 0);
    }

    #[test]
    fn a_pin_holds_what_comes_after_it_and_outlives_another_names_farewell() {
        let (one, other) = (
            AdapterName::new("a").unwrap(),
            AdapterName::new("b").unwrap(),
        );
        let tier = Tier::new("test", 20);
        tier.pin(&generation(1), &one, true);
        tier.insert(generation(1), 1, 10).unwrap();
        tier.insert(generation(2), 2, 10).unwrap();
        tier.retire(&generation(1), &other);
        tier.insert(generation(3), 3, 10).unwrap();
        let here: Vec<u8> = (1..=3).filter(|&n| tier.contains(&generation(n))).collect();
        assert_eq!(here, [1, 3]);
        tier.retire(&generation(1), &one);
        assert!(!tier.contains(&generation(1)));
    }

    #[test]
    fn what_is_retired_by_what_it_is_goes_and_the_rest_stays() {
        let tier = filled(30, &[1, 2, 3]);
        let lease = tier.get(&generation(3)).unwrap();
        tier.retire_if(|value| *value != 2);
        assert!(!tier.contains(&generation(1)));
        assert!(tier.contains(&generation(2)) && tier.contains(&generation(3)));
        drop(lease);
        tier.get(&generation(2)).unwrap();
        assert!(!tier.contains(&generation(3)), "it leaves at the next look");
    }

    proptest! {
        #[test]
        fn the_account_is_the_sum_of_what_is_here_and_within_the_budget(
            calls in proptest::collection::vec((0u8..4, 0u8..12, 0u64..40), 1..200)
        ) {
            let tier = Tier::new("test", 100);
            let (name, mut leases) = (AdapterName::new("a").unwrap(), Vec::new());
            for (call, n, bytes) in calls {
                match call {
                    0 => leases.extend(tier.insert(generation(n), n, bytes)),
                    1 => { let _ = tier.insert(generation(n), n, bytes); }
                    2 => tier.pin(&generation(n), &name, bytes % 2 == 0),
                    _ => { if !leases.is_empty() { leases.swap_remove(n as usize % leases.len()); } }
                }
                let state = tier.lock();
                let sum: u64 = state.slots.values().map(|slot| slot.resident.bytes).sum();
                prop_assert_eq!(state.used, sum);
                prop_assert!(sum <= 100);
                for lease in &leases {
                    prop_assert!(state.slots.contains_key(&lease.generation));
                }
            }
        }
    }
}
