//! The one place where the command line meets the engine.

use std::{io, sync::Arc};

use crate::{
    adapters::AdapterError,
    config::{Config, InvalidOption},
    engine::{self, AdapterLoader, EngineConfig, Mixer, OpenError, Painter, Slices},
    pipeline::Pipeline,
    training::options::ModelFacts,
};

/// Why the engine did not open.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Option(#[from] InvalidOption),
    /// Boxed, since it is large and seldom.
    #[error("no adapters can be read for this model: {0}")]
    Sites(#[from] Box<AdapterError>),
    #[error("no thread for the device worker: {0}")]
    Thread(#[from] io::Error),
}

/// A running engine, and what its model's adapters need.
pub struct Booted {
    pub painter: Arc<dyn Painter>,
    /// The way to the device for work beside painting.
    pub slices: Slices<Pipeline>,
    /// What the model says about training it.
    pub facts: ModelFacts,
    pub loader: AdapterLoader,
    pub mixer: Arc<Mixer>,
}

/// Loads the model and starts the device thread. Slow: run it on a blocking thread.
pub fn open_engine(config: &Config) -> Result<Booted, BootError> {
    let limits = config.limits.clone();
    let mut opened = engine::open(&config.model, config.device, config.dtype, limits)?;
    config
        .defaults
        .apply(&mut opened.info.defaults, &config.limits)?;
    let loader = opened.adapter_loader().map_err(Box::new)?;
    let mixer = opened.mixer(config.device_adapter_bytes);
    let facts = ModelFacts::of(opened.pipeline());
    let (engine, slices) = opened.start_shared(EngineConfig {
        queue: config.queue,
        max_rows: config.max_batch,
        // A guided picture is two rows, so these are twice as many pictures as fit a forward: those of
        // another size, which step in turns, need not wait for a free place.
        max_running: config.max_batch,
        training_share: config.training_share,
    })?;
    Ok(Booted {
        painter: Arc::new(engine),
        slices,
        facts,
        loader,
        mixer,
    })
}
