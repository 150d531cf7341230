//! The one error of the HTTP layer and the one table from it to status, type and stable code.

use std::{borrow::Cow, time::Duration};

use axum::{
    Json,
    http::{HeaderValue, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{job_refusals, refusals, state::UPLOADS};
use crate::{
    engine::{JobError, SubmitError},
    jobs::{self, JobId},
    pipeline::request::InvalidField,
    registry::RegistryError,
    trainer::DeskError,
};

/// What a client reads of every 500.
const INTERNAL: &str =
    "the server failed; the cause is in its log under this answer's x-request-id";
/// Seconds after which a client may ask again while the server starts, drains or recovers.
pub(super) const COME_BACK: Duration = Duration::from_secs(5);

/// Why a request has no answer of its own kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    #[error("the body is not valid JSON: {message}")]
    BrokenJson {
        /// What the parser met, with line and column.
        message: String,
        /// The field whose value it was reading.
        field: Option<String>,
    },
    #[error("the multipart body cannot be read: {0}")]
    BrokenForm(String),
    #[error("the body could not be read to its end")]
    BrokenBody,
    #[error("content type {got} is not understood here; send {expected}")]
    UnsupportedMediaType { got: String, expected: &'static str },
    #[error("the body is larger than {limit} bytes; send a smaller one")]
    TooLarge { limit: usize },
    #[error("the body did not arrive within {} s", .0.as_secs())]
    SlowBody(Duration),
    #[error("{field}: {message}")]
    InvalidField {
        field: Cow<'static, str>,
        message: String,
    },
    #[error("there is no {path} here; /docs lists what there is")]
    NoSuchRoute { path: String },
    #[error("{path} does not take {method}; the Allow header says what it takes")]
    NoSuchMethod { method: String, path: String },
    #[error(
        "there is no model `{name}`; this server has: {available}, and what GET /v1/adapters lists"
    )]
    NoSuchModel { name: String, available: String },
    #[error("this server has no place for adapters; start it with --adapters DIR")]
    NoAdapters,
    #[error(
        "adapters are not loaded by request here; start the server with --allow-lora-loading, or \
         do without: they are loaded when a picture needs them"
    )]
    LoraLoadingOff,
    #[error("this server trains nothing; start it with --data DIR and a place for adapters")]
    NoTraining,
    #[error("this process only trains (--role train); ask another replica for pictures")]
    TrainsOnly,
    #[error(
        "{UPLOADS} sets of pictures are arriving already; try again in {} s",
        seconds(COME_BACK)
    )]
    Uploading,
    #[error("{message}")]
    Awaited { message: String },
    #[error("{message}")]
    NoCheckpoint { message: String },
    #[error("the job `{job}` has no such sample; GET /v1/training/jobs/{job}/samples lists them")]
    NoSuchSample { job: JobId },
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Jobs(#[from] jobs::JobError),
    /// Any of these that a field of the request brought about.
    #[error("{error}")]
    Of {
        field: Cow<'static, str>,
        error: Box<ApiError>,
    },
    #[error("the queue is full; try again in {} s", seconds(*retry_after))]
    QueueFull { retry_after: Duration },
    #[error("the model is still loading; try again in {} s", seconds(COME_BACK))]
    Loading,
    #[error("the server is shutting down; try again, another replica may answer")]
    Draining,
    #[error("the device is out of order; painting stopped on this server")]
    Broken,
    #[error("the picture was not ready within {} s; ask for fewer steps or a smaller size", .0.as_secs())]
    TooSlow(Duration),
    #[error("the work was cancelled on the server")]
    Cancelled,
    /// Memory, by the operator's budget.
    #[error("{message}")]
    NoRoom { message: String },
    /// The text is for the log only.
    #[error("{0}")]
    Internal(String),
}

/// One row of the table; dialects render it in their own shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErrorRow {
    pub status: StatusCode,
    /// OpenAI's coarse class.
    pub kind: &'static str,
    /// Stable: clients may match on it.
    pub code: &'static str,
}

