//! The files of jobs, where every replica can get at them: the pictures a job begins with, checkpoints,
//! samples.
//!
//! A file is seen whole or not at all, and what [`JobFiles::put`] answered survives a crash. It is
//! replaced by putting another under its name. Nothing but checked names becomes part of a path.

mod folder;
mod name;
mod objects;

use std::{path::Path, sync::Arc};

use bytes::Bytes;
use object_store::ObjectStore;

use super::{JobError, JobId};
use crate::storage::{StoreFault, blocking};
use folder::Folder;
pub use name::{FileName, InvalidFileName};
use objects::Objects;

/// A folder or an object store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct JobFiles(Place);

#[derive(Debug, Clone)]
enum Place {
    Folder(Arc<Folder>),
    Objects(Arc<Objects>),
}

/// What is known of a file without reading it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct StoredFile {
    pub name: FileName,
    pub size: u64,
}

impl From<StoreFault> for JobError {
    fn from(fault: StoreFault) -> Self {
        let reason = fault.to_string();
        match fault {
            StoreFault::Full(_) => Self::Full { reason },
            StoreFault::Unavailable(_) => Self::Unavailable { reason },
            StoreFault::Unmet | StoreFault::TooLarge { .. } => Self::Broken { reason },
        }
    }
}

impl JobFiles {
    /// `file:///DIR` or a path, whose folder is made; or `s3://BUCKET/PREFIX`, with the usual `AWS_*`
    /// variables (adapters/README.md lists them).
    pub fn open(address: &str) -> Result<Self, JobError> {
        let place = match address.split_once("://") {
            Some(("s3", _)) => Place::Objects(Arc::new(Objects::s3(address)?)),
            Some(("file", path)) if path.starts_with('/') => folder_at(path)?,
            None if !address.is_empty() => folder_at(address)?,
            _ => {
                return Err(JobError::Address {
                    url: address.to_owned(),
                    reason: "expected a folder, file:///DIR or s3://BUCKET/PREFIX".to_owned(),
                });
            }
        };
        Ok(Self(place))
    }

    /// Any object store.
    pub fn objects(objects: impl ObjectStore) -> Self {
        Self(Place::Objects(Arc::new(Objects::new(Arc::new(objects)))))
    }

    /// Puts a file under this name, in place of what was there.
    pub async fn put(&self, job: JobId, name: &FileName, bytes: Bytes) -> Result<(), JobError> {
        match &self.0 {
            Place::Folder(folder) => {
                let (folder, name) = (folder.clone(), name.clone());
                blocking(move || folder.put(job, &name, &bytes)).await?;
            }
            Place::Objects(objects) => objects.put(job, name, bytes).await?,
        }
        Ok(())
    }

    /// The file, if there is one of this name.
    pub async fn get(&self, job: JobId, name: &FileName) -> Result<Option<Bytes>, JobError> {
        Ok(match &self.0 {
            Place::Folder(folder) => {
                let (folder, name) = (folder.clone(), name.clone());
                let found = blocking(move || folder.get(job, &name)).await?;
                found.map(Bytes::from)
            }
            Place::Objects(objects) => objects.get(job, name).await?,
        })
    }

    /// The job's files, by name.
    pub async fn list(&self, job: JobId) -> Result<Vec<StoredFile>, JobError> {
        let mut found = match &self.0 {
            Place::Folder(folder) => {
                let folder = folder.clone();
                blocking(move || folder.list(job)).await?
            }
            Place::Objects(objects) => objects.list(job).await?,
        };
        found.sort();
        Ok(found)
    }

    /// The jobs that have files, in the order of their ids.
    pub async fn jobs(&self) -> Result<Vec<JobId>, JobError> {
        let mut found = match &self.0 {
            Place::Folder(folder) => {
                let folder = folder.clone();
                blocking(move || folder.jobs()).await?
            }
            Place::Objects(objects) => objects.jobs().await?,
        };
        found.sort();
        Ok(found)
    }

    /// Removes a file; says whether it was there.
    pub async fn delete(&self, job: JobId, name: &FileName) -> Result<bool, JobError> {
        Ok(match &self.0 {
            Place::Folder(folder) => {
                let (folder, name) = (folder.clone(), name.clone());
                blocking(move || folder.delete(job, &name)).await?
            }
            Place::Objects(objects) => objects.delete(job, name).await?,
        })
    }

    /// Removes everything a job has.
    pub async fn delete_all(&self, job: JobId) -> Result<(), JobError> {
        match &self.0 {
            Place::Folder(folder) => {
                let folder = folder.clone();
                blocking(move || folder.delete_all(job)).await?;
            }
            Place::Objects(objects) => objects.delete_all(job).await?,
        }
        Ok(())
    }
}

