//! The promises of this room, on SQLite in a file and, where `LORIKEET_TEST_POSTGRES` leads to one, on a
//! PostgreSQL server. `.ci/with-postgres` starts one.

mod leases;
mod log;
mod opening;
mod outage;
mod queue;
mod retention;
mod webhooks;
mod wishes;

use std::time::Duration;

use serde_json::json;
use sqlx::{Connection as _, PgConnection};
use tempfile::TempDir;
use uuid::Uuid;

use super::*;

/// Each test once on SQLite and once on PostgreSQL.
macro_rules! on_both {
    ($($test:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() {
                super::$test(crate::jobs::tests::Ground::sqlite()).await;
            })*
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            #[ignore = "needs a PostgreSQL server: .ci/with-postgres cargo test"]
            async fn $test() {
                super::$test(crate::jobs::tests::Ground::postgres().await).await;
            })*
        }
    };
}
use on_both;

const LEASE: Duration = Duration::from_secs(30);
const KIND: &str = "training";
/// Some day in 2026.
const BEGIN: i64 = 1_790_000_000_000;

/// An empty database, the time there, and a folder.
struct Ground {
    url: String,
    clock: Clock,
    folder: TempDir,
}

impl Ground {
    fn sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            url: format!("sqlite://{}/jobs.db", folder.path().display()),
            clock: Clock::standing_at(BEGIN),
            folder,
        }
    }

    /// A schema of its own on the server.
    async fn postgres() -> Self {
        let server = std::env::var("LORIKEET_TEST_POSTGRES")
            .expect("LORIKEET_TEST_POSTGRES: run this through .ci/with-postgres");
        let schema = format!("t{}", Uuid::now_v7().simple());
        let mut connection = PgConnection::connect(&server).await.unwrap();
        let make = sqlx::AssertSqlSafe(format!("CREATE SCHEMA {schema}"));
        sqlx::raw_sql(make).execute(&mut connection).await.unwrap();
        Self {
            url: format!("{server}?options[search_path]={schema}"),
            clock: Clock::standing_at(BEGIN),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn settings(&self) -> JobSettings {
        JobSettings {
            poll: Duration::from_millis(20),
            patience: Duration::from_secs(10),
            clock: self.clock.clone(),
            ..JobSettings::default()
        }
    }

    /// The queue as one more process has it: with connections and bells of its own.
    async fn jobs(&self) -> Jobs {
        self.jobs_with(self.settings()).await
    }

    async fn jobs_with(&self, settings: JobSettings) -> Jobs {
        Jobs::open(&self.url, settings).await.unwrap()
    }

    /// Lets time pass while somebody looks at the queue, as a waiting worker does.
    async fn pass(&self, jobs: &Jobs, time: Duration) {
        let step = LEASE / 4;
        let mut left = time;
        while !left.is_zero() {
            let now = left.min(step);
            self.clock.advance(now);
            jobs.reap().await.unwrap();
            left -= now;
        }
    }
}

fn job() -> NewJob {
    NewJob::new(KIND, json!({ "steps": 10 }))
}

async fn submit(jobs: &Jobs) -> JobId {
    jobs.submit(job()).await.unwrap().job.id
}

/// By a worker nobody has heard of before.
async fn claim(jobs: &Jobs) -> Option<Lease> {
    jobs.claim(WorkerId::fresh(), &[KIND], LEASE).await.unwrap()
}

/// A job and the lease on it.
async fn running(jobs: &Jobs) -> Lease {
    let id = submit(jobs).await;
    let lease = claim(jobs).await.unwrap();
    assert_eq!(lease.job().id, id);
    lease
}

async fn state(jobs: &Jobs, id: JobId) -> JobState {
    jobs.get(id).await.unwrap().state
}

fn lost<T: std::fmt::Debug>(result: Result<T, JobError>) {
    assert!(matches!(result, Err(JobError::LeaseLost(_))), "{result:?}");
}

/// What happened to a job, by name; the numbers must be 1, 2, 3, …
async fn log(jobs: &Jobs, id: JobId) -> Vec<String> {
    let events = jobs.events(id, 0, MOST_EVENTS).await.unwrap();
    for (event, n) in events.iter().zip(1..) {
        assert_eq!(event.seq, n);
    }
    assert_eq!(jobs.get(id).await.unwrap().last_seq, events.len() as u64);
    events.into_iter().map(|event| event.kind).collect()
}
