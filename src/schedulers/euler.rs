//! Euler's method in sigma, plain and ancestral (Karras et al. 2022, algorithm 2 without churn;
//! k-diffusion's `sample_euler_ancestral`).

use super::{
    SchedulerError,
    config::{FinalSigmas, Interpolation, PredictionType, SchedulerConfig, TimestepSpacing},
    prediction::x0_exploding,
    run::{Method, update},
    schedule::{Defaults, Schedule, interpolate},
    sigmas::{SigmaShape, log_linear, timesteps_of},
};

/// Timesteps and noise levels of a sampler of the variance-exploding process.
pub(super) struct SigmaSchedule {
    /// Of every step.
    pub timesteps: Vec<f32>,
    /// Of every step, and after the last.
    pub sigmas: Vec<f32>,
    pub prediction: PredictionType,
    pub init_noise_sigma: f32,
}

impl SigmaSchedule {
    /// Lays out `steps` steps; `last` is the noise level after the last.
    pub(super) fn new(
        schedule: &Schedule,
        config: &SchedulerConfig,
        shape: SigmaShape,
        interpolation: Interpolation,
        last: f32,
        steps: usize,
    ) -> Self {
        let train = schedule.train_sigmas();
        let mut timesteps = schedule.timesteps(steps);
        let mut sigmas: Vec<f64> = match interpolation {
            Interpolation::Linear => timesteps.iter().map(|&t| interpolate(t, &train)).collect(),
            Interpolation::LogLinear => log_linear(&train, steps),
        };
        // At least one step was asked for: neither end is missing.
        let max = config.sigma_max.unwrap_or(sigmas[0]);
        let min = config.sigma_min.unwrap_or(sigmas[sigmas.len() - 1]);
        if let Some(shaped) = shape.sigmas(max, min, steps) {
            timesteps = timesteps_of(&shaped, &train);
            sigmas = shaped;
        }
        let mut sigmas: Vec<f32> = sigmas.into_iter().map(|s| s as f32).collect();
        sigmas.push(last);
        let largest = sigmas.iter().copied().fold(0.0, f32::max);
        let init_noise_sigma = match schedule.spacing {
            TimestepSpacing::Linspace | TimestepSpacing::Trailing => largest,
            TimestepSpacing::Leading => (largest * largest + 1.0).sqrt(),
        };
        Self {
            timesteps: timesteps.into_iter().map(|t| t as f32).collect(),
            sigmas,
            prediction: schedule.prediction,
            init_noise_sigma,
        }
    }

    pub(super) fn scale(&self, index: usize, sample: &[f32]) -> Vec<f32> {
        let sigma = self.sigmas[index];
        let norm = (sigma * sigma + 1.0).sqrt();
        sample.iter().map(|x| x / norm).collect()
    }

    pub(super) fn x0(&self, index: usize, output: &[f32], sample: &[f32]) -> Vec<f32> {
        x0_exploding(self.sigmas[index], self.prediction, output, sample)
    }
}

/// diffusers' `EulerDiscreteScheduler`.
pub(super) struct Euler {
    schedule: SigmaSchedule,
}

impl Euler {
    pub(super) fn new(config: &SchedulerConfig, steps: usize) -> Result<Self, SchedulerError> {
        let base = Schedule::new(config, Defaults::EULER)?;
        let last = match config.final_sigmas_type.unwrap_or_default() {
            FinalSigmas::Zero => 0.0,
            FinalSigmas::SigmaMin => base.train_sigmas()[0],
        };
        let mut schedule = SigmaSchedule::new(
            &base,
            config,
            SigmaShape::from_config(config)?,
            config.interpolation_type.unwrap_or_default(),
            last,
            steps,
        );
        if config.timestep_type.as_deref() == Some("continuous")
            && base.prediction == PredictionType::VPrediction
        {
            // EDM's noise conditioning.
            let sigmas = schedule.sigmas.iter().take(steps);
            schedule.timesteps = sigmas.map(|s| 0.25 * s.ln()).collect();
        }
        Ok(Self { schedule })
    }
}

impl Method for Euler {
    fn timesteps(&self) -> &[f32] {
        &self.schedule.timesteps
    }

    fn init_noise_sigma(&self) -> f32 {
        self.schedule.init_noise_sigma
    }

    fn scale_model_input(&self, index: usize, sample: &[f32]) -> Vec<f32> {
        self.schedule.scale(index, sample)
    }

    fn step(
        &mut self,
        index: usize,
        output: &[f32],
        sample: &mut [f32],
        _noise: &mut dyn FnMut() -> Vec<f32>,
    ) {
        let sigma = self.schedule.sigmas[index];
        let dt = self.schedule.sigmas[index + 1] - sigma;
        let x0 = self.schedule.x0(index, output, sample);
        update(sample, &x0, |x, x0| x + (x - x0) / sigma * dt);
    }

    fn denoised(&self, index: usize, output: &[f32], sample: &[f32]) -> Vec<f32> {
        self.schedule.x0(index, output, sample)
    }

    fn noise_level(&self, index: usize) -> (f32, f32) {
        (1.0, self.schedule.sigmas[index])
    }
}
