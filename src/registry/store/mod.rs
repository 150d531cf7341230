//! Where the files lie: a folder, or an object store.
//!
//! Both promise the same: a file is seen whole or not at all, a write can be made to depend on what
//! is there (`Expect`), and an unreachable store is an error, never an empty one.

mod folder;
mod remote;
mod staging;

use std::{collections::BTreeMap, path::Path, sync::Arc};

use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::ObjectStore;

use super::AdapterName;
pub use crate::storage::StoreFault;
use crate::storage::blocking;
use folder::Folder;
use remote::Remote;
pub(super) use staging::{SpoolFault, spool};
pub use staging::{Staged, fresh_staging};

/// The files of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Weights,
    Manifest,
    Preview,
}

impl Part {
    const ALL: [Self; 3] = [Self::Weights, Self::Manifest, Self::Preview];

    fn ending(self) -> &'static str {
        match self {
            Self::Weights => ".safetensors",
            Self::Manifest => ".json",
            Self::Preview => ".png",
        }
    }
}

/// One file. It is made of a checked name only, so it lies in the store and nowhere else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    pub name: AdapterName,
    pub part: Part,
}

impl Key {
    pub fn new(name: &AdapterName, part: Part) -> Self {
        Self {
            name: name.clone(),
            part,
        }
    }

    pub fn file_name(&self) -> String {
        format!("{}{}", self.name, self.part.ending())
    }
}

/// What is known of a file without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub size: u64,
    /// Differs whenever the content may differ.
    pub tag: String,
    /// Seconds since 1970.
    pub modified: u64,
}

/// What must be there for a write to happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    Anything,
    Nothing,
    Tag(String),
}

impl Expect {
    /// That nothing changed since `seen`.
    pub fn still(seen: Option<&str>) -> Self {
        seen.map_or(Self::Nothing, |tag| Self::Tag(tag.to_owned()))
    }

    fn met_by(&self, found: Option<&Seen>) -> bool {
        match self {
            Self::Anything => true,
            Self::Nothing => found.is_none(),
            Self::Tag(tag) => found.is_some_and(|seen| seen.tag == *tag),
        }
    }
}

/// The files of one adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    pub weights: Seen,
    pub manifest: Option<Seen>,
    pub preview: bool,
}

/// Everything in the store, without a byte of content read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    pub adapters: BTreeMap<AdapterName, Files>,
    /// Weights that are not served, by file name, and why.
    pub skipped: BTreeMap<String, String>,
}

impl Listing {
    fn of(files: Vec<(String, Result<Seen, String>)>) -> Self {
        let mut listing = Self::default();
        let mut beside = Vec::new();
        for (file, seen) in files {
            let Some((stem, part)) = split(&file) else {
                continue;
            };
            let name = AdapterName::new(stem);
            match (part, name, seen) {
                (Part::Weights, Ok(name), Ok(weights)) => {
                    let files = Files {
                        weights,
                        manifest: None,
                        preview: false,
                    };
                    listing.adapters.insert(name, files);
                }
                (Part::Weights, Err(error), _) => {
                    listing.skipped.insert(file, error.to_string());
                }
                (Part::Weights, _, Err(reason)) => {
                    listing.skipped.insert(file, reason);
                }
                (part, Ok(name), Ok(seen)) => beside.push((name, part, seen)),
                _ => {}
            }
        }
        for (name, part, seen) in beside {
            if let Some(files) = listing.adapters.get_mut(&name) {
                match part {
                    Part::Preview => files.preview = true,
                    _ => files.manifest = Some(seen),
                }
            }
        }
        listing
    }
}

/// The name and the part that a file's name stands for.
fn split(file: &str) -> Option<(&str, Part)> {
    Part::ALL
        .into_iter()
        .find_map(|part| Some((file.strip_suffix(part.ending())?, part)))
}

/// Pieces of a file on their way out.
pub type Pieces = BoxStream<'static, Result<Bytes, StoreFault>>;

/// A folder or an object store.
#[derive(Debug, Clone)]
pub struct Store(Place);

#[derive(Debug, Clone)]
enum Place {
    Folder(Arc<Folder>),
    Remote(Arc<Remote>),
}

impl Store {
    /// A folder, made if it is not there. Uploads are gathered in its `.staging`.
    pub fn folder(path: impl AsRef<Path>) -> Result<Self, StoreFault> {
        Ok(Self(Place::Folder(Arc::new(Folder::open(path.as_ref())?))))
    }

