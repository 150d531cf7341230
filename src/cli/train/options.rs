//! The options of `lorikeet train`.

use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::{
    cli::{Failure, options::ModelOptions, store::DEFAULT},
    training::options::{Method, RateSchedule, Rule, Targets, TrainingDraft, Variant},
};

/// Train an adapter on pictures, and put it among those that are served
///
/// Ctrl-C stops after the step at hand and keeps a checkpoint; the same command goes on from there.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lorikeet train dreambooth --images pictures --name zorp --instance-prompt \"a zorp monster\"
  lorikeet train dreambooth --images pictures --name zorp --instance-prompt \"a zorp monster\" \\
      --class-prompt \"a monster\"
  lorikeet train lora --images drawings --name blueprint
  lorikeet train textual-inversion --images pictures --name zorp-word --token \"<zorp>\" --initializer monster
  lorikeet train pivotal --images pictures --name zorp-both --token \"<zorp>\" --initializer monster \\
      --instance-prompt \"a <zorp> monster\"
  lorikeet train lora --images drawings --name lines --set noise_offset=0.05 --set flip=true

Captions are the .txt beside a picture, or a metadata.jsonl or captions.jsonl with file_name and text. What
--set can set beside the options here: prior_weight, class_images, learnable (object, style),
embedding_learning_rate, gradient_accumulation, max_grad_norm, beta1, beta2, eps, weight_decay,
min_snr_gamma, noise_offset, aspect_buckets, flip, crop (center, random), caption_dropout,
caption_shuffle, caption_keep, sample_seed, checkpointing (auto, on, off), held_out (pictures to measure
by), evaluate_every (steps), early_stop_patience (evaluations without a better one).")]
pub(in crate::cli) struct TrainOptions {
    /// What is learned, and how
    method: Method,
    /// The pictures: a folder, or a zip archive
    #[arg(long, env = "LORIKEET_IMAGES", value_name = "DIR|ZIP")]
    pub images: PathBuf,
    /// What the adapter will be called
    #[arg(long, env = "LORIKEET_NAME")]
    pub name: String,
    /// Put it in the place of an adapter of that name
    #[arg(long, env = "LORIKEET_REPLACE")]
    pub replace: bool,
    /// Begin anew, whatever an earlier run of that name left
    #[arg(long, env = "LORIKEET_RESTART")]
    pub restart: bool,

    /// What the pictures show, with the word that will call it: "a zorp monster"
    #[arg(
        long,
        env = "LORIKEET_INSTANCE_PROMPT",
        value_name = "TEXT",
        help_heading = "Words"
    )]
    instance_prompt: Option<String>,
    /// What they are one of: "a monster"; pictures of it are painted and trained along, so that the
    /// model keeps knowing others
    #[arg(
        long,
        env = "LORIKEET_CLASS_PROMPT",
        value_name = "TEXT",
        help_heading = "Words"
    )]
    class_prompt: Option<String>,
    /// The word that is learned: "<zorp>"
    #[arg(
        long,
        env = "LORIKEET_TOKEN",
        value_name = "WORD",
        help_heading = "Words"
    )]
    token: Option<String>,
    /// The word it begins as: "monster"
    #[arg(
        long,
        env = "LORIKEET_INITIALIZER",
        value_name = "WORD",
        help_heading = "Words"
    )]
    initializer: Option<String>,
    /// Tokens that the learned word stands for [default: by the model's size]
    #[arg(
        long,
        env = "LORIKEET_VECTORS",
        value_name = "N",
        help_heading = "Words"
    )]
    vectors: Option<u64>,

    /// Steps of the optimiser [default: by method and model]
    #[arg(
        long,
        env = "LORIKEET_STEPS",
        value_name = "N",
        help_heading = "Training"
    )]
    steps: Option<u64>,
    /// Steps of pivotal tuning's first phase [default: by the model]
    #[arg(
        long,
        env = "LORIKEET_EMBEDDING_STEPS",
        value_name = "N",
        help_heading = "Training"
    )]
    embedding_steps: Option<u64>,
    /// Pictures of a step [default: by the model]
    #[arg(
        long,
        env = "LORIKEET_BATCH_SIZE",
        value_name = "N",
        help_heading = "Training"
    )]
    batch_size: Option<u64>,
    /// Of the UNet's LoRA, or of the word [default: by method and model]
    #[arg(
        long,
        env = "LORIKEET_LEARNING_RATE",
        value_name = "X",
        help_heading = "Training"
    )]
    learning_rate: Option<f64>,
    /// Of the text encoder's LoRA [default: by method and model]
    #[arg(
        long,
        env = "LORIKEET_TEXT_LEARNING_RATE",
        value_name = "X",
        help_heading = "Training"
    )]
    text_learning_rate: Option<f64>,
    /// Train the text encoder along [default: by method and model]
    #[arg(
        long,
        env = "LORIKEET_TRAIN_TEXT_ENCODER",
        value_name = "true|false",
        help_heading = "Training"
    )]
    train_text_encoder: Option<bool>,
    /// How the learning rate goes [default: constant]
    #[arg(
        long,
        env = "LORIKEET_LR_SCHEDULE",
        value_enum,
        help_heading = "Training"
    )]
    lr_schedule: Option<RateSchedule>,
    /// Steps in which it rises from zero
    #[arg(
        long,
        env = "LORIKEET_WARMUP_STEPS",
        value_name = "N",
        help_heading = "Training"
    )]
    warmup_steps: Option<u64>,
    /// [default: adamw]
    #[arg(
        long,
        env = "LORIKEET_OPTIMIZER",
        value_enum,
        help_heading = "Training"
    )]
    optimizer: Option<Rule>,
    /// Side of the pictures in pixels [default: the model's]
    #[arg(
        long,
        env = "LORIKEET_RESOLUTION",
        value_name = "N",
        help_heading = "Training"
    )]
    resolution: Option<u64>,
    /// What all chance comes from: the same seed gives the same file [default: random]
    #[arg(
        long,
        env = "LORIKEET_SEED",
        value_name = "N",
        help_heading = "Training"
    )]
    seed: Option<u64>,

    /// [default: by the model]
    #[arg(
        long,
        env = "LORIKEET_RANK",
        value_name = "N",
        help_heading = "Adapter"
    )]
    rank: Option<u64>,
    /// The delta is multiplied with alpha over the rank [default: the rank]
    #[arg(
        long,
        env = "LORIKEET_ALPHA",
        value_name = "X",
        help_heading = "Adapter"
    )]
    alpha: Option<f64>,
    /// Which modules of the UNet get a delta [default: attention]
    #[arg(long, env = "LORIKEET_TARGETS", value_enum, help_heading = "Adapter")]
    targets: Option<Targets>,
    /// [default: lora]
    #[arg(long, env = "LORIKEET_VARIANT", value_enum, help_heading = "Adapter")]
    variant: Option<Variant>,
    /// Divide alpha by the rank's root instead
    #[arg(
        long,
        env = "LORIKEET_RSLORA",
        value_name = "true|false",
        help_heading = "Adapter"
    )]
    rslora: Option<bool>,

    /// What to paint on the way; several times for several
    #[arg(
        long,
        env = "LORIKEET_SAMPLE_PROMPT",
        value_name = "TEXT",
        help_heading = "On the way"
    )]
    sample_prompt: Vec<String>,
    /// Steps between two such pictures; 0 paints none
    #[arg(
        long,
        env = "LORIKEET_SAMPLE_EVERY",
        value_name = "N",
        help_heading = "On the way"
    )]
    sample_every: Option<u64>,
    /// Steps between two checkpoints
    #[arg(
        long,
        env = "LORIKEET_CHECKPOINT_EVERY",
        value_name = "N",
        help_heading = "On the way"
    )]
    checkpoint_every: Option<u64>,
    /// Where runs that are not finished lie: checkpoints and pictures painted on the way
    #[arg(
        long,
        env = "LORIKEET_DATA",
        default_value = "data",
        value_name = "DIR",
        help_heading = "On the way"
    )]
    pub data: PathBuf,

    /// Any other option, as listed below
    #[arg(long = "set", env = "LORIKEET_SET", value_name = "KEY=VALUE", value_delimiter = ';',
        value_parser = pair, help_heading = "Training")]
    set: Vec<(String, Value)>,
    /// Where adapters live: a folder, or s3://BUCKET/PREFIX with the usual AWS_* variables
    #[arg(long, env = "LORIKEET_ADAPTERS", default_value = DEFAULT, value_name = "DIR|s3://BUCKET/PREFIX",
        help_heading = "Model")]
    pub adapters: String,
    #[command(flatten, next_help_heading = "Model")]
    pub model: ModelOptions,
    /// What to log, by level and module
    #[arg(
        long,
        env = "LORIKEET_LOG",
        default_value = "warn",
        value_name = "FILTER",
        help_heading = "Model"
    )]
    pub log: String,
}

