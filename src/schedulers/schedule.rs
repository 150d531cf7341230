//! Betas, noise levels and the choice of timesteps.
//!
//! The precision follows diffusers: betas in `f32`, their cumulative product accumulated in `f64`
//! and stored in `f32` (as torch does on the CPU), timesteps and sigmas chosen in `f64` (as NumPy
//! does) and stored in `f32`.

use super::{
    SchedulerError,
    config::{BetaSchedule, PredictionType, SchedulerConfig, TimestepSpacing},
};

/// What differs between the schedulers' constructors in diffusers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Defaults {
    pub beta_start: f64,
    pub beta_end: f64,
    pub beta_schedule: BetaSchedule,
    pub spacing: TimestepSpacing,
    /// What happens with `rescale_betas_zero_snr`.
    pub zero_snr: ZeroSnr,
}

/// How a scheduler takes betas rescaled to a zero terminal signal-to-noise ratio.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ZeroSnr {
    /// The scheduler has no such option.
    Ignored,
    Exact,
    /// The last product of alphas is [`NEAR_ZERO_ALPHA`], so that sigma stays finite.
    NearZero,
}

/// The smallest number above 0 of f16.
const NEAR_ZERO_ALPHA: f32 = 5.960_464_5e-8;
/// The sigma torch finds there. Rightly rounded it is one ulp less, but a picture begins as noise
/// times sigma, and an ulp of that is 1e-4 of what is left after the next step.
const NEAR_ZERO_SIGMA: f32 = 4096.0;

impl Defaults {
    pub(super) const DDIM: Self = Self {
        beta_start: 0.0001,
        beta_end: 0.02,
        beta_schedule: BetaSchedule::Linear,
        spacing: TimestepSpacing::Leading,
        zero_snr: ZeroSnr::Exact,
    };
    pub(super) const EULER: Self = Self {
        spacing: TimestepSpacing::Linspace,
        zero_snr: ZeroSnr::NearZero,
        ..Self::DDIM
    };
    /// DPM++ and UniPC.
    pub(super) const SOLVER: Self = Self::EULER;
    pub(super) const HEUN: Self = Self {
        beta_start: 0.00085,
        beta_end: 0.012,
        zero_snr: ZeroSnr::Ignored,
        ..Self::EULER
    };
    pub(super) const LCM: Self = Self {
        beta_start: 0.00085,
        beta_end: 0.012,
        beta_schedule: BetaSchedule::ScaledLinear,
        ..Self::DDIM
    };
}

/// A training schedule and how inference steps are laid out on it.
#[derive(Debug, Clone)]
pub(super) struct Schedule {
    /// Cumulative products of `1 - beta`, one per training timestep.
    pub alphas_cumprod: Vec<f32>,
    pub spacing: TimestepSpacing,
    pub steps_offset: usize,
    pub prediction: PredictionType,
}

impl Schedule {
    pub(super) fn new(
        config: &SchedulerConfig,
        defaults: Defaults,
    ) -> Result<Self, SchedulerError> {
        let mut betas = betas(config, defaults)?;
        let zero_snr =
            config.rescale_betas_zero_snr == Some(true) && defaults.zero_snr != ZeroSnr::Ignored;
        if zero_snr {
            betas = rescale_zero_terminal_snr(&betas);
        }
        let mut alphas_cumprod = cumulative_alphas(&betas);
        if zero_snr
            && defaults.zero_snr == ZeroSnr::NearZero
            && let Some(last) = alphas_cumprod.last_mut()
        {
            *last = NEAR_ZERO_ALPHA;
        }
        Ok(Self {
            alphas_cumprod,
            spacing: config.timestep_spacing.unwrap_or(defaults.spacing),
            steps_offset: config.steps_offset.unwrap_or(0),
            prediction: config.prediction_type.unwrap_or_default(),
        })
    }

