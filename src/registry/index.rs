//! What the registry knows of every adapter without asking the store.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dashmap::DashMap;

use super::{
    AdapterName, Generation, Manifest, RegistryError,
    store::{Files, Listing, Seen},
};

/// One adapter as it was last seen.
#[derive(Debug, Clone)]
pub struct Entry {
    pub name: AdapterName,
    /// As written, or made up for a file that has none.
    pub manifest: Manifest,
    pub weights: Seen,
    pub preview: bool,
    /// Hash of the weights, once it is known.
    pub generation: Option<Generation>,
    /// Why the manifest cannot be read. Such an adapter is listed and not served: whose it is
    /// cannot be known, and a slip in a file must not make it public.
    pub fault: Option<String>,
    /// Why these very weights cannot be served; they are not read again.
    pub(super) failure: Option<RegistryError>,
    /// The manifest's mark in the store, if there is one.
    pub(super) manifest_tag: Option<String>,
}

/// A manifest's mark and what was read.
pub(super) type Read = Option<(String, Result<Manifest, String>)>;

impl Entry {
    /// From what the store shows; what was learnt of the same weights before is kept.
    pub(super) fn new(
        name: AdapterName,
        weights: Seen,
        manifest: Read,
        preview: bool,
        before: Option<&Self>,
    ) -> Self {
        let before = before.filter(|before| before.weights.tag == weights.tag);
        let (manifest_tag, read) = manifest.unzip();
        let (mut manifest, fault) = match read.transpose() {
            Ok(manifest) => (manifest.unwrap_or_default(), None),
            Err(reason) => (Manifest::default(), Some(reason)),
        };
        // Another manifest may tell another base: then the same weights get another chance.
        let failure = before
            .filter(|before| before.manifest_tag == manifest_tag)
            .and_then(|before| before.failure.clone());
        let trusted = manifest.etag.as_deref() == Some(weights.tag.as_str());
        let written = manifest.sha256.filter(|_| trusted);
        let generation = before.and_then(|before| before.generation).or(written);
        manifest.name = name.to_string();
        manifest.sha256 = generation;
        manifest.bytes = weights.size;
        if manifest.created == 0 {
            manifest.created = weights.modified;
        }
        Self {
            name,
            manifest,
            weights,
            preview,
            generation,
            fault,
            failure,
            manifest_tag,
        }
    }

    /// Whether a listing shows what is known already.
    fn shown_by(&self, files: &Files) -> bool {
        self.weights.tag == files.weights.tag
            && self.manifest_tag.as_deref() == files.manifest.as_ref().map(|m| m.tag.as_str())
            && self.preview == files.preview
    }

    /// Whether every tenant may see it.
    pub fn public(&self) -> bool {
        self.manifest.owner.is_none() && self.fault.is_none()
    }

    /// Why it cannot be served, if that is known already.
    pub(super) fn refusal(&self) -> Result<(), RegistryError> {
        if let Some(reason) = &self.fault {
            return Err(RegistryError::Refused {
                name: self.name.clone(),
                reason: format!("its manifest {}.json cannot be read: {reason}", self.name),
            });
        }
        self.failure.clone().map_or(Ok(()), Err)
    }
}

/// The live map. Guards of the map never outlive a statement.
#[derive(Debug, Default)]
pub(super) struct Index {
    entries: DashMap<AdapterName, Arc<Entry>>,
    changes: Mutex<Changes>,
}

#[derive(Debug, Default)]
struct Changes {
    /// Changed here since the running rescan began: its listing may be older than they are.
    touched: HashSet<AdapterName>,
    skipped: Vec<(String, String)>,
    /// Why the store could not be listed the last time.
    outage: Option<String>,
}

/// What a rescan changed.
#[derive(Debug, Default)]
pub(super) struct Applied {
    pub changed: usize,
    /// Generations that a name no longer means.
    pub retired: Vec<(AdapterName, Generation)>,
    /// Weights that are not served, where these are others than before.
    pub skipped: Option<Vec<(String, String)>>,
}

impl Index {
    /// Nothing under the lock panics.
    fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, name: &AdapterName) -> Option<Arc<Entry>> {
        self.entries.get(name).map(|entry| entry.value().clone())
    }

    pub fn all(&self) -> Vec<Arc<Entry>> {
        self.entries
            .iter()
            .map(|entry| entry.value().clone())
            .collect()
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn names(&self) -> Vec<AdapterName> {
        self.entries
            .iter()
            .map(|entry| entry.key().clone())
            .collect()
    }

    /// Writes down what an operation has just done or seen; returns what was there.
    pub fn set(&self, name: &AdapterName, entry: Option<Arc<Entry>>) -> Option<Arc<Entry>> {
        let mut changes = self.changes();
        changes.touched.insert(name.clone());
        match entry {
            Some(entry) => self.entries.insert(name.clone(), entry),
            None => self.entries.remove(name).map(|(_, entry)| entry),
        }
    }

    /// Adds what was learnt of certain weights, if they are still the adapter's.
    pub fn learn(&self, name: &AdapterName, tag: &str, learn: impl FnOnce(&mut Entry)) {
        if let Some(mut entry) = self.entries.get_mut(name)
            && entry.weights.tag == tag
        {
            learn(Arc::make_mut(entry.value_mut()));
        }
    }

    /// A rescan begins: from here on, what is changed by others goes before what it finds.
    pub fn begin(&self) {
        self.changes().touched.clear();
    }

    /// Of a listing, what is not known yet.
    pub fn news(&self, listing: &Listing) -> Vec<(AdapterName, Files)> {
        let known = |name, files: &Files| self.get(name).is_some_and(|e| e.shown_by(files));
        let news = listing
            .adapters
            .iter()
            .filter(|(name, files)| !known(name, files));
        news.map(|(name, files)| (name.clone(), files.clone()))
            .collect()
    }

    /// A rescan ends.
    pub fn apply(&self, listing: &Listing, fresh: Vec<Entry>) -> Applied {
        let mut changes = self.changes();
        let mut applied = Applied::default();
        let mut put = |name: &AdapterName, entry: Option<Entry>| {
            applied.changed += 1;
            let now = entry.as_ref().and_then(|entry| entry.generation);
            let before = match entry {
                Some(entry) => self.entries.insert(name.clone(), Arc::new(entry)),
                None => self.entries.remove(name).map(|(_, entry)| entry),
            };
            let before = before.and_then(|entry| entry.generation);
            if let Some(generation) = before.filter(|_| before != now) {
                applied.retired.push((name.clone(), generation));
            }
        };
        for entry in fresh {
            if !changes.touched.contains(&entry.name) {
                put(&entry.name.clone(), Some(entry));
            }
        }
        for name in self.names() {
            if !listing.adapters.contains_key(&name) && !changes.touched.contains(&name) {
                put(&name, None);
            }
        }
        let skipped: Vec<_> = listing.skipped.clone().into_iter().collect();
        if skipped != changes.skipped {
            changes.skipped.clone_from(&skipped);
            applied.skipped = Some(skipped);
        }
        changes.outage = None;
        applied
    }

    pub fn skipped(&self) -> Vec<(String, String)> {
        self.changes().skipped.clone()
    }

    pub fn outage(&self) -> Option<String> {
        self.changes().outage.clone()
    }

    pub fn set_outage(&self, reason: String) {
        self.changes().outage = Some(reason);
    }
}
