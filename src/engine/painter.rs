//! What the HTTP layer and the command line know of the engine.

use std::{collections::BTreeSet, future::Future, pin::Pin};

use tokio::sync::watch;

use super::{Health, Job, SubmitError};
use crate::pipeline::request::{ImageRequest, Limits, ModelDefaults};

/// The model that is served.
#[derive(Debug, Clone)]
pub struct ModelInfo {
    /// What clients name in `model`.
    pub name: String,
    /// Short hash of the weights, as it goes into a picture's metadata.
    pub hash: String,
    pub defaults: ModelDefaults,
    pub limits: Limits,
    /// Unix time in seconds.
    pub created: u64,
    /// The device and its arithmetic for people, such as `cpu, f32`.
    pub device: String,
}

/// What the engine is doing now and has done since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Jobs waiting for their first step.
    pub queued: usize,
    /// Rows in the running batch (guidance makes two of a picture).
    pub running_rows: usize,
    /// Denoising steps done, counted per picture.
    pub steps: u64,
    /// Pictures finished.
    pub pictures: u64,
}

/// Names of the adapters that requests are waiting for and painted with, each once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AdapterUse {
    /// Of waiting requests; an adapter that is also painted with is not among them.
    pub waiting: BTreeSet<String>,
    pub running: BTreeSet<String>,
    /// Pictures painted at once, each with adapters of its own.
    pub most: usize,
}

/// A future behind a pointer, so that [`Painter`] can be a trait object.
pub type Drained<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// Paints requests: the engine, or a stand-in under test.
pub trait Painter: Send + Sync + 'static {
    /// Takes a request in, or says at once why not. Dropping the job cancels it.
    fn submit(&self, request: ImageRequest) -> Result<Job, SubmitError>;
    /// Always holds the latest health.
    fn health(&self) -> watch::Receiver<Health>;
    fn info(&self) -> &ModelInfo;
    fn stats(&self) -> EngineStats;
    fn adapters(&self) -> AdapterUse {
        AdapterUse::default()
    }
    /// Stops taking requests; accepted ones finish.
    fn drain(&self);
    /// Resolves once nothing is queued or running after [`Painter::drain`].
    fn drained(&self) -> Drained<'_>;
}
