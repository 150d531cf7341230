//! What people outside can do to a job.

use serde_json::json;

use super::{
    Event, Job, JobError, JobId, JobState, Jobs,
    change::{self, Change},
    event,
    store::Tx,
};

impl Jobs {
    /// Stops a job for good: at once if nobody works on it, else at its worker's next heartbeat.
    pub async fn cancel(&self, id: JobId) -> Result<Job, JobError> {
        self.wish(id, Event::Cancel).await
    }

    /// Stops a job until it is resumed: at once if nobody works on it, else at its worker's next
    /// heartbeat.
    pub async fn pause(&self, id: JobId) -> Result<Job, JobError> {
        self.wish(id, Event::Pause).await
    }

    /// Puts a paused job back into the queue; of a running one, takes back the wish to pause it.
    pub async fn resume(&self, id: JobId) -> Result<Job, JobError> {
        let mut tx = self.db().write().await?;
        let job = change::locked(&mut tx, id).await?.job;
        let job = match job.state {
            JobState::Running if job.wishes.pause => {
                noted(&mut tx, &job, "pause_wish = 0", "pause_withdrawn").await?
            }
            _ => Change::new(Event::Resume).make(&mut tx, &job).await?,
        };
        tx.commit().await?;
        self.ring(&job);
        Ok(job)
    }

    async fn wish(&self, id: JobId, event: Event) -> Result<Job, JobError> {
        let mut tx = self.db().write().await?;
        let job = change::locked(&mut tx, id).await?.job;
        let job = match (job.state, event) {
            (JobState::Running, Event::Cancel) if job.wishes.cancel => return Ok(job),
            (JobState::Running, Event::Cancel) => {
                noted(&mut tx, &job, "cancel_wish = 1", "cancel_requested").await?
            }
            // It will be cancelled, and what is cancelled is not paused.
            (JobState::Running, _) if job.wishes.pause || job.wishes.cancel => return Ok(job),
            (JobState::Running, _) => {
                noted(&mut tx, &job, "pause_wish = 1", "pause_requested").await?
            }
            _ => Change::new(event).make(&mut tx, &job).await?,
        };
        tx.commit().await?;
        self.ring(&job);
        Ok(job)
    }
}

/// Leaves word for the worker of a running job.
async fn noted(tx: &mut Tx, job: &Job, set: &str, kind: &str) -> Result<Job, JobError> {
    let sql = format!(
        "UPDATE jobs SET {set}, last_seq = last_seq + 1 \
         WHERE id = $1 AND state = 'running' AND attempt = $2 RETURNING {}",
        Job::COLUMNS
    );
    let Some(row) = tx.row(&sql, &[job.id.into(), job.attempt.into()]).await? else {
        return Err(JobError::Unavailable {
            reason: format!("job `{}` was changed this very moment", job.id),
        });
    };
    let job = Job::from_row(&row)?;
    event::insert(tx, &job, kind, &json!({})).await?;
    Ok(job)
}
