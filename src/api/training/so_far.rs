//! From a checkpoint to an adapter.

use axum::{
    Json,
    body::Body,
    extract::{Request, State},
    http::StatusCode,
    response::IntoResponse,
};
use serde::Serialize;
use serde_json::Map;
use utoipa::ToSchema;

use super::{
    super::{
        ApiError, AppState,
        adapters::location,
        body::{self, clip},
        error::ErrorBody,
        fields::Fields,
    },
    identified::Identified,
};
use crate::registry::AdapterName;

/// What to make of a checkpoint.
#[derive(ToSchema)]
#[allow(
    dead_code,
    reason = "only its schema is used; the fields are read one by one"
)]
pub(super) struct SoFar {
    /// What to call the adapter; by default the job's own name with the number of steps,
    /// `zorp-100`.
    name: Option<String>,
}

/// An adapter made of a checkpoint.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SoFarAnswer {
    /// It can be painted with at once.
    #[schema(example = "zorp-100")]
    adapter: String,
}

/// Makes an adapter of what a job has learned so far.
///
/// That is by its last checkpoint: while it trains, when it is paused, and also after it was cancelled
/// or has failed.
#[utoipa::path(post, path = "/v1/training/jobs/{id}/adapter", tag = "training",
    params(("id" = String, Path, description = "The job's id")),
    request_body(content = Option<SoFar>, content_type = "application/json"),
    responses(
        (status = 201, description = "Made", body = SoFarAnswer,
            headers(("Location" = String, description = "Where the adapter is"))),
        (status = 400, description = "The body is not valid JSON", body = ErrorBody),
        (status = 404, description = "No such job", body = ErrorBody),
        (status = 408, description = "The body came too slowly", body = ErrorBody),
        (status = 409, description = "There is no checkpoint yet, or an adapter of the name",
            body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 422, description = "A field cannot be used; `param` names it", body = ErrorBody),
        (status = 503, description = "Still loading, or a store is away", body = ErrorBody),
        (status = 507, description = "The store is full", body = ErrorBody)))]
pub(super) async fn publish_so_far(
    State(state): State<AppState>,
    Identified(id): Identified,
    request: Request<Body>,
) -> Result<impl IntoResponse, ApiError> {
    let desk = state.desk()?;
    let bytes = body::read(request.into_body(), state.settings()).await?;
    let map = match bytes.is_empty() {
        true => Map::new(),
        false => body::parse_object(&bytes)?,
    };
    let mut fields = Fields::new(map);
    let name = fields.text("name")?.map(AdapterName::new).transpose()?;
    if let Some(unknown) = fields.left_over().next() {
        return Err(ApiError::field(clip(unknown), "is unknown; there is name"));
    }
    let adapter = desk.adapter_so_far(id, name).await?;
    let answer = SoFarAnswer {
        adapter: adapter.to_string(),
    };
    Ok((StatusCode::CREATED, location(&adapter), Json(answer)))
}
