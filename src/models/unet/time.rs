//! The embedding of a timestep.

use candle_core::{DType, Device, Result, Tensor};

use super::super::{
    Deltas, LoadError,
    layers::{Linear, Scope},
};
use super::UNetConfig;
use crate::ops;

/// The base of the geometric series of frequencies.
const MAX_PERIOD: f64 = 10_000.0;

/// Sinusoids of the timestep (Vaswani et al. 2017), then a two-layer perceptron.
#[derive(Debug)]
pub(super) struct TimeEmbedding {
    frequencies: Vec<f32>,
    /// Width of the sinusoids; an odd one ends in a zero.
    width: usize,
    cosine_first: bool,
    linear_1: Linear,
    linear_2: Linear,
}

impl TimeEmbedding {
    pub fn load(scope: &Scope, config: &UNetConfig) -> std::result::Result<Self, LoadError> {
        let width = config.levels[0].channels;
        let half = width / 2;
        let step = (half as f64 - config.freq_shift) as f32;
        let frequencies = (0..half)
            .map(|i| ((-MAX_PERIOD.ln()) as f32 * i as f32 / step).exp())
            .collect();
        let (scope, d) = (scope.at("time_embedding"), config.time_embedding);
        Ok(Self {
            frequencies,
            width,
            cosine_first: config.flip_sin_to_cos,
            linear_1: Linear::load(&scope.at("linear_1"), width, d, true)?,
            linear_2: Linear::load(&scope.at("linear_2"), d, d, true)?,
        })
    }

    /// The embedding `[b, d]`, already through the SiLU that every residual block begins with.
    ///
    /// Sine and cosine are taken in f32, then cast: timesteps near 1000 have no fraction in f16.
    pub fn forward(
        &self,
        timesteps: &[f32],
        dtype: DType,
        device: &Device,
        deltas: Deltas,
    ) -> Result<Tensor> {
        let waves: Vec<f32> = timesteps.iter().flat_map(|t| self.sinusoids(*t)).collect();
        let waves =
            Tensor::from_vec(waves, (timesteps.len(), self.width), device)?.to_dtype(dtype)?;
        let h = ops::silu(&self.linear_1.forward(&waves, deltas)?)?;
        ops::silu(&self.linear_2.forward(&h, deltas)?)
    }

    fn sinusoids(&self, t: f32) -> Vec<f32> {
        let sin = self.frequencies.iter().map(|f| (t * f).sin());
        let cos = self.frequencies.iter().map(|f| (t * f).cos());
        let mut wave: Vec<f32> = if self.cosine_first {
            cos.chain(sin).collect()
        } else {
            sin.chain(cos).collect()
        };
        wave.resize(self.width, 0.0);
        wave
    }
}
