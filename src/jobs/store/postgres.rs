//! A server that any number of replicas share.

use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use super::{super::JobError, Pools, migrator, unknown, unmigrated};

const TEXTS: [(&str, &str); 1] = [("jobs", include_str!("../migrations/postgres/0001_jobs.sql"))];
const CONNECTIONS: u32 = 8;

/// The server's time, which is the same for all its clients.
pub(super) const NOW: &str =
    "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT) AS now";

/// A lock until the transaction ends. The number stands for nothing; it is this room's.
pub(super) const SUBMITTING: &str = "SELECT pg_advisory_xact_lock(5347781206)";

pub(super) async fn open(url: &str, patience: Duration) -> Result<Pools, JobError> {
    let options: PgConnectOptions = url
        .parse()
        .map_err(|error: sqlx::Error| unknown(url, error.to_string()))?;
    let options = options.application_name("lorikeet").options([
        // A statement that cannot go on says so before we lose patience with the connection.
        ("statement_timeout", patience.as_millis().to_string()),
        // A process that stands still in a transaction does not keep its locks.
        ("idle_in_transaction_session_timeout", "60000".to_owned()),
    ]);
    let pool = PgPoolOptions::new()
        .max_connections(CONNECTIONS)
        .acquire_timeout(patience)
        .connect_with(options)
        .await?;
    migrator(&TEXTS)
        .run(&pool)
        .await
        .map_err(|error| unmigrated(url, error))?;
    Ok(Pools::Postgres(pool))
}
