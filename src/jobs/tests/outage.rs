//! Silence, clocks that jump, and databases that are gone for a while.

use std::time::Instant;

use sqlx::{Connection as _, Executor as _, SqliteConnection};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::*;

on_both!(
    a_silence_costs_no_lease,
    a_silence_saves_a_dead_worker_once_only,
    a_clock_set_back_holds_nothing_up_for_longer_than_a_lease,
    a_clock_set_back_holds_nothing_up_for_longer_than_a_backoff,
);

async fn a_silence_costs_no_lease(ground: Ground) {
    let (jobs, other) = (ground.jobs().await, ground.jobs().await);
    let (one, two) = (running(&jobs).await, running(&jobs).await);
    // The database is gone, or the clock jumps. Somebody who wants work is back first.
    ground.clock.advance(Duration::from_secs(600));
    assert!(claim(&other).await.is_none());
    one.heartbeat(None).await.unwrap();
    ground.clock.advance(LEASE / 2);
    assert_eq!(other.reap().await.unwrap(), []);
    two.heartbeat(None).await.unwrap();
    for lease in [one, two] {
        assert_eq!(lease.succeed(&json!(1)).await.unwrap().failures, 0);
    }
}

async fn a_silence_saves_a_dead_worker_once_only(ground: Ground) {
    let jobs = ground.jobs().await;
    let dead = running(&jobs).await.job().id;
    // Nobody looks more often than this, so it is always silent.
    ground.clock.advance(LEASE * 2);
    assert_eq!(jobs.reap().await.unwrap(), []);
    ground.clock.advance(LEASE * 2);
    assert_eq!(jobs.reap().await.unwrap(), [dead]);
}

async fn a_clock_set_back_holds_nothing_up_for_longer_than_a_lease(ground: Ground) {
    let jobs = ground.jobs().await;
    let (alive, dead) = (running(&jobs).await, running(&jobs).await.job().id);
    ground.clock.shift(-24 * 3600 * 1000);
    alive.heartbeat(None).await.unwrap();
    jobs.reap().await.unwrap();
    for _ in 0..2 {
        ground.pass(&jobs, LEASE / 2).await;
        alive.heartbeat(None).await.unwrap();
    }
    assert_eq!(state(&jobs, dead).await, JobState::Queued);
    assert_eq!(state(&jobs, alive.job().id).await, JobState::Running);
}

async fn a_clock_set_back_holds_nothing_up_for_longer_than_a_backoff(ground: Ground) {
    let jobs = ground.jobs().await;
    let lease = running(&jobs).await;
    lease.fail("x", "x", true).await.unwrap();
    assert!(claim(&jobs).await.is_none());
    ground.clock.shift(-24 * 3600 * 1000);
    assert!(claim(&jobs).await.is_some());
}

fn unavailable<T: std::fmt::Debug>(result: Result<T, JobError>) {
    assert!(
        matches!(result, Err(JobError::Unavailable { .. })),
        "{result:?}"
    );
}

#[tokio::test]
async fn a_locked_file_is_unavailable_and_then_it_is_not() {
    let ground = Ground::sqlite();
    let settings = JobSettings {
        patience: Duration::from_millis(100),
        ..ground.settings()
    };
    let jobs = ground.jobs_with(settings).await;
    let lease = running(&jobs).await;
    let mut somebody = SqliteConnection::connect(&ground.url).await.unwrap();
    somebody.execute("BEGIN IMMEDIATE").await.unwrap();
    unavailable(jobs.submit(job()).await);
    unavailable(lease.heartbeat(None).await);
    unavailable(lease.succeed(&json!(1)).await);
    // Looking is still possible.
    assert_eq!(state(&jobs, lease.job().id).await, JobState::Running);
    somebody.execute("ROLLBACK").await.unwrap();
    lease.succeed(&json!(1)).await.unwrap();
    submit(&jobs).await;
}

/// A way to the PostgreSQL server that can be cut, at `port`.
async fn way(port: u16, server: String) -> (u16, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let way = tokio::spawn(async move {
        // Dropped with the listener, and each connection with it.
        let mut connections = JoinSet::new();
        while let Ok((mut from, _)) = listener.accept().await {
            let mut to = TcpStream::connect(&server).await.unwrap();
            connections.spawn(async move {
                // How it ends is the test's affair.
                let _ = copy_bidirectional(&mut from, &mut to).await;
            });
        }
    });
    (port, way)
}

#[tokio::test]
#[ignore = "needs a PostgreSQL server: .ci/with-postgres cargo test"]
async fn a_server_that_is_gone_is_unavailable_and_then_it_is_not() {
    let ground = Ground::postgres().await;
    let (host, rest) = ground
        .url
        .split_once('@')
        .unwrap()
        .1
        .split_once('/')
        .unwrap();
    let (port, open) = way(0, host.to_owned()).await;
    let settings = JobSettings {
        patience: Duration::from_millis(500),
        ..ground.settings()
    };
    let url = format!("postgres://lorikeet@127.0.0.1:{port}/{rest}");
    let jobs = Jobs::open(&url, settings).await.unwrap();
    let lease = running(&jobs).await;

    open.abort();
    let began = Instant::now();
    unavailable(lease.heartbeat(None).await);
    unavailable(jobs.submit(job()).await);
    unavailable(jobs.get(lease.job().id).await);
    unavailable(jobs.ping().await);
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );

    let (_, _open) = way(port, host.to_owned()).await;
    lease.heartbeat(None).await.unwrap();
    assert_eq!(lease.succeed(&json!(1)).await.unwrap().failures, 0);
    submit(&jobs).await;
}
