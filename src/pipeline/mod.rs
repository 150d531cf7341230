//! From a request to pictures, one evaluation of the model at a time.
//!
//! [`Pipeline::begin`] turns a checked request into [`Painting`]s, [`Pipeline::predict`] runs the
//! UNet once for any mixture of paintings that share a latent shape, [`Pipeline::advance`] moves
//! each on, and [`Pipeline::decode`] makes pixels. Every number follows diffusers' pipelines:
//! `StableDiffusionPipeline`, `…Img2ImgPipeline` and `…InpaintPipeline` (for models of 4 channels).
//!
//! Picture `i` of a request is the first picture of the same request with seed `seed + i`, image
//! and mask included. diffusers says the same with a list of generators, but for inpainting, where
//! it takes the sample of the image's latents from the first generator alone; here a picture never
//! depends on its siblings.

mod chunks;
mod conditioning;
mod emphasis;
mod init_image;
mod mixture;
mod painting;
mod pixels;
mod prompt;
pub mod request;
mod tags;

#[cfg(test)]
mod golden_tests;

use std::{collections::HashSet, sync::Arc};

use candle_core::{DType, Device, Tensor};
use image::RgbImage;

pub(crate) use mixture::has_word;
pub use mixture::{Mixture, Word};
pub(crate) use mixture::{Piece, find_words};
pub use painting::Painting;
use painting::{Guidance, Inpaint};
pub(crate) use pixels::to_tensor;
pub(crate) use tags::tag;

use self::{
    conditioning::Conditioner,
    request::{ImageRequest, InitImage, ModelDefaults},
};
use crate::{
    models::{DeltaBatch, Deltas, Model, Moments},
    noise::{Generator, LatentNoise, picture_seed},
    schedulers::{self, SchedulerConfig, SchedulerError, SchedulerKind},
};

/// Steps when the model does not say.
const STEPS: u32 = 25;
/// Guidance when the model does not say (diffusers' default).
const GUIDANCE: f64 = 7.5;

