//! Cancelling, pausing, resuming.

use axum::{Json, extract::State};

use super::{
    super::{ApiError, AppState, error::ErrorBody},
    answer::TrainingJob,
    identified::Identified,
};

/// Stops a job for good.
///
/// A running one stops after the step at hand; `wish` is `cancel` until then. What it has learned by
/// its last checkpoint can still be made an adapter.
#[utoipa::path(post, path = "/v1/training/jobs/{id}/cancel", tag = "training",
    params(("id" = String, Path, description = "The job's id")),
    responses(
        (status = 200, description = "It is cancelled, or will be", body = TrainingJob),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 409, description = "It is over", body = ErrorBody),
        (status = 422, description = "Not an id", body = ErrorBody),
        (status = 503, description = "Still loading, or the database is away", body = ErrorBody)))]
pub(super) async fn cancel_job(
    State(state): State<AppState>,
    Identified(id): Identified,
) -> Result<Json<TrainingJob>, ApiError> {
    let desk = state.desk()?;
    desk.job(id).await?;
    Ok(Json(TrainingJob::new(desk.jobs.cancel(id).await?)))
}

/// Stops a job until it is resumed.
///
/// A running one stops after the step at hand and keeps a checkpoint; `wish` is `pause` until then.
#[utoipa::path(post, path = "/v1/training/jobs/{id}/pause", tag = "training",
    params(("id" = String, Path, description = "The job's id")),
    responses(
        (status = 200, description = "It is paused, or will be", body = TrainingJob),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 409, description = "It is over, or paused", body = ErrorBody),
        (status = 422, description = "Not an id", body = ErrorBody),
        (status = 503, description = "Still loading, or the database is away", body = ErrorBody)))]
pub(super) async fn pause_job(
    State(state): State<AppState>,
    Identified(id): Identified,
) -> Result<Json<TrainingJob>, ApiError> {
    let desk = state.desk()?;
    desk.job(id).await?;
    Ok(Json(TrainingJob::new(desk.jobs.pause(id).await?)))
}

/// Puts a paused job back into the queue.
///
/// It goes on from its checkpoint, and ends with the same adapter as one that was never paused.
#[utoipa::path(post, path = "/v1/training/jobs/{id}/resume", tag = "training",
    params(("id" = String, Path, description = "The job's id")),
    responses(
        (status = 200, description = "It waits for its turn", body = TrainingJob),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 409, description = "It is not paused", body = ErrorBody),
        (status = 422, description = "Not an id", body = ErrorBody),
        (status = 503, description = "Still loading, or the database is away", body = ErrorBody)))]
pub(super) async fn resume_job(
    State(state): State<AppState>,
    Identified(id): Identified,
) -> Result<Json<TrainingJob>, ApiError> {
    let desk = state.desk()?;
    desk.job(id).await?;
    Ok(Json(TrainingJob::new(desk.jobs.resume(id).await?)))
}
