//! DPM-Solver++ multistep (Lu et al. 2022), as an ODE and as an SDE, orders 1 to 3.

use super::{
    SchedulerError,
    config::{BetaSchedule, FinalSigmas, PredictionType, SchedulerConfig},
    prediction::Level,
    run::{Method, combine, update},
    schedule::{Defaults, Schedule, interpolate},
    sigmas::{SigmaShape, timesteps_of},
};

/// diffusers' `DPMSolverMultistepScheduler` with `algorithm_type` `dpmsolver++` or
/// `sde-dpmsolver++`.
pub(super) struct DpmPlusPlus {
    timesteps: Vec<f32>,
    /// Noise-to-signal ratio of every step, and after the last.
    sigmas: Vec<f32>,
    prediction: PredictionType,
    sde: bool,
    order: usize,
    solver: Solver,
    lower_order_final: bool,
    /// The last step is of first order however many there are.
    first_order_at_end: bool,
    /// Predicted clean samples, the latest first.
    history: Vec<Vec<f32>>,
}

/// How the second-order term is approximated.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Solver {
    Midpoint,
    Heun,
}

/// Fewer steps than this end in lower orders (`lower_order_final`).
const FEW_STEPS: usize = 15;

impl DpmPlusPlus {
    pub(super) fn new(
        config: &SchedulerConfig,
        steps: usize,
        karras: bool,
        sde: bool,
    ) -> Result<Self, SchedulerError> {
        config.refuse_thresholding()?;
        let shape = if karras {
            SigmaShape::Karras
        } else {
            let plain = SchedulerConfig {
                use_karras_sigmas: None,
                ..config.clone()
            };
            SigmaShape::from_config(&plain)?
        };
        let order = solver_order(config)?;
        let solver = match config.solver_type.as_deref() {
            Some("heun") => Solver::Heun,
            None | Some("midpoint" | "logrho" | "bh1" | "bh2") => Solver::Midpoint,
            Some(other) => return Err(unknown_solver(other, "\"midpoint\" or \"heun\"")),
        };
        let schedule = Schedule::new(config, Defaults::SOLVER)?;
        let train = schedule.train_sigmas();
        let noisiest = clipped_end(&schedule, config.lambda_min_clipped);
        let mut timesteps = schedule.solver_timesteps(steps, noisiest);
        let max = config.sigma_max.unwrap_or(train[train.len() - 1].into());
        let min = config.sigma_min.unwrap_or(train[0].into());
        let sigmas = match shape.sigmas(max, min, steps) {
            None => timesteps.iter().map(|&t| interpolate(t, &train)).collect(),
            Some(sigmas) => {
                let round = shape == SigmaShape::Karras
                    && config.beta_schedule != Some(BetaSchedule::SquaredcosCapV2);
                timesteps = whole(timesteps_of(&sigmas, &train), round);
                sigmas
            }
        };
        let final_sigmas = config.final_sigmas_type.unwrap_or_default();
        let last = match final_sigmas {
            FinalSigmas::Zero => 0.0,
            FinalSigmas::SigmaMin => train[0],
        };
        Ok(Self {
            timesteps: timesteps.into_iter().map(|t| t as f32).collect(),
            sigmas: sigmas.into_iter().map(|s| s as f32).chain([last]).collect(),
            prediction: schedule.prediction,
            sde,
            order,
            solver,
            lower_order_final: config.lower_order_final.unwrap_or(true),
            first_order_at_end: config.euler_at_final == Some(true)
                || final_sigmas == FinalSigmas::Zero,
            history: Vec::with_capacity(order),
        })
    }

    /// The order of step `index`: as many earlier predictions as there are, fewer near the end.
    fn order_at(&self, index: usize) -> usize {
        let count = self.timesteps.len();
        let few = self.lower_order_final && count < FEW_STEPS;
        let most = match count - index {
            1 if few || self.first_order_at_end => 1,
            2 if few => 2,
            _ => self.order,
        };
        most.min(self.history.len())
    }
}

/// Reads `solver_order`, for UniPC too.
pub(super) fn solver_order(config: &SchedulerConfig) -> Result<usize, SchedulerError> {
    let order = config.solver_order.unwrap_or(2);
    if (1..=3).contains(&order) {
        return Ok(order);
    }
    Err(SchedulerError::Config {
        field: "solver_order",
        value: order.to_string(),
        fix: "it must be 1, 2 or 3".into(),
    })
}

pub(super) fn unknown_solver(value: &str, known: &str) -> SchedulerError {
    SchedulerError::Config {
        field: "solver_type",
        value: format!("\"{value}\""),
        fix: format!("it must be {known}"),
    }
}