fn folder_at(path: &str) -> Result<Place, JobError> {
    Ok(Place::Folder(Arc::new(Folder::open(Path::new(path))?)))
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;
    use tempfile::TempDir;

    use super::*;

    fn name(of: &str) -> FileName {
        FileName::new(of).unwrap()
    }

    fn on_folder() -> (TempDir, JobFiles) {
        let folder = tempfile::tempdir().unwrap();
        let files = JobFiles::open(folder.path().to_str().unwrap()).unwrap();
        (folder, files)
    }

    /// One of each kind; S3 where `.ci/with-s3` has one.
    fn grounds() -> Vec<(Option<TempDir>, JobFiles)> {
        let (folder, files) = on_folder();
        let mut grounds = vec![
            (Some(folder), files),
            (None, JobFiles::objects(InMemory::new())),
        ];
        if let Ok(bucket) = std::env::var("LORIKEET_TEST_S3") {
            let files = JobFiles::open(&format!("{bucket}/jobs/{}", JobId::fresh())).unwrap();
            grounds.push((None, files));
        }
        grounds
    }

    #[tokio::test]
    async fn what_is_put_is_there_until_it_is_replaced_or_deleted() {
        for (_folder, files) in grounds() {
            let (job, other) = (JobId::fresh(), JobId::fresh());
            let (weights, picture) = (name("checkpoint.bin"), name("inputs/0001.png"));
            assert_eq!(files.get(job, &weights).await.unwrap(), None);
            assert_eq!(files.list(job).await.unwrap(), []);
            for (job, name, text) in [
                (job, &weights, "one"),
                (job, &weights, "another"),
                (job, &picture, ""),
                (other, &picture, "other"),
            ] {
                files
                    .put(job, name, Bytes::from_static(text.as_bytes()))
                    .await
                    .unwrap();
            }
            assert_eq!(files.get(job, &weights).await.unwrap().unwrap(), "another");
            assert_eq!(files.jobs().await.unwrap(), [job, other]);
            let listed = files.list(job).await.unwrap();
            let listed: Vec<_> = listed.iter().map(|f| (f.name.as_str(), f.size)).collect();
            assert_eq!(listed, [("checkpoint.bin", 7), ("inputs/0001.png", 0)]);
            assert!(files.delete(job, &weights).await.unwrap());
            assert!(!files.delete(job, &weights).await.unwrap());
            files.delete_all(job).await.unwrap();
            files.delete_all(job).await.unwrap();
            assert_eq!(files.list(job).await.unwrap(), []);
            assert_eq!(files.get(other, &picture).await.unwrap().unwrap(), "other");
        }
    }

    #[tokio::test]
    async fn nothing_half_written_is_seen_or_left() {
        let (folder, files) = on_folder();
        let job = JobId::fresh();
        files
            .put(job, &name("a"), Bytes::from_static(b"good"))
            .await
            .unwrap();
        // A file where a folder is needed: the bytes are on the disk when it fails.
        let error = files
            .put(job, &name("a/b"), Bytes::from_static(b"bad"))
            .await
            .unwrap_err();
        assert!(error.is_passing(), "{error:?}");
        assert_eq!(files.get(job, &name("a")).await.unwrap().unwrap(), "good");
        assert_eq!(files.get(job, &name("a/b")).await.unwrap(), None);
        let left = std::fs::read_dir(folder.path().join(".staging"))
            .unwrap()
            .count();
        assert_eq!(left, 0);
    }

    #[tokio::test]
    async fn a_folder_that_is_gone_is_an_error_and_not_an_empty_one() {
        let (folder, files) = on_folder();
        let job = JobId::fresh();
        files
            .put(job, &name("a"), Bytes::from_static(b"x"))
            .await
            .unwrap();
        std::fs::remove_dir_all(folder.path()).unwrap();
        assert!(files.get(job, &name("a")).await.is_err());
        assert!(files.list(job).await.is_err());
        assert!(files.delete(job, &name("a")).await.is_err());
        assert!(files.delete_all(job).await.is_err());
        assert!(files.put(job, &name("a"), Bytes::new()).await.is_err());
    }

    #[tokio::test]
    async fn a_link_out_of_the_folder_is_not_followed() {
        let (folder, files) = on_folder();
        let (job, elsewhere) = (JobId::fresh(), tempfile::tempdir().unwrap());
        files.put(job, &name("a"), Bytes::new()).await.unwrap();
        let secret = elsewhere.path().join("secret");
        std::fs::write(&secret, "secret").unwrap();
        let link = folder.path().join(job.to_string()).join("link");
        std::os::unix::fs::symlink(&secret, link).unwrap();
        assert!(files.get(job, &name("link")).await.is_err());
        files.delete_all(job).await.unwrap();
        assert!(secret.exists());
    }

    #[test]
    fn an_address_that_is_none_is_said_to_be_none() {
        for address in ["", "http://a/b", "file://relative", "s3://"] {
            assert!(JobFiles::open(address).is_err(), "{address}");
        }
        let folder = tempfile::tempdir().unwrap();
        let address = format!("file://{}/deep/er", folder.path().display());
        JobFiles::open(&address).unwrap();
        assert!(folder.path().join("deep/er").is_dir());
    }
}
