//! Training: pictures in, a servable adapter out.
//!
//! The model is the one that paints: [`Trainable`] hangs variables at its sites as a
//! [`DeltaSet`](crate::models::DeltaSet), and the ways back are those of [`ops`](crate::ops). No weight of
//! the base is ever a variable.

mod captions;
mod checkpoint;
pub mod dataset;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod gradient_tests;
pub mod objective;
pub mod optimizer;
pub mod options;
pub mod order;
mod painting;
pub mod random;
mod run;
#[cfg(all(test, feature = "demo-model"))]
mod run_tests;
mod start;
mod step;
mod trainable;

pub use checkpoint::CheckpointError;
pub use run::{Report, Run, RunError, Slice};
pub use step::{Captions, Passage, Rates, StepError, gradients, update};
pub use trainable::{Parameter, Part, Trainable};
