//! Noise levels of the sigma-based samplers: interpolated, Karras or exponential.

use super::{
    SchedulerError,
    config::{SchedulerConfig, refuse},
    schedule::{descending, linspace},
};

/// Shape of the sigmas between the largest and the smallest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SigmaShape {
    /// Those of the training schedule at the chosen timesteps.
    Training,
    /// Karras et al. 2022, equation 5, rho 7.
    Karras,
    /// Even in the logarithm.
    Exponential,
}

impl SigmaShape {
    pub(super) fn from_config(config: &SchedulerConfig) -> Result<Self, SchedulerError> {
        refuse(
            "use_beta_sigmas",
            config.use_beta_sigmas,
            "it is not supported; set it to false",
        )?;
        refuse(
            "use_lu_lambdas",
            config.use_lu_lambdas,
            "it is not supported; set it to false",
        )?;
        refuse(
            "use_flow_sigmas",
            config.use_flow_sigmas,
            "flow-matching models are not supported",
        )?;
        Ok(
            match (config.use_karras_sigmas, config.use_exponential_sigmas) {
                (Some(true), Some(true)) => {
                    return Err(SchedulerError::Config {
                        field: "use_exponential_sigmas",
                        value: "true".into(),
                        fix: "so is `use_karras_sigmas`; only one of them can be".into(),
                    });
                }
                (Some(true), _) => Self::Karras,
                (_, Some(true)) => Self::Exponential,
                _ => Self::Training,
            },
        )
    }

    /// `steps` sigmas from `max` down to `min`; `None` where the training schedule decides.
    pub(super) fn sigmas(self, max: f64, min: f64, steps: usize) -> Option<Vec<f64>> {
        const RHO: f64 = 7.0;
        match self {
            Self::Training => None,
            Self::Karras => {
                let (max, min) = (max.powf(1.0 / RHO), min.powf(1.0 / RHO));
                let ramp = linspace(0.0, 1.0, steps).into_iter();
                Some(ramp.map(|r| (max + r * (min - max)).powf(RHO)).collect())
            }
            Self::Exponential => Some(
                linspace(max.ln(), min.ln(), steps)
                    .into_iter()
                    .map(f64::exp)
                    .collect(),
            ),
        }
    }
}

/// The (fractional) training timestep of each sigma, interpolated in the logarithm.
pub(super) fn timesteps_of(sigmas: &[f64], train_sigmas: &[f32]) -> Vec<f64> {
    let logs: Vec<f32> = train_sigmas.iter().map(|s| s.ln()).collect();
    sigmas
        .iter()
        .map(|sigma| {
            let log = sigma.max(1e-10).ln();
            let below = logs.partition_point(|&l| f64::from(l) <= log);
            let low = below.saturating_sub(1).min(logs.len() - 2);
            let w = (f64::from(logs[low]) - log) / f64::from(logs[low] - logs[low + 1]);
            let w = w.clamp(0.0, 1.0);
            (1.0 - w) * low as f64 + w * (low + 1) as f64
        })
        .collect()
}

/// Even in the logarithm between the training schedule's ends, with one sigma more than steps
/// (Euler's `log_linear` interpolation).
pub(super) fn log_linear(train_sigmas: &[f32], steps: usize) -> Vec<f64> {
    let first = f64::from(train_sigmas[0].ln());
    let last = f64::from(train_sigmas[train_sigmas.len() - 1].ln());
    descending(linspace(first, last, steps + 1))
        .into_iter()
        .map(|log| f64::from((log as f32).exp()))
        .collect()
}