    fn train_steps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// Timesteps of the Euler family: `steps` of them, descending, unrounded with `linspace`.
    pub(super) fn timesteps(&self, steps: usize) -> Vec<f64> {
        // NumPy computes in f64 and stores f32.
        let laid_out = self.laid_out(steps).into_iter();
        laid_out.map(|t| f64::from(t as f32)).collect()
    }

    fn laid_out(&self, steps: usize) -> Vec<f64> {
        let train = self.train_steps();
        match self.spacing {
            TimestepSpacing::Linspace => descending(linspace(0.0, (train - 1) as f64, steps)),
            TimestepSpacing::Leading => self.leading(train / steps, steps),
            TimestepSpacing::Trailing => trailing(train as f64, train, steps),
        }
    }

    /// Timesteps of the DDIM family: as [`Schedule::timesteps`], always whole. (Rounded from `f64`:
    /// a half of `f32` may be less in truth.)
    ///
    /// Each is an index into `alphas_cumprod`; one beyond its end (a large `steps_offset`) is an
    /// error.
    pub(super) fn whole_timesteps(&self, steps: usize) -> Result<Vec<usize>, SchedulerError> {
        self.laid_out(steps)
            .into_iter()
            .map(|t| {
                let t = t.round_ties_even() as usize;
                if t < self.train_steps() {
                    Ok(t)
                } else {
                    Err(SchedulerError::Config {
                        field: "steps_offset",
                        value: self.steps_offset.to_string(),
                        fix: format!(
                            "with {steps} steps it leads to timestep {t}, past the last, {}; ask \
                             for fewer steps",
                            self.train_steps() - 1
                        ),
                    })
                }
            })
            .collect()
    }

    /// Timesteps of the multistep solvers, which lay out one point more and leave out the last;
    /// only the first `end` training timesteps are used.
    pub(super) fn solver_timesteps(&self, steps: usize, end: usize) -> Vec<f64> {
        match self.spacing {
            TimestepSpacing::Linspace => {
                let mut points = descending(linspace(0.0, (end - 1) as f64, steps + 1));
                points.pop();
                points.iter().map(|t| t.round_ties_even()).collect()
            }
            TimestepSpacing::Leading => {
                let ratio = end / (steps + 1);
                (1..=steps)
                    .rev()
                    .map(|i| (i * ratio + self.steps_offset) as f64)
                    .collect()
            }
            TimestepSpacing::Trailing => trailing(end as f64, self.train_steps(), steps),
        }
    }

    fn leading(&self, ratio: usize, steps: usize) -> Vec<f64> {
        (0..steps)
            .rev()
            .map(|i| (i * ratio + self.steps_offset) as f64)
            .collect()
    }

    /// Noise-to-signal ratio of every training timestep.
    pub(super) fn train_sigmas(&self) -> Vec<f32> {
        self.alphas_cumprod
            .iter()
            .map(|&a| match a {
                NEAR_ZERO_ALPHA => NEAR_ZERO_SIGMA,
                _ => ((1.0 - a) / a).sqrt(),
            })
            .collect()
    }
}

fn betas(config: &SchedulerConfig, defaults: Defaults) -> Result<Vec<f32>, SchedulerError> {
    let count = config.num_train_timesteps.unwrap_or(1000);
    let invalid = |field, value: String, fix: &str| SchedulerError::Config {
        field,
        value,
        fix: fix.into(),
    };
    if !(2..=1_000_000).contains(&count) {
        return Err(invalid(
            "num_train_timesteps",
            count.to_string(),
            "it must be from 2 to 1000000",
        ));
    }
    let betas = if let Some(trained) = &config.trained_betas {
        if trained.len() != count {
            return Err(invalid(
                "trained_betas",
                format!("{} numbers", trained.len()),
                "it must have `num_train_timesteps` of them",
            ));
        }
        trained.iter().map(|&b| b as f32).collect()
    } else {
        let start = config.beta_start.unwrap_or(defaults.beta_start);
        let end = config.beta_end.unwrap_or(defaults.beta_end);
        match config.beta_schedule.unwrap_or(defaults.beta_schedule) {
            BetaSchedule::Linear => linspace_f32(start, end, count),
            BetaSchedule::ScaledLinear => linspace_f32(start.sqrt(), end.sqrt(), count)
                .into_iter()
                .map(|b| b * b)
                .collect(),
            BetaSchedule::SquaredcosCapV2 => cosine_betas(count),
        }
    };
    if let Some(beta) = betas.iter().find(|b| !(0.0..1.0).contains(*b)) {
        return Err(invalid(
            "beta_start/beta_end/trained_betas",
            beta.to_string(),
            "every beta must be from 0 to below 1",
        ));
    }
    Ok(betas)
}

