//! DDPM's ancestral sampling (Ho et al. 2020).

use super::{
    SchedulerError,
    config::{PredictionType, SchedulerConfig},
    prediction::{Level, clip},
    run::{Method, update},
    schedule::{Defaults, Schedule},
};

pub(super) struct Ddpm {
    timesteps: Vec<f32>,
    steps: Vec<Step>,
    prediction: PredictionType,
    clip: Option<f32>,
}

/// Coefficients of one step: equation 7 of the paper.
struct Step {
    level: Level,
    x0: f32,
    sample: f32,
    /// Standard deviation of the noise added; `None` at timestep 0, where none is drawn.
    noise: Option<f32>,
}

/// The two fixed variances of section 3.2 of the paper, the smaller one also by way of its logarithm.
#[derive(Clone, Copy)]
enum Variance {
    Small,
    SmallLog,
    Large,
}

impl Variance {
    fn from_config(config: &SchedulerConfig) -> Result<Self, SchedulerError> {
        match config.variance_type.as_deref() {
            None | Some("fixed_small") => Ok(Self::Small),
            Some("fixed_small_log") => Ok(Self::SmallLog),
            Some("fixed_large") => Ok(Self::Large),
            Some(other) => Err(SchedulerError::Config {
                field: "variance_type",
                value: format!("\"{other}\""),
                fix: "DDPM takes \"fixed_small\", \"fixed_small_log\" or \"fixed_large\"; use \
                      another scheduler or one of these"
                    .into(),
            }),
        }
    }
}

impl Ddpm {
    pub(super) fn new(config: &SchedulerConfig, steps: usize) -> Result<Self, SchedulerError> {
        config.refuse_thresholding()?;
        let variance = Variance::from_config(config)?;
        let schedule = Schedule::new(config, Defaults::DDIM)?;
        let timesteps = schedule.whole_timesteps(steps)?;
        schedule.refuse_zero_signal(&timesteps)?;
        let alphas = &schedule.alphas_cumprod;
        let steps = timesteps
            .iter()
            .enumerate()
            .map(|(i, &t)| {
                let previous = timesteps.get(i + 1).map_or(1.0, |&t| alphas[t]);
                Step::new(alphas[t], previous, t, variance)
            })
            .collect();
        Ok(Self {
            timesteps: timesteps.into_iter().map(|t| t as f32).collect(),
            steps,
            prediction: schedule.prediction,
            clip: config.clip(true),
        })
    }
}

impl Step {
    /// From the cumulative alphas at timestep `t` and at the one that follows in sampling.
    fn new(alpha: f32, previous: f32, t: usize, variance: Variance) -> Self {
        let beta = 1.0 - alpha;
        let beta_previous = 1.0 - previous;
        let current_alpha = alpha / previous;
        let current_beta = 1.0 - current_alpha;
        let small = (beta_previous / beta * current_beta).max(1e-20);
        let deviation = match variance {
            Variance::Small => small.sqrt(),
            Variance::SmallLog => (0.5 * small.ln()).exp(),
            Variance::Large => current_beta.sqrt(),
        };
        Self {
            level: Level::from_alpha_cumprod(alpha),
            x0: previous.sqrt() * current_beta / beta,
            sample: current_alpha.sqrt() * beta_previous / beta,
            noise: (t > 0).then_some(deviation),
        }
    }
}

impl Method for Ddpm {
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
        let x0 = self.denoised(index, output, sample);
        let step = &self.steps[index];
        update(sample, &x0, |x, x0| step.x0 * x0 + step.sample * x);
        if let Some(deviation) = step.noise {
            update(sample, &noise(), |x, n| x + deviation * n);
        }
    }

    fn denoised(&self, index: usize, output: &[f32], sample: &[f32]) -> Vec<f32> {
        let mut x0 = self.steps[index].level.x0(self.prediction, output, sample);
        clip(&mut x0, self.clip);
        x0
    }

    fn noise_level(&self, index: usize) -> (f32, f32) {
        let level = self.steps[index].level;
        (level.signal, level.noise)
    }
}
