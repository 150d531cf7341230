//! What only a real S3 server can show.

use std::{
    env, iter,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::Instant,
};

use futures::{StreamExt as _, future::join_all};
use uuid::Uuid;

use super::{
    super::store::{Expect, Key, Part},
    *,
};

/// The bucket to test on, as `s3://BUCKET`; its server and key are in the `AWS_*` variables.
pub(super) fn bucket() -> Option<String> {
    env::var("LORIKEET_TEST_S3").ok()
}

fn needed() -> String {
    bucket().expect("LORIKEET_TEST_S3: run this through .ci/with-s3")
}

/// A part of the bucket that nobody else uses.
pub(super) fn on(bucket: &str) -> Ground {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("{bucket}/{}", Uuid::now_v7());
    let store = Store::s3(&url, folder.path().join("staging")).unwrap();
    Ground { folder, store }
}

/// A registry on S3 under these variables, where they differ from the environment's.
async fn open(
    url: &str,
    variables: &[(&str, &str)],
    staging: &Path,
) -> Result<Registry<Fake>, RegistryError> {
    let owned = |(name, value): &(&str, &str)| (name.to_string(), value.to_string());
    let variables = env::vars().chain(variables.iter().map(owned));
    let store = Store::s3_with(url, variables, staging).unwrap();
    let settings = Settings {
        rescan: Duration::from_millis(100),
        ..Settings::default()
    };
    Registry::open(store, Fake::default(), settings).await
}

