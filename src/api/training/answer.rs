//! Training jobs as answers show them.

use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use crate::jobs::{Job, JobEvent, JobId, JobState};

/// A training job. Times are Unix times in seconds.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TrainingJob {
    #[schema(example = "0199f3a0-7b1c-7e57-9d1e-0d6c4a3f5b21")]
    id: String,
    /// Always `training.job`.
    object: &'static str,
    /// `queued`, `running`, `paused`, `succeeded`, `failed` or `cancelled`.
    state: &'static str,
    /// What the adapter is called, or will be.
    #[schema(value_type = String, example = "zorp")]
    adapter: Value,
    /// Every option, also those that were not sent.
    #[schema(value_type = Object)]
    options: Value,
    /// Files that were sent.
    files: usize,
    /// How far it is: `phase`, `step`, `of`, `loss`, `smoothed_loss`, `steps_per_second`,
    /// `eta_seconds`, `peak_memory_bytes` (of the process, on the host), as far as they are known.
    #[schema(value_type = Option<Object>)]
    progress: Option<Value>,
    /// What came of it: `adapter`, `sha256`, `bytes`, `trigger_words`, `prompt`.
    #[schema(value_type = Option<Object>)]
    result: Option<Value>,
    /// Of the last attempt that went wrong; it may be under way again.
    error: Option<TrainingError>,
    /// What somebody wishes of it while it is running: `cancel` or `pause`.
    wish: Option<&'static str>,
    /// How often it was begun or gone on with.
    attempt: u32,
    created_at: i64,
    started_at: Option<i64>,
    finished_at: Option<i64>,
    /// Jobs before it in the queue, while it waits; in answers about one job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ahead: Option<u64>,
    /// What may spoil the result; in the answer to its making.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Where its log is.
    #[schema(example = "/v1/training/jobs/0199f3a0-7b1c-7e57-9d1e-0d6c4a3f5b21/events")]
    events: String,
}

/// Why an attempt failed.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TrainingError {
    /// Stable: programs may match on it.
    #[schema(example = "diverged")]
    code: String,
    /// For people.
    message: String,
}

/// An entry of a job's log.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TrainingEvent {
    /// 1, 2, 3, … without gaps.
    seq: u64,
    /// Unix time in seconds.
    at: f64,
    /// `submitted`, `claim`, `begun`, `step`, `evaluation`, `sample`, `checkpoint`, `succeed`, …
    #[schema(example = "step")]
    event: String,
    #[schema(value_type = Object)]
    data: Value,
}

/// Where a job is to be found.
pub(super) fn path(id: JobId) -> String {
    format!("/v1/training/jobs/{id}")
}

impl TrainingJob {
    pub fn new(job: Job) -> Self {
        let seconds = |millis: i64| millis.div_euclid(1000);
        let mut payload = job.payload;
        let running = job.state == JobState::Running;
        Self {
            id: job.id.to_string(),
            object: "training.job",
            state: job.state.name(),
            adapter: payload["adapter"].take(),
            options: payload["options"].take(),
            files: payload["pictures"].as_array().map_or(0, Vec::len),
            progress: job.progress,
            result: job.result,
            error: job.failure.map(|failure| TrainingError {
                code: failure.code,
                message: failure.message,
            }),
            wish: match (job.wishes.cancel, job.wishes.pause) {
                (true, _) if running => Some("cancel"),
                (_, true) if running => Some("pause"),
                _ => None,
            },
            attempt: job.attempt,
            created_at: seconds(job.created_at),
            started_at: job.started_at.map(seconds),
            finished_at: job.finished_at.map(seconds),
            ahead: None,
            warnings: Vec::new(),
            events: format!("{}/events", path(job.id)),
        }
    }
}

impl TrainingEvent {
    pub fn new(job: JobId, event: JobEvent) -> Self {
        let mut data = event.data;
        // The file's name is ours; a client wants to know where it is.
        if event.kind == "sample"
            && let Some(data) = data.as_object_mut()
            && let Some(Value::String(file)) = data.shift_remove("file")
        {
            data.insert("url".into(), json!(format!("{}/{file}", path(job))));
        }
        Self {
            seq: event.seq,
            at: event.at as f64 / 1000.0,
            event: event.kind,
            data,
        }
    }

    pub fn seq(&self) -> u64 {
        self.seq
    }

    pub fn name(&self) -> &str {
        &self.event
    }
}
