//! The log of a job: what happened to it, numbered 1, 2, 3, … without gaps.

use serde::Serialize;
use serde_json::Value;

use super::{
    Job, JobError, JobId, Jobs, Watch,
    store::{Tx, args},
};

/// Most events given at once.
pub const MOST_EVENTS: u32 = 1000;

/// An entry in a job's log.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JobEvent {
    /// One more than the one before it.
    pub seq: u64,
    /// Milliseconds since 1970.
    pub at: i64,
    /// An [`Event`](super::Event)'s name, `submitted`, a wish's, or whatever the worker calls it.
    pub kind: String,
    pub data: Value,
}

/// Writes the entry that `job.last_seq` was just raised for, in the same transaction.
pub(super) async fn insert(
    tx: &mut Tx,
    job: &Job,
    kind: &str,
    data: &Value,
) -> Result<(), JobError> {
    let now = tx.now().await?;
    let sql = "INSERT INTO job_events (job, seq, at, kind, data) VALUES ($1, $2, $3, $4, $5)";
    let seq = i64::try_from(job.last_seq).unwrap_or(i64::MAX);
    tx.execute(sql, args![job.id, seq, now, kind, data]).await?;
    Ok(())
}

impl Jobs {
    /// What happened after entry `after` (0 for everything), oldest first, at most `limit` entries.
    pub async fn events(
        &self,
        id: JobId,
        after: u64,
        limit: u32,
    ) -> Result<Vec<JobEvent>, JobError> {
        let mut tx = self.db().read().await?;
        let known = tx
            .row("SELECT id FROM jobs WHERE id = $1", args![id])
            .await?;
        known.ok_or(JobError::NotFound(id))?;
        let sql = "SELECT seq, at, kind, data FROM job_events WHERE job = $1 AND seq > $2 \
                   ORDER BY seq LIMIT $3";
        let after = i64::try_from(after).unwrap_or(i64::MAX);
        let rows = tx
            .rows(sql, args![id, after, limit.min(MOST_EVENTS)])
            .await?;
        rows.iter()
            .map(|row| {
                Ok(JobEvent {
                    seq: row.count("seq")?.into(),
                    at: row.int("at")?,
                    kind: row.text("kind")?,
                    data: row.json("data")?,
                })
            })
            .collect()
    }

    /// Tells when there may be something new about a job. Make it before the first look at the job, and
    /// nothing is missed.
    pub fn watch(&self, id: JobId) -> Watch {
        self.bell().watch(id)
    }

    /// Tells when there may be something to claim. Make it before the first [`Jobs::claim`].
    pub fn work(&self) -> Watch {
        self.bell().work()
    }
}
