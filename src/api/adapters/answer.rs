//! Adapters as answers show them.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::super::ApiError;
use crate::{
    engine::AdapterRegistry,
    registry::{Entry, Status},
};

/// An adapter.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AdapterAnswer {
    #[schema(example = "red-fox")]
    name: String,
    /// Always `adapter`.
    object: &'static str,
    description: String,
    /// Words that call its subject or style up in a prompt.
    trigger_words: Vec<String>,
    tags: Vec<String>,
    base: BaseAnswer,
    /// How it was made: `lora`, `dora`, `textual-inversion`, …
    method: Option<String>,
    /// The settings it was made with.
    #[schema(value_type = Option<Object>)]
    recipe: Option<Value>,
    /// Whether it stays in memory once loaded.
    pinned: bool,
    /// Hash of its file, which is its ETag too; absent until the file was first read.
    sha256: Option<String>,
    /// Size of its file.
    bytes: u64,
    /// Unix time in seconds.
    created: u64,
    /// Where its preview is, if it has one.
    #[schema(example = "/v1/adapters/red-fox/preview.png")]
    preview: Option<String>,
    /// `stored`, `loading`, `ready` (in memory) or `failed`.
    status: &'static str,
    /// Why it cannot be served, where it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// Who may see and change it; nobody in particular where absent.
    owner: Option<String>,
    /// What the file was read as; in answers to uploads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub found: Option<Found>,
    /// What was sent and did not count; absent when there is nothing to say.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// The model an adapter was made for, as far as is known.
#[derive(Debug, Serialize, ToSchema)]
struct BaseAnswer {
    /// `sd1`, `sd2`, `sdxl`.
    family: Option<String>,
    hash: Option<String>,
}

/// What a file was read as.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Found {
    /// Whose names its keys are.
    #[schema(example = "PEFT")]
    pub dialect: String,
    /// Sites it changes in each part of the model.
    #[schema(example = json!({"unet": 32}))]
    pub sites: BTreeMap<String, usize>,
    /// The ranks that occur.
    pub ranks: Vec<usize>,
    /// Words it brings.
    pub words: Vec<String>,
    /// Keys that mean nothing to this model; the first of them, where there are many.
    pub unmatched: Vec<String>,
    /// How many such keys there are.
    pub unmatched_total: usize,
}

impl AdapterAnswer {
    pub fn new(registry: &AdapterRegistry, entry: &Entry) -> Self {
        let manifest = entry.manifest.clone();
        let (status, reason) = match registry.status(entry) {
            Status::Stored => ("stored", None),
            Status::Loading => ("loading", None),
            Status::Ready => ("ready", None),
            Status::Failed(error) => ("failed", Some(ApiError::from(error).client_message())),
        };
        Self {
            name: entry.name.to_string(),
            object: "adapter",
            description: manifest.description,
            trigger_words: manifest.trigger_words,
            tags: manifest.tags,
            base: BaseAnswer {
                family: manifest.base.family,
                hash: manifest.base.hash,
            },
            method: manifest.method,
            recipe: manifest.recipe,
            pinned: manifest.pinned,
            sha256: entry.generation.map(|generation| generation.to_string()),
            bytes: manifest.bytes,
            created: manifest.created,
            preview: entry
                .preview
                .then(|| format!("/v1/adapters/{}/preview.png", entry.name)),
            status,
            reason,
            owner: manifest.owner,
            found: None,
            warnings: Vec::new(),
        }
    }
}
