//! Changing: uploads, manifests, previews, removal.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use futures::Stream;

use super::{
    AdapterName, Entry, Generation, LoadFault, Loader, Manifest, ManifestPatch, Registry,
    RegistryError, StoreFault, now,
    registry::unavailable,
    store::{Expect, Key, Part, Seen, SpoolFault, Staged, spool},
};

/// What an upload may meet under its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutPolicy {
    /// Nothing.
    Create,
    /// Whatever is there, or nothing.
    Upsert,
    /// An adapter; with a hash, that very one (`If-Match`).
    Replace(Option<Generation>),
}

/// What a client is told of a file that made the parser panic.
pub(super) const BAFFLING: &str = "it cannot be read; the cause is in the server's log";
/// Seconds after which a creator is dead that has written its manifest and not its weights: more
/// than a request to the store may take.
const CREATING: u64 = 900;
/// How every PNG begins.
const PNG: &[u8] = b"\x89PNG\r\n\x1a\n";

/// The part of an entry that a write must still find.
fn marks(entry: Option<&Arc<Entry>>) -> Option<(&str, Option<&str>)> {
    entry.map(|e| (e.weights.tag.as_str(), e.manifest_tag.as_deref()))
}

/// What an upload may count on: what was under its name when it was admitted.
#[derive(Debug)]
pub struct Admission {
    name: AdapterName,
    policy: PutPolicy,
    before: Option<Arc<Entry>>,
}

/// An upload that is there now.
#[derive(Debug, Clone)]
pub struct Published<T> {
    pub entry: Arc<Entry>,
    /// Whether there was an adapter of the name before.
    pub replaced: bool,
    /// What the check found.
    pub found: T,
}