#[tokio::test]
#[ignore = "needs an S3 server: .ci/with-s3 cargo test"]
async fn what_is_wrong_with_address_or_key_is_said_at_the_start() {
    let bucket = needed();
    let folder = tempfile::tempdir().unwrap();
    let refused = "check AWS_ACCESS_KEY_ID";
    for (url, variables, expected) in [
        (
            bucket.as_str(),
            [("AWS_SECRET_ACCESS_KEY", "wrong")],
            refused,
        ),
        (bucket.as_str(), [("AWS_ACCESS_KEY_ID", "nobody")], refused),
        (
            "s3://no-such-bucket/x",
            [("AWS_REGION", "us-east-1")],
            "no such bucket",
        ),
    ] {
        let began = Instant::now();
        let error = open(url, &variables, folder.path())
            .await
            .err()
            .unwrap()
            .to_string();
        println!("{error}");
        assert!(error.contains(expected), "{error}");
        assert!(!error.contains("<Error>"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(5));
    }
}

#[tokio::test]
#[ignore = "needs an S3 server: .ci/with-s3 cargo test"]
async fn a_listing_of_more_than_one_page_is_whole() {
    let ground = on(&needed());
    // The server's pages have 1,000.
    let names: Vec<String> = (0..1100).map(|n| format!("a{n:04}")).collect();
    let writes = stream::iter(&names).map(|of| {
        let key = Key::new(&name(of), Part::Weights);
        let store = &ground.store;
        async move {
            store
                .write(&key, b"weights".to_vec(), Expect::Nothing)
                .await
        }
    });
    let written: Vec<_> = writes.buffer_unordered(16).collect().await;
    assert!(written.iter().all(Result::is_ok), "{written:?}");
    let began = Instant::now();
    let registry = ground.open().await;
    println!("1,100 adapters on S3: open {:?}", began.elapsed());
    assert_eq!(registry.rescan().await.unwrap(), 0);
    let page = registry.list(&Query::default());
    assert_eq!(
        (page.total, listed(&registry).first()),
        (1100, names.first())
    );
    for of in ["a0999", "a1000", "a1099"] {
        assert_eq!(*registry.lease(&name(of)).await.unwrap(), "weights");
    }
}

#[tokio::test]
#[ignore = "needs an S3 server: .ci/with-s3 cargo test"]
async fn a_file_that_the_server_keeps_in_pieces_has_one_mark() {
    let ground = on(&needed());
    let registry = ground.open().await;
    // SeaweedFS cuts at 8 MiB, and makes the ETag of such an object in another way.
    let large: String = iter::repeat_n("lorikeet", 20 << 17).collect();
    let upload = |policy, text: String| {
        let body = stream::iter([Ok::<_, Infallible>(Bytes::from(text))]);
        let patch = ManifestPatch::default();
        let registry = &registry;
        async move {
            let of = name("large");
            registry.put(&of, policy, patch, body, |_, _| Ok(())).await
        }
    };
    let published = upload(PutPolicy::Create, large.clone()).await.unwrap();
    let entry = published.entry;
    assert_eq!(registry.rescan().await.unwrap(), 0);
    let again = ground.open().await.get(&name("large")).await.unwrap();
    assert_eq!(again.generation, Some(sha(&large)));
    assert_eq!(again.weights.tag, entry.weights.tag);
    assert_eq!(content(&registry, "large").await.unwrap(), large);
    let on_it = PutPolicy::Replace(entry.generation);
    upload(on_it, large.to_uppercase()).await.unwrap();
    registry
        .delete(&name("large"), Some(sha(&large.to_uppercase())))
        .await
        .unwrap();
    assert!(listed(&ground.open().await).is_empty());
}

/// A server of the test's own, to be killed.
struct Server {
    process: Child,
    data: TempDir,
    port: u16,
}

impl Server {
    fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        // Below the ports that the system gives out, and apart from those of `.ci/with-s3`.
        let port = 27_000 + (std::process::id() % 500) as u16 * 10;
        let process = Self::spawn(data.path(), port);
        Self {
            process,
            data,
            port,
        }
    }

    fn spawn(data: &Path, port: u16) -> Child {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/.ci/s3-server");
        let mut command = Command::new(script);
        command.arg(data).arg(port.to_string());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        // Not to be stopped by what stops the test.
        command.process_group(0).spawn().unwrap()
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn start_again(&mut self) {
        self.process = Self::spawn(self.data.path(), self.port);
    }

    async fn open(&self) -> Result<Registry<Fake>, RegistryError> {
        let endpoint = format!("http://127.0.0.1:{}", self.port);
        let variables = [("AWS_ENDPOINT_URL", endpoint.as_str())];
        let staging = self.data.path().join("staging");
        open("s3://adapters/some/prefix", &variables, &staging).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an S3 server: .ci/with-s3 cargo test"]
async fn a_server_that_is_killed_takes_nothing_along_and_is_missed_by_nobody_who_has_a_lease() {
    needed();
    let mut server = Server::start();
    let registry = loop {
        match server.open().await {
            Ok(registry) => break registry,
            Err(error) => assert!(server.process.try_wait().unwrap().is_none(), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    create(&registry, "warm", "one").await;
    create(&registry, "cold", "two").await;
    let lease = registry.lease(&name("warm")).await.unwrap();
    server.kill();

    let began = Instant::now();
    let (warm, cold, never) = (name("warm"), name("cold"), name("never-seen"));
    let patch = ManifestPatch::default;
    let unavailable = |error: RegistryError| {
        assert!(
            matches!(error, RegistryError::Unavailable { .. }),
            "{error:?}"
        );
    };
    unavailable(registry.rescan().await.unwrap_err());
    assert!(registry.outage().is_some());
    unavailable(registry.lease(&cold).await.unwrap_err());
    unavailable(
        put(&registry, "new", PutPolicy::Create, "x")
            .await
            .unwrap_err(),
    );
    unavailable(
        put(&registry, "warm", PutPolicy::Upsert, "x")
            .await
            .unwrap_err(),
    );
    unavailable(registry.patch(&warm, None, patch()).await.unwrap_err());
    unavailable(registry.delete(&warm, None).await.unwrap_err());
    unavailable(content(&registry, "warm").await.unwrap_err());
    let each = began.elapsed() / 7;
    // Many who ask for the same get one answer.
    let began = Instant::now();
    let asking = (0..40).map(|_| registry.lease(&never));
    for answer in join_all(asking).await {
        unavailable(answer.unwrap_err());
    }
    let line = began.elapsed();
    println!("without its server: {each:?} a request, {line:?} for forty at once");
    assert!(each < Duration::from_secs(5) && line < Duration::from_secs(5));
    // What is known is still listed, and what is in memory still served.
    let began = Instant::now();
    assert_eq!(
        (listed(&registry), lease.as_str()),
        (vec!["cold".into(), "warm".into()], "one")
    );
    assert_eq!(*registry.lease(&warm).await.unwrap(), "one");
    assert!(began.elapsed() < Duration::from_millis(100));

    server.start_again();
    let _keeper = registry.keep();
    until("the server is found again", || registry.outage().is_none()).await;
    // It lists before it reads, and reads before it writes.
    let began = Instant::now();
    let mut again = registry.lease(&cold).await;
    while again.is_err() && began.elapsed() < Duration::from_secs(10) {
        again = registry.lease(&cold).await;
    }
    assert_eq!(*again.unwrap(), "two");
    assert_eq!(listed(&registry), ["cold", "warm"]);
    let mut replaced = put(&registry, "warm", PutPolicy::Upsert, "three").await;
    while replaced.is_err() && began.elapsed() < Duration::from_secs(20) {
        replaced = put(&registry, "warm", PutPolicy::Upsert, "three").await;
    }
    replaced.unwrap();
    create(&registry, "new", "four").await;
    assert_eq!(lease.as_str(), "one");
    assert_eq!(*registry.lease(&warm).await.unwrap(), "three");
}
