//! Looking: opening, rescanning, listing, getting.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use dashmap::DashMap;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::{Mutex, MutexGuard, Semaphore};

use super::{
    AdapterName, Entry, Generation, Loader, Page, Pieces, Query, RegistryError, Store, StoreFault,
    Tier, Usage,
    follower::Followers,
    index::{Index, Read},
    lease::Flights,
    manifest, nearest,
    store::{Key, Part, Seen},
};

/// Names that share a lock share a wait of milliseconds, seldom.
const LOCKS: usize = 64;
/// Manifests read at once in a rescan.
const READS: usize = 32;

/// When the store last failed to answer under a lock, and how.
type Unanswered = Option<(Instant, RegistryError)>;

/// What the operator decides.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Host memory for loaded adapters.
    pub host_bytes: u64,
    /// Largest weights file, uploaded or loaded.
    pub largest_weights: u64,
    /// Largest preview.
    pub largest_preview: u64,
    /// Adapters loaded at once.
    pub loads: usize,
    /// Between two rescans that nothing else asked for.
    pub rescan: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            host_bytes: 2 << 30,
            largest_weights: 2 << 30,
            largest_preview: 8 << 20,
            loads: std::thread::available_parallelism().map_or(2, |cores| cores.get()),
            rescan: Duration::from_secs(30),
        }
    }
}

/// A handle on the adapters; clones are the same registry.
pub struct Registry<L: Loader>(pub(super) Arc<Inner<L>>);

impl<L: Loader> Clone for Registry<L> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

pub(super) struct Inner<L: Loader> {
    pub store: Store,
    pub loader: L,
    pub settings: Settings,
    pub index: Index,
    pub host: Tier<L::Loaded>,
    pub followers: Followers,
    pub flights: Flights<L::Loaded>,
    pub loads: Semaphore,
    rescan: Mutex<()>,
    locks: [Mutex<Unanswered>; LOCKS],
}

/// An adapter's file on its way out.
pub struct Download {
    pub entry: Arc<Entry>,
    /// Hash and size of the version that is sent; the hash if it is known.
    pub generation: Option<Generation>,
    pub size: u64,
    pub pieces: Pieces,
}

impl<L: Loader> Registry<L> {
    /// Looks through the store once; an unreachable one is an error here and not later.
    pub async fn open(store: Store, loader: L, settings: Settings) -> Result<Self, RegistryError> {
        let registry = Self(Arc::new(Inner {
            host: Tier::new("host", settings.host_bytes),
            loads: Semaphore::new(settings.loads.max(1)),
            index: Index::default(),
            followers: Followers::default(),
            flights: DashMap::new(),
            rescan: Mutex::default(),
            locks: std::array::from_fn(|_| Mutex::default()),
            store,
            loader,
            settings,
        }));
        // So that the figures are there before the first lease is.
        let tier = registry.0.host.label();
        metrics::counter!("lorikeet_adapter_hits_total", "tier" => tier).increment(0);
        metrics::counter!("lorikeet_adapter_misses_total", "tier" => tier).increment(0);
        registry.rescan().await?;
        Ok(registry)
    }

    /// Makes the index what the store is. Without the store the index stays what it was.
    /// Says how many adapters were new, changed or gone.
    pub async fn rescan(&self) -> Result<usize, RegistryError> {
        let _alone = self.0.rescan.lock().await;
        let up = metrics::gauge!("lorikeet_adapter_store_up");
        match self.look_through().await {
            Ok(changed) => {
                up.set(1.0);
                self.count();
                Ok(changed)
            }
            Err(fault) => {
                up.set(0.0);
                self.0.index.set_outage(fault.to_string());
                Err(unavailable(fault))
            }
        }
    }

    async fn look_through(&self) -> Result<usize, StoreFault> {
        let index = &self.0.index;
        index.begin();
        let listing = self.0.store.list().await?;
        let fresh = stream::iter(index.news(&listing))
            .map(|(name, files)| async move {
                let read = match files.manifest {
                    Some(_) => self.read_manifest(&name).await?,
                    None => None,
                };
                let before = index.get(&name);
                let (weights, preview) = (files.weights, files.preview);
                Ok::<_, StoreFault>(Entry::new(name, weights, read, preview, before.as_deref()))
            })
            .buffer_unordered(READS)
            .try_collect::<Vec<_>>()
            .await?;
        let pins: Vec<_> = fresh
            .iter()
            .filter_map(|e| Some((e.generation?, e.name.clone(), e.manifest.pinned)))
            .collect();
        let applied = index.apply(&listing, fresh);
        for (name, generation) in &applied.retired {
            self.retire(generation, name);
        }
        for (generation, name, pinned) in &pins {
            self.keep_in_memory(generation, name, *pinned);
        }
        for (file, reason) in applied.skipped.iter().flatten() {
            tracing::warn!(file, reason, "not served as an adapter");
        }
        Ok(applied.changed)
    }

