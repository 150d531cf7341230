//! Those who keep what they have made of adapters.

use std::sync::{Arc, PoisonError, RwLock};

use super::{AdapterName, Generation, Loader, Registry};

/// Told what becomes of adapters, so that what was made of them stays or goes with them. Called
/// wherever the registry changes, so it must not take long.
pub trait Follower: Send + Sync {
    /// `name` no longer means this generation, or its memory was asked back.
    fn retired(&self, generation: &Generation, name: &AdapterName);

    /// `name` keeps this generation in memory, or no longer.
    fn pinned(&self, generation: &Generation, name: &AdapterName, pinned: bool);
}

/// All who follow.
#[derive(Default)]
pub(super) struct Followers(RwLock<Vec<Arc<dyn Follower>>>);

impl Followers {
    fn add(&self, follower: Arc<dyn Follower>) {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        all.push(follower);
    }

    fn tell(&self, what: impl Fn(&dyn Follower)) {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        all.iter().for_each(|follower| what(follower.as_ref()));
    }
}

impl<L: Loader> Registry<L> {
    /// Tells `follower` of every change from now on, and of the pins there are.
    pub fn follow(&self, follower: Arc<dyn Follower>) {
        self.0.followers.add(follower.clone());
        for entry in self.all() {
            if let Some(generation) = entry.generation.filter(|_| entry.manifest.pinned) {
                follower.pinned(&generation, &entry.name, true);
            }
        }
    }

    pub(super) fn retire(&self, generation: &Generation, name: &AdapterName) {
        self.0.host.retire(generation, name);
        self.0.followers.tell(|one| one.retired(generation, name));
    }

    pub(super) fn keep_in_memory(&self, generation: &Generation, name: &AdapterName, pinned: bool) {
        self.0.host.pin(generation, name, pinned);
        self.0
            .followers
            .tell(|one| one.pinned(generation, name, pinned));
    }
}
