//! What a training job is to do: its payload, and the names of its files.

use serde::{Deserialize, Serialize};

use crate::{
    jobs::{FileName, InvalidFileName},
    registry::AdapterName,
    training::options::TrainingOptions,
};

/// What these jobs are called in the queue.
pub const KIND: &str = "training";
/// The folder of the pictures painted on the way.
pub const SAMPLES: &str = "samples";
/// Where a run goes on from.
const CHECKPOINT: &str = "checkpoint.safetensors";
/// The folder of what had been learned by then, as an adapter.
const SO_FAR: &str = "so-far";

/// The payload of a training job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// What the result is to be called.
    pub adapter: AdapterName,
    pub options: TrainingOptions,
    /// What to learn from, in [`JobFiles`](crate::jobs::JobFiles).
    pub pictures: Vec<Picture>,
}

/// A file as it was sent: a picture, captions, or an archive of such.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Picture {
    /// Its sender's.
    pub name: String,
    /// Ours.
    pub file: String,
}

/// What the n-th file that was sent is called among the job's.
///
/// # Errors
/// None that can happen: a number is a name.
pub fn input(n: usize) -> Result<FileName, InvalidFileName> {
    FileName::new(&format!("inputs/{n:05}"))
}

/// A picture painted after a step.
pub(super) fn sample(step: u32, index: usize) -> Result<FileName, InvalidFileName> {
    FileName::new(&format!("{SAMPLES}/{step:05}-{index}.png"))
}

pub(super) fn checkpoint() -> Result<FileName, InvalidFileName> {
    FileName::new(CHECKPOINT)
}

/// The adapter of so many steps.
pub(super) fn so_far(step: u32) -> Result<FileName, InvalidFileName> {
    FileName::new(&format!("{SO_FAR}/{step}.safetensors"))
}

/// The steps of an adapter by its file's name, if it is one.
pub(super) fn steps_of(name: &FileName) -> Option<u32> {
    let (folder, file) = name.as_str().split_once('/')?;
    let step = file.strip_suffix(".safetensors")?;
    step.parse().ok().filter(|_| folder == SO_FAR)
}
