//! The one way from a state to another: the pure function decides, the row is changed only if it is
//! still what was decided upon, and event and webhook are written in the same transaction.

use serde_json::{Value, json};

use super::{
    Backoff, Event, Job, JobError, JobFailure, JobId, WorkerId,
    clock::millis,
    event,
    store::{Arg, Row, Tx},
    webhook::outbox,
};

/// A job that nobody else changes until the transaction ends.
pub(super) struct Locked {
    pub job: Job,
    /// Who has it, or had it last and ended the lease himself.
    pub worker: Option<String>,
}

impl Locked {
    pub fn from_row(row: &Row) -> Result<Self, JobError> {
        Ok(Self {
            job: Job::from_row(row)?,
            worker: row.maybe_text("worker")?,
        })
    }

    /// Whether the last lease was this one.
    pub fn last_held_by(&self, worker: WorkerId, attempt: u32) -> bool {
        self.job.attempt == attempt && self.worker == Some(worker.to_string())
    }
}

pub(super) async fn locked(tx: &mut Tx, id: JobId) -> Result<Locked, JobError> {
    let (columns, locked) = (Job::COLUMNS, tx.for_update());
    let sql = format!("SELECT {columns} FROM jobs WHERE id = $1{locked}");
    let row = tx.row(&sql, &[id.into()]).await?;
    Locked::from_row(&row.ok_or(JobError::NotFound(id))?)
}

/// What is to happen to a job, and what is to be written with it.
pub(super) struct Change {
    pub event: Event,
    /// Columns besides the state's own.
    pub set: Vec<(&'static str, Arg)>,
    /// Of the entry in the log.
    pub data: Value,
    /// Whose lease it happens by; `None` for everybody outside.
    pub holder: Option<WorkerId>,
}

impl Change {
    pub fn new(event: Event) -> Self {
        Self {
            event,
            set: Vec::new(),
            data: json!({}),
            holder: None,
        }
    }

    pub fn set(mut self, column: &'static str, value: impl Into<Arg>) -> Self {
        self.set.push((column, value.into()));
        self
    }

    pub fn data(self, data: Value) -> Self {
        Self { data, ..self }
    }

    pub fn by(self, holder: Option<WorkerId>) -> Self {
        Self { holder, ..self }
    }

    /// Makes the change to a job that is as `job` says.
    pub async fn make(self, tx: &mut Tx, job: &Job) -> Result<Job, JobError> {
        let to = job.state.after(self.event)?;
        let now = tx.now().await?;
        let (mut sql, mut args) = (
            String::from("UPDATE jobs SET last_seq = last_seq + 1"),
            vec![],
        );
        let mut put = |text: &str, value: Arg| {
            args.push(value);
            sql.push_str(&format!("{text} = ${}", args.len()));
        };
        put(", state", to.into());
        put(", cancel_wish", 0.into());
        put(", pause_wish", 0.into());
        if to.is_terminal() {
            put(", finished_at", now.into());
        }
        if self.holder.is_none() && self.event != Event::Claim {
            // Whoever had it is not to take this for his own doing.
            put(", worker", Arg::Text(None));
        }
        for (column, value) in self.set {
            put(&format!(", {column}"), value);
        }
        put(" WHERE id", job.id.into());
        put(" AND state", job.state.into());
        put(" AND attempt", job.attempt.into());
        if let Some(worker) = self.holder {
            put(" AND worker", worker.into());
        }
        sql.push_str(&format!(" RETURNING {}", Job::COLUMNS));
        let Some(row) = tx.row(&sql, &args).await? else {
            return Err(JobError::Unavailable {
                reason: format!("job `{}` was changed this very moment", job.id),
            });
        };
        let job = Job::from_row(&row)?;
        event::insert(tx, &job, self.event.name(), &self.data).await?;
        if job.state.is_terminal() {
            outbox::enqueue(tx, &job).await?;
        }
        Ok(job)
    }
}

/// An attempt went wrong: back into the queue for a while, or the end. What was wished meanwhile is
/// granted now.
pub(super) async fn after_failure(
    tx: &mut Tx,
    job: &Job,
    holder: Option<WorkerId>,
    mut failure: JobFailure,
    retryable: bool,
    backoff: Backoff,
) -> Result<Job, JobError> {
    let failures = job.failures + 1;
    let spent = failures >= job.max_attempts;
    let event = match job.wishes {
        _ if !retryable => Event::Fail,
        wishes if wishes.cancel => Event::Cancel,
        _ if spent => Event::Fail,
        wishes if wishes.pause => Event::Pause,
        _ => Event::Retry,
    };
    if event == Event::Fail && retryable {
        failure.message = format!("gave up after {failures} attempts: {}", failure.message);
    }
    let mut data = json!({
        "code": failure.code,
        "message": failure.message,
        "failures": failures,
        "max_attempts": job.max_attempts,
    });
    let mut change = Change::new(event)
        .by(holder)
        .set("failures", failures)
        .set("error_code", failure.code)
        .set("error_message", failure.message);
    if event == Event::Retry {
        let wait = millis(backoff.after(failures));
        data["retry_in_ms"] = wait.into();
        change = change.set("not_before", tx.now().await? + wait);
    }
    change.data(data).make(tx, job).await
}