impl<L: Loader> Registry<L> {
    /// Takes an upload in: [`admit`](Self::admit), [`receive`](Self::receive) and
    /// [`publish`](Self::publish) in one.
    pub async fn put<E: fmt::Display, T: Send + 'static>(
        &self,
        name: &AdapterName,
        policy: PutPolicy,
        patch: ManifestPatch,
        body: impl Stream<Item = Result<Bytes, E>>,
        check: impl FnOnce(Bytes, &mut Manifest) -> Result<T, LoadFault> + Send + 'static,
    ) -> Result<Published<T>, RegistryError> {
        // What can be refused is refused before the body is read.
        let admission = self.admit(name, policy).await?;
        let staged = self.receive(body).await?;
        self.publish(admission, patch, staged, check).await
    }

    /// Writes the bytes of an upload aside, where nobody sees them.
    pub async fn receive<E: fmt::Display>(
        &self,
        body: impl Stream<Item = Result<Bytes, E>>,
    ) -> Result<Staged, RegistryError> {
        let limit = self.0.settings.largest_weights;
        let staged = spool(self.0.store.staging(), body, limit).await;
        staged.map_err(|fault| match fault {
            SpoolFault::Body(reason) => RegistryError::BrokenBody { reason },
            SpoolFault::TooLarge => RegistryError::TooLarge {
                what: "the weights".into(),
                limit,
            },
            SpoolFault::Store(StoreFault::Full(reason)) => RegistryError::StoreFull { reason },
            SpoolFault::Store(fault) => unavailable(fault),
        })
    }

    /// Makes what was received an adapter. `check` looks at the whole file on a blocking thread
    /// before anyone can see it, and writes what it learns of it into the manifest; `patch` has the
    /// first word there and the last. A replaced adapter keeps the rest of its manifest, and its
    /// preview.
    pub async fn publish<T: Send + 'static>(
        &self,
        admission: Admission,
        patch: ManifestPatch,
        staged: Staged,
        check: impl FnOnce(Bytes, &mut Manifest) -> Result<T, LoadFault> + Send + 'static,
    ) -> Result<Published<T>, RegistryError> {
        let Admission {
            name,
            policy,
            before,
        } = admission;
        let mut manifest = match &before {
            Some(entry) => entry.manifest.clone(),
            None => Manifest {
                name: name.to_string(),
                created: now(),
                ..Manifest::default()
            },
        };
        manifest.apply(patch.clone());
        // Files in memory are bounded in number, whoever brings them there.
        let turn = self.0.loads.acquire().await.map_err(unavailable)?;
        let checked = tokio::task::spawn_blocking(move || {
            let bytes = staged.map().map_err(unavailable)?;
            Ok((check(bytes, &mut manifest), staged, manifest))
        });
        let checked = checked.await;
        drop(turn);
        let (verdict, staged, mut manifest) = match checked {
            Ok(checked) => checked?,
            Err(error) => {
                tracing::error!(%name, %error, "checking an upload panicked");
                return Err(RegistryError::Refused {
                    name: name.clone(),
                    reason: BAFFLING.into(),
                });
            }
        };
        let found = verdict.map_err(|fault| fault.of(&name))?;
        manifest.apply(patch);
        manifest.name = name.to_string();
        manifest.bytes = staged.size;
        manifest.sha256 = Some(staged.generation);
        manifest.etag = None;

        // In a task of its own: a client that leaves now leaves no half-done change.
        let registry = self.clone();
        let replaced = before.is_some();
        let done = tokio::spawn(async move {
            let _alone = registry.lock(&name).await;
            let found = registry.refresh(&name).await?;
            if marks(found.as_ref()) != marks(before.as_ref()) {
                return Err(lost(&name, policy));
            }
            let replaced = found.as_deref();
            registry
                .swap(&name, policy, replaced, staged, manifest)
                .await
        });
        Ok(Published {
            entry: done.await.map_err(unavailable)??,
            replaced,
            found,
        })
    }

    /// Looks at what is under a name, and whether the policy allows an upload there.
    pub async fn admit(
        &self,
        name: &AdapterName,
        policy: PutPolicy,
    ) -> Result<Admission, RegistryError> {
        let before = {
            let _alone = self.lock(name).await;
            self.refresh(name).await?
        };
        match (policy, &before) {
            (PutPolicy::Create, Some(_)) => return Err(RegistryError::Exists(name.clone())),
            (PutPolicy::Replace(_), None) => return Err(self.missing(name)),
            (PutPolicy::Replace(expected), Some(entry)) => self.matches(entry, expected).await?,
            _ => {}
        }
        // Its owner and what else it holds would be lost.
        if let Some(entry) = before.as_ref().filter(|entry| entry.fault.is_some()) {
            entry.refusal()?;
        }
        Ok(Admission {
            name: name.clone(),
            policy,
            before,
        })
    }

    /// Compare, before swapping.
    async fn matches(
        &self,
        entry: &Entry,
        expected: Option<Generation>,
    ) -> Result<(), RegistryError> {
        let Some(expected) = expected else {
            return Ok(());
        };
        let found = self.generation_of(entry).await?;
        match found == expected {
            true => Ok(()),
            false => Err(RegistryError::Changed {
                name: entry.name.clone(),
                expected,
                found,
            }),
        }
    }

    /// The manifest goes first: an adapter must not be seen without its owner, and of two writers
    /// at once, on whatever replicas, the one whose manifest is there goes on. Without weights
    /// beside it a manifest means nothing, and beside other weights its hash is not believed.
    async fn swap(
        &self,
        name: &AdapterName,
        policy: PutPolicy,
        replaced: Option<&Entry>,
        staged: Staged,
        mut manifest: Manifest,
    ) -> Result<Arc<Entry>, RegistryError> {
        let store = &self.0.store;
        let explain = |fault| match fault {
            StoreFault::Unmet => lost(name, policy),
            fault => self.explain(name, fault),
        };
        let [weights, beside, preview] =
            [Part::Weights, Part::Manifest, Part::Preview].map(|part| Key::new(name, part));
        let tag = match replaced {
            Some(entry) => entry.manifest_tag.clone(),
            None => self.orphan(&beside).await?,
        };
        let (text, expect) = (manifest.encode(name)?, Expect::still(tag.as_deref()));
        let first = store.write(&beside, text, expect).await.map_err(explain)?;
        if replaced.is_none()
            && let Err(fault) = store.delete(&preview, Expect::Anything).await
        {
            self.take_back(&beside, replaced, first.tag).await;
            return Err(explain(fault));
        }
        let generation = staged.generation;
        let expect = Expect::still(replaced.map(|entry| entry.weights.tag.as_str()));
        let seen = match store.publish(&weights, staged, expect).await {
            Ok(seen) => seen,
            Err(fault) => {
                self.take_back(&beside, replaced, first.tag).await;
                return Err(explain(fault));
            }
        };
        manifest.etag = Some(seen.tag.clone());
        let expect = Expect::Tag(first.tag.clone());
        let tag = match store.write(&beside, manifest.encode(name)?, expect).await {
            Ok(second) => second.tag,
            // All that is missing is the mark: the hash is computed again where it is not known.
            Err(error) => {
                tracing::warn!(%name, %error, "the manifest was not marked");
                first.tag
            }
        };
        let preview = replaced.is_some_and(|entry| entry.preview);
        Ok(self.made(name, seen, (tag, manifest), preview, generation))
    }

    /// The mark of a manifest without weights, which may be written over: unless a creator on
    /// another replica has just put it there and is about to put its weights beside it.
    async fn orphan(&self, beside: &Key) -> Result<Option<String>, RegistryError> {
        let name = &beside.name;
        let explain = |fault| self.explain(name, fault);
        let read = self.read_manifest(name).await.map_err(explain)?;
        // After the reading: were it before, a manifest written between the two would have no age.
        let seen = self.0.store.head(beside).await.map_err(explain)?;
        // Last, since a creator's weights come after its manifest: what was read may be the
        // manifest of an adapter that has come since we looked.
        let weights = self.0.store.head(&Key::new(name, Part::Weights)).await;
        let there = weights
            .map_err(|fault| self.explain(name, fault))?
            .is_some();
        let Some((tag, manifest)) = read else {
            // Then the first to write one goes on.
            return Ok(None);
        };
        let unmarked = manifest.is_ok_and(|m| m.sha256.is_some() && m.etag.is_none());
        let young = seen.is_some_and(|seen| now().saturating_sub(seen.modified) < CREATING);
        match there || (unmarked && young) {
            true => Err(RegistryError::Conflict(name.clone())),
            false => Ok(Some(tag)),
        }
    }

    /// The manifest as it was before, unless somebody else's is there by now.
    async fn take_back(&self, beside: &Key, replaced: Option<&Entry>, tag: String) {
        let (store, expect) = (&self.0.store, Expect::Tag(tag));
        let before = replaced.filter(|entry| entry.manifest_tag.is_some());
        let result = match before.map(|entry| entry.manifest.encode(&beside.name)) {
            Some(Ok(text)) => store.write(beside, text, expect).await.map(drop),
            _ => store.delete(beside, expect).await.map(drop),
        };
        match result {
            Ok(()) | Err(StoreFault::Unmet) => {}
            Err(error) => {
                tracing::error!(name = %beside.name, %error, "a manifest was not taken back");
            }
        }
    }

    /// Writes down what was just written.
    fn made(
        &self,
        name: &AdapterName,
        weights: Seen,
        (tag, manifest): (String, Manifest),
        preview: bool,
        generation: Generation,
    ) -> Arc<Entry> {
        let read = Some((tag, Ok(manifest)));
        let mut entry = Entry::new(name.clone(), weights, read, preview, None);
        entry.generation = Some(generation);
        entry.manifest.sha256 = Some(generation);
        let entry = Arc::new(entry);
        self.remember(name, Some(entry.clone()));
        entry
    }

    /// Sets fields of the manifest; with a hash, only while the adapter is that very one.
    pub async fn patch(
        &self,
        name: &AdapterName,
        expected: Option<Generation>,
        patch: ManifestPatch,
    ) -> Result<Arc<Entry>, RegistryError> {
        let _alone = self.lock(name).await;
        let found = self.found(name).await?;
        self.matches(&found, expected).await?;
        if found.fault.is_some() {
            found.refusal()?;
        }
        // The hash may have become known just now.
        let found = self.0.index.get(name).unwrap_or(found);
        let mut manifest = found.manifest.clone();
        manifest.apply(patch);
        manifest.etag = manifest.sha256.map(|_| found.weights.tag.clone());
        let expect = Expect::still(found.manifest_tag.as_deref());
        let key = Key::new(name, Part::Manifest);
        let written = self
            .0
            .store
            .write(&key, manifest.encode(name)?, expect)
            .await;
        let beside = written.map_err(|fault| self.explain(name, fault))?;
        let (weights, preview) = (found.weights.clone(), found.preview);
        let read = Some((beside.tag, Ok(manifest)));
        let before = Some(found.as_ref());
        let entry = Arc::new(Entry::new(name.clone(), weights, read, preview, before));
        self.remember(name, Some(entry.clone()));
        Ok(entry)
    }

    /// Loads an adapter and keeps it in memory, or lets it go like any other again.
    pub async fn pin(&self, name: &AdapterName, pinned: bool) -> Result<Arc<Entry>, RegistryError> {
        // What cannot be loaded is not pinned; the lease holds it until it is.
        let _lease = match pinned {
            true => Some(self.lease(name).await?),
            false => None,
        };
        let patch = ManifestPatch {
            pinned: Some(pinned),
            ..ManifestPatch::default()
        };
        self.patch(name, None, patch).await
    }

    /// Removes an adapter; with a hash, only that very one. Leases of it live on.
    pub async fn delete(
        &self,
        name: &AdapterName,
        expected: Option<Generation>,
    ) -> Result<(), RegistryError> {
        let _alone = self.lock(name).await;
        let found = self.found(name).await?;
        self.matches(&found, expected).await?;
        let store = &self.0.store;
        // With the weights the adapter is gone.
        let expect = Expect::Tag(found.weights.tag.clone());
        let deleted = store.delete(&Key::new(name, Part::Weights), expect).await;
        deleted.map_err(|fault| self.explain(name, fault))?;
        self.remember(name, None);
        // Another replica may have made a new one meanwhile: then the manifest is not ours.
        let beside = found.manifest_tag.clone().map(Expect::Tag);
        let left = [
            beside.map(|expect| (Part::Manifest, expect)),
            Some((Part::Preview, Expect::Anything)),
        ];
        for (part, expect) in left.into_iter().flatten() {
            match store.delete(&Key::new(name, part), expect).await {
                Ok(_) | Err(StoreFault::Unmet) => {}
                Err(error) => {
                    tracing::warn!(%name, ?part, %error, "a file of a deleted adapter was left");
                }
            }
        }
        Ok(())
    }

    /// Puts a preview beside an adapter, or another in its place.
    pub async fn put_preview(&self, name: &AdapterName, png: Vec<u8>) -> Result<(), RegistryError> {
        let limit = self.0.settings.largest_preview;
        if png.len() as u64 > limit {
            let what = "a preview".into();
            return Err(RegistryError::TooLarge { what, limit });
        }
        if !png.starts_with(PNG) {
            return Err(RegistryError::Refused {
                name: name.clone(),
                reason: "its preview is not a PNG; send it as one".into(),
            });
        }
        let _alone = self.lock(name).await;
        let found = self.found(name).await?;
        let key = Key::new(name, Part::Preview);
        let written = self.0.store.write(&key, png, Expect::Anything).await;
        written.map_err(|fault| self.explain(name, fault))?;
        let entry = Entry {
            preview: true,
            ..Entry::clone(&found)
        };
        self.remember(name, Some(Arc::new(entry)));
        Ok(())
    }

    /// What the store has now. The name's lock is held.
    async fn found(&self, name: &AdapterName) -> Result<Arc<Entry>, RegistryError> {
        self.refresh(name).await?.ok_or_else(|| self.missing(name))
    }
}

/// Somebody else came first.
fn lost(name: &AdapterName, policy: PutPolicy) -> RegistryError {
    match policy {
        PutPolicy::Create => RegistryError::Exists(name.clone()),
        _ => RegistryError::Conflict(name.clone()),
    }
}
