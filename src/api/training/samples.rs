//! Pictures painted on the way.

use axum::{
    Json,
    extract::{Path, State},
    http::header,
    response::IntoResponse,
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    super::{ApiError, AppState, error::ErrorBody},
    answer::path,
    identified::{Identified, identified},
};

/// A job's samples.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SampleList {
    /// Always `list`.
    object: &'static str,
    /// In the order in which they were painted.
    data: Vec<Sample>,
}

/// A sample.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Sample {
    /// Step and number of the prompt.
    #[schema(example = "00100-0.png")]
    name: String,
    url: String,
}

/// The pictures that a job painted on the way.
#[utoipa::path(get, path = "/v1/training/jobs/{id}/samples", tag = "training",
    params(("id" = String, Path, description = "The job's id")),
    responses(
        (status = 200, description = "Their names", body = SampleList),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 422, description = "Not an id", body = ErrorBody),
        (status = 503, description = "Still loading, or the store is away", body = ErrorBody)))]
pub(super) async fn list_samples(
    State(state): State<AppState>,
    Identified(id): Identified,
) -> Result<Json<SampleList>, ApiError> {
    let desk = state.desk()?;
    desk.job(id).await?;
    let names = desk.samples(id).await?.into_iter();
    let folder = format!("{}/samples", path(id));
    Ok(Json(SampleList {
        object: "list",
        data: names
            .map(|name| Sample {
                url: format!("{folder}/{name}"),
                name,
            })
            .collect(),
    }))
}

/// A picture that a job painted on the way.
#[utoipa::path(get, path = "/v1/training/jobs/{id}/samples/{name}", tag = "training",
    params(("id" = String, Path, description = "The job's id"),
        ("name" = String, Path, description = "A name from the list")),
    responses(
        (status = 200, description = "The picture", body = Vec<u8>, content_type = "image/png"),
        (status = 404, description = "No such job or sample", body = ErrorBody),
        (status = 422, description = "Not an id", body = ErrorBody),
        (status = 503, description = "Still loading, or the store is away", body = ErrorBody)))]
pub(super) async fn get_sample(
    State(state): State<AppState>,
    named: Result<Path<(String, String)>, axum::extract::rejection::PathRejection>,
) -> Result<impl IntoResponse, ApiError> {
    let desk = state.desk()?;
    // What is no text can be no name.
    let (id, name) = named.map_or_else(|_| Default::default(), |Path(named)| named);
    let id = identified("id", &id)?;
    desk.job(id).await?;
    let found = desk.sample(id, &name).await?;
    let png = found.ok_or(ApiError::NoSuchSample { job: id })?;
    Ok(([(header::CONTENT_TYPE, "image/png")], png))
}