    /// `s3://BUCKET/PREFIX`, with the usual `AWS_*` variables for everything else (adapters/README.md
    /// lists them). Uploads are gathered in `staging`, a folder on this machine.
    pub fn s3(url: &str, staging: impl AsRef<Path>) -> Result<Self, StoreFault> {
        let variables = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        });
        Self::s3_with(url, variables, staging)
    }

    /// S3 with these variables in place of the environment's.
    pub(super) fn s3_with(
        url: &str,
        variables: impl IntoIterator<Item = (String, String)>,
        staging: impl AsRef<Path>,
    ) -> Result<Self, StoreFault> {
        let remote = Remote::s3(url, variables, staging.as_ref())?;
        Ok(Self(Place::Remote(Arc::new(remote))))
    }

    /// Any object store.
    pub fn objects(
        objects: impl ObjectStore,
        staging: impl AsRef<Path>,
    ) -> Result<Self, StoreFault> {
        let remote = Remote::new(Arc::new(objects), staging.as_ref())?;
        Ok(Self(Place::Remote(Arc::new(remote))))
    }

    /// The folder whose changes can be watched.
    pub fn watchable(&self) -> Option<&Path> {
        match &self.0 {
            Place::Folder(folder) => Some(folder.root()),
            Place::Remote(_) => None,
        }
    }

    pub(super) fn staging(&self) -> &Path {
        match &self.0 {
            Place::Folder(folder) => folder.staging(),
            Place::Remote(remote) => remote.staging(),
        }
    }

    pub async fn list(&self) -> Result<Listing, StoreFault> {
        match &self.0 {
            Place::Folder(folder) => {
                let folder = folder.clone();
                blocking(move || folder.list()).await
            }
            Place::Remote(remote) => remote.list().await,
        }
    }

    pub async fn head(&self, key: &Key) -> Result<Option<Seen>, StoreFault> {
        match &self.0 {
            Place::Folder(folder) => {
                let (folder, file) = (folder.clone(), key.file_name());
                blocking(move || folder.head(&file)).await
            }
            Place::Remote(remote) => remote.head(&key.file_name()).await,
        }
    }

    /// The whole file, if it has no more than `limit` bytes.
    pub async fn read(&self, key: &Key, limit: u64) -> Result<Option<(Seen, Bytes)>, StoreFault> {
        match &self.0 {
            Place::Folder(folder) => {
                let (folder, file) = (folder.clone(), key.file_name());
                blocking(move || folder.read(&file, limit)).await
            }
            Place::Remote(remote) => remote.read(&key.file_name(), limit).await,
        }
    }

    /// The file piece by piece, all of one version.
    pub async fn stream(&self, key: &Key) -> Result<Option<(Seen, Pieces)>, StoreFault> {
        match &self.0 {
            Place::Folder(folder) => {
                let (folder, file) = (folder.clone(), key.file_name());
                let opened = blocking(move || folder.open_file(&file)).await?;
                Ok(opened.map(|(file, seen)| (seen, folder::pieces(file))))
            }
            Place::Remote(remote) => remote.stream(&key.file_name()).await,
        }
    }

    /// Makes a staged file visible under its name, at once or not at all.
    pub async fn publish(
        &self,
        key: &Key,
        staged: Staged,
        expect: Expect,
    ) -> Result<Seen, StoreFault> {
        match &self.0 {
            Place::Folder(folder) => {
                let (folder, file) = (folder.clone(), key.file_name());
                blocking(move || folder.publish(&file, staged, &expect)).await
            }
            Place::Remote(remote) => {
                let bytes = staged.map()?;
                remote.write(&key.file_name(), bytes, &expect).await
            }
        }
    }

    /// Writes a small file, at once or not at all.
    pub async fn write(
        &self,
        key: &Key,
        bytes: Vec<u8>,
        expect: Expect,
    ) -> Result<Seen, StoreFault> {
        match &self.0 {
            Place::Folder(folder) => {
                let (folder, file) = (folder.clone(), key.file_name());
                blocking(move || folder.write(&file, &bytes, &expect)).await
            }
            Place::Remote(remote) => remote.write(&key.file_name(), bytes.into(), &expect).await,
        }
    }

    /// Removes a file; says whether it was there.
    pub async fn delete(&self, key: &Key, expect: Expect) -> Result<bool, StoreFault> {
        match &self.0 {
            Place::Folder(folder) => {
                let (folder, file) = (folder.clone(), key.file_name());
                blocking(move || folder.delete(&file, &expect)).await
            }
            Place::Remote(remote) => remote.delete(&key.file_name(), &expect).await,
        }
    }
}
