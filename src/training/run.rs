//! A run from its first picture to its last step, in slices.
//!
//! A slice is one class picture, one picture encoded, or one step of the optimiser: between two slices
//! the device is free for others. A run depends on its options, its pictures and its model and on nothing
//! else, so it can go on from a [`Run::checkpoint`] as if it had never stopped.

use std::collections::{BTreeMap, HashMap, VecDeque};

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use sha2::{Digest as _, Sha256};

use super::{
    captions,
    checkpoint::{Checkpoint, CheckpointError, Head},
    dataset::{self, Augment, Choice, Cut, Dataset},
    objective::{Noised, weights},
    optimizer::{Optimizer, OptimizerError},
    options::{Checkpointing, Crop, ModelFacts, TrainingOptions},
    order::Order,
    painting,
    random::{Draw, Purpose},
    start,
    step::{Captions, Passage, Rates, StepError, gradients, update},
    trainable::{Parameter, Trainable},
};
use crate::{
    adapters::{Adapter, TokenEmbedding},
    models::{Model, Moments},
    pipeline::{Pipeline, PipelineError, Word},
    schedulers::{NoiseLevels, SchedulerConfig, SchedulerError},
};

/// UNets above this many parameters compute their blocks again on the way back where the options leave
/// the choice: the demo model never does, SD 1.5 (860 million) does.
const RECOMPUTE_ABOVE: u64 = 100_000_000;
/// How fast the smoothed loss forgets.
const SMOOTHING: f64 = 0.95;
/// Seeds of class pictures begin here, far from those of samples.
const CLASS_SEEDS: u64 = 1 << 32;
/// Samples that belong to the class draw their numbers from this place of a batch on.
const CLASS_PLACES: u64 = 1 << 20;

/// What one slice did.
#[derive(Debug, Clone)]
pub enum Slice {
    /// A picture of the class was painted, for prior preservation.
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

/// A stretch of a run in which one set of parameters is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Word,
    Lora,
}

/// A training run.
#[derive(Debug)]
pub struct Run {
    options: TrainingOptions,
    identity: String,
    /// Whether memory asks for gradient checkpointing.
    large: bool,
    levels: NoiseLevels,
    dataset: Dataset,
    /// Indices of the samples that are learned from.
    learned: Vec<usize>,
    /// Of pictures as steps see them, kept where there are few ways to see one.
    latents: HashMap<(usize, Choice), Moments>,
    class_pictures: VecDeque<RgbImage>,
    class: Vec<Moments>,
    order: Order,
    class_order: Order,
    trainable: Trainable,
    parameters: Vec<Parameter>,
    optimizer: Optimizer,
    phase: Phase,
    step: u32,
    smoothed: Option<f64>,
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
        let held_out = dataset.held_out(options.seed);
        let mut learned: Vec<usize> = (0..dataset.samples.len()).collect();
        learned.retain(|sample| !held_out.contains(sample));
        if learned.is_empty() {
            return Err(RunError::NoPictures);
        }
        let model = pipeline.model();
        let config = SchedulerConfig::from_json(&model.scheduler_config)?;
        let levels = NoiseLevels::new(&config)?;
        let identity = identity(&options, &dataset, model);
        let checkpoint = checkpoint.map(Checkpoint::decode).transpose()?;
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
        let of_sample = dataset.bucket_of();
        let buckets: Vec<usize> = learned.iter().map(|&sample| of_sample[sample]).collect();
        let size = options.batch_size as usize;
        let class = options
            .prior
            .as_ref()
            .map_or(0, |prior| prior.images as usize);
        let words = words(model, &options)?;
        let trainable = trainable(model, &options, phase, words)?;
        let mut run = Self {
            identity,
            large: ModelFacts::of(pipeline).unet_parameters > RECOMPUTE_ABOVE,
            levels,
            order: Order::new(options.seed, &buckets, size),
            class_order: Order::new(options.seed ^ CLASS_SEEDS, &vec![0; class], size),
            dataset,
            learned,
            latents: HashMap::new(),
            class_pictures: VecDeque::new(),
            class: Vec::new(),
            parameters: trainable.parameters(),
            optimizer: optimizer(&options, phase, &trainable),
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
        let mut left = checkpoint.values;
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
        self.optimizer.load(checkpoint.optimizer)?;
        Ok(())
    }

