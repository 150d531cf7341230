//! Why a file is not an adapter for a model.

use super::Family;
use crate::models::LoadError;

/// A file that cannot be read as an adapter, or an adapter that cannot be written as asked.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// The file cannot be opened, or its header does not describe it.
    #[error(transparent)]
    File(#[from] LoadError),
    #[error(
        "{file}: is {found}, not safetensors, and running one can run any program; convert it: python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('FILE', weights_only=True), 'FILE.safetensors')\""
    )]
    Pickle { file: String, found: &'static str },
    #[error("{file}: {found} {what}; at most {limit} are read")]
    Limit {
        file: String,
        what: &'static str,
        found: u64,
        limit: u64,
    },
    #[error("{file}: key `{key}`: {reason}")]
    Key {
        file: String,
        key: String,
        reason: String,
    },
    #[error(
        "{file}: key `{key}` has shape {found:?}; `{site}` of this model asks for {expected}: is it for another model family?"
    )]
    Shape {
        file: String,
        key: String,
        site: String,
        found: Vec<usize>,
        expected: String,
    },
    #[error("{file}: key `{key}` needs its companion `{missing}`, which the file lacks")]
    Incomplete {
        file: String,
        key: String,
        missing: String,
    },
    #[error("{file}: keys `{key}` and `{other}` mean the same tensor; keep one of them")]
    Duplicate {
        file: String,
        key: String,
        other: String,
    },
    #[error("{file}: is for {found}, and this model is {expected}")]
    Family {
        file: String,
        found: Family,
        /// The model's, or that it has none of those that are known.
        expected: String,
    },
    #[error(
        "{file}: none of its {count} keys (such as {sample}) belongs to this model: is it an adapter, and for this model family?"
    )]
    NothingMatched {
        file: String,
        count: usize,
        sample: String,
    },
    #[error(
        "{file}: key `{key}` holds {vectors} vectors without a token; give one token, or {vectors}"
    )]
    TokenNeeded {
        file: String,
        key: String,
        vectors: usize,
    },
    #[error("{file}: metadata `{key}`: {reason}")]
    Metadata {
        file: String,
        key: String,
        reason: String,
    },
    /// cloneofsimo's files number the sites; the numbers must be this model's.
    #[error(
        "{file}: numbers {found} places of the {part} ({classes}), and this model has {expected} such places"
    )]
    Positions {
        file: String,
        part: &'static str,
        classes: String,
        found: usize,
        expected: usize,
    },
    /// Two sites of one model that some dialect cannot tell apart.
    #[error("the spelling `{spelling}` would mean both `{first}` and `{second}` of this model")]
    Ambiguous {
        spelling: String,
        first: String,
        second: String,
    },
    #[error("`{site}`: {what} has no place in {format}; write {instead} instead")]
    Unwritable {
        site: String,
        what: &'static str,
        format: &'static str,
        instead: &'static str,
    },
    #[error("`{key}` would hold {value:e}; nothing above {limit:e} is read")]
    Value { key: String, value: f32, limit: f32 },
    #[error("`{site}`: {source}")]
    Tensor {
        site: String,
        source: candle_core::Error,
    },
}
