//! A run from its first picture to its last step, in slices.
//!
//! A slice is a step of a class picture, one picture encoded, one step of the optimiser, or a part of an
//! evaluation that is no more work than a step: between two slices the device is free for others. A run
//! depends on its options, its pictures and its model and on nothing
//! else, so it can go on from a [`Run::checkpoint`] as if it had never stopped.

use candle_core::{Device, Tensor};
use image::RgbImage;
use sha2::{Digest as _, Sha256};

use super::{
    captions,
    checkpoint::{Checkpoint, CheckpointError, Head, Values},
    dataset::Dataset,
    evaluation::{self, Evaluation, Evaluator, Points},
    material::{Material, Rows},
    objective::{Noised, weights},
    optimizer::{Optimizer, OptimizerError},
    options::{Checkpointing, ModelFacts, TrainingOptions},
    painting::{self, Canvas},
    start::{self, Phase},
    step::{Captions, Passage, Rates, StepError, gradients, update},
    trainable::{Parameter, Trainable},
};
use crate::{
    adapters::Adapter,
    models::Model,
    pipeline::{Pipeline, PipelineError, Word},
    schedulers::{NoiseLevels, SchedulerConfig, SchedulerError},
};

/// UNets above this many parameters compute their blocks again on the way back where the options leave
/// the choice: the demo model never does, SD 1.5 (860 million) does.
const RECOMPUTE_ABOVE: u64 = 100_000_000;
/// How fast the smoothed loss forgets.
const SMOOTHING: f64 = 0.95;

/// What one slice did.
#[derive(Debug, Clone)]
pub enum Slice {
    /// A step of a picture of the class, for prior preservation.
    ClassPicture {
        done: usize,
        of: usize,
    },
    /// A picture became latents.
    Encoded {
        done: usize,
        of: usize,
    },
    Step(Report),
    /// A part of an evaluation was made.
    Measured {
        done: usize,
        of: usize,
    },
    /// An evaluation came to its end.
    Evaluated(Evaluation),
    /// The last step was made, or early stop has ended the run before it ([`Run::step`] says when).
    Finished,
}

/// A step, as it is told.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// Steps made, this one included.
    pub step: u32,
    pub of: u32,
    pub loss: f64,
    pub smoothed_loss: f64,
    /// Of all gradients together, before they were clipped.
    pub gradient_norm: f64,
    pub rates: Rates,
}

