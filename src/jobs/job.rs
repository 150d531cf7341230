//! What a job is, to those who submit one and to those who look at it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{JobError, JobState, store::Row};

/// Most bytes of a payload, a result, a progress or an event's data, as JSON.
pub const LARGEST_JSON: usize = 1 << 20;
/// Most attempts a job can be given.
const MOST_ATTEMPTS: u32 = 100;

/// A job's name: a UUID of version 7, so that names sort by time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobId(Uuid);

impl JobId {
    /// One that nobody else has.
    pub fn fresh() -> Self {
        Self(Uuid::now_v7())
    }

    /// When it was made, in milliseconds since 1970 by the maker's clock; unknown of one that
    /// [`JobId::fresh`] did not make.
    pub fn made_at(self) -> Option<i64> {
        let (seconds, nanos) = self.0.get_timestamp()?.to_unix();
        i64::try_from(seconds * 1000 + u64::from(nanos) / 1_000_000).ok()
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// A text that is not a job's id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a job's id; expected a UUID")]
pub struct NotAJobId(String);

impl FromStr for JobId {
    type Err = NotAJobId;

    fn from_str(text: &str) -> Result<Self, NotAJobId> {
        let id = Uuid::try_parse(text).map_err(|_| NotAJobId(text.to_owned()))?;
        Ok(Self(id))
    }
}

impl TryFrom<String> for JobId {
    type Error = NotAJobId;

    fn try_from(text: String) -> Result<Self, NotAJobId> {
        text.parse()
    }
}

impl From<JobId> for String {
    fn from(id: JobId) -> Self {
        id.to_string()
    }
}

/// A worker's name, another at every boot: whoever comes back after a crash is somebody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WorkerId(Uuid);

impl WorkerId {
    /// One that nobody else has.
    pub fn fresh() -> Self {
        Self(Uuid::now_v7())
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// What makes a repeated request the same request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Idempotency {
    /// The client's. It counts within one owner, for as long as the job is kept.
    pub key: String,
    /// Of everything the request said, so that another request under the same key is noticed.
    pub hash: String,
}

/// A job to be submitted.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// Known beforehand, so that files can be put under it first.
    pub id: JobId,
    /// What sort of work it is; workers claim by it.
    pub kind: String,
    /// Whose it is; nobody's where there are no tenants.
    pub owner: Option<String>,
    /// What is to be done, for the worker to understand.
    pub payload: Value,
    /// Higher ones first.
    pub priority: i32,
    /// How often it may go wrong.
    pub max_attempts: u32,
    pub idempotency: Option<Idempotency>,
    /// Who is to be told of the end.
    pub webhook: Option<String>,
}

impl NewJob {
    /// One with nothing special about it.
    pub fn new(kind: impl Into<String>, payload: Value) -> Self {
        Self {
            id: JobId::fresh(),
            kind: kind.into(),
            owner: None,
            payload,
            priority: 0,
            max_attempts: 3,
            idempotency: None,
            webhook: None,
        }
    }

    pub(super) fn check(&self) -> Result<(), JobError> {
        check_word("kind", &self.kind)?;
        if let Some(owner) = &self.owner {
            check_text("owner", owner)?;
        }
        if let Some(Idempotency { key, hash }) = &self.idempotency {
            check_text("idempotency key", key)?;
            check_text("request hash", hash)?;
        }
        if !(1..=MOST_ATTEMPTS).contains(&self.max_attempts) {
            let reason = format!("{} is not from 1 to {MOST_ATTEMPTS}", self.max_attempts);
            return Err(JobError::invalid("max_attempts", reason));
        }
        check_json("payload", &self.payload)
    }
}

/// A word of ours: a kind of job, an event's kind, an error's code.
pub(super) fn check_word(field: &'static str, word: &str) -> Result<(), JobError> {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if word.is_empty() || word.len() > 64 || !word.bytes().all(fine) {
        let reason = format!("`{word}` is not 1 to 64 letters, digits, `_`, `-` or `.`");
        return Err(JobError::invalid(field, reason));
    }
    Ok(())
}

/// A client's word.
fn check_text(field: &'static str, text: &str) -> Result<(), JobError> {
    if text.is_empty() || text.len() > 255 || text.chars().any(char::is_control) {
        let reason = "must have 1 to 255 bytes and no control characters";
        return Err(JobError::invalid(field, reason));
    }
    Ok(())
}

pub(super) fn check_json(field: &'static str, value: &Value) -> Result<(), JobError> {
    let size = value.to_string().len();
    if size > LARGEST_JSON {
        let reason = format!("has {size} bytes as JSON; at most {LARGEST_JSON} are kept");
        return Err(JobError::invalid(field, reason));
    }
    Ok(())
}

/// What came of submitting.
#[derive(Debug, Clone, PartialEq)]
pub struct Submitted {
    pub job: Job,
    /// Not where the same request had made it before.
    pub created: bool,
}

/// What somebody outside wants of a running job.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Wishes {
    pub cancel: bool,
    pub pause: bool,
}

