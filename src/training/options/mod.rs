//! What a training run is to do: a draft with holes becomes options without any.
//!
//! [`TrainingDraft::validate`] is the only way to [`TrainingOptions`] for callers, and a pure function
//! but for the seed it draws when none is given. Its errors name the field, the limit and what to send
//! instead; a field that the method has no use for is an error too. The options are a job's payload and
//! the recipe in an adapter's manifest: as JSON they come back the same.

mod check;
mod defaults;
mod draft;
mod measured;
mod phases;
#[cfg(test)]
mod tests;
mod validate;

use serde::{Deserialize, Serialize};

use crate::pipeline::Pipeline;

pub use super::optimizer::{RateSchedule, Rule, Settings};
pub use check::Limits;
pub use draft::TrainingDraft;

/// What is learned, and how.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// A subject from a few pictures, as a LoRA (Ruiz et al. 2022).
    #[serde(rename = "dreambooth")]
    #[value(name = "dreambooth")]
    DreamBooth,
    /// A style or a subject from captioned pictures, as a LoRA (Hu et al. 2021).
    Lora,
    /// A word from a few pictures (Gal et al. 2022).
    #[serde(alias = "textual_inversion")]
    #[value(alias = "textual_inversion")]
    TextualInversion,
    /// A word, then a LoRA that uses it; both in one file.
    Pivotal,
}

/// Which modules of the UNet get a delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Targets {
    /// Query, key, value and output of every attention.
    Attention,
    /// And the linear layers after it.
    AttentionFf,
    /// And the convolutions.
    Convs,
}

/// The form of a delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Variant {
    Lora,
    /// With a trained magnitude for each output (Liu et al. 2024).
    Dora,
}

/// What templates call the pictures while a word is learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Learnable {
    /// "a photo of a …"
    Object,
    /// "a painting in the style of …"
    Style,
}

/// Which part of a picture is taken where its shape is not that of its bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Crop {
    #[serde(alias = "centre")]
    #[value(alias = "centre")]
    Center,
    Random,
}

/// Whether activations are computed a second time in place of being kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Checkpointing {
    /// Where memory asks for it.
    Auto,
    On,
    Off,
}

/// What the model says about training it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelFacts {
    pub unet_parameters: u64,
    /// Side in pixels of the pictures it was trained on.
    pub sample_size: u32,
    /// Sides must be multiples of this many pixels.
    pub side_multiple: u32,
}

/// A run that has been checked: every value can be used as it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingOptions {
    pub method: Method,
    /// The word the subject or style will answer to: a new one where a word is learned, else one that
    /// the instance prompt has.
    pub token: Option<String>,
    /// The caption of pictures that have none of their own.
    pub instance_prompt: Option<String>,
    /// Absent without prior preservation.
    pub prior: Option<Prior>,
    /// Absent where no word is learned.
    pub embedding: Option<Embedding>,
    /// Absent where nothing but a word is learned.
    pub lora: Option<Lora>,
    pub batch_size: u32,
    /// Batches whose gradients make one step.
    pub gradient_accumulation: u32,
    /// Absent: gradients are not clipped.
    pub max_grad_norm: Option<f64>,
    /// Its weight decay is for the LoRA alone: a word's vectors do not decay.
    pub optimizer: Settings,
    pub lr_schedule: RateSchedule,
    pub warmup_steps: u32,
    /// Absent: every noise level weighs the same.
    pub min_snr_gamma: Option<f64>,
    /// Strength of noise that is the same for a whole channel.
    pub noise_offset: f64,
    /// Pixels: side of a square as large as a picture may become.
    pub resolution: u32,
    /// Pictures keep about their shape; otherwise all become squares.
    pub aspect_buckets: bool,
    /// Half of the samples are mirrored.
    pub flip: bool,
    pub crop: Crop,
    /// Share of the samples that are trained without a caption.
    pub caption_dropout: f64,
    /// The parts of a caption between commas change places, but for the first `caption_keep`.
    pub caption_shuffle: bool,
    pub caption_keep: u32,
    pub seed: u64,
    /// Absent: no pictures are painted on the way.
    pub samples: Option<Samples>,
    /// Absent: all pictures are learned from, and nothing is measured on the way.
    pub evaluations: Option<Evaluations>,
    /// Steps between checkpoints.
    pub checkpoint_every: u32,
    pub checkpointing: Checkpointing,
}

