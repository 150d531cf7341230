//! Training: pictures in, a servable adapter out.
//!
//! [`options`] say what is to be done and [`dataset`] with which pictures; a [`Run`] does it, slice by
//! slice, and goes on from its own checkpoints to the same bytes. A step draws all its chance from
//! [`random`], so that nothing but values and moments is ever state. `evaluation.rs` measures, where it is
//! asked for, what was learned on pictures that were held out.
//!
//! The model is the one that paints: `trainable.rs` hangs variables at its sites as a
//! [`DeltaSet`](crate::models::DeltaSet), `step.rs` leads a batch through and back, and the ways back are
//! those of [`ops`](crate::ops). No weight of the base is ever a variable. What is learned is an
//! [`Adapter`](crate::adapters::Adapter) like any other, and pictures on the way are painted with it as
//! requests are.

mod captions;
mod checkpoint;
pub mod dataset;
#[cfg(test)]
mod difference_tests;
pub mod estimate;
mod evaluation;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod gradient_tests;
#[cfg(all(test, feature = "demo-model"))]
mod learning_tests;
mod material;
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
pub use estimate::Estimate;
pub use evaluation::Evaluation;
pub use painting::Canvas;
pub use run::{Report, Run, RunError, Slice};
pub use step::{Captions, Passage, Rates, StepError, gradients, update};
pub use trainable::{Parameter, Part, Trainable};
