//! A worker's hold on a job.

use serde_json::{Value, json};

use super::{
    Event, Job, JobError, JobFailure, JobState, Jobs, Wishes, WorkerId,
    change::{self, Change},
    event,
    job::{check_json, check_word},
    pulse,
    store::{Tx, args},
};

/// Most bytes of a failure's message that are kept.
const LONGEST_MESSAGE: usize = 4096;

/// The right to work on a job, for as long as it is renewed. Every write goes through it and is refused
/// ([`JobError::LeaseLost`]) once somebody else has the job or it is over.
///
/// Dropping it says nothing to anybody: that is what a crash does. The ways to end it well are
/// [`Lease::succeed`], [`Lease::fail`], [`Lease::cancelled`], [`Lease::paused`] and
/// [`Lease::release`]; each can be called again when the database was out of reach, and says yes again
/// when it had been done after all.
#[derive(Debug)]
pub struct Lease {
    jobs: Jobs,
    job: Job,
    worker: WorkerId,
}

impl Lease {
    pub(super) fn new(jobs: Jobs, job: Job, worker: WorkerId) -> Self {
        Self { jobs, job, worker }
    }

    /// The job as it was when it was claimed.
    pub fn job(&self) -> &Job {
        &self.job
    }

    /// Who holds it.
    pub fn worker(&self) -> WorkerId {
        self.worker
    }

    /// Renews the lease, leaves word of how far the work is, and hears what is wished.
    pub async fn heartbeat(&self, progress: Option<&Value>) -> Result<Wishes, JobError> {
        if let Some(progress) = progress {
            check_json("progress", progress)?;
        }
        let mut tx = self.jobs.db().write().await?;
        let now = tx.now().await?;
        pulse::beat(&mut tx, now).await?;
        let sql = "UPDATE jobs SET lease_expires = $1 + lease_ms, lease_prolonged = 0, \
                   progress = COALESCE($2, progress) \
                   WHERE id = $3 AND state = 'running' AND worker = $4 AND attempt = $5 \
                   RETURNING cancel_wish, pause_wish";
        let args = args![now, progress, self.job.id, self.worker, self.job.attempt];
        let row = tx.row(sql, args).await?.ok_or(self.lost())?;
        let wishes = Wishes {
            cancel: row.flag("cancel_wish")?,
            pause: row.flag("pause_wish")?,
        };
        tx.commit().await?;
        Ok(wishes)
    }

    /// The work got further, and what it has is kept: attempts that went wrong before count no more.
    /// A long job outlives any number of crashes, and one that crashes at the same place over and over
    /// does not.
    pub async fn progressed(&self) -> Result<(), JobError> {
        let mut tx = self.jobs.db().write().await?;
        let sql = "UPDATE jobs SET failures = 0 \
                   WHERE id = $1 AND state = 'running' AND worker = $2 AND attempt = $3";
        let args = args![self.job.id, self.worker, self.job.attempt];
        if tx.execute(sql, args).await? == 0 {
            return Err(self.lost());
        }
        tx.commit().await
    }

    /// Writes into the job's log; gives the entry's number.
    pub async fn append(&self, kind: &str, data: &Value) -> Result<u64, JobError> {
        check_word("event", kind)?;
        check_json("data", data)?;
        let mut tx = self.jobs.db().write().await?;
        let sql = format!(
            "UPDATE jobs SET last_seq = last_seq + 1 \
             WHERE id = $1 AND state = 'running' AND worker = $2 AND attempt = $3 RETURNING {}",
            Job::COLUMNS
        );
        let args = args![self.job.id, self.worker, self.job.attempt];
        let row = tx.row(&sql, args).await?.ok_or(self.lost())?;
        let job = Job::from_row(&row)?;
        event::insert(&mut tx, &job, kind, data).await?;
        tx.commit().await?;
        self.jobs.ring(&job);
        Ok(job.last_seq)
    }

    /// It is done, and this came of it.
    pub async fn succeed(&self, result: &Value) -> Result<Job, JobError> {
        check_json("result", result)?;
        self.end(&[JobState::Succeeded], async |tx, job| {
            let change = Change::new(Event::Succeed).set("result", result);
            change.by(Some(self.worker)).make(tx, job).await
        })
        .await
    }

    /// This attempt went wrong. A retryable failure puts the job back after a back-off while it has
    /// attempts left, or grants what was wished of it.
    pub async fn fail(&self, code: &str, message: &str, retryable: bool) -> Result<Job, JobError> {
        check_word("code", code)?;
        let ends = [
            JobState::Failed,
            JobState::Queued,
            JobState::Paused,
            JobState::Cancelled,
        ];
        self.end(&ends, async |tx, job| {
            let failure = JobFailure {
                code: code.to_owned(),
                message: storable(message),
            };
            let backoff = self.jobs.settings().backoff;
            let holder = Some(self.worker);
            change::after_failure(tx, job, holder, failure, retryable, backoff).await
        })
        .await
    }

    /// It was stopped because somebody wished so; what there is of it may be kept.
    pub async fn cancelled(&self, result: Option<&Value>) -> Result<Job, JobError> {
        if let Some(result) = result {
            check_json("result", result)?;
        }
        self.end(&[JobState::Cancelled], async |tx, job| {
            let change = Change::new(Event::Cancel).set("result", result);
            change.by(Some(self.worker)).make(tx, job).await
        })
        .await
    }

    /// It was stopped where it can go on, and waits to be resumed.
    pub async fn paused(&self) -> Result<Job, JobError> {
        self.end(&[JobState::Paused], async |tx, job| {
            Change::new(Event::Pause)
                .by(Some(self.worker))
                .make(tx, job)
                .await
        })
        .await
    }

    /// Puts it back for the next worker at once, without using up an attempt: this one has to go. What
    /// was wished of it is granted instead.
    pub async fn release(&self) -> Result<Job, JobError> {
        let ends = [JobState::Queued, JobState::Paused, JobState::Cancelled];
        self.end(&ends, async |tx, job| {
            let event = match job.wishes {
                Wishes { cancel: true, .. } => Event::Cancel,
                Wishes { pause: true, .. } => Event::Pause,
                _ => Event::Release,
            };
            let data = json!({ "attempt": job.attempt });
            let change = Change::new(event).data(data).by(Some(self.worker));
            change.make(tx, job).await
        })
        .await
    }

    /// Ends the lease by `change`, unless that was done before and the answer was lost.
    async fn end(
        &self,
        ends: &[JobState],
        change: impl AsyncFnOnce(&mut Tx, &Job) -> Result<Job, JobError>,
    ) -> Result<Job, JobError> {
        let mut tx = self.jobs.db().write().await?;
        let locked = match change::locked(&mut tx, self.job.id).await {
            Err(JobError::NotFound(_)) => return Err(self.lost()),
            other => other?,
        };
        if !locked.last_held_by(self.worker, self.job.attempt) {
            return Err(self.lost());
        }
        if ends.contains(&locked.job.state) {
            return Ok(locked.job);
        }
        if locked.job.state != JobState::Running {
            return Err(self.lost());
        }
        let job = change(&mut tx, &locked.job).await?;
        tx.commit().await?;
        self.jobs.ring(&job);
        Ok(job)
    }

    fn lost(&self) -> JobError {
        JobError::LeaseLost(self.job.id)
    }
}

/// PostgreSQL's text has no zero bytes, and nobody reads a whole core dump.
fn storable(message: &str) -> String {
    let mut message = message.replace('\0', "");
    message.truncate(message.floor_char_boundary(LONGEST_MESSAGE));
    message
}
