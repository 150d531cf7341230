//! The serving core: admission queue, step batcher, device worker.
//!
//! A step is the unit of scheduling. Requests join and leave between denoising steps, and what
//! runs together shares nothing but the latent shape. [`Painter`] is what the HTTP layer and the
//! command line know of all this; [`Engine`] is the real one, over any [`Backend`].

mod admission;
mod backend;
mod batcher;
#[allow(clippy::module_inception)] // The house is named after its main room.
mod engine;
mod job;
mod loader;
mod mixer;
mod open;
mod painter;
mod pipeline_backend;
mod slices;
mod wardrobe;
mod worker;

#[cfg(all(test, feature = "demo-model"))]
mod independence_tests;
#[cfg(test)]
mod slice_tests;
#[cfg(all(test, feature = "demo-model"))]
mod swap_tests;
#[cfg(all(test, feature = "demo-model"))]
mod test_adapters;
#[cfg(test)]
pub(crate) mod tests;

pub use backend::{Backend, BackendError, LatentShape, View};
pub use engine::{Engine, EngineConfig};
pub use job::{Health, Job, JobError, Picture, Progress, SubmitError};
pub use loader::{AdapterLoader, AdapterRegistry};
pub use mixer::{Mixer, MixerError, Portion};
pub use open::{DeviceChoice, OpenError, Opened, Precision, open};
pub use painter::{AdapterUse, Drained, EngineStats, ModelInfo, Painter};
pub use slices::{Outcome, Slices, Work, WorkError, Working};
pub use wardrobe::{OnMissing, Wardrobe, WardrobeError};
