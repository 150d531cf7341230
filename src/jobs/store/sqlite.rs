//! A file on this machine. Several processes may share it, on a local disk.

use std::{path::Path, time::Duration};

use sqlx::{
    SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

use super::{super::JobError, Pools, migrator, unknown, unmigrated};

const TEXTS: [(&str, &str); 1] = [("jobs", include_str!("../migrations/sqlite/0001_jobs.sql"))];
const READERS: u32 = 4;
/// Two processes that make one new file meet in making it a write-ahead one, where SQLite does not wait
/// for a lock, and in making the tables, for which it has none. The second finds it all made when it
/// tries again.
const TRIES: u32 = 20;
const BETWEEN: Duration = Duration::from_millis(50);

/// `file` is what stands behind `sqlite:`.
pub(super) async fn open(url: &str, file: &str, patience: Duration) -> Result<Pools, JobError> {
    let options = SqliteConnectOptions::new()
        .create_if_missing(true)
        .foreign_keys(true)
        .busy_timeout(patience)
        // What was answered is on the disk, also when the power fails.
        .synchronous(SqliteSynchronous::Full);
    // SQLite itself looks for a dead connection's file; a ping would tell nothing.
    let pool = SqlitePoolOptions::new()
        .acquire_timeout(patience)
        .test_before_acquire(false);
    if file == ":memory:" {
        // One connection, for ever: with the last one the content goes.
        let pool = pool
            .max_connections(1)
            .idle_timeout(None)
            .max_lifetime(None);
        let pool = pool.connect_with(options.in_memory(true)).await?;
        tables(url, &pool).await?;
        let (write, read) = (pool.clone(), pool);
        return Ok(Pools::Sqlite { write, read });
    }
    let file = file.strip_prefix("//").unwrap_or(file);
    if file.is_empty() {
        return Err(unknown(url, "expected sqlite://FILE".into()));
    }
    if let Some(folder) = Path::new(file).parent() {
        std::fs::create_dir_all(folder).map_err(|error| JobError::Unavailable {
            reason: format!("{}: {error}", folder.display()),
        })?;
    }
    let options = options.filename(file).journal_mode(SqliteJournalMode::Wal);
    for _ in 1..TRIES {
        match writer(url, &pool, &options).await {
            Ok(write) => return with_readers(write, pool, options).await,
            Err(error) => tracing::debug!(%error, "opening the database once more"),
        }
        tokio::time::sleep(BETWEEN).await;
    }
    let write = writer(url, &pool, &options).await?;
    with_readers(write, pool, options).await
}

/// The one connection that writes, to a file whose tables are there.
async fn writer(
    url: &str,
    pool: &SqlitePoolOptions,
    options: &SqliteConnectOptions,
) -> Result<SqlitePool, JobError> {
    let pool = pool.clone().max_connections(1);
    let write = pool.connect_with(options.clone()).await?;
    tables(url, &write).await?;
    Ok(write)
}

async fn with_readers(
    write: SqlitePool,
    pool: SqlitePoolOptions,
    options: SqliteConnectOptions,
) -> Result<Pools, JobError> {
    let read = pool.max_connections(READERS).connect_with(options).await?;
    Ok(Pools::Sqlite { write, read })
}

async fn tables(url: &str, pool: &SqlitePool) -> Result<(), JobError> {
    let made = migrator(&TEXTS).run(pool).await;
    made.map_err(|error| unmigrated(url, error))
}
