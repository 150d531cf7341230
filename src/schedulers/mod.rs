//! Noise schedules and samplers, numerically those of diffusers.
//!
//! Everything here works on `f32` slices in host memory and knows nothing of tensors: a latent is
//! small (64 KB for a 512² picture), the UNet beside it takes a thousand times longer, and one path
//! for every device means one result on every device. The layout of a slice is the caller's; every
//! operation is element by element, and noise must come in the layout of the sample.
//!
//! [`sampler`] turns a [`SchedulerKind`] and a model's [`SchedulerConfig`] into a [`Sampler`], the
//! state of one picture's way through the schedule:
//!
//! ```
//! # use lorikeet::schedulers::{SchedulerConfig, SchedulerKind, sampler};
//! # fn model(sample: Vec<f32>, _timestep: f32) -> Vec<f32> { sample }
//! let mut sampler = sampler(SchedulerKind::Euler, &SchedulerConfig::default(), 20, None)?;
//! let mut latent = vec![0.5 * sampler.init_noise_sigma(); 4 * 8 * 8];
//! let mut noise = || vec![0.1; 4 * 8 * 8];
//! while let Some(timestep) = sampler.timestep() {
//!     let output = model(sampler.scale_model_input(&latent), timestep);
//!     sampler.step(&output, &mut latent, &mut noise);
//! }
//! # Ok::<(), lorikeet::schedulers::SchedulerError>(())
//! ```
//!
//! Coefficients are computed in the precision diffusers uses (schedules in `f64`, rounded to `f32`;
//! the updates in `f32`), so that a whole trajectory agrees to about 1e-6.

mod config;
mod ddim;
mod ddpm;
mod dpmpp;
mod euler;
#[cfg(test)]
mod golden_tests;
mod heun;
mod kind;
mod lcm;
mod prediction;
mod run;
mod schedule;
mod sigmas;
mod unipc;

pub use config::{
    BetaSchedule, FinalSigmas, Interpolation, PredictionType, SchedulerConfig, TimestepSpacing,
};
pub use kind::{SchedulerKind, UnknownScheduler};

use run::Run;

/// Why no sampler can be built.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SchedulerError {
    #[error("scheduler_config.json: {0}")]
    Parse(String),
    /// A field of the config holds what no sampler here can follow.
    #[error("scheduler_config.json: `{field}` is {value}; {fix}")]
    Config {
        field: &'static str,
        value: String,
        fix: String,
    },
    #[error("steps must be from 1 to {most}, got {steps}")]
    Steps { steps: usize, most: usize },
    #[error("strength must be above 0 and at most 1, got {0}")]
    Strength(f64),
    #[error(
        "strength {strength} of {steps} steps leaves none to run; send at least {}",
        1.0 / *steps as f64
    )]
    NothingToRun { steps: usize, strength: f64 },
}

/// One picture's way through a noise schedule.
///
/// The caller alternates [`Sampler::scale_model_input`], the model, and [`Sampler::step`] until
/// [`Sampler::timestep`] is `None`.
pub trait Sampler: Send {
    /// What unit Gaussian noise is multiplied with to start a picture from nothing.
    fn init_noise_sigma(&self) -> f32;
    /// Model calls from start to end (Heun calls twice a step, but for the last).
    fn evaluations(&self) -> usize;
    /// Model calls made.
    fn done(&self) -> usize;
    /// Timestep of the next model call, fractional with some schedules; `None` when finished.
    fn timestep(&self) -> Option<f32>;
    /// What the model is to see of `sample` in the next call.
    fn scale_model_input(&self, sample: &[f32]) -> Vec<f32>;
    /// Moves `sample` on by one model call; does nothing once finished.
    ///
    /// `noise` returns fresh unit Gaussian noise in the shape of the sample and is called exactly
    /// when diffusers' scheduler would draw from its generator.
    fn step(
        &mut self,
        model_output: &[f32],
        sample: &mut [f32],
        noise: &mut dyn FnMut() -> Vec<f32>,
    );
    /// The picture as the model guesses it at the next call's noise level, given that call's
    /// output; for previews, so call it before [`Sampler::step`].
    fn denoised(&self, model_output: &[f32], sample: &[f32]) -> Vec<f32>;
    /// `original` with as much noise as belongs to the next call; `None` when finished.
    ///
    /// This is `scheduler.add_noise` as diffusers' img2img pipeline calls it before the first step,
    /// and its inpaint pipeline after every step but the last (where the clean original is used).
    fn add_noise(&self, original: &[f32], noise: &[f32]) -> Option<Vec<f32>>;
}

