//! How learning rates change over a run.

use serde::{Deserialize, Serialize};

/// What the learning rate is multiplied with from step to step, as diffusers' `get_scheduler` has it:
/// up from zero in a straight line through the warm-up, then by this rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum RateSchedule {
    Constant,
    /// Down to zero in a straight line.
    Linear,
    /// Down to zero along half a cosine.
    Cosine,
}

impl RateSchedule {
    /// The multiplier of step `step` (the first is 0) of `steps`, of which `warmup` are the rise.
    pub fn multiplier(self, step: u64, warmup: u64, steps: u64) -> f64 {
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let rest = steps.saturating_sub(warmup).max(1) as f64;
        match self {
            Self::Constant => 1.0,
            Self::Linear => steps.saturating_sub(step) as f64 / rest,
            Self::Cosine => {
                let done = ((step - warmup) as f64 / rest).min(1.0);
                0.5 * (1.0 + (std::f64::consts::PI * done).cos())
            }
        }
    }
}
