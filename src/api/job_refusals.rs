//! The rows of the error table for jobs.

use std::time::Duration;

use axum::http::StatusCode;

use super::error::{COME_BACK, ErrorRow};
use crate::jobs::JobError;

/// After which a place in the queue may be free: jobs take minutes.
const FULL: Duration = Duration::from_secs(30);

/// Status, class and code.
pub(super) fn row(error: &JobError) -> ErrorRow {
    use JobError::*;
    const INVALID: &str = "invalid_request_error";
    const SERVER: &str = "server_error";
    let (status, kind, code) = match error {
        Invalid { .. } => (StatusCode::UNPROCESSABLE_ENTITY, INVALID, "invalid_value"),
        NotFound(_) => (StatusCode::NOT_FOUND, INVALID, "job_not_found"),
        Refused(_) => (StatusCode::CONFLICT, INVALID, "job_state"),
        KeyReused { .. } => (
            StatusCode::UNPROCESSABLE_ENTITY,
            INVALID,
            "idempotency_key_reused",
        ),
        QueueFull { .. } => (
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limit_error",
            "queue_full",
        ),
        Unavailable { .. } => (
            StatusCode::SERVICE_UNAVAILABLE,
            SERVER,
            "job_store_unavailable",
        ),
        Full { .. } => (StatusCode::INSUFFICIENT_STORAGE, SERVER, "job_store_full"),
        LeaseLost(_) | Address { .. } | Broken { .. } => {
            (StatusCode::INTERNAL_SERVER_ERROR, SERVER, "internal_error")
        }
    };
    ErrorRow { status, kind, code }
}

/// The field at fault, where there is one.
pub(super) fn param(error: &JobError) -> Option<&'static str> {
    match error {
        JobError::Invalid { field, .. } => Some(field),
        JobError::KeyReused { .. } => Some("Idempotency-Key"),
        JobError::NotFound(_) => Some("id"),
        _ => None,
    }
}

/// A database that is away comes back, and jobs end.
pub(super) fn retry_after(error: &JobError) -> Option<Duration> {
    match error {
        JobError::Unavailable { .. } => Some(COME_BACK),
        JobError::QueueFull { .. } => Some(FULL),
        _ => None,
    }
}

/// What the client is told: of a store's trouble not where it is and how it is reached.
pub(super) fn message(error: &JobError) -> Option<String> {
    let seconds = COME_BACK.as_secs();
    match error {
        JobError::Unavailable { .. } => Some(format!(
            "the store of jobs cannot be reached; nothing was changed; try again in {seconds} s"
        )),
        JobError::Full { .. } => Some("the store of jobs is full; nothing was changed".into()),
        JobError::LeaseLost(_) | JobError::Address { .. } | JobError::Broken { .. } => None,
        JobError::Invalid { reason, field } => Some(format!("{field}: {reason}")),
        other => Some(other.to_string()),
    }
}

/// Whether the error itself is for the log only.
pub(super) fn is_secret(error: &JobError) -> bool {
    matches!(error, JobError::Unavailable { .. } | JobError::Full { .. })
        || message(error).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ApiError;

    #[test]
    fn a_databases_trouble_is_told_without_its_whereabouts() {
        let reason = String::from("secret: postgres://me:hunter2@10.0.0.7/jobs");
        for error in [
            JobError::Unavailable {
                reason: reason.clone(),
            },
            JobError::Full {
                reason: reason.clone(),
            },
            JobError::Broken { reason },
        ] {
            let error = ApiError::from(error);
            assert!(error.row().status.is_server_error());
            assert!(!error.client_message().contains("secret"));
        }
    }
}
