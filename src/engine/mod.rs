//! The serving core: admission queue, step batcher, device worker.
//!
//! This is the contract the HTTP layer and the command line code against.

mod job;
mod painter;

pub use job::{Health, Job, JobError, Picture, Progress, SubmitError};
pub use painter::{Drained, EngineStats, ModelInfo, Painter};
