//! The promises of this room: on a folder, on an object store in memory, and, where
//! `LORIKEET_TEST_S3` names a bucket, on that. `.ci/with-s3` starts a server that has one.

mod folder;
mod loading;
mod s3;
mod together;
mod writing;

use std::{
    convert::Infallible,
    sync::{
        Arc, Barrier,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, TryStreamExt as _, stream};
use object_store::memory::InMemory;
use tempfile::TempDir;

use super::*;

/// Contents with a meaning to [`Fake`]; anything else is a good adapter.
const BROKEN: &str = "broken";
const PANICS: &str = "panics";
const SDXL: &str = "sdxl";

/// A loader whose adapters are their files' texts, one byte of memory a letter.
#[derive(Clone, Default)]
struct Fake {
    loads: Arc<AtomicUsize>,
    /// Where loads wait for each other, or for the test.
    gate: Option<Arc<Barrier>>,
}

impl Fake {
    fn loads(&self) -> usize {
        self.loads.load(Ordering::SeqCst)
    }

    /// A loader of which `n` (loads, or the test itself) must be at the gate at once.
    fn gated(n: usize) -> Self {
        let gate = Some(Arc::new(Barrier::new(n)));
        Self {
            gate,
            ..Self::default()
        }
    }
}

impl Loader for Fake {
    type Loaded = String;

    fn load(&self, bytes: Bytes, _: &Manifest) -> Result<(String, u64), LoadFault> {
        self.loads.fetch_add(1, Ordering::SeqCst);
        if let Some(gate) = &self.gate {
            gate.wait();
        }
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        match text.as_str() {
            BROKEN => Err(LoadFault::Invalid("tensor `a` is truncated".into())),
            PANICS => panic!("a bug in the parser"),
            SDXL => Err(LoadFault::WrongBase {
                made_for: "SDXL".into(),
                served: "SD 1.x".into(),
            }),
            _ => Ok((text, bytes.len() as u64)),
        }
    }
}

/// A store, and what it stands on.
struct Ground {
    folder: TempDir,
    store: Store,
}

/// One of each kind.
fn grounds() -> Vec<Ground> {
    let mut grounds = vec![on_folder(), on_objects()];
    grounds.extend(s3::bucket().map(|bucket| s3::on(&bucket)));
    grounds
}

fn on_folder() -> Ground {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::folder(folder.path().join("adapters")).unwrap();
    Ground { folder, store }
}

fn on_objects() -> Ground {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::objects(InMemory::new(), folder.path().join("staging")).unwrap();
    Ground { folder, store }
}

impl Ground {
    async fn open(&self) -> Registry<Fake> {
        self.open_with(Fake::default(), Settings::default()).await
    }

    async fn open_with(&self, loader: Fake, settings: Settings) -> Registry<Fake> {
        Registry::open(self.store.clone(), loader, settings)
            .await
            .unwrap()
    }

    /// Uploads that nobody finished or cleared away.
    fn staged(&self) -> usize {
        let files = std::fs::read_dir(self.store.staging()).unwrap();
        files
            .filter(|f| {
                f.as_ref()
                    .unwrap()
                    .path()
                    .extension()
                    .is_some_and(|e| e == "tmp")
            })
            .count()
    }
}

fn name(of: &str) -> AdapterName {
    AdapterName::new(of).unwrap()
}

fn body(text: &str) -> impl Stream<Item = Result<Bytes, Infallible>> + use<> {
    let pieces: Vec<_> = text
        .as_bytes()
        .chunks(3)
        .map(|p| Ok(Bytes::copy_from_slice(p)))
        .collect();
    stream::iter(pieces)
}

fn sha(text: &str) -> Generation {
    Generation::of(text.as_bytes())
}

type Put = Result<Arc<Entry>, RegistryError>;

/// An upload that is checked and found good.
async fn put(registry: &Registry<Fake>, of: &str, policy: PutPolicy, text: &str) -> Put {
    let patch = ManifestPatch::default();
    let of = name(of);
    let put = registry.put(&of, policy, patch, body(text), |_, _| Ok(()));
    put.await.map(|published| published.entry)
}

async fn create(registry: &Registry<Fake>, of: &str, text: &str) -> Arc<Entry> {
    put(registry, of, PutPolicy::Create, text).await.unwrap()
}

async fn content(registry: &Registry<Fake>, of: &str) -> Result<String, RegistryError> {
    let download = registry.download(&name(of)).await?;
    let pieces: Vec<Bytes> = download.pieces.try_collect().await.unwrap();
    Ok(String::from_utf8(pieces.concat()).unwrap())
}

fn listed(registry: &Registry<Fake>) -> Vec<String> {
    let page = registry.list(&Query {
        limit: LARGEST_PAGE,
        ..Query::default()
    });
    page.adapters
        .iter()
        .map(|entry| entry.name.to_string())
        .collect()
}

/// Waits for something that must come about.
async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..500 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("not within 10 s: {what}");
}
