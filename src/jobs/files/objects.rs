//! The files of jobs in an object store: `PREFIX/JOB/NAME`.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use futures::TryStreamExt as _;
use object_store::{Error, ObjectStore, ObjectStoreExt as _, path::Path as Location};

use super::{FileName, JobId, StoredFile};
use crate::storage::{StoreFault, s3::S3};

pub(super) struct Objects {
    objects: Arc<dyn ObjectStore>,
    /// S3's own, where it is S3.
    s3: Option<S3>,
}

/// Without the objects, which hold S3's key.
impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Objects")
            .field("s3", &self.s3)
            .finish_non_exhaustive()
    }
}

fn location(job: JobId, name: &FileName) -> Location {
    Location::from(format!("{job}/{name}"))
}

impl Objects {
    pub fn new(objects: Arc<dyn ObjectStore>) -> Self {
        Self { objects, s3: None }
    }

    pub fn s3(url: &str) -> Result<Self, StoreFault> {
        let variables = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        });
        let (s3, objects) = S3::open(url, variables)?;
        let s3 = Some(s3);
        Ok(Self { objects, s3 })
    }

    /// An object is there whole or not at all.
    pub async fn put(&self, job: JobId, name: &FileName, bytes: Bytes) -> Result<(), StoreFault> {
        self.objects.put(&location(job, name), bytes.into()).await?;
        Ok(())
    }

    pub async fn get(&self, job: JobId, name: &FileName) -> Result<Option<Bytes>, StoreFault> {
        match self.objects.get(&location(job, name)).await {
            Ok(found) => Ok(Some(found.bytes().await?)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn found(&self, job: JobId) -> Result<Vec<object_store::ObjectMeta>, StoreFault> {
        let listed = self.objects.list(Some(&Location::from(job.to_string())));
        let listed: Result<Vec<_>, Error> = listed.try_collect().await;
        listed.map_err(|error| match &self.s3 {
            Some(s3) => s3.explain(error),
            None => error.into(),
        })
    }

    pub async fn list(&self, job: JobId) -> Result<Vec<StoredFile>, StoreFault> {
        let root = format!("{job}/");
        let stored = |object: object_store::ObjectMeta| {
            let name = object.location.as_ref().strip_prefix(&root)?;
            Some(StoredFile {
                name: FileName::new(name).ok()?,
                size: object.size,
            })
        };
        Ok(self
            .found(job)
            .await?
            .into_iter()
            .filter_map(stored)
            .collect())
    }

    pub async fn jobs(&self) -> Result<Vec<JobId>, StoreFault> {
        let listed = self.objects.list_with_delimiter(None).await?;
        let named = |folder: Location| folder.filename()?.parse().ok();
        Ok(listed
            .common_prefixes
            .into_iter()
            .filter_map(named)
            .collect())
    }

    pub async fn delete(&self, job: JobId, name: &FileName) -> Result<bool, StoreFault> {
        let location = location(job, name);
        match self.objects.head(&location).await {
            Err(Error::NotFound { .. }) => return Ok(false),
            other => other?,
        };
        self.remove(&location).await.map(|()| true)
    }

    pub async fn delete_all(&self, job: JobId) -> Result<(), StoreFault> {
        for object in self.found(job).await? {
            self.remove(&object.location).await?;
        }
        Ok(())
    }

    async fn remove(&self, location: &Location) -> Result<(), StoreFault> {
        match self.objects.delete(location).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