    /// Everything that the next step depends on, beside options, pictures and model.
    ///
    /// # Errors
    /// A device that fails.
    pub fn checkpoint(&self) -> Result<Vec<u8>, RunError> {
        let mut values = BTreeMap::new();
        for (name, tensor) in self.trainable.values() {
            let numbers = tensor.flatten_all()?.to_vec1()?;
            values.insert(name, (tensor.dims().to_vec(), numbers));
        }
        let checkpoint = Checkpoint {
            head: Head {
                step: self.step,
                run: self.identity.clone(),
                smoothed_loss: self.smoothed,
            },
            values,
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

    /// What has been learned so far.
    ///
    /// # Errors
    /// A device that fails.
    pub fn adapter(&self) -> Result<Adapter, RunError> {
        Ok(self.trainable.adapter()?)
    }

    /// A picture of what has been learned so far.
    ///
    /// # Errors
    /// A prompt that is refused, or a device that fails.
    pub fn paint(
        &self,
        pipeline: &Pipeline,
        prompt: &str,
        seed: u64,
    ) -> Result<RgbImage, RunError> {
        let adapter = self.adapter()?;
        let side = self.options.resolution;
        Ok(painting::paint(
            pipeline,
            prompt,
            side,
            seed,
            Some(&adapter),
        )?)
    }

    /// The next piece of work.
    ///
    /// Call it on a thread with room on its stack: candle walks the graph of the model recursively.
    ///
    /// # Errors
    /// A device that fails, a loss that is not finite, or a parameter that nothing reaches.
    pub fn slice(&mut self, pipeline: &Pipeline) -> Result<Slice, RunError> {
        if self.step >= self.options.total_steps() {
            return Ok(Slice::Finished);
        }
        let wanted = self
            .options
            .prior
            .as_ref()
            .map_or(0, |prior| prior.images as usize);
        if let Some(prior) = &self.options.prior
            && self.class.len() + self.class_pictures.len() < wanted
        {
            let done = self.class.len() + self.class_pictures.len();
            let seed = self.options.seed.wrapping_add(CLASS_SEEDS + done as u64);
            let (prompt, side) = (&prior.class_prompt, self.options.resolution);
            let picture = painting::paint(pipeline, prompt, side, seed, None)?;
            self.class_pictures.push_back(picture);
            return Ok(Slice::ClassPicture {
                done: done + 1,
                of: wanted,
            });
        }
        let model = pipeline.model();
        let of = self.learned.len() + wanted;
        // What differs by chance is encoded when its step comes.
        let next = self.learned.iter().copied().find(|&sample| {
            let choice = self.dataset.samples[sample].middle();
            !self.latents.contains_key(&(sample, choice))
        });
        if let Some(sample) = next {
            let choice = self.dataset.samples[sample].middle();
            let moments = encode_cut(model, &self.dataset.samples[sample].cut(choice))?;
            self.latents.insert((sample, choice), moments);
            let done = self.learned.iter().take_while(|&&s| s <= sample).count();
            return Ok(Slice::Encoded { done, of });
        }
        if let Some(picture) = self.class_pictures.pop_front() {
            let pixels = crate::pipeline::to_tensor(&picture, &model.modules().device)?;
            self.class.push(moments(model, &pixels)?);
            let done = self.learned.len() + self.class.len();
            return Ok(Slice::Encoded { done, of });
        }
        self.train(pipeline).map(Slice::Step)
    }

    /// One step of the optimiser.
    fn train(&mut self, pipeline: &Pipeline) -> Result<Report, RunError> {
        let model = pipeline.model();
        let micro_batches = self.options.gradient_accumulation;
        let (mut loss, mut sum) = (0.0, Vec::<Vec<f32>>::new());
        for micro in 0..micro_batches {
            let number = u64::from(self.step) * u64::from(micro_batches) + u64::from(micro);
            for passage in self.passages(model, number)? {
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
        self.trainable = trainable(model, &self.options, self.phase, words)?;
        self.parameters = self.trainable.parameters();
        self.optimizer = optimizer(&self.options, self.phase, &self.trainable);
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

    /// The passages of a micro-batch: samples of one size, and class pictures with them where they have
    /// it too.
    fn passages(&mut self, model: &Model, number: u64) -> Result<Vec<Passage>, RunError> {
        let samples = self.order.batch(number);
        let weight = 1.0 / samples.len().max(1) as f64;
        let mut own = Rows::default();
        for (place, at) in samples.into_iter().enumerate() {
            let (sample, place) = (self.learned[at], place as u64);
            let caption = self.caption(sample, number, place);
            let moments = self.look(model, sample, number, place)?;
            own.push(self.row(model, &moments, caption, number, place)?, weight);
        }
        let mut class = Rows::default();
        if let Some(prior) = &self.options.prior {
            let samples = self.class_order.batch(number);
            let weight = prior.weight / samples.len().max(1) as f64;
            for (place, at) in samples.into_iter().enumerate() {
                let place = CLASS_PLACES + place as u64;
                let caption = prior.class_prompt.clone();
                class.push(
                    self.row(model, &self.class[at], caption, number, place)?,
                    weight,
                );
            }
        }
        let mut all = Vec::new();
        match (own.shape(), class.shape()) {
            (Some(a), Some(b)) if a == b => own.append(class),
            (_, Some(_)) => all.push(self.passage(model, class)?),
            _ => {}
        }
        all.push(self.passage(model, own)?);
        Ok(all)
    }

    fn caption(&self, sample: usize, number: u64, place: u64) -> String {
        let options = &self.options;
        match (
            &self.dataset.samples[sample].caption,
            &options.embedding,
            &options.token,
        ) {
            (Some(caption), _, _) => {
                dataset::Captions::of(options).vary(caption, options.seed, number, place)
            }
            (None, Some(word), Some(token)) => {
                dataset::with_token(word.learnable, token, options.seed, number, place)
            }
            // The data set has seen to captions wherever templates make none.
            (None, _, _) => String::new(),
        }
    }

    /// A sample's latents as this step sees it.
    fn look(
        &mut self,
        model: &Model,
        sample: usize,
        number: u64,
        place: u64,
    ) -> Result<Moments, RunError> {
        let augment = Augment::of(&self.options);
        let picture = &self.dataset.samples[sample];
        let choice = augment.choose(picture, self.options.seed, number, place);
        if let Some(moments) = self.latents.get(&(sample, choice)) {
            return Ok(moments.clone());
        }
        let moments = encode_cut(model, &picture.cut(choice))?;
        if augment.crop == Crop::Center {
            self.latents.insert((sample, choice), moments.clone());
        }
        Ok(moments)
    }

    /// One sample of a batch, with numbers of its own.
    fn row(
        &self,
        model: &Model,
        moments: &Moments,
        caption: String,
        number: u64,
        place: u64,
    ) -> Result<Row, RunError> {
        let options = &self.options;
        let draw = |purpose| Draw::new(options.seed, number, place, purpose);
        let normal = |purpose, shape: &[usize]| {
            let count = shape.iter().product();
            Tensor::from_vec(draw(purpose).normal(count), shape, &Device::Cpu)
        };
        let shape = moments.mean.dims();
        let latent = (&moments.mean + (moments.std()? * normal(Purpose::Latent, shape)?)?)?;
        let shift = model.vae.shift_factor().unwrap_or(0.0);
        let clean = ((latent - shift)? * model.vae.scaling_factor())?;
        let mut noise = normal(Purpose::Noise, shape)?;
        if options.noise_offset != 0.0 {
            let channels = normal(Purpose::NoiseOffset, &[1, 1, 1, shape[3]])?;
            noise = noise.broadcast_add(&(channels * options.noise_offset)?)?;
        }
        let steps = self.levels.alphas_cumprod.len() as u64;
        Ok(Row {
            clean,
            noise,
            timestep: draw(Purpose::Timestep).below(steps) as usize,
            caption,
        })
    }

    fn passage(&self, model: &Model, rows: Rows) -> Result<Passage, RunError> {
        let device = self.trainable.device();
        let join = |all: &[Tensor]| Tensor::cat(all, 0)?.to_device(device);
        let ratios = weights::signal_to_noise(&self.levels.alphas_cumprod);
        let weight = |(&t, &weight): (&usize, &f64)| match self.options.min_snr_gamma {
            Some(gamma) => {
                let prediction = self.levels.prediction;
                weight * f64::from(weights::min_snr(ratios[t], gamma as f32, prediction))
            }
            None => weight,
        };
        let words: Vec<Word> = self.trainable.words();
        let ids = rows
            .captions
            .iter()
            .map(|text| captions::ids(model, text, &words));
        let ids = ids.collect::<candle_core::Result<Vec<_>>>()?;
        let captions = match self.trainable.changes_text() {
            true => Captions::Ids(ids),
            false => Captions::Encoded(self.encode(model, &ids)?),
        };
        Ok(Passage {
            noised: Noised {
                clean: join(&rows.clean)?,
                noise: join(&rows.noise)?,
                timesteps: rows.timesteps.clone(),
            },
            captions,
            weights: rows
                .timesteps
                .iter()
                .zip(&rows.weights)
                .map(weight)
                .collect(),
            recompute: match self.options.checkpointing {
                Checkpointing::On => true,
                Checkpointing::Off => false,
                Checkpointing::Auto => self.large,
            },
        })
    }

    /// Captions whose meaning is not trained.
    fn encode(&self, model: &Model, ids: &[Vec<u32>]) -> candle_core::Result<Vec<Tensor>> {
        let encoder = &model.text_encoder;
        let embedded = encoder.embed(ids, self.trainable.rows()?.as_ref())?;
        let hidden = encoder.encode(&embedded, 0, crate::models::Deltas::NONE)?;
        (0..ids.len()).map(|row| hidden.get(row)).collect()
    }
}

/// One sample of a batch.
struct Row {
    clean: Tensor,
    noise: Tensor,
    timestep: usize,
    caption: String,
}

/// Samples of one size.
#[derive(Default)]
struct Rows {
    clean: Vec<Tensor>,
    noise: Vec<Tensor>,
    timesteps: Vec<usize>,
    captions: Vec<String>,
    weights: Vec<f64>,
}

impl Rows {
    fn push(&mut self, row: Row, weight: f64) {
        self.clean.push(row.clean);
        self.noise.push(row.noise);
        self.timesteps.push(row.timestep);
        self.captions.push(row.caption);
        self.weights.push(weight);
    }

    fn append(&mut self, mut other: Self) {
        self.clean.append(&mut other.clean);
        self.noise.append(&mut other.noise);
        self.timesteps.append(&mut other.timesteps);
        self.captions.append(&mut other.captions);
        self.weights.append(&mut other.weights);
    }

    fn shape(&self) -> Option<&[usize]> {
        self.clean.first().map(Tensor::dims)
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

/// A cut's latents, on the host.
fn encode_cut(model: &Model, cut: &Cut) -> Result<Moments, RunError> {
    let shape = (1, cut.height, cut.width, 3);
    let pixels = Tensor::from_slice(&cut.values, shape, &model.modules().device)?;
    moments(model, &pixels)
}

fn moments(model: &Model, pixels: &Tensor) -> Result<Moments, RunError> {
    let moments = model.vae.encode(pixels)?;
    let host = |t: &Tensor| t.to_device(&Device::Cpu)?.to_dtype(DType::F32);
    Ok(Moments {
        mean: host(&moments.mean)?,
        logvar: host(&moments.logvar)?,
    })
}

/// Words with the rows of their initializer.
fn words(model: &Model, options: &TrainingOptions) -> Result<Vec<TokenEmbedding>, RunError> {
    let (Some(word), Some(token)) = (&options.embedding, &options.token) else {
        return Ok(Vec::new());
    };
    Ok(vec![start::word(
        model,
        token,
        &word.initializer,
        word.vectors,
    )?])
}

/// The variables of a phase; words are among them only while they are learned.
fn trainable(
    model: &Model,
    options: &TrainingOptions,
    phase: Phase,
    words: Vec<TokenEmbedding>,
) -> Result<Trainable, RunError> {
    let deltas = match (phase, &options.lora) {
        (Phase::Lora, Some(lora)) => start::deltas(model.modules(), lora, options.seed)?,
        _ => Default::default(),
    };
    let mut trainable = Trainable::new(model.modules(), &Adapter::trained(deltas, words))?;
    if phase == Phase::Lora {
        trainable.freeze_words()?;
    }
    Ok(trainable)
}

/// The rows of words do not decay: there is nothing at zero that they should come near.
fn optimizer(options: &TrainingOptions, phase: Phase, trainable: &Trainable) -> Optimizer {
    let mut settings = options.optimizer;
    if phase == Phase::Word {
        settings.weight_decay = 0.0;
    }
    let parameters = trainable.parameters().into_iter();
    let sizes = parameters.map(|p| (p.name.clone(), p.var.elem_count()));
    Optimizer::new(settings, sizes)
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
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
