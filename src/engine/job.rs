//! What a client of the engine holds while its pictures are painted.

use std::{sync::Arc, time::Duration};

use image::RgbImage;
use tokio::sync::{oneshot, watch};

/// Where a job stands.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// Place in the queue, counted from 1; 0 once it runs.
    pub queued_ahead: usize,
    /// Denoising steps done and in all, over all pictures of the request.
    pub step: u32,
    pub of: u32,
    /// The latest intermediate picture and how many there have been.
    pub preview: Option<Arc<RgbImage>>,
    pub previews_sent: u32,
}

/// A finished picture.
#[derive(Debug, Clone)]
pub struct Picture {
    pub image: RgbImage,
    pub seed: u64,
}

/// Whether the device still answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    Healthy,
    /// Painting stopped for good; the text goes to the log and to operators only.
    Broken(String),
}

/// Why a request was not taken in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error("the queue is full; try again in {} s", retry_after.as_secs().max(1))]
    QueueFull { retry_after: Duration },
    #[error("the server is shutting down")]
    Draining,
    #[error("the device is out of order")]
    Broken,
}

/// Why an accepted request has no picture.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    #[error("cancelled")]
    Cancelled,
    /// The cause is for the log, never for the client.
    #[error("painting failed: {0}")]
    Failed(String),
    /// The prompt could not be used (say, broken emphasis marks); meant for the client.
    #[error("{field}: {message}")]
    Invalid {
        field: &'static str,
        message: String,
    },
}

/// An accepted request. Dropping it cancels the work at the next step boundary.
#[derive(Debug)]
pub struct Job {
    pub id: uuid::Uuid,
    pub(crate) progress: watch::Receiver<Progress>,
    pub(crate) result: oneshot::Receiver<Result<Vec<Picture>, JobError>>,
}

impl Job {
    /// The client's end of a job whose worker holds the other end of both channels.
    pub fn new(
        progress: watch::Receiver<Progress>,
        result: oneshot::Receiver<Result<Vec<Picture>, JobError>>,
    ) -> Self {
        Self {
            id: uuid::Uuid::now_v7(),
            progress,
            result,
        }
    }

    /// A channel that always holds the latest progress.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Waits for the pictures.
    pub async fn finish(self) -> Result<Vec<Picture>, JobError> {
        match self.result.await {
            Ok(result) => result,
            Err(_) => Err(JobError::Failed("the worker went away".into())),
        }
    }
}
