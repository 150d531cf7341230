//! Loading adapters into memory, and holding them there.

use std::{fmt, ops::Deref, sync::Arc, time::Instant};

use bytes::Bytes;
use dashmap::{DashMap, Entry as Place};
use futures::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};

use super::{
    AdapterName, Entry, Generation, Manifest, Registry, RegistryError, Resident,
    registry::unavailable, writing::BAFFLING,
};

/// Looks at a file that changes under our hands before giving up.
const LOOKS: usize = 3;

/// Makes an adapter of a file's bytes.
pub trait Loader: Send + Sync + 'static {
    type Loaded: Send + Sync + 'static;

    /// The adapter and the bytes of memory it takes. Called on a blocking thread, for several
    /// adapters at once.
    fn load(&self, bytes: Bytes, manifest: &Manifest) -> Result<(Self::Loaded, u64), LoadFault>;
}

/// Why a file is not an adapter for this server. It will not become one by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoadFault {
    /// What is wrong with it, for people.
    Invalid(String),
    /// A good adapter of another family of models.
    WrongBase { made_for: String, served: String },
}

impl LoadFault {
    pub(super) fn of(self, name: &AdapterName) -> RegistryError {
        let name = name.clone();
        match self {
            Self::Invalid(reason) => RegistryError::Refused { name, reason },
            Self::WrongBase { made_for, served } => RegistryError::WrongBase {
                name,
                made_for,
                served,
            },
        }
    }
}

/// How far an adapter has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// In the store only.
    Stored,
    Loading,
    /// In host memory.
    Ready,
    /// It cannot be served as it is.
    Failed(RegistryError),
}

/// A loaded adapter, held in memory in this generation until the last clone is dropped.
pub struct AdapterLease<T> {
    entry: Arc<Entry>,
    resident: Arc<Resident<T>>,
}

impl<T> AdapterLease<T> {
    pub fn name(&self) -> &AdapterName {
        &self.entry.name
    }

    pub fn generation(&self) -> Generation {
        self.resident.generation
    }

    /// As it was when the lease was taken.
    pub fn manifest(&self) -> &Manifest {
        &self.entry.manifest
    }
}

impl<T> Clone for AdapterLease<T> {
    fn clone(&self) -> Self {
        Self {
            entry: self.entry.clone(),
            resident: self.resident.clone(),
        }
    }
}

impl<T> Deref for AdapterLease<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.resident.value
    }
}

impl<T> fmt::Debug for AdapterLease<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AdapterLease({} {})", self.name(), self.generation())
    }
}

/// A load that any number may wait for.
pub(super) type Flight<T> = Shared<BoxFuture<'static, Result<Arc<Resident<T>>, RegistryError>>>;
/// Loads under way, by name and by the weights' mark.
pub(super) type Flights<T> = DashMap<(AdapterName, String), Flight<T>>;

impl<L: Loader> Registry<L> {
    /// The adapter, loaded. Waits for its load and for nobody else's; dropping the future gives up
    /// the waiting and not the load.
    pub async fn lease(
        &self,
        name: &AdapterName,
    ) -> Result<AdapterLease<L::Loaded>, RegistryError> {
        let entry = self.get(name).await?;
        entry.refusal()?;
        let tier = self.0.host.label();
        if let Some(resident) = self.resident(&entry) {
            metrics::counter!("lorikeet_adapter_hits_total", "tier" => tier).increment(1);
            return Ok(AdapterLease { entry, resident });
        }
        metrics::counter!("lorikeet_adapter_misses_total", "tier" => tier).increment(1);
        let resident = self.flight(&entry).await?;
        // The load may have met a newer version, with another manifest.
        let newer = self.0.index.get(name);
        let entry = newer
            .filter(|newer| newer.generation == Some(resident.generation))
            .unwrap_or(entry);
        Ok(AdapterLease { entry, resident })
    }

    /// How far an adapter has come.
    pub fn status(&self, entry: &Entry) -> Status {
        let key = (entry.name.clone(), entry.weights.tag.clone());
        let here = |generation| self.0.host.contains(&generation);
        match entry.refusal() {
            Err(error) => Status::Failed(error),
            Ok(()) if entry.generation.is_some_and(here) => Status::Ready,
            Ok(()) if self.0.flights.contains_key(&key) => Status::Loading,
            Ok(()) => Status::Stored,
        }
    }

    /// Lets an adapter's memory go as soon as nobody uses it; the next lease loads it again. A pinned
    /// one stays, which is what `false` says.
    pub async fn release(&self, name: &AdapterName) -> Result<bool, RegistryError> {
        let entry = self.get(name).await?;
        if entry.manifest.pinned {
            return Ok(false);
        }
        if let Some(generation) = entry.generation {
            self.retire(&generation, name);
        }
        Ok(true)
    }

    fn resident(&self, entry: &Entry) -> Option<Arc<Resident<L::Loaded>>> {
        self.0.host.get(&entry.generation?)
    }

