//! What a run learns from: its pictures as latents, and which of them a batch has.

use std::collections::{HashMap, VecDeque};

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

use super::{
    dataset::{self, Augment, Choice, Cut, Dataset},
    options::{Crop, TrainingOptions},
    order::Order,
    painting::{self, Canvas},
    random::{Draw, Purpose},
    run::{RunError, Slice},
};
use crate::{
    models::{Model, Moments},
    pipeline::{Pipeline, to_tensor},
};

/// Seeds of class pictures begin here, far from those of samples.
const CLASS_SEEDS: u64 = 1 << 32;
/// Samples that belong to the class draw their numbers from this place of a batch on.
const CLASS_PLACES: u64 = 1 << 20;

/// The pictures of a run, and those of its class.
#[derive(Debug)]
pub(super) struct Material {
    dataset: Dataset,
    /// Indices of the samples that are learned from.
    learned: Vec<usize>,
    /// And of those that the run is measured by.
    held_out: Vec<usize>,
    /// Of pictures as steps see them, kept where there are few ways to see one.
    latents: HashMap<(usize, Choice), Moments>,
    class_pictures: VecDeque<RgbImage>,
    /// The one that is being painted.
    canvas: Option<Canvas>,
    class: Vec<Moments>,
    order: Order,
    class_order: Order,
}

impl Material {
    /// # Errors
    /// No picture to learn from.
    pub fn new(options: &TrainingOptions, dataset: Dataset) -> Result<Self, RunError> {
        let held_out = dataset.held_out(options);
        let mut learned: Vec<usize> = (0..dataset.samples.len()).collect();
        learned.retain(|sample| !held_out.contains(sample));
        if learned.is_empty() {
            return Err(RunError::NoPictures);
        }
        let of_sample = dataset.bucket_of();
        let buckets: Vec<usize> = learned.iter().map(|&sample| of_sample[sample]).collect();
        let class = vec![0; class_pictures(options)];
        let (seed, size) = (options.seed, options.batch_size as usize);
        Ok(Self {
            dataset,
            learned,
            held_out,
            latents: HashMap::new(),
            class_pictures: VecDeque::new(),
            canvas: None,
            class: Vec::new(),
            order: Order::new(seed, &buckets, size),
            class_order: Order::new(seed ^ CLASS_SEEDS, &class, size),
        })
    }

    /// The next picture to paint or to encode before the first step; `None` when all is there.
    pub fn prepare(
        &mut self,
        pipeline: &Pipeline,
        options: &TrainingOptions,
    ) -> Result<Option<Slice>, RunError> {
        let wanted = class_pictures(options);
        let painted = self.class.len() + self.class_pictures.len();
        if let Some(prior) = &options.prior
            && painted < wanted
        {
            let seed = options.seed.wrapping_add(CLASS_SEEDS + painted as u64);
            let (prompt, side) = (&prior.class_prompt, options.resolution);
            let mut canvas = match self.canvas.take() {
                Some(canvas) => canvas,
                None => painting::begin(pipeline, prompt, side, seed, None)?,
            };
            let done = match canvas.step(pipeline)? {
                Some(picture) => {
                    self.class_pictures.push_back(picture);
                    painted + 1
                }
                None => {
                    self.canvas = Some(canvas);
                    painted
                }
            };
            return Ok(Some(Slice::ClassPicture { done, of: wanted }));
        }
        let model = pipeline.model();
        let own = self.learned.len() + self.held_out.len();
        let of = own + wanted;
        // What differs by chance is encoded when its step comes.
        let next = (self.learned.iter())
            .chain(&self.held_out)
            .copied()
            .enumerate()
            .find(|&(_, sample)| {
                let choice = self.dataset.samples[sample].middle();
                !self.latents.contains_key(&(sample, choice))
            });
        if let Some((place, sample)) = next {
            let choice = self.dataset.samples[sample].middle();
            let moments = encode_cut(model, &self.dataset.samples[sample].cut(choice))?;
            self.latents.insert((sample, choice), moments);
            return Ok(Some(Slice::Encoded {
                done: place + 1,
                of,
            }));
        }
        if let Some(picture) = self.class_pictures.pop_front() {
            let pixels = to_tensor(&picture, &model.modules().device)?;
            self.class.push(moments(model, &pixels)?);
            let done = own + self.class.len();
            return Ok(Some(Slice::Encoded { done, of }));
        }
        Ok(None)
    }

    /// The samples of a micro-batch, in groups of one size: class pictures are with the others where they
    /// have it too. `timesteps` is the length of the noise schedule.
    pub fn batch(
        &mut self,
        model: &Model,
        options: &TrainingOptions,
        timesteps: usize,
        number: u64,
    ) -> Result<Vec<Rows>, RunError> {
        let row = |moments: &Moments, caption, place| {
            row(model, options, timesteps, moments, caption, number, place)
        };
        let samples = self.order.batch(number);
        let weight = 1.0 / samples.len().max(1) as f64;
        let mut own = Rows::default();
        for (place, at) in samples.into_iter().enumerate() {
            let (sample, place) = (self.learned[at], place as u64);
            let caption = self.caption(options, sample, number, place);
            let moments = self.look(model, options, sample, number, place)?;
            own.push(row(&moments, caption, place)?, weight);
        }
        let mut class = Rows::default();
        if let Some(prior) = &options.prior {
            let samples = self.class_order.batch(number);
            let weight = prior.weight / samples.len().max(1) as f64;
            for (place, at) in samples.into_iter().enumerate() {
                let place = CLASS_PLACES + place as u64;
                let caption = prior.class_prompt.clone();
                class.push(row(&self.class[at], caption, place)?, weight);
            }
        }
        let mut all = Vec::new();
        match (own.shape(), class.shape()) {
            (Some(a), Some(b)) if a == b => own.append(class),
            (_, Some(_)) => all.push(class),
            _ => {}
        }
        all.push(own);
        Ok(all)
    }