/// The noise schedule that a model is trained on.
#[derive(Debug, Clone)]
pub struct NoiseLevels {
    /// Cumulative products of `1 - beta`, one for each timestep: the share of the signal.
    pub alphas_cumprod: Vec<f32>,
    pub prediction: PredictionType,
}

impl NoiseLevels {
    /// Those of diffusers' `DDPMScheduler.from_config(config)`, which its trainers use.
    ///
    /// # Errors
    /// Betas that make no schedule.
    pub fn new(config: &SchedulerConfig) -> Result<Self, SchedulerError> {
        let schedule = schedule::Schedule::new(config, schedule::Defaults::DDIM)?;
        Ok(Self {
            alphas_cumprod: schedule.alphas_cumprod,
            prediction: schedule.prediction,
        })
    }
}

/// Builds the sampler that diffusers' `Kind.from_config(config)` with `set_timesteps(steps)` is.
///
/// With a `strength` in (0, 1] only the last `int(steps * strength)` steps run, as in diffusers'
/// img2img and inpaint pipelines. Two differences are deliberate. The kind decides between plain
/// and Karras, ODE and SDE for DPM++ 2M, whatever the config says. And `trailing` spacing always
/// gives `steps` timesteps, where rounding gives diffusers one more, at -1, for a few counts
/// (61, 103, 121, … of 1000).
pub fn sampler(
    kind: SchedulerKind,
    config: &SchedulerConfig,
    steps: usize,
    strength: Option<f64>,
) -> Result<Box<dyn Sampler>, SchedulerError> {
    let most = config.num_train_timesteps.unwrap_or(1000);
    if steps == 0 || steps > most {
        return Err(SchedulerError::Steps { steps, most });
    }
    let skipped = match strength {
        None => 0,
        Some(strength) => skipped_steps(steps, strength)?,
    };
    use SchedulerKind::*;
    Ok(match kind {
        Ddim => Run::boxed(ddim::Ddim::new(config, steps)?, skipped),
        Ddpm => Run::boxed(ddpm::Ddpm::new(config, steps)?, skipped),
        Euler => Run::boxed(euler::Euler::new(config, steps)?, skipped),
        EulerAncestral => Run::boxed(euler::EulerAncestral::new(config, steps)?, skipped),
        Heun => Run::boxed(heun::Heun::new(config, steps)?, skipped),
        Dpmpp2m | Dpmpp2mKarras | Dpmpp2mSde | Dpmpp2mSdeKarras => {
            let karras = matches!(kind, Dpmpp2mKarras | Dpmpp2mSdeKarras);
            let sde = matches!(kind, Dpmpp2mSde | Dpmpp2mSdeKarras);
            let solver = dpmpp::DpmPlusPlus::new(config, steps, karras, sde)?;
            Run::boxed(solver, skipped)
        }
        UniPc => Run::boxed(unipc::UniPc::new(config, steps)?, skipped),
        Lcm => Run::boxed(lcm::Lcm::new(config, steps)?, skipped),
    })
}

/// Steps at the start that img2img leaves out: diffusers' `t_start`.
fn skipped_steps(steps: usize, strength: f64) -> Result<usize, SchedulerError> {
    if !(strength > 0.0 && strength <= 1.0) {
        return Err(SchedulerError::Strength(strength));
    }
    // Truncated, as Python's int() does.
    let run = ((steps as f64 * strength) as usize).min(steps);
    if run == 0 {
        return Err(SchedulerError::NothingToRun { steps, strength });
    }
    Ok(steps - run)
}
