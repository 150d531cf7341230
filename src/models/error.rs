//! Why a model folder cannot be served.

/// A model folder that cannot be loaded; every case names the file, and the tensor or key in it.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(
        "the demo model is not in this binary: build with the feature `demo-model`, or name a model folder"
    )]
    NoDemoModel,
    #[error("{file}: cannot be read: {source}")]
    Io {
        file: String,
        source: std::io::Error,
    },
    /// A file the folder must have; `expected` says which names were tried.
    #[error("{file}: missing; {expected}")]
    MissingFile { file: String, expected: String },
    #[error("{file}: not valid JSON: {source}")]
    Json {
        file: String,
        source: serde_json::Error,
    },
    #[error("{file}: key `{key}` is missing; expected {expected}")]
    MissingKey {
        file: String,
        key: String,
        expected: String,
    },
    #[error("{file}: key `{key}`: {found} is not supported; expected {expected}")]
    Config {
        file: String,
        key: String,
        found: String,
        expected: String,
    },
    /// A file that is not safetensors, or whose header lies about it.
    #[error("{file}: not a usable safetensors file: {reason}")]
    Header { file: String, reason: String },
    #[error("{file}: tensor `{tensor}` is missing; expected shape {expected:?}")]
    MissingTensor {
        file: String,
        tensor: String,
        expected: Vec<usize>,
    },
    #[error("{file}: tensor `{tensor}` has shape {found:?}; the config asks for {expected:?}")]
    Shape {
        file: String,
        tensor: String,
        expected: Vec<usize>,
        found: Vec<usize>,
    },
    #[error("{file}: tensor `{tensor}`: {reason}")]
    Tensor {
        file: String,
        tensor: String,
        reason: String,
    },
    #[error(
        "{file}: tensor `{tensor}` is truncated: it ends at byte {needed} and the file has {found}"
    )]
    Truncated {
        file: String,
        tensor: String,
        needed: u64,
        found: u64,
    },
    #[error("{file}: not a usable tokenizer: {reason}")]
    Tokenizer { file: String, reason: String },
    #[error("{what}: {source}")]
    Device {
        what: String,
        source: candle_core::Error,
    },
}
