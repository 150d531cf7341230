//! An object store, through `object_store`: S3 and what speaks like it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
use object_store::{
    ClientOptions, Error, GetResult, ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMode,
    PutOptions, RetryConfig, UpdateVersion, aws::AmazonS3Builder, path::Path as Location,
    prefix::PrefixStore,
};

use super::{Expect, Listing, Pieces, Seen, StoreFault, staging};

/// A request waits no longer than this for the next byte.
const SILENCE: Duration = Duration::from_secs(20);
/// No more attempts after this: a client waits for the answer.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Remote {
    objects: Arc<dyn ObjectStore>,
    staging: PathBuf,
}

impl Remote {
    pub fn new(objects: Arc<dyn ObjectStore>, staging: &Path) -> Result<Self, StoreFault> {
        staging::prepare(staging)?;
        staging::sweep(staging);
        Ok(Self {
            objects,
            staging: staging.to_owned(),
        })
    }

    pub fn s3(url: &str, staging: &Path) -> Result<Self, StoreFault> {
        Self::s3_from(AmazonS3Builder::from_env(), url, staging)
    }

    fn s3_from(builder: AmazonS3Builder, url: &str, staging: &Path) -> Result<Self, StoreFault> {
        let prefix = url
            .strip_prefix("s3://")
            .filter(|rest| !rest.is_empty())
            .ok_or_else(|| StoreFault::Unavailable(format!("{url}: expected s3://BUCKET/PREFIX")))?
            .split_once('/')
            .map_or("", |(_, prefix)| prefix);
        let prefix = Location::parse(prefix).map_err(|e| StoreFault::from_error(&e))?;
        // It fails where a provider is chosen already, and then that one serves.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let retry = RetryConfig {
            max_retries: 3,
            retry_timeout: PATIENCE,
            ..RetryConfig::default()
        };
        let client = ClientOptions::new()
            .with_connect_timeout(Duration::from_secs(5))
            // Of the whole request: a large adapter over a slow line needs its time …
            .with_timeout(Duration::from_secs(600))
            // … and a dead one is noticed by its silence.
            .with_read_timeout(SILENCE);
        let s3 = builder
            .with_url(url)
            .with_retry(retry)
            .with_client_options(client)
            .build()
            .map_err(|e| StoreFault::from_error(&e))?;
        Self::new(Arc::new(PrefixStore::new(s3, prefix)), staging)
    }

    pub fn staging(&self) -> &Path {
        &self.staging
    }

    pub async fn list(&self) -> Result<Listing, StoreFault> {
        let found = self.objects.list_with_delimiter(None).await?;
        let files = found.objects.iter().filter_map(|object| {
            let file = object.location.filename()?;
            Some((file.to_owned(), Ok(seen(object))))
        });
        Ok(Listing::of(files.collect()))
    }

    pub async fn head(&self, file: &str) -> Result<Option<Seen>, StoreFault> {
        match self.objects.head(&Location::from(file)).await {
            Ok(found) => Ok(Some(seen(&found))),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn get(&self, file: &str) -> Result<Option<GetResult>, StoreFault> {
        match self.objects.get(&Location::from(file)).await {
            Ok(found) => Ok(Some(found)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    pub async fn read(&self, file: &str, limit: u64) -> Result<Option<(Seen, Bytes)>, StoreFault> {
        match self.get(file).await? {
            None => Ok(None),
            Some(found) if found.meta.size > limit => Err(StoreFault::TooLarge { limit }),
            Some(found) => {
                let seen = seen(&found.meta);
                Ok(Some((seen, found.bytes().await?)))
            }
        }
    }

    pub async fn stream(&self, file: &str) -> Result<Option<(Seen, Pieces)>, StoreFault> {
        Ok(self.get(file).await?.map(|found| {
            let seen = seen(&found.meta);
            let pieces = found.into_stream().map(|piece| Ok(piece?));
            (seen, pieces.boxed() as Pieces)
        }))
    }

    pub async fn write(
        &self,
        file: &str,
        bytes: Bytes,
        expect: &Expect,
    ) -> Result<Seen, StoreFault> {
        let mode = match expect {
            Expect::Anything => PutMode::Overwrite,
            Expect::Nothing => PutMode::Create,
            Expect::Tag(tag) => PutMode::Update(UpdateVersion {
                e_tag: Some(tag.clone()),
                version: None,
            }),
        };
        let size = bytes.len() as u64;
        let options = PutOptions {
            mode,
            ..PutOptions::default()
        };
        let location = Location::from(file);
        match self
            .objects
            .put_opts(&location, bytes.into(), options)
            .await
        {
            Ok(put) => match put.e_tag {
                Some(tag) => Ok(Seen {
                    size,
                    tag,
                    modified: super::super::now(),
                }),
                None => self.head(file).await?.ok_or(StoreFault::Unmet),
            },
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Err(StoreFault::Unmet),
            // Of a missing object this is said only where one was to be replaced; else the bucket
            // is missing.
            Err(Error::NotFound { .. }) if matches!(expect, Expect::Tag(_)) => {
                Err(StoreFault::Unmet)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// S3 has no conditional removal that every imitation knows: between the look and the deed
    /// another replica may get in.
    pub async fn delete(&self, file: &str, expect: &Expect) -> Result<bool, StoreFault> {
        let found = self.head(file).await?;
        if !expect.met_by(found.as_ref()) {
            return Err(StoreFault::Unmet);
        }
        if found.is_none() {
            return Ok(false);
        }
        match self.objects.delete(&Location::from(file)).await {
            Ok(()) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl From<Error> for StoreFault {
    fn from(error: Error) -> Self {
        Self::from_error(&error)
    }
}

fn seen(found: &ObjectMeta) -> Seen {
    let tag = found.e_tag.clone();
    Seen {
        size: found.size,
        tag: tag.unwrap_or_else(|| {
            format!("{}-{}", found.last_modified.timestamp_millis(), found.size)
        }),
        modified: found.last_modified.timestamp().try_into().unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn an_s3_that_does_not_answer_is_unavailable_soon() {
        let folder = tempfile::tempdir().unwrap();
        // Port 1 is nobody's. With TLS, so that a missing provider would show, too.
        let builder = AmazonS3Builder::new()
            .with_endpoint("https://127.0.0.1:1")
            .with_region("nowhere")
            .with_access_key_id("id")
            .with_secret_access_key("secret");
        let remote = Remote::s3_from(builder, "s3://bucket/some/prefix", folder.path()).unwrap();
        let began = Instant::now();
        let listed = remote.list().await.unwrap_err();
        assert!(matches!(listed, StoreFault::Unavailable(_)), "{listed:?}");
        let written = remote
            .write("a.json", Bytes::new(), &Expect::Nothing)
            .await
            .unwrap_err();
        assert!(matches!(written, StoreFault::Unavailable(_)), "{written:?}");
        assert!(began.elapsed() < 2 * PATIENCE + SILENCE);
    }

    #[test]
    fn what_is_no_s3_address_is_said_to_be_none() {
        let folder = tempfile::tempdir().unwrap();
        for url in ["s3://", "http://x/y", "bucket"] {
            let error = Remote::s3(url, folder.path()).unwrap_err();
            assert!(error.to_string().contains("s3://BUCKET/PREFIX"), "{error}");
        }
    }
}
