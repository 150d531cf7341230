//! S3 as the operator describes it, and what `object_store` has no call for.

use std::{fmt, sync::Arc, time::Duration};

use object_store::{
    ClientConfigKey, ClientOptions, Error, HeaderMap, HeaderValue, ObjectStore,
    ObjectStoreExt as _, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    path::Path as Location,
    prefix::PrefixStore,
};

use super::StoreFault;

/// A request waits no longer than this for the next byte.
const SILENCE: Duration = Duration::from_secs(20);
/// No more attempts after this: a client waits for the answer.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct S3 {
    /// As the operator gave it.
    url: String,
    prefix: Location,
    builder: AmazonS3Builder,
    client: ClientOptions,
}

/// Without the builder, which holds the key.
impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "S3({})", self.url)
    }
}

impl S3 {
    /// The objects under `s3://BUCKET/PREFIX`. `variables` are the environment's, of which those
    /// count that begin with `AWS_`.
    pub fn open(
        url: &str,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<(Self, Arc<dyn ObjectStore>), StoreFault> {
        let prefix = url
            .strip_prefix("s3://")
            .filter(|rest| !rest.is_empty())
            .ok_or_else(|| StoreFault::Unavailable(format!("{url}: expected s3://BUCKET/PREFIX")))?
            .split_once('/')
            .map_or("", |(_, prefix)| prefix);
        let prefix = Location::parse(prefix).map_err(|e| StoreFault::from_error(&e))?;
        // It fails where a provider is chosen already, and then that one serves.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (builder, client) = described(variables);
        secure(&builder, &client)?;
        let builder = builder.with_url(url).with_retry(RetryConfig {
            max_retries: 3,
            retry_timeout: PATIENCE,
            ..RetryConfig::default()
        });
        let objects = builder
            .clone()
            .with_client_options(client.clone())
            .build()
            .map_err(|e| StoreFault::from_error(&e))?;
        let s3 = Self {
            url: url.to_owned(),
            // Asked for once and renewed for all.
            builder: builder.with_credentials(objects.credentials().clone()),
            client,
            prefix: prefix.clone(),
        };
        Ok((s3, Arc::new(PrefixStore::new(objects, prefix))))
    }

    /// A removal with `If-Match`. The header is one of a client's that makes this one request, so
    /// that signing, trying again and understanding the answer are `object_store`'s. It costs the
    /// making of that client, some milliseconds.
    pub async fn delete_if(&self, file: &str, tag: &str) -> Result<(), Error> {
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

    /// Of a listing's failure: where it is the operator's settings that are at fault, says which.
    /// `object_store` tells no kinds of it apart, but has the server's answer in its text, and in
    /// that S3's own code.
    pub fn explain(&self, error: Error) -> StoreFault {
        let text = error.to_string();
        let code = text
            .split_once("<Code>")
            .and_then(|(_, rest)| rest.split_once("</Code>"))
            .map_or("", |(code, _)| code);
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
        StoreFault::Unavailable(format!("{}: {advice} ({code})", self.url))
    }
}

/// Not by `from_env`: of the client's options it takes those in the environment, or those set here,
/// and not both.
fn described(
    variables: impl IntoIterator<Item = (String, String)>,
) -> (AmazonS3Builder, ClientOptions) {
    let mut builder = AmazonS3Builder::new();
    let mut client = ClientOptions::new()
        .with_connect_timeout(Duration::from_secs(5))
        // Of the whole request: a large adapter over a slow line needs its time …
        .with_timeout(Duration::from_secs(600))
        // … and a dead one is noticed by its silence.
        .with_read_timeout(SILENCE);
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
    (builder, client)
}

/// An endpoint without TLS would be refused at every request, in words that name no way out.
fn secure(builder: &AmazonS3Builder, client: &ClientOptions) -> Result<(), StoreFault> {
    let endpoint = [AmazonS3ConfigKey::S3Endpoint, AmazonS3ConfigKey::Endpoint]
        .iter()
        .find_map(|key| builder.get_config_value(key));
    // In whatever way `object_store` lets one say yes.
    let allowed = client
        .get_config_value(&ClientConfigKey::AllowHttp)
        .is_some_and(|word| {
            ["1", "true", "on", "yes", "y"].contains(&word.to_ascii_lowercase().as_str())
        });
    match endpoint {
        Some(endpoint) if endpoint.starts_with("http://") && !allowed => {
            Err(StoreFault::Unavailable(format!(
                "AWS_ENDPOINT_URL: {endpoint} has no TLS; set AWS_ALLOW_HTTP=true to use it all \
                 the same"
            )))
        }
        _ => Ok(()),
    }
}
