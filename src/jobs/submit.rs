//! The way into the queue.

use serde_json::json;

use super::{
    Idempotency, Job, JobError, Jobs, NewJob, Submitted, event,
    store::{Tx, args},
};

impl Jobs {
    /// Puts a job into the queue. The same request made again, told by its idempotency key or by its
    /// id, gives the job that there is.
    pub async fn submit(&self, new: NewJob) -> Result<Submitted, JobError> {
        self.check(&new)?;
        let mut tx = self.db().write().await?;
        tx.alone_in_submitting().await?;
        if let Some(job) = before(&mut tx, &new).await? {
            let created = false;
            return Ok(Submitted { job, created });
        }
        self.room_for(&mut tx, &new.kind).await?;
        let job = insert(&mut tx, &new).await?;
        tx.commit().await?;
        self.ring(&job);
        let created = true;
        Ok(Submitted { job, created })
    }

    /// Whether a job says nothing that [`Jobs::submit`] would refuse.
    pub fn check(&self, new: &NewJob) -> Result<(), JobError> {
        new.check()?;
        if let Some(url) = &new.webhook {
            let checked = self.settings().webhooks.check(url);
            checked.map_err(|reason| JobError::invalid("webhook", reason))?;
        }
        Ok(())
    }

    /// The job that this very request made before, if it did.
    pub async fn made_before(&self, new: &NewJob) -> Result<Option<Job>, JobError> {
        before(&mut self.db().read().await?, new).await
    }

    async fn room_for(&self, tx: &mut Tx, kind: &str) -> Result<(), JobError> {
        let sql = "SELECT COUNT(*) AS n FROM jobs WHERE state = 'queued' AND kind = $1";
        let row = tx.row(sql, args![kind]).await?;
        let waiting = row.map_or(Ok(0), |row| row.int("n"))?;
        let limit = self.settings().max_queued;
        if waiting >= limit.into() {
            let kind = kind.to_owned();
            return Err(JobError::QueueFull { kind, limit });
        }
        Ok(())
    }
}

/// The job that this very request made before.
async fn before(tx: &mut Tx, new: &NewJob) -> Result<Option<Job>, JobError> {
    let columns = Job::COLUMNS;
    if let Some(Idempotency { key, hash }) = &new.idempotency {
        let sql = format!(
            "SELECT {columns}, request_hash FROM jobs WHERE owner = $1 AND idempotency_key = $2"
        );
        let owner = new.owner.as_deref().unwrap_or_default();
        if let Some(row) = tx.row(&sql, args![owner, &**key]).await? {
            if row.text("request_hash")? != *hash {
                return Err(JobError::KeyReused { key: key.clone() });
            }
            return Ok(Some(Job::from_row(&row)?));
        }
    }
    let sql = format!("SELECT {columns} FROM jobs WHERE id = $1");
    let row = tx.row(&sql, args![new.id]).await?;
    row.map(|row| Job::from_row(&row)).transpose()
}

async fn insert(tx: &mut Tx, new: &NewJob) -> Result<Job, JobError> {
    let now = tx.now().await?;
    let sql = format!(
        "INSERT INTO jobs (id, kind, owner, state, priority, payload, max_attempts, \
         idempotency_key, request_hash, webhook, not_before, created_at, last_seq) \
         VALUES ($1, $2, $3, 'queued', $4, $5, $6, $7, $8, $9, $10, $10, 1) RETURNING {}",
        Job::COLUMNS
    );
    let (key, hash) = match &new.idempotency {
        Some(given) => (Some(&*given.key), Some(&*given.hash)),
        None => (None, None),
    };
    let args = args![
        new.id,
        &*new.kind,
        new.owner.as_deref().unwrap_or_default(),
        new.priority,
        &new.payload,
        new.max_attempts,
        key,
        hash,
        new.webhook.as_deref(),
        now,
    ];
    let row = tx
        .row(&sql, args)
        .await?
        .ok_or(JobError::NotFound(new.id))?;
    let job = Job::from_row(&row)?;
    event::insert(tx, &job, "submitted", &json!({ "kind": job.kind })).await?;
    Ok(job)
}
