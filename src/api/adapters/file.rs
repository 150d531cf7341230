//! The file of an adapter, in and out.

use axum::{
    Json,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};

use super::{
    super::{ApiError, AppState, body, error::ErrorBody, incoming::Incoming},
    answer::AdapterAnswer,
    check::check,
    conditions,
    named::Named,
};
use crate::registry::ManifestPatch;

/// Bytes of an upload in memory at any time.
const IN_MEMORY: u64 = 16 << 20;

/// An adapter's file.
#[utoipa::path(get, path = "/v1/adapters/{name}/file", tag = "adapters",
    params(("name" = String, Path, description = "A name from the list"),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of a file that is there")),
    responses(
        (status = 200, description = "The file, as it was uploaded", body = Vec<u8>,
            content_type = "application/octet-stream",
            headers(("ETag" = String, description = "Its sha256 in quotes"))),
        (status = 304, description = "It is the one that is there"),
        (status = 404, description = "No such adapter", body = ErrorBody),
        (status = 503, description = "Still loading, or the store is away", body = ErrorBody)))]
pub(super) async fn get_file(
    State(state): State<AppState>,
    Named(name): Named,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let registry = state.adapters()?;
    // A file dropped in by hand is hashed now, at the latest.
    let known = registry.generation(&name).await?;
    if conditions::has(&headers, known) {
        let etag = [(header::ETAG, conditions::etag(known))];
        return Ok((StatusCode::NOT_MODIFIED, etag).into_response());
    }
    let download = registry.download(&name).await?;
    let mut response = Body::from_stream(download.pieces).into_response();
    let headers = response.headers_mut();
    let kind = HeaderValue::from_static("application/octet-stream");
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(header::CONTENT_LENGTH, download.size.into());
    // Where it was replaced this very moment, what is sent has another hash.
    if let Some(generation) = download.generation {
        headers.insert(header::ETAG, conditions::etag(generation));
    }
    // A name is ASCII without quotes.
    if let Ok(value) = format!("attachment; filename=\"{name}.safetensors\"").parse() {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    Ok(response)
}

/// Puts a file under a name.
///
/// The body is the file itself; it is checked before anyone can see it, and appears at once. What
/// is said about a replaced adapter stays. Conditions make it safe: `If-None-Match: *` only makes
/// a new one, `If-Match` with the sha256 only replaces that very one.
#[utoipa::path(put, path = "/v1/adapters/{name}/file", tag = "adapters",
    params(("name" = String, Path, description = "The name to serve it under"),
        ("If-Match" = Option<String>, Header,
            description = "Only while its sha256 is this; `*`: only if there is one"),
        ("If-None-Match" = Option<String>, Header, description = "`*`: only if there is none")),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses(
        (status = 200, description = "Replaced", body = AdapterAnswer),
        (status = 201, description = "Made", body = AdapterAnswer),
        (status = 400, description = "The body ended early", body = ErrorBody),
        (status = 404, description = "None to replace", body = ErrorBody),
        (status = 408, description = "The body came too slowly", body = ErrorBody),
        (status = 409, description = "There is one already, somebody else's change came first, or \
            it is for another model family", body = ErrorBody),
        (status = 412, description = "It has another hash", body = ErrorBody),
        (status = 413, description = "The file is too large", body = ErrorBody),
        (status = 415, description = "The body is a form", body = ErrorBody),
        (status = 422, description = "The file cannot be served", body = ErrorBody),
        (status = 503, description = "Still loading, or the store is away", body = ErrorBody),
        (status = 507, description = "The store is full", body = ErrorBody)))]
pub(super) async fn put_file(
    State(state): State<AppState>,
    Named(name): Named,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let registry = state.adapters()?;
    let (parts, body) = request.into_parts();
    let policy = conditions::policy(&parts.headers)?;
    let incoming = Incoming::new(body, IN_MEMORY, &state);
    let put = async {
        let content_type = body::content_type(&parts.headers);
        // Its boundaries would become part of the file.
        if content_type == "multipart/form-data" {
            let expected = "application/octet-stream, or send the form to POST /v1/adapters";
            return Err(body::unsupported(content_type, expected));
        }
        let loader = registry.loader().clone();
        let file = incoming.onto_disk(incoming.pieces());
        let check = move |bytes, manifest: &mut _| check(&loader, bytes, manifest);
        let patch = ManifestPatch::default();
        Ok(registry.put(&name, policy, patch, file, check).await?)
    };
    let published = match put.await {
        Ok(published) => published,
        Err(error) => return Err(incoming.refuse(error).await),
    };
    let mut answer = AdapterAnswer::new(registry, &published.entry);
    answer.found = Some(published.found);
    let status = match published.replaced {
        true => StatusCode::OK,
        false => StatusCode::CREATED,
    };
    Ok((status, location(&name), Json(answer)).into_response())
}

/// Where an adapter is to be found.
pub(in crate::api) fn location(name: impl std::fmt::Display) -> [(header::HeaderName, String); 1] {
    [(header::LOCATION, format!("/v1/adapters/{name}"))]
}