impl ApiError {
    /// Status, class and code of this error.
    pub fn row(&self) -> ErrorRow {
        use ApiError::*;
        const INVALID: &str = "invalid_request_error";
        const SERVER: &str = "server_error";
        let (status, kind, code) = match self {
            Registry(error) => return refusals::row(error),
            Jobs(error) => return job_refusals::row(error),
            Of { error, .. } => return error.row(),
            BrokenJson { .. } => (StatusCode::BAD_REQUEST, INVALID, "invalid_json"),
            BrokenForm(_) => (StatusCode::BAD_REQUEST, INVALID, "invalid_multipart"),
            BrokenBody => (StatusCode::BAD_REQUEST, INVALID, "incomplete_body"),
            UnsupportedMediaType { .. } => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                INVALID,
                "unsupported_media_type",
            ),
            TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, INVALID, "body_too_large"),
            SlowBody(_) => (StatusCode::REQUEST_TIMEOUT, INVALID, "body_timeout"),
            InvalidField { .. } => (StatusCode::UNPROCESSABLE_ENTITY, INVALID, "invalid_value"),
            NoSuchRoute { .. } => (StatusCode::NOT_FOUND, INVALID, "not_found"),
            NoSuchMethod { .. } => (
                StatusCode::METHOD_NOT_ALLOWED,
                INVALID,
                "method_not_allowed",
            ),
            NoSuchModel { .. } => (StatusCode::NOT_FOUND, INVALID, "model_not_found"),
            NoAdapters => (StatusCode::NOT_FOUND, INVALID, "no_adapter_store"),
            LoraLoadingOff => (StatusCode::NOT_FOUND, INVALID, "lora_loading_off"),
            NoTraining => (StatusCode::NOT_FOUND, INVALID, "no_training"),
            TrainsOnly => (StatusCode::SERVICE_UNAVAILABLE, SERVER, "trains_only"),
            Uploading => (
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limit_error",
                "uploads_full",
            ),
            Awaited { .. } => (StatusCode::CONFLICT, INVALID, "adapter_exists"),
            NoCheckpoint { .. } => (StatusCode::CONFLICT, INVALID, "no_checkpoint"),
            NoSuchSample { .. } => (StatusCode::NOT_FOUND, INVALID, "sample_not_found"),
            QueueFull { .. } => (
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limit_error",
                "queue_full",
            ),
            Loading => (StatusCode::SERVICE_UNAVAILABLE, SERVER, "model_loading"),
            Draining => (StatusCode::SERVICE_UNAVAILABLE, SERVER, "shutting_down"),
            Broken => (StatusCode::SERVICE_UNAVAILABLE, SERVER, "device_broken"),
            TooSlow(_) => (StatusCode::GATEWAY_TIMEOUT, SERVER, "paint_timeout"),
            Cancelled => (StatusCode::SERVICE_UNAVAILABLE, SERVER, "cancelled"),
            NoRoom { .. } => (StatusCode::INSUFFICIENT_STORAGE, SERVER, "no_room"),
            Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, SERVER, "internal_error"),
        };
        ErrorRow { status, kind, code }
    }

    /// A field that cannot be used, by a name not known at compile time.
    pub fn field(field: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self::InvalidField {
            field: field.into(),
            message: message.into(),
        }
    }

    /// The same, as the doing of a field.
    pub(super) fn of(self, field: impl Into<Cow<'static, str>>) -> Self {
        let (field, error) = (field.into(), Box::new(self));
        Self::Of { field, error }
    }

    /// The field at fault, where there is one.
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::InvalidField { field, .. } | Self::Of { field, .. } => Some(field),
            Self::BrokenJson { field, .. } => field.as_deref(),
            Self::UnsupportedMediaType { .. } => Some("Content-Type"),
            Self::NoSuchModel { .. } => Some("model"),
            Self::Registry(error) => refusals::param(error),
            Self::Jobs(error) => job_refusals::param(error),
            Self::Awaited { .. } => Some("name"),
            _ => None,
        }
    }

    /// When the client may try again.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::QueueFull { retry_after } => Some(*retry_after),
            Self::Registry(error) => refusals::retry_after(error),
            Self::Jobs(error) => job_refusals::retry_after(error),
            Self::Of { error, .. } => error.retry_after(),
            Self::Loading
            | Self::Draining
            | Self::Broken
            | Self::Cancelled
            | Self::Uploading
            | Self::TrainsOnly => Some(COME_BACK),
            _ => None,
        }
    }

    /// What the client is told; never the cause of a 500.
    pub fn client_message(&self) -> String {
        match self {
            Self::Internal(_) => INTERNAL.into(),
            Self::Registry(error) => refusals::message(error),
            Self::Jobs(error) => job_refusals::message(error).unwrap_or_else(|| INTERNAL.into()),
            Self::Of { error, .. } => error.client_message(),
            other => other.to_string(),
        }
    }

    /// OpenAI's error object.
    pub fn body(&self) -> ErrorBody {
        let row = self.row();
        ErrorBody {
            error: ErrorDetail {
                message: self.client_message(),
                kind: row.kind,
                param: self.param().map(str::to_owned),
                code: row.code,
            },
        }
    }

    /// Writes what the client is not told to the log; the request's span adds its id.
    pub fn log(&self) {
        match self {
            Self::Of { error, .. } => error.log(),
            Self::Internal(cause) => tracing::error!(cause, "request failed"),
            Self::Registry(error) if refusals::is_secret(error) => {
                tracing::error!(%error, "request failed");
            }
            Self::Jobs(error) if job_refusals::is_secret(error) => {
                tracing::error!(%error, "request failed");
            }
            _ => {}
        }
    }
}