/// The cosine schedule of Nichol & Dhariwal 2021, betas capped at 0.999.
fn cosine_betas(count: usize) -> Vec<f32> {
    let alpha_bar = |t: f64| {
        ((t + 0.008) / 1.008 * std::f64::consts::PI / 2.0)
            .cos()
            .powi(2)
    };
    (0..count)
        .map(|i| {
            let from = i as f64 / count as f64;
            let to = (i + 1) as f64 / count as f64;
            (1.0 - alpha_bar(to) / alpha_bar(from)).min(0.999) as f32
        })
        .collect()
}

/// Algorithm 1 of "Common Diffusion Noise Schedules and Sample Steps are Flawed" (Lin et al. 2023).
fn rescale_zero_terminal_snr(betas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = cumulative_alphas(betas).iter().map(|a| a.sqrt()).collect();
    // `betas` checked the count: neither end is missing.
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let scale = first / (first - last);
    let alphas: Vec<f32> = roots
        .iter()
        .map(|root| {
            let root = (root - last) * scale;
            root * root
        })
        .collect();
    let mut previous = 1.0;
    alphas
        .into_iter()
        .map(|alpha| {
            let beta = 1.0 - alpha / previous;
            previous = alpha;
            beta
        })
        .collect()
}

/// Torch's `cumprod` on the CPU accumulates `f32` in `f64`.
fn cumulative_alphas(betas: &[f32]) -> Vec<f32> {
    let mut product = 1.0f64;
    betas
        .iter()
        .map(|&beta| {
            product *= f64::from(1.0 - beta);
            product as f32
        })
        .collect()
}

/// Torch's `linspace` in `f32`: from both ends to the middle.
fn linspace_f32(start: f64, end: f64, count: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / (count - 1) as f32;
    (0..count)
        .map(|i| {
            if i < count / 2 {
                start + step * i as f32
            } else {
                end - step * (count - 1 - i) as f32
            }
        })
        .collect()
}

/// NumPy's `linspace` with the end point; a single point is the start.
pub(super) fn linspace(start: f64, end: f64, count: usize) -> Vec<f64> {
    if count == 1 {
        return vec![start];
    }
    let step = (end - start) / (count - 1) as f64;
    (0..count)
        .map(|i| {
            if i == count - 1 {
                end
            } else {
                start + i as f64 * step
            }
        })
        .collect()
}

pub(super) fn descending(mut values: Vec<f64>) -> Vec<f64> {
    values.reverse();
    values
}

/// `round(arange(last, 0, -train / steps)) - 1`, but never more than `steps` values.
fn trailing(last: f64, train: usize, steps: usize) -> Vec<f64> {
    let ratio = train as f64 / steps as f64;
    let count = ((last / ratio).ceil() as usize).min(steps);
    // NumPy's `arange` takes the difference of the first two values for the step.
    let delta = (last - ratio) - last;
    (0..count)
        .map(|i| (last + i as f64 * delta).round_ties_even() - 1.0)
        .collect()
}

/// NumPy's `interp` over whole positions `0..values.len()`, clamped at both ends.
pub(super) fn interpolate(position: f64, values: &[f32]) -> f64 {
    let last = values.len() - 1;
    if position >= last as f64 {
        return f64::from(values[last]);
    }
    let position = position.max(0.0);
    let low = position.floor() as usize;
    let (from, to) = (f64::from(values[low]), f64::from(values[low + 1]));
    (to - from) * (position - low as f64) + from
}
