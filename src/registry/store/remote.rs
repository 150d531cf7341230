//! An object store, through `object_store`: S3 and what speaks like it.
//!
//! # What the server must be able to do
//!
//! Writes rest on `PUT` with `If-None-Match: *` and `If-Match`: of two at once one wins. AWS,
//! Cloudflare R2 and MinIO document it; SeaweedFS (from 4.18) is what the suite runs on. A server
//! that ignores these headers is no place for a registry that more than one process writes to.
//!
//! Removals are `DELETE` with `If-Match`, which AWS documents and SeaweedFS heeds. Elsewhere the header is
//! ignored, and what is left is the look just before the removal. Another replica's write that
//! falls between the two, a few milliseconds, is then removed with what it replaced:
//! - of an adapter's weights: its upload was answered with success, and the adapter is gone, as if
//!   it had been deleted a moment later, though the removal named the hash of the one before;
//! - of its manifest, where an adapter is deleted and made again under its name at once: the new
//!   adapter stands without its texts and its owner, so every tenant sees it.
//!
//! One thing no header mends: an answer `5xx` to a write that was done all the same is tried again,
//! and the second attempt meets the first one's work. The writer is then told of a conflict with
//! itself, and looks again.

use std::{
    fmt,
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures::StreamExt as _;
use object_store::{
    Error, GetResult, ObjectMeta, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions,
    UpdateVersion, path::Path as Location,
};

use super::{Expect, Listing, Pieces, Seen, StoreFault};
use crate::storage::{aside, s3::S3};

pub(super) struct Remote {
    objects: Arc<dyn ObjectStore>,
    staging: PathBuf,
    /// While it is open, the folder is this process'.
    _held: Option<File>,
    /// S3's own, where it is S3.
    s3: Option<S3>,
}

/// Without the objects, which hold S3's key.
impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote")
            .field("s3", &self.s3)
            .finish_non_exhaustive()
    }
}

impl Remote {
    pub fn new(objects: Arc<dyn ObjectStore>, staging: &Path) -> Result<Self, StoreFault> {
        aside::prepare(staging)?;
        aside::sweep(staging);
        Ok(Self {
            objects,
            staging: staging.to_owned(),
            _held: super::staging::hold(staging),
            s3: None,
        })
    }

    pub fn s3(
        url: &str,
        variables: impl IntoIterator<Item = (String, String)>,
        staging: &Path,
    ) -> Result<Self, StoreFault> {
        let (s3, objects) = S3::open(url, variables)?;
        Ok(Self {
            s3: Some(s3),
            ..Self::new(objects, staging)?
        })
    }

    pub fn staging(&self) -> &Path {
        &self.staging
    }

    pub async fn list(&self) -> Result<Listing, StoreFault> {
        let listed = self.objects.list_with_delimiter(None).await;
        let found = listed.map_err(|error| match &self.s3 {
            Some(s3) => s3.explain(error),
            None => error.into(),
        })?;
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

    pub async fn delete(&self, file: &str, expect: &Expect) -> Result<bool, StoreFault> {
        let found = self.head(file).await?;
        if !expect.met_by(found.as_ref()) {
            return Err(StoreFault::Unmet);
        }
        if found.is_none() {
            return Ok(false);
        }
        let deleted = match (expect, &self.s3) {
            (Expect::Tag(tag), Some(s3)) => s3.delete_if(file, tag).await,
            _ => self.objects.delete(&Location::from(file)).await,
        };
        match deleted {
            Ok(()) => Ok(true),
            Err(Error::NotFound { .. }) if *expect == Expect::Anything => Ok(false),
            Err(
                Error::NotFound { .. } | Error::Precondition { .. } | Error::AlreadyExists { .. },
            ) => Err(StoreFault::Unmet),
            Err(error) => Err(error.into()),
        }
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
    use std::time::{Duration, Instant};

    use super::*;

    fn given(variables: &[(&str, &str)]) -> Vec<(String, String)> {
        let owned = |(name, value): &(&str, &str)| (name.to_string(), value.to_string());
        variables.iter().map(owned).collect()
    }

    #[tokio::test]
    async fn an_s3_that_does_not_answer_is_unavailable_soon() {
        let folder = tempfile::tempdir().unwrap();
        // Port 1 is nobody's. With TLS, so that a missing provider would show, too.
        let variables = given(&[
            ("AWS_ENDPOINT_URL", "https://127.0.0.1:1"),
            ("AWS_REGION", "nowhere"),
            ("AWS_ACCESS_KEY_ID", "id"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
        ]);
        let remote = Remote::s3("s3://bucket/some/prefix", variables, folder.path()).unwrap();
        let began = Instant::now();
        let listed = remote.list().await.unwrap_err();
        assert!(matches!(listed, StoreFault::Unavailable(_)), "{listed:?}");
        let written = remote
            .write("a.json", Bytes::new(), &Expect::Nothing)
            .await
            .unwrap_err();
        assert!(matches!(written, StoreFault::Unavailable(_)), "{written:?}");
        assert!(began.elapsed() < Duration::from_secs(40));
        assert!(!format!("{remote:?}").contains("secret"));
    }

    #[test]
    fn a_server_without_tls_is_used_only_if_that_is_allowed() {
        let folder = tempfile::tempdir().unwrap();
        for (allowed, fine) in [("true", true), ("1", true), ("false", false)] {
            let variables = given(&[
                ("AWS_ENDPOINT_URL", "http://127.0.0.1:9000"),
                ("AWS_ALLOW_HTTP", allowed),
            ]);
            let result = Remote::s3("s3://bucket", variables, folder.path());
            assert_eq!(result.is_ok(), fine, "{result:?}");
            if let Err(error) = result {
                assert!(error.to_string().contains("AWS_ALLOW_HTTP=true"), "{error}");
            }
        }
    }

    #[test]
    fn what_is_no_s3_address_is_said_to_be_none() {
        let folder = tempfile::tempdir().unwrap();
        for url in ["s3://", "http://x/y", "bucket"] {
            let error = Remote::s3(url, [], folder.path()).unwrap_err();
            assert!(error.to_string().contains("s3://BUCKET/PREFIX"), "{error}");
        }
    }

    #[tokio::test]
    #[ignore = "needs an S3 server: .ci/with-s3 cargo test"]
    async fn a_removal_spares_what_was_written_just_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let url = std::env::var("LORIKEET_TEST_S3").unwrap() + "/removal";
        let remote = Remote::s3(&url, std::env::vars(), folder.path()).unwrap();
        let write = |text: &'static str| {
            remote.write(
                "a.json",
                Bytes::from_static(text.as_bytes()),
                &Expect::Anything,
            )
        };
        let (one, two) = (write("one").await.unwrap(), write("two").await.unwrap());
        // The look before it found `one`; what only the server can still see is `two`.
        let s3 = remote.s3.as_ref().unwrap();
        let error = s3.delete_if("a.json", &one.tag).await.unwrap_err();
        assert!(matches!(error, Error::Precondition { .. }), "{error:?}");
        let (_, text) = remote.read("a.json", 10).await.unwrap().unwrap();
        assert_eq!(text, "two");
        s3.delete_if("a.json", &two.tag).await.unwrap();
        assert_eq!(remote.head("a.json").await.unwrap(), None);
    }
}
