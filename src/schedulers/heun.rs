//! Heun's second-order method in sigma (Karras et al. 2022, algorithm 1).
//!
//! Every step but the last calls the model twice: once where it starts and once where Euler's step
//! would end; the step is then taken along the mean slope.

use super::{
    SchedulerError,
    config::{Interpolation, SchedulerConfig},
    euler::SigmaSchedule,
    prediction::clip,
    run::{Method, combine, update},
    schedule::{Defaults, Schedule},
    sigmas::SigmaShape,
};

pub(super) struct Heun {
    schedule: SigmaSchedule,
    clip: Option<f32>,
    half_step: Option<HalfStep>,
}

/// What the first call of a step leaves to the second.
struct HalfStep {
    slope: Vec<f32>,
    dt: f32,
    sample: Vec<f32>,
}

impl Heun {
    pub(super) fn new(config: &SchedulerConfig, steps: usize) -> Result<Self, SchedulerError> {
        let base = Schedule::new(config, Defaults::HEUN)?;
        let mut schedule = SigmaSchedule::new(
            &base,
            config,
            SigmaShape::from_config(config)?,
            Interpolation::Linear,
            0.0,
            steps,
        );
        // Everything but the two ends comes twice: as a step's end, then as the next one's start.
        let twice = |values: &[f32]| values.iter().flat_map(|&v| [v, v]).collect::<Vec<_>>();
        let sigmas = twice(&schedule.sigmas);
        schedule.sigmas = sigmas[1..sigmas.len() - 1].to_vec();
        schedule.timesteps = twice(&schedule.timesteps)[1..].to_vec();
        Ok(Self {
            schedule,
            clip: config.clip(false),
            half_step: None,
        })
    }
}

impl Method for Heun {
    fn timesteps(&self) -> &[f32] {
        &self.schedule.timesteps
    }

    fn calls_per_step(&self) -> usize {
        2
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
        let x0 = self.denoised(index, output, sample);
        let mut slope = combine(sample, &x0, |x, x0| (x - x0) / sigma);
        match self.half_step.take() {
            None => {
                let dt = self.schedule.sigmas[index + 1] - sigma;
                let start = sample.to_vec();
                update(sample, &slope, |x, s| x + s * dt);
                self.half_step = Some(HalfStep {
                    slope,
                    dt,
                    sample: start,
                });
            }
            Some(half) => {
                update(&mut slope, &half.slope, |end, start| (start + end) / 2.0);
                sample.copy_from_slice(&combine(&half.sample, &slope, |x, s| x + s * half.dt));
            }
        }
    }

    fn denoised(&self, index: usize, output: &[f32], sample: &[f32]) -> Vec<f32> {
        let mut x0 = self.schedule.x0(index, output, sample);
        clip(&mut x0, self.clip);
        x0
    }

    fn noise_level(&self, index: usize) -> (f32, f32) {
        (1.0, self.schedule.sigmas[index])
    }
}
