//! Latent consistency sampling (Luo et al. 2023): jump to the clean sample, add noise, repeat.

use super::{
    SchedulerError,
    config::{PredictionType, SchedulerConfig},
    prediction::{Level, clip},
    run::{Method, combine, update},
    schedule::{Defaults, Schedule, linspace},
};

pub(super) struct Lcm {
    timesteps: Vec<f32>,
    levels: Vec<Level>,
    /// Weights of the sample and of the predicted x0 that hold the consistency function to the
    /// identity at timestep 0.
    boundary: Vec<(f32, f32)>,
    prediction: PredictionType,
    clip: Option<f32>,
}

impl Lcm {
    pub(super) fn new(config: &SchedulerConfig, steps: usize) -> Result<Self, SchedulerError> {
        config.refuse_thresholding()?;
        let schedule = Schedule::new(config, Defaults::LCM)?;
        let timesteps = timesteps(config, schedule.alphas_cumprod.len(), steps)?;
        schedule.refuse_zero_signal(&timesteps)?;
        let scaling = config.timestep_scaling.unwrap_or(10.0);
        Ok(Self {
            levels: timesteps
                .iter()
                .map(|&t| Level::from_alpha_cumprod(schedule.alphas_cumprod[t]))
                .collect(),
            boundary: timesteps.iter().map(|&t| boundary(t, scaling)).collect(),
            timesteps: timesteps.into_iter().map(|t| t as f32).collect(),
            prediction: schedule.prediction,
            clip: config.clip(false),
        })
    }

    fn x0(&self, index: usize, output: &[f32], sample: &[f32]) -> Vec<f32> {
        let mut x0 = self.levels[index].x0(self.prediction, output, sample);
        clip(&mut x0, self.clip);
        x0
    }
}

/// An even choice from the schedule the model was distilled on.
fn timesteps(
    config: &SchedulerConfig,
    train: usize,
    steps: usize,
) -> Result<Vec<usize>, SchedulerError> {
    let original = config.original_inference_steps.unwrap_or(50);
    if original == 0 || original > train {
        return Err(SchedulerError::Config {
            field: "original_inference_steps",
            value: original.to_string(),
            fix: format!("it must be from 1 to `num_train_timesteps`, {train}"),
        });
    }
    if steps > original {
        return Err(SchedulerError::Steps {
            steps,
            most: original,
        });
    }
    let stride = train / original;
    // Even positions without the end point, rounded down, counted from the noisy end.
    Ok(linspace(0.0, original as f64, steps + 1)
        .into_iter()
        .take(steps)
        .map(|position| (original - position.floor() as usize) * stride - 1)
        .collect())
}

/// c_skip and c_out of the paper, with sigma_data 0.5.
fn boundary(timestep: usize, scaling: f64) -> (f32, f32) {
    const VARIANCE: f32 = 0.25;
    let scaled = timestep as f32 * scaling as f32;
    let norm = scaled * scaled + VARIANCE;
    (VARIANCE / norm, scaled / norm.sqrt())
}

impl Method for Lcm {
    fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn step(
        &mut self,
        index: usize,
        output: &[f32],
        sample: &mut [f32],
        noise: &mut dyn FnMut() -> Vec<f32>,
    ) {
        let denoised = self.denoised(index, output, sample);
        sample.copy_from_slice(&denoised);
        if let Some(next) = self.levels.get(index + 1) {
            update(sample, &noise(), |x, n| next.signal * x + next.noise * n);
        }
    }

    fn denoised(&self, index: usize, output: &[f32], sample: &[f32]) -> Vec<f32> {
        let (skip, out) = self.boundary[index];
        let x0 = self.x0(index, output, sample);
        combine(&x0, sample, |x0, x| out * x0 + skip * x)
    }

    fn noise_level(&self, index: usize) -> (f32, f32) {
        (self.levels[index].signal, self.levels[index].noise)
    }
}