    /// Pictures that are held out.
    pub fn held_out(&self) -> usize {
        self.held_out.len()
    }

    /// One of them, as an evaluation sees it at some timesteps: from its middle, at the mean of its latents,
    /// and under noise that hangs on nothing but picture and timestep.
    pub fn measured(
        &self,
        model: &Model,
        options: &TrainingOptions,
        picture: usize,
        timesteps: &[usize],
    ) -> Result<Rows, RunError> {
        let sample = self.held_out[picture];
        let choice = self.dataset.samples[sample].middle();
        let Some(moments) = self.latents.get(&(sample, choice)) else {
            return Err(candle_core::Error::Msg(
                "a picture is measured before it is encoded".into(),
            )
            .into());
        };
        let clean = scaled(model, &moments.mean)?;
        let mut rows = Rows::default();
        for &timestep in timesteps {
            let place = sample as u64;
            let mut draw = Draw::new(options.seed, timestep as u64, place, Purpose::Validation);
            let shape = clean.dims();
            let noise = draw.normal(clean.elem_count());
            let row = Row {
                clean: clean.clone(),
                noise: Tensor::from_vec(noise, shape, &Device::Cpu)?,
                timestep,
                caption: self.plain_caption(options, sample, timestep as u64),
            };
            rows.push(row, 1.0);
        }
        Ok(rows)
    }

    /// A sample's caption with nothing left out or moved.
    fn plain_caption(&self, options: &TrainingOptions, sample: usize, timestep: u64) -> String {
        match (
            &self.dataset.samples[sample].caption,
            &options.embedding,
            &options.token,
        ) {
            (Some(caption), _, _) => caption.clone(),
            (None, Some(word), Some(token)) => {
                // No batch has a number as high.
                let number = u64::MAX - timestep;
                let place = sample as u64;
                dataset::with_token(word.learnable, token, options.seed, number, place)
            }
            (None, _, _) => String::new(),
        }
    }

    fn caption(&self, options: &TrainingOptions, sample: usize, number: u64, place: u64) -> String {
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
        options: &TrainingOptions,
        sample: usize,
        number: u64,
        place: u64,
    ) -> Result<Moments, RunError> {
        let augment = Augment::of(options);
        let picture = &self.dataset.samples[sample];
        let choice = augment.choose(picture, options.seed, number, place);
        if let Some(moments) = self.latents.get(&(sample, choice)) {
            return Ok(moments.clone());
        }
        let moments = encode_cut(model, &picture.cut(choice))?;
        if augment.crop == Crop::Center {
            self.latents.insert((sample, choice), moments.clone());
        }
        Ok(moments)
    }
}

fn class_pictures(options: &TrainingOptions) -> usize {
    let prior = options.prior.as_ref();
    prior.map_or(0, |prior| prior.images as usize)
}

/// One sample of a batch, with numbers of its own.
fn row(
    model: &Model,
    options: &TrainingOptions,
    timesteps: usize,
    moments: &Moments,
    caption: String,
    number: u64,
    place: u64,
) -> Result<Row, RunError> {
    let draw = |purpose| Draw::new(options.seed, number, place, purpose);
    let normal = |purpose, shape: &[usize]| {
        let count = shape.iter().product();
        Tensor::from_vec(draw(purpose).normal(count), shape, &Device::Cpu)
    };
    let shape = moments.mean.dims();
    let latent = (&moments.mean + (moments.std()? * normal(Purpose::Latent, shape)?)?)?;
    let clean = scaled(model, &latent)?;
    let mut noise = normal(Purpose::Noise, shape)?;
    if options.noise_offset != 0.0 {
        let channels = normal(Purpose::NoiseOffset, &[1, 1, 1, shape[3]])?;
        noise = noise.broadcast_add(&(channels * options.noise_offset)?)?;
    }
    Ok(Row {
        clean,
        noise,
        timestep: draw(Purpose::Timestep).below(timesteps as u64) as usize,
        caption,
    })
}

/// Latents as the UNet sees them.
fn scaled(model: &Model, latent: &Tensor) -> candle_core::Result<Tensor> {
    let shift = model.vae.shift_factor().unwrap_or(0.0);
    (latent - shift)? * model.vae.scaling_factor()
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
pub(super) struct Rows {
    pub clean: Vec<Tensor>,
    pub noise: Vec<Tensor>,
    pub timesteps: Vec<usize>,
    pub captions: Vec<String>,
    /// What each counts in the loss, before min-SNR.
    pub weights: Vec<f64>,
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
