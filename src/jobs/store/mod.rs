//! The database: SQLite in a file, or a PostgreSQL server.
//!
//! Every statement is one text for both. They agree on `$1`, `RETURNING`, `ON CONFLICT` and partial
//! indexes; the tables hold nothing but text and 64-bit integers. Where they differ is in this folder:
//! how a writing transaction begins, how a row is locked, whose clock counts, and what to do so that
//! submissions come one after the other.

mod postgres;
mod sql;
mod sqlite;

use std::{future::Future, time::Duration};

use sqlx::{AssertSqlSafe, Postgres, SqlSafeStr as _, Sqlite, Transaction, migrate};

use super::{Clock, JobError, clock};
pub(super) use sql::{Arg, Row, args};

/// The tables that hold which migrations were made. Named for this room: another one may share the
/// database.
const MIGRATIONS: &str = "_jobs_migrations";

#[derive(Debug, Clone)]
pub(super) struct Db {
    pools: Pools,
    clock: Clock,
    /// How long a statement may take.
    patience: Duration,
}

#[derive(Debug, Clone)]
enum Pools {
    Sqlite {
        /// One connection: writers of one process queue up here, and not at the file's lock.
        write: sqlx::SqlitePool,
        read: sqlx::SqlitePool,
    },
    Postgres(sqlx::PgPool),
}

/// A transaction. Dropped, it is rolled back.
pub(super) struct Tx {
    inner: Inner,
    clock: Clock,
    patience: Duration,
    now: Option<i64>,
}

enum Inner {
    Sqlite(Transaction<'static, Sqlite>),
    Postgres(Transaction<'static, Postgres>),
}

impl Db {
    /// Opens it by its address and brings its tables up to date.
    pub async fn open(url: &str, clock: Clock, patience: Duration) -> Result<Self, JobError> {
        let pools = match url.split_once(':') {
            Some(("sqlite", file)) => sqlite::open(url, file, patience).await?,
            Some(("postgres" | "postgresql", _)) => postgres::open(url, patience).await?,
            _ => {
                return Err(unknown(
                    url,
                    "expected sqlite://FILE or postgres://…".into(),
                ));
            }
        };
        Ok(Self {
            pools,
            clock,
            patience,
        })
    }

    /// A transaction that only reads.
    pub async fn read(&self) -> Result<Tx, JobError> {
        let inner = match &self.pools {
            Pools::Sqlite { read, .. } => Inner::Sqlite(read.begin().await?),
            Pools::Postgres(pool) => Inner::Postgres(pool.begin().await?),
        };
        Ok(self.tx(inner))
    }

    /// A transaction that may write.
    pub async fn write(&self) -> Result<Tx, JobError> {
        let inner = match &self.pools {
            // At once: a reader that becomes a writer later is refused when another was faster.
            Pools::Sqlite { write, .. } => {
                Inner::Sqlite(write.begin_with("BEGIN IMMEDIATE").await?)
            }
            Pools::Postgres(pool) => Inner::Postgres(pool.begin().await?),
        };
        Ok(self.tx(inner))
    }

    fn tx(&self, inner: Inner) -> Tx {
        Tx {
            inner,
            clock: self.clock.clone(),
            patience: self.patience,
            now: None,
        }
    }

    /// Closes every connection, once what they do is done.
    pub async fn close(&self) {
        match &self.pools {
            Pools::Sqlite { write, read } => {
                write.close().await;
                read.close().await;
            }
            Pools::Postgres(pool) => pool.close().await,
        }
    }
}

impl Tx {
    /// The number of rows it changed.
    pub async fn execute(&mut self, sql: &str, args: &[Arg]) -> Result<u64, JobError> {
        let patience = self.patience;
        in_time(patience, async {
            Ok(match &mut self.inner {
                Inner::Sqlite(tx) => {
                    let query = sql::bound::<Sqlite>(sql, args);
                    query.execute(&mut **tx).await?.rows_affected()
                }
                Inner::Postgres(tx) => {
                    let query = sql::bound::<Postgres>(sql, args);
                    query.execute(&mut **tx).await?.rows_affected()
                }
            })
        })
        .await
    }

    /// Every row it gives.
    pub async fn rows(&mut self, sql: &str, args: &[Arg]) -> Result<Vec<Row>, JobError> {
        let patience = self.patience;
        in_time(patience, async {
            Ok(match &mut self.inner {
                Inner::Sqlite(tx) => {
                    let rows = sql::bound::<Sqlite>(sql, args).fetch_all(&mut **tx).await?;
                    rows.into_iter().map(Row::Sqlite).collect()
                }
                Inner::Postgres(tx) => {
                    let rows = sql::bound::<Postgres>(sql, args)
                        .fetch_all(&mut **tx)
                        .await?;
                    rows.into_iter().map(Row::Postgres).collect()
                }
            })
        })
        .await
    }

    /// The first row it gives.
    pub async fn row(&mut self, sql: &str, args: &[Arg]) -> Result<Option<Row>, JobError> {
        Ok(self.rows(sql, args).await?.into_iter().next())
    }

    pub async fn commit(self) -> Result<(), JobError> {
        in_time(self.patience, async {
            match self.inner {
                Inner::Sqlite(tx) => tx.commit().await?,
                Inner::Postgres(tx) => tx.commit().await?,
            }
            Ok(())
        })
        .await
    }

    /// The time of this transaction: one for all it writes.
    pub async fn now(&mut self) -> Result<i64, JobError> {
        if let Some(now) = self.now {
            return Ok(now);
        }
        let now = match (self.clock.standing(), &self.inner) {
            (Some(now), _) => now,
            (None, Inner::Sqlite(_)) => clock::machine(),
            (None, Inner::Postgres(_)) => {
                let row = self.row(postgres::NOW, &[]).await?;
                row.map_or(Ok(0), |row| row.int("now"))?
            }
        };
        self.now = Some(now);
        Ok(now)
    }

    /// What to put behind a SELECT whose rows nobody else is to change meanwhile. A writing SQLite
    /// transaction is alone anyway.
    pub fn for_update(&self) -> &'static str {
        match self.inner {
            Inner::Sqlite(_) => "",
            Inner::Postgres(_) => " FOR UPDATE",
        }
    }

    /// The same, passing over rows that another has locked. The table is to be called `j`.
    pub fn for_update_of_free(&self) -> &'static str {
        match self.inner {
            Inner::Sqlite(_) => "",
            Inner::Postgres(_) => " FOR UPDATE OF j SKIP LOCKED",
        }
    }

