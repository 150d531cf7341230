//! An object store, through `object_store`: S3 and what speaks like it.
//!
//! # What the server must be able to do
//!
//! Writes rest on `PUT` with `If-None-Match: *` and `If-Match`: of two at once one wins. AWS,
//! Cloudflare R2, MinIO and SeaweedFS (from 4.18) do that. A server that ignores these headers is no place
//! for a registry that more than one process writes to.
//!
//! Removals are `DELETE` with `If-Match`, which AWS and SeaweedFS heed. Elsewhere the header is
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
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
use object_store::{
    ClientConfigKey, ClientOptions, Error, GetResult, HeaderMap, HeaderValue, ObjectMeta,
    ObjectStore, ObjectStoreExt as _, PutMode, PutOptions, RetryConfig, UpdateVersion,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    path::Path as Location,
    prefix::PrefixStore,
};

use super::{Expect, Listing, Pieces, Seen, StoreFault, staging};

/// A request waits no longer than this for the next byte.
const SILENCE: Duration = Duration::from_secs(20);
/// No more attempts after this: a client waits for the answer.
const PATIENCE: Duration = Duration::from_secs(10);

pub(super) struct Remote {
    objects: Arc<dyn ObjectStore>,
    staging: PathBuf,
    /// S3's own, where it is S3.
    s3: Option<S3>,
}

/// What `object_store` has no call for.
struct S3 {
    /// As the operator gave it.
    url: String,
    prefix: Location,
    builder: AmazonS3Builder,
    client: ClientOptions,
}

/// Its address only: both of the others hold the key.
impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = self.s3.as_ref().map_or("objects", |s3| s3.url.as_str());
        f.debug_tuple("Remote").field(&url).finish()
    }
}

impl Remote {
    pub fn new(objects: Arc<dyn ObjectStore>, staging: &Path) -> Result<Self, StoreFault> {
        staging::prepare(staging)?;
        staging::sweep(staging);
        Ok(Self {
            objects,
            staging: staging.to_owned(),
            s3: None,
        })
    }

    /// `variables` are the environment's, of which those count that begin with `AWS_`.
    pub fn s3(
        url: &str,
        variables: impl IntoIterator<Item = (String, String)>,
        staging: &Path,
    ) -> Result<Self, StoreFault> {
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
        let mut builder = AmazonS3Builder::new();
        let mut client = ClientOptions::new()
            .with_connect_timeout(Duration::from_secs(5))
            // Of the whole request: a large adapter over a slow line needs its time …
            .with_timeout(Duration::from_secs(600))
            // … and a dead one is noticed by its silence.
            .with_read_timeout(SILENCE);
        // Not `from_env`: the client's options given there and those above would be either or.
        for (name, value) in variables {
            if !name.starts_with("AWS_") {
                continue;
            }
            match name.to_ascii_lowercase().parse() {
                Ok(AmazonS3ConfigKey::Client(key)) => client = client.with_config(key, value),
                Ok(key) => builder = builder.with_config(key, value),
                // There are more such variables, for others.
                Err(_) => {}
            }
        }
        let plain = [AmazonS3ConfigKey::S3Endpoint, AmazonS3ConfigKey::Endpoint]
            .iter()
            .find_map(|key| builder.get_config_value(key))
            .filter(|endpoint| endpoint.starts_with("http://"));
        // In whatever way `object_store` lets one say yes.
        let allowed = client
            .get_config_value(&ClientConfigKey::AllowHttp)
            .is_some_and(|word| {
                let yes = ["1", "true", "on", "yes", "y"];
                yes.contains(&word.to_ascii_lowercase().as_str())
            });
        if let Some(endpoint) = plain.filter(|_| !allowed) {
            return Err(StoreFault::Unavailable(format!(
                "AWS_ENDPOINT_URL: {endpoint} has no TLS; set AWS_ALLOW_HTTP=true to use it all the same"
            )));
        }
        let builder = builder.with_url(url).with_retry(retry);
        let objects = builder
            .clone()
            .with_client_options(client.clone())
            .build()
            .map_err(|e| StoreFault::from_error(&e))?;
        let s3 = S3 {
            url: url.to_owned(),
            // Asked for once and renewed for both.
            builder: builder.with_credentials(objects.credentials().clone()),
            client,
            prefix: prefix.clone(),
        };
        let objects = Arc::new(PrefixStore::new(objects, prefix));
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
        let found = listed.map_err(|error| self.explain(error))?;
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

    /// Of a listing's failure: where it is the operator's settings that are at fault, says which.
    /// `object_store` tells no kinds of it apart, but has the server's answer in its text, and in
    /// that S3's own code.
    fn explain(&self, error: Error) -> StoreFault {
        let text = error.to_string();
        let code = text
            .split_once("<Code>")
            .and_then(|(_, rest)| rest.split_once("</Code>"));
        let (Some(S3 { url, .. }), Some((code, _))) = (&self.s3, code) else {
            return error.into();
        };
        let advice = match code {
            "NoSuchBucket" => "there is no such bucket; check the address, or make the bucket",
            "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "ExpiredToken" | "InvalidToken" => {
                "the key was refused; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            }
            "AccessDenied" => {
                "the key may not list this bucket; check AWS_ACCESS_KEY_ID and what it is allowed"
            }
            "AuthorizationHeaderMalformed" | "PermanentRedirect" => {
                "the bucket is in another region; check AWS_REGION"
            }
            _ => return error.into(),
        };
        StoreFault::Unavailable(format!("{url}: {advice} ({code})"))
    }
}

impl S3 {
    /// A removal with `If-Match`. The header is one of a client's that makes this one request, so
    /// that signing, trying again and understanding the answer are `object_store`'s. It costs the
    /// making of that client, some milliseconds.
    async fn delete_if(&self, file: &str, tag: &str) -> Result<(), Error> {
        let tag = HeaderValue::from_str(tag).map_err(|error| Error::Generic {
            store: "S3",
            source: Box::new(error),
        })?;
        let mut headers = HeaderMap::new();
        headers.insert("if-match", tag);
        let client = self.client.clone().with_default_headers(headers);
        let one = self
            .builder
            .clone()
            .with_client_options(client)
            // A removal of many has no room for the header.
            .with_disable_bulk_delete(true)
            .build()?;
        PrefixStore::new(one, self.prefix.clone())
            .delete(&Location::from(file))
            .await
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
        assert!(began.elapsed() < 2 * PATIENCE + SILENCE);
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