/// Why a run cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("there are no pictures to learn from")]
    NoPictures,
    #[error("no module of this model is trained with these targets")]
    NothingToTrain,
    #[error(transparent)]
    Step(#[from] StepError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Scheduler(#[from] SchedulerError),
    #[error(transparent)]
    Paint(#[from] PipelineError),
    #[error(transparent)]
    Optimizer(#[from] OptimizerError),
    #[error(transparent)]
    Device(#[from] candle_core::Error),
}

/// A training run.
#[derive(Debug)]
pub struct Run {
    options: TrainingOptions,
    identity: String,
    unet_parameters: u64,
    levels: NoiseLevels,
    material: Material,
    /// Of captions in which nothing is trained.
    encodings: captions::Encodings,
    trainable: Trainable,
    parameters: Vec<Parameter>,
    optimizer: Optimizer,
    phase: Phase,
    step: u32,
    smoothed: Option<f64>,
    /// Absent where nothing is measured.
    evaluator: Option<Evaluator>,
}

impl Run {
    /// A run that has not begun, or goes on from a checkpoint's bytes.
    ///
    /// # Errors
    /// No pictures, options that leave nothing to train, or another run's checkpoint.
    pub fn new(
        pipeline: &Pipeline,
        options: TrainingOptions,
        dataset: Dataset,
        checkpoint: Option<&[u8]>,
    ) -> Result<Self, RunError> {
        let model = pipeline.model();
        let config = SchedulerConfig::from_json(&model.scheduler_config)?;
        let levels = NoiseLevels::new(&config)?;
        let identity = identity(&options, &dataset, model);
        let mut checkpoint = checkpoint.map(Checkpoint::decode).transpose()?;
        if checkpoint.as_ref().is_some_and(|c| c.head.run != identity) {
            return Err(CheckpointError::Foreign.into());
        }
        let word_steps = options.embedding.as_ref().map_or(0, |phase| phase.steps);
        let step = checkpoint.as_ref().map_or(0, |c| c.head.step);
        // The last step of the words leads into the next phase, if there is one.
        let phase = match step < word_steps || options.lora.is_none() {
            true => Phase::Word,
            false => Phase::Lora,
        };
        let words = start::words(model, &options)?;
        let trainable = start::trainable(model, &options, phase, words)?;
        let material = Material::new(&options, dataset)?;
        let (found, best) = match &mut checkpoint {
            Some(checkpoint) => (
                checkpoint.head.evaluations.take(),
                std::mem::take(&mut checkpoint.best),
            ),
            None => Default::default(),
        };
        let mut run = Self {
            identity,
            unet_parameters: ModelFacts::of(pipeline).unet_parameters,
            levels,
            evaluator: Evaluator::new(&options, material.held_out(), found, best),
            material,
            encodings: captions::Encodings::default(),
            parameters: trainable.parameters(),
            optimizer: start::optimizer(&options, phase, &trainable),
            trainable,
            options,
            phase,
            step,
            smoothed: checkpoint.as_ref().and_then(|c| c.head.smoothed_loss),
        };
        if run.parameters.is_empty() {
            return Err(RunError::NothingToTrain);
        }
        if let Some(checkpoint) = checkpoint {
            run.restore(checkpoint)?;
        }
        Ok(run)
    }

    fn restore(&mut self, checkpoint: Checkpoint) -> Result<(), RunError> {
        self.set(checkpoint.values)?;
        self.optimizer.load(checkpoint.optimizer)?;
        Ok(())
    }

    /// Gives every parameter the value it has there.
    fn set(&mut self, mut left: Values) -> Result<(), RunError> {
        for (name, values) in self.trainable.values() {
            let found = left.remove(&name);
            let Some((shape, numbers)) = found.filter(|(shape, _)| shape == values.dims()) else {
                let reason = format!("`{name}` is missing, or of another shape");
                return Err(CheckpointError::Broken(reason).into());
            };
            self.trainable
                .set(&name, &Tensor::from_vec(numbers, shape, &Device::Cpu)?)?;
        }
        if let Some(name) = left.keys().next() {
            let reason = format!("`{name}` is of no parameter");
            return Err(CheckpointError::Broken(reason).into());
        }
        Ok(())
    }

    /// What all parameters are now.
    fn values(&self) -> Result<Values, RunError> {
        let mut values = Values::new();
        for (name, tensor) in self.trainable.values() {
            let numbers = tensor.flatten_all()?.to_vec1()?;
            values.insert(name, (tensor.dims().to_vec(), numbers));
        }
        Ok(values)
    }

    /// Everything that the next step depends on, beside options, pictures and model.
    ///
    /// # Errors
    /// A device that fails.
    pub fn checkpoint(&self) -> Result<Vec<u8>, RunError> {
        let state = self.evaluator.as_ref().map(Evaluator::state);
        let (evaluations, best) = state.unwrap_or_default();
        let checkpoint = Checkpoint {
            head: Head {
                step: self.step,
                run: self.identity.clone(),
                smoothed_loss: self.smoothed,
                evaluations,
            },
            values: self.values()?,
            best,
            optimizer: self.optimizer.state(),
        };
        Ok(checkpoint.encode()?)
    }

    pub fn options(&self) -> &TrainingOptions {
        &self.options
    }

    /// Steps made.
    pub fn step(&self) -> u32 {
        self.step
    }

    /// The step of the best evaluation and its loss, of runs that are measured.
    pub fn best(&self) -> Option<(u32, f32)> {
        self.evaluator.as_ref().and_then(Evaluator::best)
    }

    /// What has been learned so far; when a run with early stop is finished, what it had learned at its best
    /// evaluation.
    ///
    /// # Errors
    /// A device that fails.
    pub fn adapter(&self) -> Result<Adapter, RunError> {
        Ok(self.trainable.adapter()?)
    }

    /// A picture of what has been learned so far, before its first step.
    ///
    /// # Errors
    /// A prompt that is refused, or a device that fails.
    pub fn canvas(&self, pipeline: &Pipeline, prompt: &str, seed: u64) -> Result<Canvas, RunError> {
        let (side, adapter) = (self.options.resolution, self.adapter()?);
        let canvas = painting::begin(pipeline, prompt, side, seed, Some(&adapter));
        Ok(canvas?)
    }

    /// The same, painted to its end.
    ///
    /// # Errors
    /// A prompt that is refused, or a device that fails.
    pub fn paint(
        &self,
        pipeline: &Pipeline,
        prompt: &str,
        seed: u64,
    ) -> Result<RgbImage, RunError> {
        Ok(self.canvas(pipeline, prompt, seed)?.finish(pipeline)?)
    }

    /// The next piece of work.
    ///
    /// Call it on a thread with room on its stack: candle walks the graph of the model recursively.
    ///
    /// # Errors
    /// A device that fails, a loss that is not finite, or a parameter that nothing reaches.
    pub fn slice(&mut self, pipeline: &Pipeline) -> Result<Slice, RunError> {
        let due = self.evaluator.as_ref().is_some_and(|e| e.is_due(self.step));
        let stopped = self.evaluator.as_ref().is_some_and(Evaluator::stops);
        if !due && (stopped || self.step >= self.options.total_steps()) {
            return Ok(Slice::Finished);
        }
        if let Some(slice) = self.material.prepare(pipeline, &self.options)? {
            return Ok(slice);
        }
        match self.evaluator.take() {
            Some(mut evaluator) if due => {
                let slice = self.evaluate(pipeline.model(), &mut evaluator);
                self.evaluator = Some(evaluator);
                slice
            }
            evaluator => {
                self.evaluator = evaluator;
                self.train(pipeline).map(Slice::Step)
            }
        }
    }

    /// Measures one of the pictures that are held out at some noise levels.
    fn evaluate(&mut self, model: &Model, evaluator: &mut Evaluator) -> Result<Slice, RunError> {
        let Points { picture, timesteps } = evaluator.points(self.levels.alphas_cumprod.len());
        let rows = (self.material).measured(model, &self.options, picture, &timesteps)?;
        let (noised, ids) = (self.noised(&rows)?, self.ids(model, &rows)?);
        let losses = evaluation::losses(model, &self.levels, &self.trainable, &noised, &ids)?;
        let Some(evaluation) = evaluator.take(self.step, losses, || self.values())? else {
            let (done, of) = evaluator.progress();
            return Ok(Slice::Measured { done, of });
        };
        if let Some(best) = evaluator.ending(self.step) {
            self.set(best.clone())?;
        }
        Ok(Slice::Evaluated(evaluation))
    }

    /// One step of the optimiser.
    fn train(&mut self, pipeline: &Pipeline) -> Result<Report, RunError> {
        let model = pipeline.model();
        let micro_batches = self.options.gradient_accumulation;
        let (mut loss, mut sum) = (0.0, Vec::<Vec<f32>>::new());
        for micro in 0..micro_batches {
            let number = u64::from(self.step) * u64::from(micro_batches) + u64::from(micro);
            let timesteps = self.levels.alphas_cumprod.len();
            let batch = self
                .material
                .batch(model, &self.options, timesteps, number)?;
            for rows in batch {
                let passage = self.passage(model, rows)?;
                let (part, found) = gradients(
                    model,
                    &self.levels,
                    &self.trainable,
                    &self.parameters,
                    &passage,
                )?;
                loss += part / f64::from(micro_batches);
                add(&mut sum, found);
            }
        }
        let share = 1.0 / micro_batches as f32;
        sum.iter_mut().flatten().for_each(|number| *number *= share);
        let (at, of) = self.place();
        // The first step that moves anything moves what begins at zero (that of a warm-up moves nothing);
        // after it nothing is without a gradient.
        let moved = 1 + u32::from(self.options.warmup_steps > 0);
        if at == moved
            && let Some(still) = sum
                .iter()
                .position(|g| g.iter().all(|number| *number == 0.0))
        {
            let name = self.parameters[still].name.clone();
            return Err(StepError::NoGradient { name }.into());
        }
        let rates = self.rates(at, of);
        let most = self.options.max_grad_norm;
        let norm = update(&mut self.optimizer, &self.parameters, &mut sum, most, rates)?;
        self.step += 1;
        let smoothed = match self.smoothed {
            Some(before) => SMOOTHING * before + (1.0 - SMOOTHING) * loss,
            None => loss,
        };
        self.smoothed = Some(smoothed);
        if self.phase == Phase::Word && at + 1 == of && self.options.lora.is_some() {
            self.go_on_with_lora(model)?;
        }
        Ok(Report {
            step: self.step,
            of: self.options.total_steps(),
            loss,
            smoothed_loss: smoothed,
            gradient_norm: norm,
            rates,
        })
    }

    /// The words are learned: from here on a LoRA is, that uses them.
    fn go_on_with_lora(&mut self, model: &Model) -> Result<(), RunError> {
        let words = self.trainable.adapter()?.embeddings;
        self.phase = Phase::Lora;
        self.encodings = captions::Encodings::default();
        self.trainable = start::trainable(model, &self.options, self.phase, words)?;
        self.parameters = self.trainable.parameters();
        self.optimizer = start::optimizer(&self.options, self.phase, &self.trainable);
        Ok(())
    }

    /// Where the next step is in its phase, and the phase's length.
    fn place(&self) -> (u32, u32) {
        let steps = self
            .options
            .embedding
            .as_ref()
            .map_or(0, |phase| phase.steps);
        match (self.phase, &self.options.lora) {
            (Phase::Lora, Some(lora)) => (self.step - steps, lora.steps),
            _ => (self.step, steps),
        }
    }

    fn rates(&self, at: u32, of: u32) -> Rates {
        let options = &self.options;
        let factor =
            options
                .lr_schedule
                .multiplier(at.into(), options.warmup_steps.into(), of.into());
        let lora = options.lora.as_ref();
        let rate = |rate: Option<f64>| rate.unwrap_or_default() * factor;
        Rates {
            unet: rate(lora.map(|lora| lora.learning_rate)),
            text: rate(lora.and_then(|lora| lora.text_learning_rate)),
            embedding: rate(options.embedding.as_ref().map(|word| word.learning_rate)),
        }
    }

    /// Samples of one size, ready for the model.
    fn passage(&mut self, model: &Model, rows: Rows) -> Result<Passage, RunError> {
        let ratios = weights::signal_to_noise(&self.levels.alphas_cumprod);
        let weight = |(&t, &weight): (&usize, &f64)| match self.options.min_snr_gamma {
            Some(gamma) => {
                let prediction = self.levels.prediction;
                weight * f64::from(weights::min_snr(ratios[t], gamma as f32, prediction))
            }
            None => weight,
        };
        let ids = self.ids(model, &rows)?;
        let captions = match self.trainable.changes_text() {
            true => Captions::Ids(ids),
            false => {
                let rows = self.trainable.rows()?;
                let all = ids.into_iter();
                let all = all.map(|ids| self.encodings.of(model, ids, rows.as_ref()));
                Captions::Encoded(all.collect::<candle_core::Result<_>>()?)
            }
        };
        Ok(Passage {
            noised: self.noised(&rows)?,
            captions,
            weights: rows
                .timesteps
                .iter()
                .zip(&rows.weights)
                .map(weight)
                .collect(),
            recompute: recomputes(self.options.checkpointing, self.unet_parameters),
        })
    }

    fn noised(&self, rows: &Rows) -> candle_core::Result<Noised> {
        let device = self.trainable.device();
        let join = |all: &[Tensor]| Tensor::cat(all, 0)?.to_device(device);
        Ok(Noised {
            clean: join(&rows.clean)?,
            noise: join(&rows.noise)?,
            timesteps: rows.timesteps.clone(),
        })
    }

    fn ids(&self, model: &Model, rows: &Rows) -> candle_core::Result<Vec<Vec<u32>>> {
        let words: Vec<Word> = self.trainable.words();
        let texts = rows.captions.iter();
        texts
            .map(|text| captions::ids(model, text, &words))
            .collect()
    }
}

/// Whether blocks of a UNet of so many parameters are computed again on the way back.
pub(super) fn recomputes(checkpointing: Checkpointing, unet_parameters: u64) -> bool {
    match checkpointing {
        Checkpointing::On => true,
        Checkpointing::Off => false,
        Checkpointing::Auto => unet_parameters > RECOMPUTE_ABOVE,
    }
}

/// Adds gradients up, tensor by tensor.
fn add(sum: &mut Vec<Vec<f32>>, more: Vec<Vec<f32>>) {
    if sum.is_empty() {
        *sum = more;
        return;
    }
    for (sum, more) in sum.iter_mut().flatten().zip(more.iter().flatten()) {
        *sum += more;
    }
}

/// What a run is: two with the same go the same way.
fn identity(options: &TrainingOptions, dataset: &Dataset, model: &Model) -> String {
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    // Options are plain data: they always have a text.
    let text = serde_json::to_string(options).unwrap_or_default();
    part(text.as_bytes());
    part(model.hash.as_bytes());
    for sample in &dataset.samples {
        part(&sample.pixels());
        part(&[sample.caption.is_some().into()]);
        part(sample.caption.as_deref().unwrap_or_default().as_bytes());
    }
    format!("{:x}", hash.finalize())
}
