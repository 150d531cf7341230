//! Changing what is there.

use axum::{
    Json,
    body::Body,
    extract::{Request, State},
    http::HeaderMap,
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    super::{ApiError, AppState, body, error::ErrorBody, fields::Fields},
    answer::AdapterAnswer,
    conditions,
    describe::{describe, ignored},
    named::Named,
};

/// What to say about an adapter; what is absent stays as it is.
#[derive(ToSchema)]
#[allow(
    dead_code,
    reason = "only its schema is used; the fields are read one by one"
)]
pub(super) struct AdapterPatch {
    description: Option<String>,
    trigger_words: Option<Vec<String>>,
    tags: Option<Vec<String>>,
    /// `sd1`, `sd2`, `sdxl`
    base_family: Option<String>,
    method: Option<String>,
    #[schema(value_type = Option<Object>)]
    recipe: Option<serde_json::Value>,
}

/// Sets what is said about an adapter.
#[utoipa::path(patch, path = "/v1/adapters/{name}", tag = "adapters",
    params(("name" = String, Path, description = "A name from the list"),
        ("If-Match" = Option<String>, Header, description = "Only while its sha256 is this")),
    request_body = AdapterPatch,
    responses(
        (status = 200, description = "The adapter as it is now", body = AdapterAnswer),
        (status = 400, description = "The body is not valid JSON", body = ErrorBody),
        (status = 404, description = "No such adapter", body = ErrorBody),
        (status = 409, description = "Somebody else's change came first", body = ErrorBody),
        (status = 412, description = "It has another hash", body = ErrorBody),
        (status = 415, description = "The body is not JSON", body = ErrorBody),
        (status = 422, description = "A field cannot be used; `param` names it", body = ErrorBody),
        (status = 503, description = "Still loading, or the store is away", body = ErrorBody)))]
pub(super) async fn patch_adapter(
    State(state): State<AppState>,
    Named(name): Named,
    request: Request<Body>,
) -> Result<Json<AdapterAnswer>, ApiError> {
    let registry = state.adapters()?;
    let (parts, body) = request.into_parts();
    let content_type = body::content_type(&parts.headers);
    if !body::is_json(&content_type) {
        return Err(body::unsupported(content_type, "application/json"));
    }
    let expected = conditions::expected(&parts.headers)?.flatten();
    let bytes = body::read(body, state.settings()).await?;
    let mut fields = Fields::new(body::parse_object(&bytes)?);
    if fields.take("pinned").is_some() {
        return Err(ApiError::field(
            "pinned",
            format!("is not set here; POST /v1/adapters/{name}/pin or /unpin"),
        ));
    }
    let patch = describe(&mut fields)?;
    let entry = registry.patch(&name, expected, patch).await?;
    let mut answer = AdapterAnswer::new(registry, &entry);
    answer.warnings = ignored(&fields);
    Ok(Json(answer))
}

/// What is gone.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AdapterDeleted {
    name: String,
    /// Always `adapter`.
    object: &'static str,
    /// Always true.
    deleted: bool,
}

/// Removes an adapter.
///
/// Pictures that are being painted with it are finished.
#[utoipa::path(delete, path = "/v1/adapters/{name}", tag = "adapters",
    params(("name" = String, Path, description = "A name from the list"),
        ("If-Match" = Option<String>, Header, description = "Only while its sha256 is this")),
    responses(
        (status = 200, description = "It is gone", body = AdapterDeleted),
        (status = 404, description = "No such adapter", body = ErrorBody),
        (status = 409, description = "Somebody else's change came first", body = ErrorBody),
        (status = 412, description = "It has another hash", body = ErrorBody),
        (status = 503, description = "Still loading, or the store is away", body = ErrorBody)))]
pub(super) async fn delete_adapter(
    State(state): State<AppState>,
    Named(name): Named,
    headers: HeaderMap,
) -> Result<Json<AdapterDeleted>, ApiError> {
    let registry = state.adapters()?;
    let expected = conditions::expected(&headers)?.flatten();
    registry.delete(&name, expected).await?;
    Ok(Json(AdapterDeleted {
        name: name.into(),
        object: "adapter",
        deleted: true,
    }))
}

/// Loads an adapter and keeps it in memory.
#[utoipa::path(post, path = "/v1/adapters/{name}/pin", tag = "adapters",
    params(("name" = String, Path, description = "A name from the list")),
    responses(
        (status = 200, description = "It is in memory and stays there", body = AdapterAnswer),
        (status = 404, description = "No such adapter", body = ErrorBody),
        (status = 409, description = "It is for another model family", body = ErrorBody),
        (status = 422, description = "Its file cannot be served", body = ErrorBody),
        (status = 503, description = "Still loading, or the store is away", body = ErrorBody),
        (status = 507, description = "There is no memory for it", body = ErrorBody)))]
pub(super) async fn pin_adapter(
    State(state): State<AppState>,
    Named(name): Named,
) -> Result<Json<AdapterAnswer>, ApiError> {
    let registry = state.adapters()?;
    let entry = registry.pin(&name, true).await?;
    Ok(Json(AdapterAnswer::new(registry, &entry)))
}

/// Lets an adapter leave memory like any other again.
#[utoipa::path(post, path = "/v1/adapters/{name}/unpin", tag = "adapters",
    params(("name" = String, Path, description = "A name from the list")),
    responses(
        (status = 200, description = "It is pinned no longer", body = AdapterAnswer),
        (status = 404, description = "No such adapter", body = ErrorBody),
        (status = 503, description = "Still loading, or the store is away", body = ErrorBody)))]
pub(super) async fn unpin_adapter(
    State(state): State<AppState>,
    Named(name): Named,
) -> Result<Json<AdapterAnswer>, ApiError> {
    let registry = state.adapters()?;
    let entry = registry.pin(&name, false).await?;
    Ok(Json(AdapterAnswer::new(registry, &entry)))
}
