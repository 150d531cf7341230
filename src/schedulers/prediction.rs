//! From what the model predicts to the clean picture and the noise.

use super::{config::PredictionType, run::combine};

/// A noise level of the variance-preserving process: `x = signal·x0 + noise·ε`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Level {
    pub signal: f32,
    pub noise: f32,
}

impl Level {
    /// From the cumulative product of alphas.
    pub(super) fn from_alpha_cumprod(alpha: f32) -> Self {
        Self {
            signal: alpha.sqrt(),
            noise: (1.0 - alpha).sqrt(),
        }
    }

    /// From the noise-to-signal ratio.
    pub(super) fn from_sigma(sigma: f32) -> Self {
        let signal = 1.0 / (sigma * sigma + 1.0).sqrt();
        Self {
            signal,
            noise: sigma * signal,
        }
    }

    /// The clean sample (x0) in a sample of the variance-preserving process.
    pub(super) fn x0(self, prediction: PredictionType, output: &[f32], sample: &[f32]) -> Vec<f32> {
        let Self { signal, noise } = self;
        match prediction {
            PredictionType::Epsilon => combine(output, sample, |o, x| (x - noise * o) / signal),
            PredictionType::VPrediction => combine(output, sample, |o, x| signal * x - noise * o),
            PredictionType::Sample => output.to_vec(),
        }
    }

    /// The noise in a sample of the variance-preserving process.
    pub(super) fn epsilon(
        self,
        prediction: PredictionType,
        output: &[f32],
        sample: &[f32],
    ) -> Vec<f32> {
        let Self { signal, noise } = self;
        match prediction {
            PredictionType::Epsilon => output.to_vec(),
            PredictionType::VPrediction => combine(output, sample, |o, x| signal * o + noise * x),
            PredictionType::Sample => combine(output, sample, |o, x| (x - signal * o) / noise),
        }
    }
}

/// The clean sample in a sample of the variance-exploding process, `x = x0 + sigma·ε`, which Euler
/// and Heun run in (Karras et al. 2022; diffusers scales the model's input instead).
pub(super) fn x0_exploding(
    sigma: f32,
    prediction: PredictionType,
    output: &[f32],
    sample: &[f32],
) -> Vec<f32> {
    match prediction {
        PredictionType::Epsilon => combine(output, sample, |o, x| x - sigma * o),
        PredictionType::VPrediction => {
            let norm = sigma * sigma + 1.0;
            let c_out = -sigma / norm.sqrt();
            combine(output, sample, |o, x| o * c_out + x / norm)
        }
        PredictionType::Sample => output.to_vec(),
    }
}

/// Limits every element to `±range`, if there is one.
pub(super) fn clip(x: &mut [f32], range: Option<f32>) {
    if let Some(range) = range {
        for x in x {
            *x = x.clamp(-range, range);
        }
    }
}
