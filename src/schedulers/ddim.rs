//! DDIM (Song et al. 2020), deterministic: eta is 0, as in diffusers' pipelines by default.

use super::{
    SchedulerError,
    config::{PredictionType, SchedulerConfig},
    prediction::{Level, clip},
    run::{Method, combine},
    schedule::{Defaults, Schedule},
};

pub(super) struct Ddim {
    timesteps: Vec<f32>,
    /// Level at each timestep and at the one before it in time.
    levels: Vec<(Level, Level)>,
    prediction: PredictionType,
    clip: Option<f32>,
}

impl Ddim {
    pub(super) fn new(config: &SchedulerConfig, steps: usize) -> Result<Self, SchedulerError> {
        config.refuse_thresholding()?;
        let schedule = Schedule::new(config, Defaults::DDIM)?;
        let timesteps = schedule.whole_timesteps(steps)?;
        schedule.refuse_zero_signal(&timesteps)?;
        let alphas = &schedule.alphas_cumprod;
        let stride = alphas.len() / steps;
        let last = if config.set_alpha_to_one.unwrap_or(true) {
            1.0
        } else {
            alphas[0]
        };
        let levels = timesteps
            .iter()
            .map(|&t| {
                let previous = t.checked_sub(stride).map_or(last, |t| alphas[t]);
                (
                    Level::from_alpha_cumprod(alphas[t]),
                    Level::from_alpha_cumprod(previous),
                )
            })
            .collect();
        Ok(Self {
            timesteps: timesteps.into_iter().map(|t| t as f32).collect(),
            levels,
            prediction: schedule.prediction,
            clip: config.clip(true),
        })
    }
}

impl Method for Ddim {
    fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn step(
        &mut self,
        index: usize,
        output: &[f32],
        sample: &mut [f32],
        _noise: &mut dyn FnMut() -> Vec<f32>,
    ) {
        let (_, next) = self.levels[index];
        let x0 = self.denoised(index, output, sample);
        // From the unclipped x0: diffusers' use_clipped_model_output is off.
        let epsilon = self.levels[index]
            .0
            .epsilon(self.prediction, output, sample);
        let moved = combine(&x0, &epsilon, |x0, e| next.signal * x0 + next.noise * e);
        sample.copy_from_slice(&moved);
    }

    fn denoised(&self, index: usize, output: &[f32], sample: &[f32]) -> Vec<f32> {
        let mut x0 = self.levels[index].0.x0(self.prediction, output, sample);
        clip(&mut x0, self.clip);
        x0
    }

    fn noise_level(&self, index: usize) -> (f32, f32) {
        let level = self.levels[index].0;
        (level.signal, level.noise)
    }
}
