//! `POST /v1/training/jobs`.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::{Request, State},
    http::{HeaderName, StatusCode, header, request::Parts},
    response::{IntoResponse, Response},
};
use tokio::{task, time};

use super::{
    super::{ApiError, AppState, body, error::ErrorBody, incoming::Incoming},
    answer::{TrainingJob, path},
    form::{self, TrainingForm},
};
use crate::{jobs::JobState, trainer::Desk};

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// For all of the pictures to arrive: a place for an upload is not to be held for ever.
const UPLOAD: Duration = Duration::from_secs(900);

/// Train an adapter.
///
/// Five to ten pictures of a subject and a word for it make a DreamBooth adapter; captioned pictures a
/// LoRA of a style. Everything is checked before the job is accepted, the pictures too. With an
/// `Idempotency-Key` a request can be sent again without becoming a second job.
#[utoipa::path(post, path = "/v1/training/jobs", tag = "training",
    params(("Idempotency-Key" = Option<String>, Header,
        description = "The same key with the same request gives the same job; with another one, 422")),
    request_body(content = TrainingForm, content_type = "multipart/form-data"),
    responses(
        (status = 200, description = "This very request was accepted before", body = TrainingJob),
        (status = 202, description = "Accepted", body = TrainingJob,
            headers(("Location" = String, description = "Where the job is"))),
        (status = 400, description = "The body cannot be read", body = ErrorBody),
        (status = 404, description = "This server trains nothing", body = ErrorBody),
        (status = 408, description = "The body came too slowly", body = ErrorBody),
        (status = 409, description = "There is an adapter of the name, or a job will make one",
            body = ErrorBody),
        (status = 413, description = "The pictures are too large together", body = ErrorBody),
        (status = 415, description = "The body is not a form", body = ErrorBody),
        (status = 422, description = "A field or a picture cannot be used; `param` names it",
            body = ErrorBody),
        (status = 429, description = "The queue is full, or too many upload at once",
            body = ErrorBody,
            headers(("Retry-After" = u64, description = "Seconds until there may be room"))),
        (status = 503, description = "Still loading, or database or store are away",
            body = ErrorBody),
        (status = 507, description = "The store is full", body = ErrorBody)))]
pub(super) async fn create_job(
    State(state): State<AppState>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let desk = state.desk()?;
    let (parts, body) = request.into_parts();
    let incoming = Incoming::new(body, state.settings().max_training_upload, &state);
    match create(&state, desk, parts, &incoming).await {
        Ok(response) => Ok(response),
        Err(error) => Err(incoming.refuse(error).await),
    }
}

async fn create(
    state: &AppState,
    desk: &Arc<Desk>,
    parts: Parts,
    incoming: &Incoming,
) -> Result<Response, ApiError> {
    let content_type = body::content_type(&parts.headers);
    if content_type != "multipart/form-data" {
        return Err(body::unsupported(content_type, "multipart/form-data"));
    }
    let key = match parts.headers.get(IDEMPOTENCY_KEY) {
        None => None,
        Some(key) => {
            let text = key.to_str().ok().filter(|key| !key.is_empty());
            let refused =
                || ApiError::field("Idempotency-Key", "must be 1 to 255 characters of ASCII");
            Some(text.ok_or_else(refused)?.to_owned())
        }
    };
    // A file is in memory until it is stored.
    let place = state.uploads().try_acquire_owned();
    let place = place.map_err(|_| ApiError::Uploading)?;
    let read = form::read(desk, parts, incoming, key);
    let order = time::timeout(UPLOAD, read).await;
    let order = order.map_err(|_| ApiError::SlowBody(UPLOAD))??;
    // In a task of its own: a client that leaves now leaves a whole job or none.
    let at = desk.clone();
    let accepted = task::spawn(async move { at.submit(order).await }).await;
    drop(place);
    let accepted = accepted
        .map_err(|error| ApiError::Internal(format!("taking in a training job died: {error}")))??;
    let (id, queued) = (accepted.job.id, accepted.job.state == JobState::Queued);
    let mut answer = TrainingJob::new(accepted.job);
    answer.warnings = accepted.notes;
    if queued {
        // It is made: not knowing its place is no reason to say it is not.
        answer.ahead = desk.jobs.ahead_of(id).await.unwrap_or_default();
    }
    let status = match accepted.created {
        true => StatusCode::ACCEPTED,
        false => StatusCode::OK,
    };
    Ok((status, [(header::LOCATION, path(id))], Json(answer)).into_response())
}
