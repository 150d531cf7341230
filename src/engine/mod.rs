//! The serving core: admission queue, step batcher, device worker.
//!
//! This is the contract the HTTP layer and the command line code against.

mod job;

pub use job::{Health, Job, JobError, Picture, Progress, SubmitError};
