//! Processes that are killed while they train, and those that go on with what they left.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use reqwest::Client;
use serde_json::{Value, json};
use sqlx::{Connection as _, PgConnection};
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time,
};

use crate::{
    support::{ok, quick, refusal},
    training::{Place, events, finished, short, stepped, submit},
};

/// Kills in all.
const KILLS: u32 = 20;
const STEPS: u32 = 12;

/// Numbers that are the same every time, and look random.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        // Knuth's, from MMIX.
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % limit
    }
}

/// `lorikeet train`, in a folder of its own.
struct Training {
    folder: TempDir,
}

impl Training {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join("adapters")).unwrap();
        Self { folder }
    }

    fn command(&self) -> Command {
        let subject = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/training/subject");
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorikeet"));
        command
            .args([
                "train",
                "dreambooth",
                "--name",
                "a",
                "--seed",
                "5",
                "--images",
            ])
            .arg(subject)
            .args([
                "--instance-prompt",
                "a zorp monster",
                "--class-prompt",
                "a monster",
            ])
            .args([
                "--batch-size",
                "1",
                "--resolution",
                "64",
                "--checkpoint-every",
                "1",
            ])
            .args([
                "--sample-every",
                "0",
                "--set",
                "class_images=2",
                "--threads",
                "1",
            ])
            .args([
                "--train-text-encoder",
                "true",
                "--steps",
                &STEPS.to_string(),
            ])
            .arg("--data")
            .arg(self.folder.path().join("data"))
            .arg("--adapters")
            .arg(self.folder.path().join("adapters"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    fn adapter(&self) -> Option<Vec<u8>> {
        fs::read(self.folder.path().join("adapters/a.safetensors")).ok()
    }
}

#[test]
fn twenty_kills_at_random_moments_change_no_byte() {
    let whole = Training::new();
    let began = Instant::now();
    assert!(whole.command().status().unwrap().success());
    let took = began.elapsed().as_millis() as u64;
    let expected = whole.adapter().unwrap();

    let (mut dice, mut kills, mut gone_on) = (Dice(7), 0, 0);
    let mut training = Training::new();
    loop {
        let mut child = training.command().spawn().unwrap();
        if kills < KILLS {
            // From the first moment on; later ones are more interesting.
            thread::sleep(Duration::from_millis(took / 8 + dice.below(took)));
            // SIGKILL; it may have ended already.
            let _ = child.kill();
        }
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        gone_on += u32::from(text.contains("going on after step"));
        match output.status.code() {
            None => kills += 1,
            Some(0) => {
                assert!(
                    training.adapter().unwrap() == expected,
                    "after {kills} kills: {text}"
                );
                if kills == KILLS {
                    break;
                }
                training = Training::new();
            }
            Some(code) => panic!("ended with {code}: {text}"),
        }
    }
    // Else it would have begun anew each time, which is not what this is about.
    assert!(gone_on >= KILLS / 4, "went on {gone_on} times");
}

/// The hash of the adapter of a job that nothing happened to.
async fn undisturbed(fields: &Value) -> Value {
    let place = Place::new();
    let server = place.serve(&[]);
    let job = submit(&server.url, fields).await;
    let done = finished(&server.url, &job).await;
    assert_eq!(done["state"], "succeeded", "{done}");
    done["result"]["sha256"].clone()
}

#[tokio::test]
async fn servers_that_are_killed_and_stopped_leave_a_job_that_ends_as_it_would_have() {
    let fields = short("a", 30, json!({}));
    let expected = undisturbed(&fields).await;
    let place = Place::new();
    let mut server = place.serve(&[]);
    let job = submit(&server.url, &fields).await;
    for signal in ["KILL", "TERM", "KILL"] {
        time::sleep(Duration::from_millis(700)).await;
        server.signal(signal);
        server.child.wait().unwrap();
        server = place.serve(&[]);
    }
    let done = finished(&server.url, &job).await;
    assert_eq!(done["state"], "succeeded", "{done}");
    assert_eq!(done["result"]["sha256"], expected, "{done}");
    assert!(done["attempt"].as_u64() >= Some(2), "{done}");
}

/// Two servers with one queue; the one that has the job is killed.
async fn taken_over(database: Option<&str>) {
    let fields = short("a", 40, json!({}));
    let expected = undisturbed(&fields).await;
    let place = Place::new();
    let files = format!("{}/jobs", place.data());
    let options = match database {
        Some(url) => vec!["--database", url, "--job-files", &files],
        None => Vec::new(),
    };
    let first = place.serve(&options);
    let job = submit(&first.url, &fields).await;
    stepped(&first.url, &job, 3).await;
    let second = place.serve(&options);
    first.signal("KILL");
    let done = finished(&second.url, &job).await;
    assert_eq!(done["state"], "succeeded", "{done}");
    assert_eq!(done["attempt"], 2, "{done}");
    assert_eq!(done["result"]["sha256"], expected, "{done}");
}

#[tokio::test]
async fn another_process_goes_on_with_a_dead_ones_job() {
    taken_over(None).await;
}

#[tokio::test]
#[ignore = "needs a PostgreSQL server: .ci/with-postgres cargo test"]
async fn another_process_goes_on_with_a_dead_ones_job_by_postgresql() {
    taken_over(Some(&postgres().await)).await;
}

/// A schema of its own on the server.
async fn postgres() -> String {
    let server = std::env::var("LORIKEET_TEST_POSTGRES").unwrap();
    let schema = format!("t{}", uuid::Uuid::now_v7().simple());
    let mut connection = PgConnection::connect(&server).await.unwrap();
    let make = sqlx::AssertSqlSafe(format!("CREATE SCHEMA {schema}"));
    sqlx::raw_sql(make).execute(&mut connection).await.unwrap();
    format!("{server}?options[search_path]={schema}")
}

/// A way to a server that can be closed.
struct Door {
    url: String,
    open: watch::Sender<bool>,
}

impl Door {
    async fn to(url: &str) -> Self {
        let (head, tail) = url.split_once('@').unwrap();
        let (host, path) = tail.split_once('/').unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (open, host) = (watch::Sender::new(true), host.to_owned());
        let opened = open.subscribe();
        tokio::spawn(async move {
            loop {
                let (mut here, _) = listener.accept().await.unwrap();
                let (mut opened, host) = (opened.clone(), host.clone());
                tokio::spawn(async move {
                    if !*opened.borrow_and_update() {
                        return;
                    }
                    let mut there = TcpStream::connect(&host).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut here, &mut there) => {}
                        _ = opened.changed() => {}
                    }
                });
            }
        });
        Self {
            url: format!("{head}@{address}/{path}"),
            open,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a PostgreSQL server: .ci/with-postgres cargo test"]
async fn a_database_that_is_away_for_a_while_costs_a_job_nothing() {
    let fields = short("a", 60, json!({}));
    let expected = undisturbed(&fields).await;
    let door = Door::to(&postgres().await).await;
    let place = Place::new();
    let files = format!("{}/jobs", place.data());
    let server = place.serve(&["--database", &door.url, "--job-files", &files]);
    let job = submit(&server.url, &fields).await;
    stepped(&server.url, &job, 3).await;
    door.open.send_replace(false);
    time::sleep(Duration::from_secs(8)).await;
    // Longer than a lease. Requests that need it fail clearly, others go on.
    let asked = reqwest::get(format!("{}{job}", server.url)).await.unwrap();
    assert!(asked.headers().contains_key("retry-after"));
    let (status, error) = refusal(asked).await;
    assert_eq!(status, 503, "{error}");
    assert_eq!(error["code"], "job_store_unavailable");
    let painted = Client::new().post(format!("{}/v1/images/generations", server.url));
    ok(painted.json(&quick(json!({}))).send().await.unwrap()).await;
    door.open.send_replace(true);
    let done = finished(&server.url, &job).await;
    assert_eq!(done["state"], "succeeded", "{done}");
    assert_eq!(done["attempt"], 1, "{done}");
    assert_eq!(done["result"]["sha256"], expected, "{done}");
}

#[tokio::test]
async fn a_checkpoint_for_which_there_is_no_room_is_missed_and_the_job_goes_on() {
    let change = json!({"options": {
        "batch_size": 1, "resolution": 64, "checkpoint_every": 2, "rank": 128,
        "train_text_encoder": false
    }});
    let fields = short("a", 4, change);
    let place = Place::new();
    // Room for the adapter and not for a checkpoint, which has it three times.
    let server = place.serve_on_a_full_disk(10_000, &[]);
    let job = submit(&server.url, &fields).await;
    let done = finished(&server.url, &job).await;
    assert_eq!(done["state"], "succeeded", "{done}");
    let told = events(&server.url, &job, None).await;
    let failed = told.iter().find(|(_, kind, _)| kind == "checkpoint_failed");
    let (_, _, data) = failed.unwrap_or_else(|| panic!("{told:?}"));
    let reason = data["data"]["reason"].as_str().unwrap();
    assert!(reason.contains("full"), "{reason}");
    let size = done["result"]["bytes"].as_u64().unwrap();
    assert!(
        (1_800_000..5_000_000).contains(&size),
        "{size}: the test is about nothing"
    );
}
