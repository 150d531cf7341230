//! UniPC (Zhao et al. 2023): a multistep predictor whose every step is corrected, at no extra cost,
//! once the model has been called at its end.

use super::{
    SchedulerError,
    config::{FinalSigmas, PredictionType, SchedulerConfig},
    dpmpp::{lambda, solver_order, unknown_solver, whole},
    prediction::Level,
    run::{Method, update},
    schedule::{Defaults, Schedule, interpolate},
    sigmas::{SigmaShape, timesteps_of},
};

/// diffusers' `UniPCMultistepScheduler`.
pub(super) struct UniPc {
    timesteps: Vec<f32>,
    /// Noise-to-signal ratio of every step, and after the last.
    sigmas: Vec<f32>,
    prediction: PredictionType,
    order: usize,
    variant: Variant,
    lower_order_final: bool,
    /// Steps after which nothing is corrected.
    uncorrected: Vec<usize>,
    /// Predicted clean samples, the latest first.
    history: Vec<Vec<f32>>,
    last: Option<LastStep>,
}

/// The paper's choices of B(h).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Variant {
    Bh1,
    Bh2,
}

/// What the corrector needs of the step it corrects.
struct LastStep {
    sample: Vec<f32>,
    order: usize,
}

impl UniPc {
    pub(super) fn new(config: &SchedulerConfig, steps: usize) -> Result<Self, SchedulerError> {
        config.refuse_thresholding()?;
        refuse_other_predictors(config)?;
        let variant = match config.solver_type.as_deref() {
            Some("bh1") => Variant::Bh1,
            None | Some("bh2" | "midpoint" | "heun" | "logrho") => Variant::Bh2,
            Some(other) => return Err(unknown_solver(other, "\"bh1\" or \"bh2\"")),
        };
        let shape = SigmaShape::from_config(config)?;
        let schedule = Schedule::new(config, Defaults::SOLVER)?;
        let train = schedule.train_sigmas();
        let mut timesteps = schedule.solver_timesteps(steps, train.len());
        let max = config.sigma_max.unwrap_or(train[train.len() - 1].into());
        let min = config.sigma_min.unwrap_or(train[0].into());
        let (sigmas, smallest): (Vec<f64>, f64) = match shape.sigmas(max, min, steps) {
            None => (
                timesteps.iter().map(|&t| interpolate(t, &train)).collect(),
                train[0].into(),
            ),
            Some(sigmas) => {
                timesteps = whole(timesteps_of(&sigmas, &train), shape == SigmaShape::Karras);
                let smallest = sigmas[sigmas.len() - 1];
                (sigmas, smallest)
            }
        };
        let last = match config.final_sigmas_type.unwrap_or_default() {
            FinalSigmas::Zero => 0.0,
            FinalSigmas::SigmaMin => smallest,
        };
        let sigmas = sigmas.into_iter().chain([last]).map(|s| s as f32).collect();
        let order = solver_order(config)?;
        let lower_order_final = config.lower_order_final.unwrap_or(true);
        if !lower_order_final && order > 1 && last == 0.0 {
            return Err(SchedulerError::Config {
                field: "lower_order_final",
                value: "false".into(),
                fix: "UniPC's last step to a sigma of zero can only be of first order; set it to \
                      true, or `final_sigmas_type` to \"sigma_min\""
                    .into(),
            });
        }
        Ok(Self {
            timesteps: timesteps.into_iter().map(|t| t as f32).collect(),
            sigmas,
            prediction: schedule.prediction,
            order,
            variant,
            lower_order_final,
            uncorrected: config.disable_corrector.clone().unwrap_or_default(),
            history: Vec::with_capacity(order),
            last: None,
        })
    }

    fn level(&self, index: usize) -> Level {
        Level::from_sigma(self.sigmas[index])
    }

    /// The step from `index` to the next, as far as it follows from what is known at `index`.
    fn update(&self, index: usize, order: usize) -> Update {
        let (from, to) = (self.level(index), self.level(index + 1));
        let h = lambda(to) - lambda(from);
        let ratios = (1..order)
            .map(|i| (lambda(self.level(index - i)) - lambda(from)) / h)
            .collect();
        Update::new(from, to, h, ratios, self.variant)
    }

    /// `sample`, at the end of the step to `index`, once the model's output there is known.
    fn correct(&self, index: usize, last: &LastStep, x0: &[f32], sample: &mut [f32]) {
        let step = self.update(index - 1, last.order);
        let weights = if last.order == 1 {
            vec![0.5]
        } else {
            step.weights(last.order)
        };
        let m0 = &self.history[0];
        sample.copy_from_slice(&last.sample);
        let mut residual = step.residual(&self.history, &weights[..last.order - 1]);
        let newest = weights[last.order - 1];
        for ((r, &x0), &m0) in residual.iter_mut().zip(x0).zip(m0) {
            *r += newest * (x0 - m0);
        }
        step.apply(sample, m0, &residual);
    }
}