    /// Waits until no other submission is under way, and holds up the next: a limit is exact then.
    pub async fn alone_in_submitting(&mut self) -> Result<(), JobError> {
        if matches!(self.inner, Inner::Postgres(_)) {
            self.execute(postgres::SUBMITTING, &[]).await?;
        }
        Ok(())
    }
}

/// A server that is gone without a word would keep us waiting for ever.
async fn in_time<T>(
    patience: Duration,
    work: impl Future<Output = Result<T, JobError>>,
) -> Result<T, JobError> {
    // SQLite and PostgreSQL give up by themselves after once as long, and say more about it.
    match tokio::time::timeout(patience * 2, work).await {
        Ok(result) => result,
        Err(_) => Err(JobError::Unavailable {
            reason: format!("no answer within {:?}", patience * 2),
        }),
    }
}

fn unknown(url: &str, reason: String) -> JobError {
    let url = without_password(url);
    JobError::Address { url, reason }
}

/// An address that may be shown.
fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    match rest.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://…@{host}"),
        None => url.to_owned(),
    }
}

/// The migrations of a dialect, by number from 1.
fn migrator(texts: &[(&'static str, &'static str)]) -> migrate::Migrator {
    let migrations = texts.iter().zip(1..).map(|((name, sql), version)| {
        migrate::Migration::new(
            version,
            (*name).into(),
            migrate::MigrationType::Simple,
            AssertSqlSafe(*sql).into_sql_str(),
            false,
        )
    });
    let mut migrator = migrate::Migrator::with_migrations(migrations.collect());
    migrator.dangerous_set_table_name(MIGRATIONS);
    migrator
}

/// What went wrong in bringing the tables up to date.
fn unmigrated(url: &str, error: migrate::MigrateError) -> JobError {
    match error {
        migrate::MigrateError::Execute(error)
        | migrate::MigrateError::ExecuteMigration(error, _) => error.into(),
        // Made by another version of this program, say.
        error => unknown(url, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_shown_without_its_password() {
        let shown = without_password("postgres://me:secret@db:5432/jobs");
        assert_eq!(shown, "postgres://…@db:5432/jobs");
        assert_eq!(without_password("sqlite://a/b.db"), "sqlite://a/b.db");
    }

    #[tokio::test]
    async fn what_is_no_address_of_a_database_is_said_to_be_none() {
        for url in [
            "",
            "jobs.db",
            "mysql://x/y",
            "sqlite:",
            "sqlite://",
            "postgres://[",
        ] {
            let opened = Db::open(url, Clock::default(), Duration::from_secs(1)).await;
            assert!(
                matches!(opened, Err(JobError::Address { .. })),
                "{url}: {opened:?}"
            );
        }
    }
}
