//! `GET /v1/models`, and which model a request means.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{ApiError, AppState, error::ErrorBody};
use crate::{
    engine::ModelInfo,
    registry::{AdapterName, Entry, RegistryError, Status},
};

/// A model that can be named in `model`: the served one, or an adapter for it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Model {
    #[schema(example = "demo")]
    id: String,
    /// Always `model`.
    object: &'static str,
    /// Unix time in seconds.
    created: u64,
    owned_by: String,
    /// Of an adapter, the model it is painted with.
    #[schema(example = json!(null))]
    parent: Option<String>,
}

/// All models.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ModelList {
    /// Always `list`.
    object: &'static str,
    data: Vec<Model>,
}

impl From<&ModelInfo> for Model {
    fn from(info: &ModelInfo) -> Self {
        Self {
            id: info.name.clone(),
            object: "model",
            created: info.created,
            owned_by: OWNER.into(),
            parent: None,
        }
    }
}

impl Model {
    /// As vLLM lists adapters.
    fn adapter(entry: &Entry, info: &ModelInfo) -> Self {
        let owner = entry.manifest.owner.as_deref();
        Self {
            id: entry.name.to_string(),
            object: "model",
            created: entry.manifest.created,
            owned_by: owner.unwrap_or(OWNER).into(),
            parent: Some(info.name.clone()),
        }
    }
}

/// Who owns what nobody else does.
const OWNER: &str = "lorikeet";

/// Lists what can be named in `model`: the model that is served, then the adapters.
#[utoipa::path(get, path = "/v1/models", tag = "models",
    responses(
        (status = 200, description = "The models", body = ModelList),
        (status = 503, description = "Still loading", body = ErrorBody)))]
pub(super) async fn list_models(
    State(state): State<AppState>,
) -> Result<Json<ModelList>, ApiError> {
    let info = state.painter()?.info();
    let mut data = vec![info.into()];
    if let Ok(registry) = state.adapters() {
        let all = registry.all().into_iter();
        // One that cannot be served, or has the model's own name, cannot be named in `model`.
        let served = all.filter(|entry| {
            entry.name.as_str() != info.name && !matches!(registry.status(entry), Status::Failed(_))
        });
        data.extend(served.map(|entry| Model::adapter(&entry, info)));
    }
    Ok(Json(ModelList {
        object: "list",
        data,
    }))
}

/// One model.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "models",
    params(("id" = String, Path, description = "A name from the list", example = "demo")),
    responses(
        (status = 200, description = "The model", body = Model),
        (status = 404, description = "No such model", body = ErrorBody),
        (status = 503, description = "Still loading", body = ErrorBody)))]
pub(super) async fn get_model(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let info = state.painter()?.info();
    // What is no text can be no name.
    let Ok(Path(id)) = id else {
        return Err(no_such_model("\u{fffd}", info));
    };
    if id == info.name {
        return Ok(Json(info.into()));
    }
    match adapter_named(&state, &id).await? {
        Some(entry) => Ok(Json(Model::adapter(&entry, info))),
        None => Err(no_such_model(&id, info)),
    }
}

/// The adapter of a name, if there is one and it can be a name.
pub(super) async fn adapter_named(
    state: &AppState,
    name: &str,
) -> Result<Option<Arc<Entry>>, ApiError> {
    let (Ok(registry), Ok(name)) = (state.adapters(), AdapterName::new(name)) else {
        return Ok(None);
    };
    match registry.get(&name).await {
        Ok(entry) => Ok(Some(entry)),
        Err(RegistryError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn no_such_model(name: &str, info: &ModelInfo) -> ApiError {
    ApiError::NoSuchModel {
        // Enough to recognise it by; the answer is not an echo service.
        name: name.chars().take(128).collect(),
        available: info.name.clone(),
    }
}

/// What the field `model` means.
pub(super) enum Meant {
    /// The served model.
    Base,
    /// The same, under a name that OpenAI's clients send by default.
    Instead(String),
    /// The served model with an adapter, if there is one of this name.
    Adapter(String),
}

/// Finds the model a request means.
pub(super) fn resolve(name: Option<&str>, info: &ModelInfo) -> Result<Meant, ApiError> {
    match name {
        None | Some("default") => Ok(Meant::Base),
        Some(name) if name == info.name => Ok(Meant::Base),
        Some(name) if is_openai_model(name) => Ok(Meant::Instead(format!(
            "model `{name}` is not served here; painted with `{}`",
            info.name
        ))),
        Some(name) if AdapterName::new(name).is_ok() => Ok(Meant::Adapter(name.into())),
        Some(name) => Err(no_such_model(name, info)),
    }
}

fn is_openai_model(name: &str) -> bool {
    const NAMES: [&str; 3] = ["dall-e-2", "dall-e-3", "chatgpt-image-latest"];
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    NAMES.contains(&name)
        || (name.starts_with("gpt-image-") && name.len() <= 64 && name.chars().all(plain))
}