/// `flip=true`, `crop=random`.
fn pair(text: &str) -> Result<(String, Value), String> {
    let (key, value) = text
        .split_once('=')
        .ok_or_else(|| format!("`{text}` is not KEY=VALUE"))?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.into()));
    Ok((key.trim().replace('-', "_"), value))
}

impl TrainOptions {
    /// All that was said, to be checked against the model.
    pub fn draft(&self) -> Result<TrainingDraft, Failure> {
        let others: Map<String, Value> = self.set.iter().cloned().collect();
        let others = serde_json::from_value::<TrainingDraft>(Value::Object(others));
        let others = others.map_err(|error| Failure::usage(format!("--set: {error}")))?;
        let prompts = (!self.sample_prompt.is_empty()).then(|| self.sample_prompt.clone());
        Ok(TrainingDraft {
            method: Some(self.method),
            token: self.token.clone().or(others.token.clone()),
            instance_prompt: self
                .instance_prompt
                .clone()
                .or(others.instance_prompt.clone()),
            class_prompt: self.class_prompt.clone().or(others.class_prompt.clone()),
            initializer: self.initializer.clone().or(others.initializer.clone()),
            vectors: self.vectors.or(others.vectors),
            rank: self.rank.or(others.rank),
            alpha: self.alpha.or(others.alpha),
            targets: self.targets.or(others.targets),
            train_text_encoder: self.train_text_encoder.or(others.train_text_encoder),
            variant: self.variant.or(others.variant),
            rslora: self.rslora.or(others.rslora),
            learning_rate: self.learning_rate.or(others.learning_rate),
            text_learning_rate: self.text_learning_rate.or(others.text_learning_rate),
            embedding_steps: self.embedding_steps.or(others.embedding_steps),
            lr_schedule: self.lr_schedule.or(others.lr_schedule),
            warmup_steps: self.warmup_steps.or(others.warmup_steps),
            steps: self.steps.or(others.steps),
            batch_size: self.batch_size.or(others.batch_size),
            optimizer: self.optimizer.or(others.optimizer),
            resolution: self.resolution.or(others.resolution),
            seed: self.seed.or(others.seed),
            sample_prompts: prompts.or(others.sample_prompts.clone()),
            sample_every: self.sample_every.or(others.sample_every),
            checkpoint_every: self.checkpoint_every.or(others.checkpoint_every),
            ..others
        })
    }
}