/// Prior preservation: the class is painted by the model itself and trained along.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prior {
    pub class_prompt: String,
    /// What the loss of a class picture weighs; that of a subject's weighs 1.
    pub weight: f64,
    pub images: u32,
}

/// A word that is learned.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Embedding {
    /// Words whose vectors are the first; the last is repeated if there are fewer than `vectors`.
    pub initializer: String,
    /// Tokens the word stands for.
    pub vectors: u32,
    pub learnable: Learnable,
    pub learning_rate: f64,
    pub steps: u32,
}

/// A LoRA that is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    pub rank: u32,
    /// The delta is multiplied with alpha over the rank (over its root with `rslora`).
    pub alpha: f64,
    pub targets: Targets,
    pub variant: Variant,
    /// Kalajdzievski 2023.
    pub rslora: bool,
    pub learning_rate: f64,
    /// Absent: the text encoder stays as it is.
    pub text_learning_rate: Option<f64>,
    pub steps: u32,
}

/// The loss on pictures held out from training, measured on the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluations {
    /// Absent: by how many pictures there are ([`Dataset::held_out`](super::dataset::Dataset::held_out)).
    pub held_out: Option<u32>,
    /// Steps between two evaluations; there is one before the first step and one after the last, too.
    pub every: u32,
    /// Evaluations without a new best, after which the run ends; in any case it then ends with the values
    /// of the best one. Of two phases this concerns the second. Absent: the run goes to its last step, and
    /// ends with what that leaves.
    pub patience: Option<u32>,
}

/// Pictures painted on the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Samples {
    pub prompts: Vec<String>,
    /// Steps between them.
    pub every: u32,
    pub seed: u64,
}

impl ModelFacts {
    /// Those of a loaded model.
    pub fn of(pipeline: &Pipeline) -> Self {
        let defaults = pipeline.defaults();
        let sites = pipeline.model().sites().iter();
        let unet = sites.filter(|site| site.name.starts_with("unet."));
        let numbers = unet.map(|site| site.weight_shape.iter().product::<usize>() as u64);
        // Latents must be halved as often as the UNet does, or skips are cut.
        let halvings = pipeline.model().unet.downsamplings();
        Self {
            unet_parameters: numbers.sum(),
            sample_size: defaults.width,
            side_multiple: defaults.side_multiple << halvings,
        }
    }
}

impl TrainingOptions {
    /// A prompt that shows what was learned.
    pub fn example_prompt(&self) -> String {
        let samples = self.samples.as_ref();
        match (
            samples.and_then(|samples| samples.prompts.first()),
            &self.instance_prompt,
            &self.token,
        ) {
            (Some(prompt), _, _) => prompt.clone(),
            (None, Some(prompt), _) => prompt.clone(),
            (None, None, Some(token)) => format!("a photo of {token}"),
            (None, None, None) => "a photo".into(),
        }
    }

    /// Steps of all phases together.
    pub fn total_steps(&self) -> u32 {
        let embedding = self.embedding.as_ref().map_or(0, |phase| phase.steps);
        let lora = self.lora.as_ref().map_or(0, |phase| phase.steps);
        embedding + lora
    }

    /// What calls the result up in a prompt.
    pub fn trigger_words(&self) -> Vec<&str> {
        let words = self.token.iter().chain(&self.instance_prompt);
        words.take(1).map(String::as_str).collect()
    }
}