fn refuse_other_predictors(config: &SchedulerConfig) -> Result<(), SchedulerError> {
    let error = |field, value: &str, fix: &str| {
        Err(SchedulerError::Config {
            field,
            value: value.into(),
            fix: fix.into(),
        })
    };
    if config.predict_x0 == Some(false) {
        return error("predict_x0", "false", "only true is supported");
    }
    if config.solver_p.is_some() {
        return error("solver_p", "set", "only null is supported");
    }
    Ok(())
}

/// One step's coefficients, equations 3 and 9 of the paper for a data-predicting model.
struct Update {
    sample: f32,
    x0: f32,
    residual: f32,
    /// Log-SNR distances of earlier outputs over that of the step.
    ratios: Vec<f32>,
    /// The right-hand side of the order conditions.
    b: Vec<f32>,
}

impl Update {
    fn new(from: Level, to: Level, h: f32, ratios: Vec<f32>, variant: Variant) -> Self {
        let hh = -h;
        let h_phi_1 = hh.exp_m1();
        let b_h = match variant {
            Variant::Bh1 => hh,
            Variant::Bh2 => h_phi_1,
        };
        let mut h_phi_k = h_phi_1 / hh - 1.0;
        let mut factorial = 1.0;
        let b = (1..=ratios.len() + 1)
            .map(|i| {
                let b = h_phi_k * factorial / b_h;
                factorial *= (i + 1) as f32;
                h_phi_k = h_phi_k / hh - 1.0 / factorial;
                b
            })
            .collect();
        Self {
            sample: to.noise / from.noise,
            x0: to.signal * h_phi_1,
            residual: to.signal * b_h,
            ratios,
            b,
        }
    }

    /// Weights that satisfy the first `count` order conditions: `Σ_k w_k r_k^i = b_i`, where the
    /// last ratio is that of the step's own end, 1.
    fn weights(&self, count: usize) -> Vec<f32> {
        let nodes: Vec<f64> = self.ratios.iter().map(|&r| r.into()).chain([1.0]).collect();
        let rows = (0..count)
            .map(|i| {
                let powers = nodes[..count].iter().map(|r| r.powi(i as i32));
                powers.chain([self.b[i].into()]).collect()
            })
            .collect();
        solve(rows).into_iter().map(|w| w as f32).collect()
    }

    /// `Σ w_k (m_k - m_0) / r_k` over earlier outputs.
    fn residual(&self, history: &[Vec<f32>], weights: &[f32]) -> Vec<f32> {
        let mut sum = vec![0.0; history[0].len()];
        for ((m, &ratio), &weight) in history[1..].iter().zip(&self.ratios).zip(weights) {
            for ((sum, &m), &m0) in sum.iter_mut().zip(m).zip(&history[0]) {
                *sum += weight * ((m - m0) / ratio);
            }
        }
        sum
    }

    fn apply(&self, sample: &mut [f32], m0: &[f32], residual: &[f32]) {
        update(sample, m0, |x, m0| self.sample * x - self.x0 * m0);
        update(sample, residual, |x, r| x - self.residual * r);
    }
}

/// Solves a small linear system given as rows with the right-hand side at the end, by Gaussian
/// elimination with pivoting.
fn solve(mut rows: Vec<Vec<f64>>) -> Vec<f64> {
    let n = rows.len();
    for column in 0..n {
        let pivot = (column..n)
            .max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()))
            .unwrap_or(column);
        rows.swap(column, pivot);
        let pivot = rows[column].clone();
        for row in &mut rows[column + 1..] {
            let factor = row[column] / pivot[column];
            for (value, above) in row.iter_mut().zip(&pivot).skip(column) {
                *value -= factor * above;
            }
        }
    }
    let mut solution = vec![0.0; n];
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|k| rows[i][k] * solution[k]).sum();
        solution[i] = (rows[i][n] - known) / rows[i][i];
    }
    solution
}

impl Method for UniPc {
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
        let x0 = self.denoised(index, output, sample);
        if let Some(last) = self.last.take()
            && !self.uncorrected.contains(&(index - 1))
        {
            self.correct(index, &last, &x0, sample);
        }
        self.history.truncate(self.order - 1);
        self.history.insert(0, x0);

        let most = if self.sigmas[index] == self.sigmas[index + 1] {
            // A step of no length, as in DPM++.
            1
        } else if self.lower_order_final {
            self.order.min(self.timesteps.len() - index)
        } else {
            self.order
        };
        let order = most.min(self.history.len());
        self.last = Some(LastStep {
            sample: sample.to_vec(),
            order,
        });
        let step = self.update(index, order);
        if order == 1 {
            // No residual: its factor is infinite at a zero final sigma with B(h) = h.
            update(sample, &self.history[0], |x, m0| {
                step.sample * x - step.x0 * m0
            });
            return;
        }
        let weights = if order == 2 {
            // The paper's simplification for order 2.
            vec![0.5]
        } else {
            step.weights(order - 1)
        };
        let residual = step.residual(&self.history, &weights);
        step.apply(sample, &self.history[0], &residual);
    }

    fn denoised(&self, index: usize, output: &[f32], sample: &[f32]) -> Vec<f32> {
        self.level(index).x0(self.prediction, output, sample)
    }

    fn noise_level(&self, index: usize) -> (f32, f32) {
        let level = self.level(index);
        (level.signal, level.noise)
    }
}
