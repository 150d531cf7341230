//! The one place where the command line meets the engine.

use std::sync::Arc;

use crate::{config::Config, engine::Painter};

/// Why the engine did not open.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the model: {0}")]
pub struct BootError(pub String);

/// Loads the model and starts the device thread. Slow: run it on a blocking thread.
pub fn open_engine(_config: &Config) -> Result<Arc<dyn Painter>, BootError> {
    Err(BootError("not built yet".into()))
}