/// Whole seconds for `Retry-After`, at least one.
fn seconds(duration: Duration) -> u64 {
    duration.as_secs_f64().ceil().max(1.0) as u64
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.log();
        let mut response = (self.row().status, Json(self.body())).into_response();
        if let Some(after) = self.retry_after() {
            let value = HeaderValue::from(seconds(after));
            response.headers_mut().insert(header::RETRY_AFTER, value);
        }
        response
    }
}

impl From<InvalidField> for ApiError {
    fn from(error: InvalidField) -> Self {
        Self::field(error.field, error.message)
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::QueueFull { retry_after } => Self::QueueFull { retry_after },
            SubmitError::Draining => Self::Draining,
            SubmitError::Broken => Self::Broken,
        }
    }
}

impl From<JobError> for ApiError {
    fn from(error: JobError) -> Self {
        match error {
            JobError::Cancelled => Self::Cancelled,
            JobError::Failed(cause) => Self::Internal(cause),
            JobError::Invalid { field, message } => Self::field(field, message),
        }
    }
}

impl From<DeskError> for ApiError {
    fn from(error: DeskError) -> Self {
        match error {
            DeskError::Field(error) => error.into(),
            DeskError::Pictures(error) => Self::field("images", error.to_string()),
            DeskError::Awaited { .. } => Self::Awaited {
                message: error.to_string(),
            },
            DeskError::NoCheckpoint(_) => Self::NoCheckpoint {
                message: error.to_string(),
            },
            DeskError::Registry(error) => error.into(),
            DeskError::Jobs(error) => error.into(),
            DeskError::Internal(cause) => Self::Internal(cause),
        }
    }
}

/// OpenAI's error object.
#[derive(Debug, Serialize, ToSchema)]
#[schema(example = json!({"error": {
    "message": "steps: must be a whole number from 1 to 200, got 0; more steps seldom help",
    "type": "invalid_request_error", "param": "steps", "code": "invalid_value"
}}))]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// For people: what is wrong, the limit, what to send instead.
    pub message: String,
    /// `invalid_request_error`, `rate_limit_error` or `server_error`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The field at fault, if one is.
    pub param: Option<String>,
    /// Stable: programs may match on it.
    pub code: &'static str,
}

/// For paths nobody registered.
pub(super) async fn no_such_route(uri: Uri) -> ApiError {
    ApiError::NoSuchRoute {
        path: uri.path().to_owned(),
    }
}

/// For paths that exist with another method; axum adds `Allow`.
pub(super) async fn no_such_method(method: Method, uri: Uri) -> ApiError {
    ApiError::NoSuchMethod {
        method: method.to_string(),
        path: uri.path().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_500_never_shows_its_cause() {
        let body = ApiError::Internal("secret: /var/lib/weights".into()).body();
        assert!(!body.error.message.contains("secret"));
        assert!(body.error.message.contains("x-request-id"));
    }

    #[test]
    fn retry_after_is_a_whole_second_at_least() {
        assert_eq!(seconds(Duration::from_millis(20)), 1);
        assert_eq!(seconds(Duration::from_millis(2100)), 3);
    }
}
