//! What a caller asked for, before validation.

use serde::{Deserialize, Serialize};

use super::{Checkpointing, Crop, Learnable, Method, RateSchedule, Rule, Targets, Variant};

/// Every field may be absent but `method`, and one that says what to call the subject. What the fields
/// mean is said at [`TrainingOptions`](super::TrainingOptions), whose defaults depend on method and
/// model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingDraft {
    pub method: Option<Method>,
    pub token: Option<String>,
    pub instance_prompt: Option<String>,
    /// Switches prior preservation on.
    pub class_prompt: Option<String>,
    pub prior_weight: Option<f64>,
    pub class_images: Option<u64>,
    pub initializer: Option<String>,
    pub vectors: Option<u64>,
    pub learnable: Option<Learnable>,
    pub rank: Option<u64>,
    /// As the rank if absent.
    pub alpha: Option<f64>,
    pub targets: Option<Targets>,
    pub train_text_encoder: Option<bool>,
    pub variant: Option<Variant>,
    pub rslora: Option<bool>,
    /// Of the UNet's LoRA; of the word in textual inversion.
    pub learning_rate: Option<f64>,
    pub text_learning_rate: Option<f64>,
    /// Of pivotal tuning's first phase.
    pub embedding_learning_rate: Option<f64>,
    /// Of pivotal tuning's first phase; `steps` are those of the second.
    pub embedding_steps: Option<u64>,
    pub lr_schedule: Option<RateSchedule>,
    pub warmup_steps: Option<u64>,
    pub steps: Option<u64>,
    pub batch_size: Option<u64>,
    pub gradient_accumulation: Option<u64>,
    /// 0 switches clipping off.
    pub max_grad_norm: Option<f64>,
    pub optimizer: Option<Rule>,
    pub beta1: Option<f64>,
    pub beta2: Option<f64>,
    pub eps: Option<f64>,
    pub weight_decay: Option<f64>,
    /// 0 is off.
    pub min_snr_gamma: Option<f64>,
    pub noise_offset: Option<f64>,
    pub resolution: Option<u64>,
    pub aspect_buckets: Option<bool>,
    pub flip: Option<bool>,
    pub crop: Option<Crop>,
    pub caption_dropout: Option<f64>,
    pub caption_shuffle: Option<bool>,
    pub caption_keep: Option<u64>,
    pub seed: Option<u64>,
    /// Empty: nothing is painted on the way.
    pub sample_prompts: Option<Vec<String>>,
    /// 0 paints nothing on the way.
    pub sample_every: Option<u64>,
    pub sample_seed: Option<u64>,
    /// Pictures kept from training to measure it by; 0 is none, as is this absent with the two below.
    pub held_out: Option<u64>,
    pub evaluate_every: Option<u64>,
    /// 0 is off.
    pub early_stop_patience: Option<u64>,
    pub checkpoint_every: Option<u64>,
    pub checkpointing: Option<Checkpointing>,
}
