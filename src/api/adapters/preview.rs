//! Previews: one PNG for an adapter.

use axum::{
    body::Body,
    extract::{Request, State},
    http::{StatusCode, header},
    response::IntoResponse,
};

use super::{
    super::{ApiError, AppState, blocking::blocking, body, error::ErrorBody, incoming::Incoming},
    named::Named,
};
use crate::pictures::decode_image;

/// An adapter's preview.
#[utoipa::path(get, path = "/v1/adapters/{name}/preview.png", tag = "adapters",
    params(("name" = String, Path, description = "A name from the list")),
    responses(
        (status = 200, description = "The picture", body = Vec<u8>, content_type = "image/png"),
        (status = 404, description = "No such adapter, or it has no preview", body = ErrorBody),
        (status = 503, description = "Still loading, or the store is away", body = ErrorBody)))]
pub(super) async fn get_preview(
    State(state): State<AppState>,
    Named(name): Named,
) -> Result<impl IntoResponse, ApiError> {
    let bytes = state.adapters()?.preview(&name).await?;
    Ok(([(header::CONTENT_TYPE, "image/png")], bytes))
}

/// Puts a preview beside an adapter, or another in its place.
#[utoipa::path(put, path = "/v1/adapters/{name}/preview.png", tag = "adapters",
    params(("name" = String, Path, description = "A name from the list")),
    request_body(content = Vec<u8>, content_type = "image/png"),
    responses(
        (status = 204, description = "It is there"),
        (status = 404, description = "No such adapter", body = ErrorBody),
        (status = 413, description = "The picture is too large", body = ErrorBody),
        (status = 415, description = "The body is not a PNG", body = ErrorBody),
        (status = 422, description = "The picture cannot be decoded", body = ErrorBody),
        (status = 503, description = "Still loading, or the store is away", body = ErrorBody),
        (status = 507, description = "The store is full", body = ErrorBody)))]
pub(super) async fn put_preview(
    State(state): State<AppState>,
    Named(name): Named,
    request: Request<Body>,
) -> Result<StatusCode, ApiError> {
    let registry = state.adapters()?;
    let (parts, body) = request.into_parts();
    let content_type = body::content_type(&parts.headers);
    if !matches!(content_type.as_str(), "image/png" | "") {
        return Err(body::unsupported(content_type, "image/png"));
    }
    let limit = registry.settings().largest_preview;
    let incoming = Incoming::new(body, limit, &state);
    let put = async {
        let png = incoming.gather().await?;
        check(&state, png.clone()).await?;
        Ok(registry.put_preview(&name, png).await?)
    };
    match put.await {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(error) => Err(incoming.refuse(error).await),
    }
}

/// Whether it is a PNG that can be decoded: browsers are going to try.
pub(super) async fn check(state: &AppState, png: Vec<u8>) -> Result<(), ApiError> {
    if !png.starts_with(b"\x89PNG") {
        return Err(ApiError::field("preview", "is not a PNG; send it as one"));
    }
    // Each decode may hold the decoder's whole memory allowance. The semaphore is never closed.
    let permit = state
        .decoders()
        .acquire_owned()
        .await
        .map_err(|error| ApiError::Internal(error.to_string()))?;
    let decoded = blocking(move || {
        let _permit = permit;
        decode_image(&png).map(drop)
    })
    .await?;
    decoded.map_err(|error| ApiError::field("preview", error.to_string()))
}