/// Why a job failed, or its last attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JobFailure {
    /// For programs.
    pub code: String,
    /// For people.
    pub message: String,
}

/// A job as it is in the database. Times are milliseconds since 1970.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub id: JobId,
    pub kind: String,
    pub owner: Option<String>,
    pub state: JobState,
    pub priority: i32,
    pub payload: Value,
    /// What its worker last said of it.
    pub progress: Option<Value>,
    pub result: Option<Value>,
    /// Of the last attempt that went wrong; it stays while the next one runs.
    pub failure: Option<JobFailure>,
    /// How often it was claimed. With the worker it tells one lease from every other.
    pub attempt: u32,
    /// How many attempts went wrong; being put back or paused is not going wrong.
    pub failures: u32,
    pub max_attempts: u32,
    pub wishes: Wishes,
    pub webhook: Option<String>,
    /// Not to be claimed before.
    pub not_before: i64,
    pub created_at: i64,
    /// When it was first claimed.
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
    /// Of its last event.
    pub last_seq: u64,
}

impl Job {
    pub(super) const COLUMNS: &'static str = "id, kind, owner, state, priority, payload, progress, \
         result, error_code, error_message, attempt, failures, max_attempts, cancel_wish, \
         pause_wish, webhook, not_before, created_at, started_at, finished_at, last_seq, worker";

    pub(super) fn from_row(row: &Row) -> Result<Self, JobError> {
        let failure = match (
            row.maybe_text("error_code")?,
            row.maybe_text("error_message")?,
        ) {
            (Some(code), Some(message)) => Some(JobFailure { code, message }),
            _ => None,
        };
        Ok(Self {
            id: row.id("id")?,
            kind: row.text("kind")?,
            owner: Some(row.text("owner")?).filter(|owner| !owner.is_empty()),
            state: row.state("state")?,
            priority: row.int("priority")?.clamp(i32::MIN.into(), i32::MAX.into()) as i32,
            payload: row.json("payload")?,
            progress: row.maybe_json("progress")?,
            result: row.maybe_json("result")?,
            failure,
            attempt: row.count("attempt")?,
            failures: row.count("failures")?,
            max_attempts: row.count("max_attempts")?,
            wishes: Wishes {
                cancel: row.flag("cancel_wish")?,
                pause: row.flag("pause_wish")?,
            },
            webhook: row.maybe_text("webhook")?,
            not_before: row.int("not_before")?,
            created_at: row.int("created_at")?,
            started_at: row.maybe_int("started_at")?,
            finished_at: row.maybe_int("finished_at")?,
            last_seq: row.count("last_seq")?.into(),
        })
    }

    /// What may be told to whoever may know of the job: not its payload, its owner or where its
    /// webhook goes. Times are seconds since 1970.
    pub fn view(&self) -> Value {
        let seconds = |millis: i64| millis.div_euclid(1000);
        json!({
            "id": self.id,
            "kind": self.kind,
            "state": self.state,
            "progress": self.progress,
            "result": self.result,
            "error": self.failure,
            "attempt": self.attempt,
            "created_at": seconds(self.created_at),
            "started_at": self.started_at.map(seconds),
            "finished_at": self.finished_at.map(seconds),
        })
    }
}