/// Why a picture cannot be painted.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// The request is at fault.
    #[error("{field}: {message}")]
    Invalid {
        field: &'static str,
        message: String,
    },
    #[error(transparent)]
    Scheduler(#[from] SchedulerError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

/// A model that paints.
pub struct Pipeline {
    model: Model,
    schedulers: SchedulerConfig,
    conditioner: Conditioner,
    device: Device,
}

impl Pipeline {
    /// # Errors
    /// A scheduler_config.json that no sampler can follow.
    pub fn new(model: Model, device: Device) -> Result<Self, SchedulerError> {
        let schedulers =
            SchedulerConfig::from_json(&model.scheduler_config)?.for_stable_diffusion();
        Ok(Self {
            conditioner: Conditioner::new(&model.tokenizer),
            model,
            schedulers,
            device,
        })
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What the model fixes or suggests.
    pub fn defaults(&self) -> ModelDefaults {
        let factor = self.model.vae.downscale_factor();
        let [height, width] = self.model.unet.sample_size().unwrap_or([64, 64]);
        let pixels = |latents: usize| u32::try_from(latents * factor).unwrap_or(u32::MAX);
        let hints = &self.model.defaults;
        ModelDefaults {
            width: pixels(width),
            height: pixels(height),
            side_multiple: pixels(1),
            steps: hints.steps.unwrap_or(STEPS),
            guidance_scale: hints.guidance_scale.unwrap_or(GUIDANCE),
            scheduler: SchedulerKind::from_config(&self.schedulers),
            text_layers: u32::try_from(self.model.text_encoder.layers()).unwrap_or(u32::MAX),
        }
    }

    /// Encodes the prompt, draws the noise and readies a sampler for each picture of a request.
    pub fn begin(&self, request: &ImageRequest) -> Result<Vec<Painting>, PipelineError> {
        let mixture = request.mixture.as_ref();
        let encode = |field, text, clip_skip| {
            let mixture = mixture.map(|mixture| &mixture.value);
            self.conditioner
                .encode(&self.model, field, text, clip_skip, mixture)
        };
        let condition = encode("prompt", &request.prompt, request.clip_skip)?;
        // diffusers: do_classifier_free_guidance = guidance_scale > 1
        let uncondition = match request.guidance_scale > 1.0 {
            // diffusers skips no layers for the negative prompt (A1111 does).
            true => Some(encode("negative_prompt", &request.negative_prompt, 0)?),
            false => None,
        };
        let init = request.init.as_ref();
        let moments = init
            .map(|init| {
                let image = pixels::to_tensor(&init.image, &self.device)?;
                self.model.vae.encode(&image)
            })
            .transpose()?;
        (0..u64::from(request.n))
            .map(|i| {
                let seed = picture_seed(request.seed, i);
                let guidance = uncondition.clone().map(|uncondition| Guidance {
                    scale: request.guidance_scale as f32,
                    uncondition,
                });
                let start = init.zip(moments.as_ref());
                let previews = request.previews > 0 && i == 0;
                self.start(request, seed, &condition, guidance, start, previews)
            })
            .collect()
    }

    fn start(
        &self,
        request: &ImageRequest,
        seed: u64,
        condition: &Tensor,
        guidance: Option<Guidance>,
        init: Option<(&InitImage, &Moments)>,
        previews: bool,
    ) -> Result<Painting, PipelineError> {
        let factor = self.model.vae.downscale_factor();
        let shape = [
            request.height as usize / factor,
            request.width as usize / factor,
            self.model.unet.out_channels(),
        ];
        let sampler = schedulers::sampler(
            request.scheduler,
            &self.schedulers,
            request.steps as usize,
            init.map(|(init, _)| init.strength),
        )?;
        let mut noise = LatentNoise {
            generator: Generator::new(seed),
            shape,
        };
        let mut inpaint = None;
        // The order of draws is that of diffusers' pipelines: it decides every number after it.
        let latents = match init {
            None => scaled(noise.draw(), sampler.init_noise_sigma()),
            Some((init, moments)) => {
                let original = self.sample(moments, &noise.draw())?;
                let start = noise.draw();
                let noised = sampler.add_noise(&original, &start);
                let latents = match &init.mask {
                    // Inpainting at full strength keeps nothing of the image under the mask.
                    Some(_) if init.strength >= 1.0 => {
                        scaled(start.clone(), sampler.init_noise_sigma())
                    }
                    // A sampler that has something to run has a next timestep.
                    _ => noised.unwrap_or_else(|| original.clone()),
                };
                if let Some(mask) = &init.mask {
                    // diffusers also encodes the masked image, which only a model of 9 channels
                    // looks at; its sample is drawn all the same.
                    noise.draw();
                    inpaint = Some(Inpaint {
                        mask: pixels::latent_mask(mask, factor as u32),
                        original,
                        noise: start,
                    });
                }
                latents
            }
        };
        Ok(Painting {
            seed,
            shape,
            sampler,
            denoised: previews.then(|| latents.clone()),
            latents,
            noise,
            condition: condition.clone(),
            guidance,
            inpaint,
            mixture: request.mixture.clone(),
        })
    }

    /// A sample of a picture's latents, in the UNet's scale.
    fn sample(&self, moments: &Moments, noise: &[f32]) -> Result<Vec<f32>, PipelineError> {
        let flat = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        let (mean, std) = (flat(&moments.mean)?, flat(&moments.std()?)?);
        let scale = self.model.vae.scaling_factor() as f32;
        let shift = self.model.vae.shift_factor().unwrap_or(0.0) as f32;
        Ok(mean
            .iter()
            .zip(&std)
            .zip(noise)
            .map(|((mean, std), noise)| (mean + std * noise - shift) * scale)
            .collect())
    }

    /// One forward of the UNet: its output for each painting's rows (unconditioned first), f32.
    ///
    /// All paintings must share a latent shape, and none may be finished.
    pub fn predict(&self, batch: &[&Painting]) -> Result<Vec<Vec<f32>>, PipelineError> {
        let Some(first) = batch.first() else {
            return Ok(Vec::new());
        };
        let [h, w, c] = first.shape;
        let (mut sample, mut timesteps, mut context) = (Vec::new(), Vec::new(), Vec::new());
        let mut rows = Vec::new();
        // Rows under the same adapters are cheapest side by side.
        let mut order: Vec<usize> = (0..batch.len()).collect();
        order.sort_by_key(|&at| batch[at].deltas().map(Arc::as_ptr));
        for painting in order.iter().map(|&at| batch[at]) {
            let Some(timestep) = painting.sampler.timestep() else {
                return Err(candle_core::Error::msg("a finished picture was to be stepped").into());
            };
            let input = painting.sampler.scale_model_input(&painting.latents);
            if painting.shape != first.shape || input.len() != h * w * c {
                return Err(
                    candle_core::Error::msg("pictures of one forward must share a shape").into(),
                );
            }
            let uncondition = painting.guidance.as_ref().map(|g| &g.uncondition);
            for condition in uncondition.into_iter().chain([&painting.condition]) {
                sample.extend_from_slice(&input);
                timesteps.push(timestep);
                context.push(condition.clone());
                rows.push(painting.deltas().cloned());
            }
        }
        let sample = Tensor::from_vec(sample, (timesteps.len(), h, w, c), &self.device)?;
        let deltas = DeltaBatch::new(rows);
        metrics::histogram!("lorikeet_adapters_per_batch").record(distinct(batch) as f64);
        let output = self
            .model
            .unet
            .forward(&sample, &timesteps, &context, deltas.deltas())?;
        let output = output
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1::<f32>()?;
        let mut rest = output.as_slice();
        let mut predictions = vec![Vec::new(); batch.len()];
        for at in order {
            let (own, others) = rest.split_at(batch[at].rows() * h * w * c);
            rest = others;
            predictions[at] = own.to_vec();
        }
        Ok(predictions)
    }

    /// Takes a painting one evaluation further with what [`Pipeline::predict`] said of it.
    pub fn advance(&self, painting: &mut Painting, prediction: &[f32]) {
        painting.advance(prediction);
    }

    /// The picture in latents `[h, w, c]` of the UNet's scale.
    pub fn decode(&self, latents: &[f32], shape: [usize; 3]) -> Result<RgbImage, PipelineError> {
        let [h, w, c] = shape;
        let vae = &self.model.vae;
        let scale = vae.scaling_factor() as f32;
        let shift = vae.shift_factor().unwrap_or(0.0) as f32;
        let latents: Vec<f32> = latents.iter().map(|x| x / scale + shift).collect();
        let latents = Tensor::from_vec(latents, (1, h, w, c), &self.device)?;
        Ok(pixels::from_tensor(&vae.decode(&latents)?)?)
    }

    /// Runs the UNet on a small latent of zeros; `Ok` when numbers come back.
    pub fn probe(&self) -> Result<(), PipelineError> {
        let unet = &self.model.unet;
        let side = 1 << unet.downsamplings();
        let sample = Tensor::zeros(
            (1, side, side, unet.in_channels()),
            DType::F32,
            &self.device,
        )?;
        let context = Tensor::zeros((1, unet.context_width()), DType::F32, &self.device)?;
        let output = unet.forward(&sample, &[1.0], &[context], Deltas::NONE)?;
        let sum = output
            .to_dtype(DType::F32)?
            .abs()?
            .sum_all()?
            .to_scalar::<f32>()?;
        match sum.is_finite() {
            true => Ok(()),
            false => {
                Err(candle_core::Error::msg("the UNet's output on zeros is not finite").into())
            }
        }
    }
}

/// Mixtures of adapters in a batch, each counted once.
fn distinct(batch: &[&Painting]) -> usize {
    let mixtures = batch.iter().filter_map(|painting| painting.deltas());
    mixtures.map(Arc::as_ptr).collect::<HashSet<_>>().len()
}

fn scaled(mut values: Vec<f32>, factor: f32) -> Vec<f32> {
    values.iter_mut().for_each(|value| *value *= factor);
    values
}
