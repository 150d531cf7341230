//! Keeping the index true while others change the store.

use std::{collections::HashSet, path::Path, sync::Arc, time::Duration};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::{sync::Notify, task::JoinHandle, time};

use super::{Loader, Registry, Status};

/// Changes come in bursts (a copied file, a whole set of them): one rescan for all.
const QUIET: Duration = Duration::from_millis(200);

/// The task that rescans; dropping this ends it.
#[derive(Debug)]
pub struct Keeper(JoinHandle<()>);

impl Drop for Keeper {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<L: Loader> Registry<L> {
    /// Watches and rescans the store, and loads what is pinned, until the [`Keeper`] is dropped.
    pub fn keep(&self) -> Keeper {
        Keeper(tokio::spawn(self.clone().keeping()))
    }

    async fn keeping(self) {
        let changed = Arc::new(Notify::new());
        let mut watch = self
            .0
            .store
            .watchable()
            .map(|folder| Watch::new(folder, &changed));
        let (mut up, mut tried) = (true, HashSet::new());
        loop {
            // Before looking, so that no change falls between the two; every time, since the folder
            // may have been removed and made again.
            if let Some(watch) = &mut watch {
                watch.renew();
            }
            match self.rescan().await {
                Ok(changed) => {
                    if !up || changed > 0 {
                        tracing::info!(changed, "adapters rescanned");
                    }
                    up = true;
                }
                Err(error) => {
                    if up {
                        tracing::error!(%error, "serving the adapters in memory only");
                    }
                    up = false;
                }
            }
            self.load_pinned(&mut tried);
            tokio::select! {
                () = time::sleep(self.0.settings.rescan) => {}
                () = changed.notified() => time::sleep(QUIET).await,
            }
        }
    }

    /// Begins to load what is pinned and not here, each version once: what did not fit is not read
    /// again at every turn.
    fn load_pinned(&self, tried: &mut HashSet<(String, String)>) {
        let pinned = self.0.index.all().into_iter().filter(|e| e.manifest.pinned);
        for entry in pinned.filter(|entry| self.status(entry) == Status::Stored) {
            if tried.insert((entry.name.to_string(), entry.weights.tag.clone())) {
                // The load goes on by itself, and logs what goes wrong.
                drop(self.flight(&entry));
            }
        }
    }
}

/// The system's notices of changes in a folder.
struct Watch<'a> {
    folder: &'a Path,
    watcher: Option<RecommendedWatcher>,
    warned: bool,
}

impl<'a> Watch<'a> {
    fn new(folder: &'a Path, changed: &Arc<Notify>) -> Self {
        let changed = changed.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| !reading(event.kind)) {
                changed.notify_one();
            }
        });
        let mut watch = Self {
            folder,
            watcher: None,
            warned: false,
        };
        match watcher {
            Ok(watcher) => watch.watcher = Some(watcher),
            Err(error) => watch.warn(&error),
        }
        watch
    }

    /// Watches the folder that is there now; the same one twice is once.
    fn renew(&mut self) {
        let Some(watcher) = &mut self.watcher else {
            return;
        };
        // Kept under its path, the watch of a folder that is gone would be taken for this one's.
        let _ = watcher.unwatch(self.folder);
        match watcher.watch(self.folder, RecursiveMode::NonRecursive) {
            Ok(()) => self.warned = false,
            Err(error) => self.warn(&error),
        }
    }

    /// The rescans go on without it.
    fn warn(&mut self, error: &notify::Error) {
        if !self.warned {
            tracing::warn!(%error, "the adapter folder is not watched, only rescanned");
        }
        self.warned = true;
    }
}

/// Our own looking at the folder must not make us look again.
fn reading(kind: EventKind) -> bool {
    let written = EventKind::Access(AccessKind::Close(AccessMode::Write));
    matches!(kind, EventKind::Access(_)) && kind != written
}