/// Timesteps as the integers that torch makes of them, rounded first or truncated.
pub(super) fn whole(timesteps: Vec<f64>, round: bool) -> Vec<f64> {
    let to_whole = |t: f64| {
        if round {
            t.round_ties_even()
        } else {
            t.trunc()
        }
    };
    timesteps.into_iter().map(to_whole).collect()
}

/// How many training timesteps are left when those of a log-SNR below `lambda_min` are not used.
fn clipped_end(schedule: &Schedule, lambda_min: Option<f64>) -> usize {
    let lambda = |&alpha: &f32| alpha.sqrt().ln() - (1.0 - alpha).sqrt().ln();
    match lambda_min {
        None => schedule.alphas_cumprod.len(),
        Some(min) => schedule
            .alphas_cumprod
            .iter()
            .filter(|alpha| f64::from(lambda(alpha)) >= min)
            .count()
            .max(1),
    }
}

/// Half the logarithm of the signal-to-noise ratio.
pub(super) fn lambda(level: Level) -> f32 {
    level.signal.ln() - level.noise.ln()
}

/// Factors of one update, `x' = x·sample + Σ d[k]·D_k + noise·ε`, where `D_k` estimates the k-th
/// derivative of the clean sample by the log-SNR.
struct Factors {
    sample: f32,
    d: [f32; 3],
    noise: f32,
}

impl Factors {
    fn new(from: Level, to: Level, h: f32, sde: bool, solver: Solver, order: usize) -> Self {
        let alpha = to.signal;
        let ratio = to.noise / from.noise;
        // Order 3 always has Heun's form of the first derivative's factor.
        let midpoint = solver == Solver::Midpoint && order < 3;
        if sde {
            let p = 1.0 - (-2.0 * h).exp();
            let d1 = if midpoint {
                0.5 * (alpha * p)
            } else {
                alpha * (p / (-2.0 * h) + 1.0)
            };
            let h2 = 2.0 * h;
            Self {
                sample: ratio * (-h).exp(),
                d: [alpha * p, d1, alpha * ((p - h2) / (h2 * h2) - 0.5)],
                noise: to.noise * p.sqrt(),
            }
        } else {
            let e = (-h).exp() - 1.0;
            let d1 = if midpoint {
                -0.5 * (alpha * e)
            } else {
                alpha * (e / h + 1.0)
            };
            Self {
                sample: ratio,
                d: [-(alpha * e), d1, -(alpha * ((e + h) / (h * h) - 0.5))],
                noise: 0.0,
            }
        }
    }
}

impl Method for DpmPlusPlus {
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
        self.history.truncate(self.order - 1);
        self.history.insert(0, x0);

        let level = |i: usize| Level::from_sigma(self.sigmas[i]);
        let (from, to) = (level(index), level(index + 1));
        let h = lambda(to) - lambda(from);
        // The smallest of Karras' sigmas may be the final one too: a step of no length, where higher
        // orders (and diffusers) divide 0 by 0.
        let order = if h == 0.0 { 1 } else { self.order_at(index) };
        let factors = Factors::new(from, to, h, self.sde, self.solver, order);

        let m = &self.history;
        update(sample, &m[0], |x, m0| {
            factors.sample * x + factors.d[0] * m0
        });
        if order > 1 {
            let r0 = (lambda(from) - lambda(level(index - 1))) / h;
            let mut d1 = combine(&m[0], &m[1], |m0, m1| 1.0 / r0 * (m0 - m1));
            if order > 2 {
                let r1 = (lambda(level(index - 1)) - lambda(level(index - 2))) / h;
                let older = combine(&m[1], &m[2], |m1, m2| 1.0 / r1 * (m1 - m2));
                let difference = combine(&d1, &older, |a, b| a - b);
                update(&mut d1, &difference, |d, diff| d + r0 / (r0 + r1) * diff);
                update(sample, &d1, |x, d1| x + factors.d[1] * d1);
                let inverse = 1.0 / (r0 + r1);
                update(sample, &difference, |x, diff| {
                    x + factors.d[2] * (inverse * diff)
                });
            } else {
                update(sample, &d1, |x, d1| x + factors.d[1] * d1);
            }
        }
        if self.sde {
            update(sample, &noise(), |x, n| x + factors.noise * n);
        }
    }

    fn denoised(&self, index: usize, output: &[f32], sample: &[f32]) -> Vec<f32> {
        Level::from_sigma(self.sigmas[index]).x0(self.prediction, output, sample)
    }

    fn noise_level(&self, index: usize) -> (f32, f32) {
        let level = Level::from_sigma(self.sigmas[index]);
        (level.signal, level.noise)
    }
}
