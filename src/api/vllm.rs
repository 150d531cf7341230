//! vLLM's two routes for adapters, for the operators and gateways that call them.
//!
//! There they are how an adapter becomes known at all. Here every adapter in the store is, and comes
//! into memory when a picture needs it: loading is to have it there before, unloading to give the
//! memory back.

use std::path::{self, Path};

use axum::{
    body::Body,
    extract::{Request, State},
};
use utoipa::ToSchema;

use super::{ApiError, AppState, body, error::ErrorBody, fields::Fields};
use crate::{engine::AdapterRegistry, registry::AdapterName};

/// What to load.
#[derive(ToSchema)]
#[allow(
    dead_code,
    reason = "only its schema is used; the fields are read one by one"
)]
pub(super) struct LoadLora {
    /// The adapter's name in `/v1/adapters`.
    lora_name: String,
    /// The same name, or a path of its file in the adapter folder.
    lora_path: String,
}

/// What to unload.
#[derive(ToSchema)]
#[allow(
    dead_code,
    reason = "only its schema is used; the fields are read one by one"
)]
pub(super) struct UnloadLora {
    /// The adapter's name in `/v1/adapters`.
    lora_name: String,
}

/// Load an adapter, as vLLM does.
///
/// Off unless the server was started with `--allow-lora-loading`. The adapter must be in the store;
/// files elsewhere are never read.
#[utoipa::path(post, path = "/v1/load_lora_adapter", tag = "adapters",
    request_body = LoadLora,
    responses(
        (status = 200, description = "It is in memory", body = String, content_type = "text/plain"),
        (status = 404, description = "Not allowed here, or no such adapter", body = ErrorBody),
        (status = 409, description = "It is for another model family", body = ErrorBody),
        (status = 422, description = "A field or the file cannot be used", body = ErrorBody),
        (status = 503, description = "Still loading, or the store is away", body = ErrorBody),
        (status = 507, description = "There is no memory for it", body = ErrorBody)))]
pub(super) async fn load_lora_adapter(
    State(state): State<AppState>,
    request: Request<Body>,
) -> Result<String, ApiError> {
    let registry = allowed(&state)?;
    let mut fields = read(&state, request).await?;
    let name = name(&mut fields)?;
    let path = required(&mut fields, "lora_path")?;
    if named_by(&path, registry).as_ref() != Some(&name) {
        return Err(ApiError::field(
            "lora_path",
            format!(
                "must be `{name}`, or the path of {name}.safetensors in the adapter folder: adapters \
                 have their files' names, and files elsewhere are not read; POST /v1/adapters \
                 uploads one"
            ),
        ));
    }
    registry.lease(&name).await?;
    Ok(format!(
        "Success: LoRA adapter '{name}' added successfully."
    ))
}

/// Unload an adapter, as vLLM does.
///
/// Off unless the server was started with `--allow-lora-loading`. Its memory goes as soon as no
/// picture needs it; it stays in the store, and the next picture loads it again.
#[utoipa::path(post, path = "/v1/unload_lora_adapter", tag = "adapters",
    request_body = UnloadLora,
    responses(
        (status = 200, description = "It is not kept in memory", body = String,
            content_type = "text/plain"),
        (status = 404, description = "Not allowed here, or no such adapter", body = ErrorBody),
        (status = 422, description = "It is pinned, or a field cannot be used", body = ErrorBody),
        (status = 503, description = "Still loading, or the store is away", body = ErrorBody)))]
pub(super) async fn unload_lora_adapter(
    State(state): State<AppState>,
    request: Request<Body>,
) -> Result<String, ApiError> {
    let registry = allowed(&state)?;
    let mut fields = read(&state, request).await?;
    let name = name(&mut fields)?;
    match registry.release(&name).await? {
        true => Ok(format!(
            "Success: LoRA adapter '{name}' removed successfully."
        )),
        false => Err(ApiError::field(
            "lora_name",
            format!("is pinned; POST /v1/adapters/{name}/unpin first"),
        )),
    }
}

/// The adapters, if the operator lets requests load them. vLLM without its permission has no such
/// routes, so 404 is what its clients expect.
fn allowed(state: &AppState) -> Result<&AdapterRegistry, ApiError> {
    match state.settings().lora_loading {
        true => state.adapters(),
        false => Err(ApiError::LoraLoadingOff),
    }
}

async fn read(state: &AppState, request: Request<Body>) -> Result<Fields, ApiError> {
    let (parts, body) = request.into_parts();
    let content_type = body::content_type(&parts.headers);
    if !body::is_json(&content_type) {
        return Err(body::unsupported(content_type, "application/json"));
    }
    let bytes = body::read(body, state.settings()).await?;
    Ok(Fields::new(body::parse_object(&bytes)?))
}

fn required(fields: &mut Fields, name: &'static str) -> Result<String, ApiError> {
    let text = fields.text(name)?.filter(|text| !text.is_empty());
    text.ok_or_else(|| ApiError::field(name, "is missing"))
}

fn name(fields: &mut Fields) -> Result<AdapterName, ApiError> {
    let name = required(fields, "lora_name")?;
    AdapterName::new(name).map_err(|error| ApiError::field("lora_name", error.to_string()))
}

/// The adapter that a path means. The path is compared and never opened.
fn named_by(given: &str, registry: &AdapterRegistry) -> Option<AdapterName> {
    let given = Path::new(given);
    let file = match given.parent() {
        Some(parent) if parent != Path::new("") => {
            let folder = path::absolute(parent).ok()?;
            given
                .file_name()
                .filter(|_| Some(&*folder) == registry.folder())?
        }
        _ => given.as_os_str(),
    };
    let file = file.to_str()?;
    AdapterName::new(file.strip_suffix(".safetensors").unwrap_or(file)).ok()
}