    /// A manifest's mark and content; a broken one is an answer, too.
    pub(super) async fn read_manifest(&self, name: &AdapterName) -> Result<Read, StoreFault> {
        let key = Key::new(name, Part::Manifest);
        match self.0.store.read(&key, manifest::LARGEST).await {
            Ok(None) => Ok(None),
            Ok(Some((seen, bytes))) => {
                let read = serde_json::from_slice(&bytes).map_err(|e| e.to_string());
                Ok(Some((seen.tag, read)))
            }
            Err(fault @ StoreFault::TooLarge { .. }) => {
                let seen = self.0.store.head(&key).await?;
                Ok(seen.map(|seen| (seen.tag, Err(fault.to_string()))))
            }
            Err(fault) => Err(fault),
        }
    }

    /// One page of what is known.
    pub fn list(&self, query: &Query) -> Page {
        query.page(self.0.index.all())
    }

    /// Everything that is known, in the order of the names.
    pub fn all(&self) -> Vec<Arc<Entry>> {
        let mut all = self.0.index.all();
        all.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// One adapter; one that is not known yet is looked for in the store.
    pub async fn get(&self, name: &AdapterName) -> Result<Arc<Entry>, RegistryError> {
        if let Some(entry) = self.0.index.get(name) {
            return Ok(entry);
        }
        let asked = Instant::now();
        let mut turn = self.lock(name).await;
        // Those who were first may have found it, or have got no answer: then that is ours, too, or
        // all who ask while the store is silent would stand in line for it.
        if let Some(entry) = self.0.index.get(name) {
            return Ok(entry);
        }
        if let Some((_, error)) = turn.as_ref().filter(|(at, _)| *at > asked) {
            return Err(error.clone());
        }
        let found = self.refresh(name).await;
        *turn = match &found {
            Err(error @ RegistryError::Unavailable { .. }) => Some((Instant::now(), error.clone())),
            _ => None,
        };
        found?.ok_or_else(|| self.missing(name))
    }

    /// Why the store could not be listed the last time, if so.
    pub fn outage(&self) -> Option<String> {
        self.0.index.outage()
    }

    /// Files that look like adapters and are not served, and why.
    pub fn skipped(&self) -> Vec<(String, String)> {
        self.0.index.skipped()
    }

    /// What makes adapters of files.
    pub fn loader(&self) -> &L {
        &self.0.loader
    }

    pub fn settings(&self) -> &Settings {
        &self.0.settings
    }

    /// The folder the adapters lie in, if they lie in one.
    pub fn folder(&self) -> Option<&Path> {
        self.0.store.watchable()
    }

    /// What host memory holds.
    pub fn usage(&self) -> Usage {
        self.0.host.usage()
    }

    /// The weights as they are in the store.
    pub async fn download(&self, name: &AdapterName) -> Result<Download, RegistryError> {
        let entry = self.get(name).await?;
        let opened = self.0.store.stream(&Key::new(name, Part::Weights)).await;
        let (seen, pieces) = opened
            .map_err(|fault| self.explain(name, fault))?
            .ok_or_else(|| self.missing(name))?;
        let same = seen.tag == entry.weights.tag;
        Ok(Download {
            generation: entry.generation.filter(|_| same),
            size: seen.size,
            entry,
            pieces,
        })
    }

    pub async fn preview(&self, name: &AdapterName) -> Result<Bytes, RegistryError> {
        self.get(name).await?;
        let key = Key::new(name, Part::Preview);
        match self
            .0
            .store
            .read(&key, self.0.settings.largest_preview)
            .await
        {
            Ok(Some((_, bytes))) => Ok(bytes),
            Ok(None) => Err(RegistryError::NoPreview(name.clone())),
            Err(fault) => Err(self.explain(name, fault)),
        }
    }

    /// The adapter's hash, computed now if it was not known; the value of its ETag.
    pub async fn generation(&self, name: &AdapterName) -> Result<Generation, RegistryError> {
        let entry = self.get(name).await?;
        self.generation_of(&entry).await
    }

    pub(super) async fn generation_of(&self, entry: &Entry) -> Result<Generation, RegistryError> {
        if let Some(generation) = entry.generation {
            return Ok(generation);
        }
        let (seen, bytes) = self.read_weights(&entry.name).await?;
        let hashed = tokio::task::spawn_blocking(move || Generation::of(&bytes)).await;
        let generation = hashed.map_err(unavailable)?;
        self.0.index.learn(&entry.name, &seen.tag, |entry| {
            entry.generation = Some(generation);
            entry.manifest.sha256 = Some(generation);
        });
        Ok(generation)
    }

    pub(super) async fn read_weights(
        &self,
        name: &AdapterName,
    ) -> Result<(Seen, Bytes), RegistryError> {
        let key = Key::new(name, Part::Weights);
        let read = self
            .0
            .store
            .read(&key, self.0.settings.largest_weights)
            .await;
        match read {
            Ok(Some(read)) => Ok(read),
            Ok(None) => Err(self.missing(name)),
            Err(fault) => Err(self.explain(name, fault)),
        }
    }

    /// Looks at one adapter in the store and writes down what is there. The name's lock is held.
    pub(super) async fn refresh(
        &self,
        name: &AdapterName,
    ) -> Result<Option<Arc<Entry>>, RegistryError> {
        let (weights, preview) = (Key::new(name, Part::Weights), Key::new(name, Part::Preview));
        let (weights, manifest, preview) = futures::try_join!(
            self.0.store.head(&weights),
            self.read_manifest(name),
            self.0.store.head(&preview),
        )
        .map_err(|fault| self.explain(name, fault))?;
        let before = self.0.index.get(name);
        let preview = preview.is_some();
        let entry = weights.map(|weights| {
            let before = before.as_deref();
            Arc::new(Entry::new(name.clone(), weights, manifest, preview, before))
        });
        if entry.is_some() || before.is_some() {
            self.remember(name, entry.clone());
        }
        Ok(entry)
    }

    /// Sets the index, and lets go of a generation that the name no longer means.
    pub(super) fn remember(&self, name: &AdapterName, entry: Option<Arc<Entry>>) {
        let now = entry.as_ref().and_then(|entry| entry.generation);
        let pinned = entry.as_ref().is_some_and(|entry| entry.manifest.pinned);
        let before = self.0.index.set(name, entry).and_then(|e| e.generation);
        if let Some(before) = before.filter(|_| before != now) {
            self.retire(&before, name);
        }
        if let Some(now) = now {
            self.keep_in_memory(&now, name, pinned);
        }
        self.count();
    }

    fn count(&self) {
        metrics::gauge!("lorikeet_adapters").set(self.0.index.len() as f64);
    }

    /// Changes of one name come one after another.
    pub(super) async fn lock(&self, name: &AdapterName) -> MutexGuard<'_, Unanswered> {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        self.0.locks[hasher.finish() as usize % LOCKS].lock().await
    }

    /// A 404 that helps, and tells no tenant of another's adapters.
    pub(super) fn missing(&self, name: &AdapterName) -> RegistryError {
        let all = self.0.index.all();
        let public = all.iter().filter(|entry| entry.public());
        RegistryError::NotFound {
            nearest: nearest(name.as_str(), public.map(|entry| entry.name.clone())),
            name: name.clone(),
        }
    }

    /// A store's fault as it concerns one adapter.
    pub(super) fn explain(&self, name: &AdapterName, fault: StoreFault) -> RegistryError {
        match fault {
            StoreFault::Unmet => RegistryError::Conflict(name.clone()),
            StoreFault::TooLarge { limit } => RegistryError::TooLarge {
                what: format!("a file of adapter `{name}`"),
                limit,
            },
            StoreFault::Full(reason) => RegistryError::StoreFull { reason },
            StoreFault::Unavailable(reason) => RegistryError::Unavailable { reason },
        }
    }
}

pub(super) fn unavailable(error: impl std::fmt::Display) -> RegistryError {
    RegistryError::Unavailable {
        reason: error.to_string(),
    }
}