    /// The one load of an entry, begun now if it was not under way.
    pub(super) fn flight(&self, entry: &Arc<Entry>) -> Flight<L::Loaded> {
        let key = (entry.name.clone(), entry.weights.tag.clone());
        match self.0.flights.entry(key.clone()) {
            Place::Occupied(flight) => flight.get().clone(),
            Place::Vacant(place) => {
                let (registry, entry) = (self.clone(), entry.clone());
                let landing = tokio::spawn(async move {
                    // In a task of its own, so that a panic cannot leave the flight in the air.
                    let load = tokio::spawn(registry.clone().load(entry));
                    let result = load.await.unwrap_or_else(|error| Err(unavailable(error)));
                    registry.0.flights.remove(&key);
                    result
                });
                let flight = landing
                    .map(|result| result.unwrap_or_else(|error| Err(unavailable(error))))
                    .boxed()
                    .shared();
                place.insert(flight).clone()
            }
        }
    }

    async fn load(self, entry: Arc<Entry>) -> Result<Arc<Resident<L::Loaded>>, RegistryError> {
        let _turn = self.0.loads.acquire().await.map_err(unavailable)?;
        let name = &entry.name;
        // Another flight may have landed since the caller looked.
        let mut entry = self.0.index.get(name).unwrap_or(entry.clone());
        for _ in 0..LOOKS {
            entry.refusal()?;
            if let Some(resident) = self.resident(&entry) {
                return Ok(resident);
            }
            let began = Instant::now();
            let (seen, bytes) = match self.read_weights(&entry.name).await {
                Err(missing @ RegistryError::NotFound { .. }) => {
                    // Removed behind our back.
                    let _alone = self.lock(&entry.name).await;
                    self.refresh(&entry.name).await?;
                    return Err(missing);
                }
                read => read?,
            };
            metrics::histogram!("lorikeet_adapter_load_seconds", "tier" => "store")
                .record(began.elapsed());
            if seen.tag != entry.weights.tag {
                let _alone = self.lock(&entry.name).await;
                let newer = self.refresh(&entry.name).await?;
                entry = newer.ok_or_else(|| self.missing(&entry.name))?;
            }
            if seen.tag == entry.weights.tag {
                entry.refusal()?;
                return self.make(entry, bytes, began).await;
            }
        }
        Err(RegistryError::Conflict(entry.name.clone()))
    }

    /// From bytes to an adapter on the account.
    async fn make(
        &self,
        entry: Arc<Entry>,
        bytes: Bytes,
        began: Instant,
    ) -> Result<Arc<Resident<L::Loaded>>, RegistryError> {
        let name = entry.name.clone();
        let (registry, work) = (self.clone(), entry.clone());
        let made = tokio::task::spawn_blocking(move || {
            let load = |bytes| registry.0.loader.load(bytes, &work.manifest);
            // The hash takes longer than all the rest, so it is computed beside it.
            let (generation, loaded) = match work.generation {
                Some(generation) => (generation, load(bytes)),
                None => rayon::join(|| Generation::of(&bytes), || load(bytes.clone())),
            };
            // The same content may be here already, under another name: then that stays.
            let resident =
                loaded
                    .map_err(|fault| fault.of(&work.name))
                    .and_then(|(value, size)| {
                        let inserted = registry.0.host.insert(generation, value, size);
                        inserted.map_err(|room| RegistryError::NoRoom {
                            name: work.name.clone(),
                            tier: registry.0.host.label(),
                            needed: size,
                            budget: room.budget,
                            held: room.held,
                        })
                    });
            (generation, resident)
        });
        let (generation, result) = match made.await {
            Ok((generation, result)) => (Some(generation), result),
            Err(error) => {
                tracing::error!(%name, %error, "loading an adapter panicked");
                let reason = BAFFLING.into();
                (
                    None,
                    Err(RegistryError::Refused {
                        name: name.clone(),
                        reason,
                    }),
                )
            }
        };
        let lasting = match &result {
            Err(e @ (RegistryError::Refused { .. } | RegistryError::WrongBase { .. })) => Some(e),
            _ => None,
        };
        if let Err(error) = &result {
            tracing::warn!(%name, %error, "an adapter was not loaded");
        }
        let mut pinned = false;
        self.0.index.learn(&name, &entry.weights.tag, |now| {
            now.generation = generation.or(now.generation);
            now.manifest.sha256 = now.generation;
            // A failure is this manifest's, too.
            if now.manifest_tag == entry.manifest_tag {
                now.failure = lasting.cloned();
            }
            pinned = now.manifest.pinned;
        });
        if let Ok(resident) = &result {
            self.keep_in_memory(&resident.generation, &name, pinned);
            metrics::histogram!("lorikeet_adapter_load_seconds", "tier" => self.0.host.label())
                .record(began.elapsed());
        }
        result
    }
}
