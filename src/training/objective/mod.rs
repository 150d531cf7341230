//! What training makes small: the squared error of the model's prediction for noisy latents.

pub mod weights;

use candle_core::{DType, Device, Result, Tensor};

use crate::schedulers::{NoiseLevels, PredictionType};

/// The clean latents of a batch, and what is added to them.
#[derive(Debug, Clone)]
pub struct Noised {
    /// `[b, h, w, c]`, scaled as the UNet sees them.
    pub clean: Tensor,
    /// Of the same shape, standard normal.
    pub noise: Tensor,
    /// Steps of the noise schedule, one for each row.
    pub timesteps: Vec<usize>,
}

impl Noised {
    /// What the UNet is shown: `sqrt(ᾱ) x + sqrt(1 - ᾱ) ε` (Ho et al. 2020, equation 4).
    ///
    /// # Errors
    /// Those of candle; timesteps past the end of the schedule.
    pub fn sample(&self, levels: &NoiseLevels) -> Result<Tensor> {
        let [signal, noise] = self.factors(levels)?;
        self.clean.broadcast_mul(&signal)? + self.noise.broadcast_mul(&noise)?
    }

    /// What it is to say: the noise, the velocity `sqrt(ᾱ) ε - sqrt(1 - ᾱ) x` (Salimans & Ho 2022), or
    /// the clean latents.
    ///
    /// # Errors
    /// As [`Noised::sample`].
    pub fn target(&self, levels: &NoiseLevels) -> Result<Tensor> {
        match levels.prediction {
            PredictionType::Epsilon => Ok(self.noise.clone()),
            PredictionType::Sample => Ok(self.clean.clone()),
            PredictionType::VPrediction => {
                let [signal, noise] = self.factors(levels)?;
                self.noise.broadcast_mul(&signal)? - self.clean.broadcast_mul(&noise)?
            }
        }
    }

    /// `sqrt(ᾱ)` and `sqrt(1 - ᾱ)`, `[b, 1, 1, 1]` each. The roots are taken in f32, as diffusers does.
    fn factors(&self, levels: &NoiseLevels) -> Result<[Tensor; 2]> {
        let mut columns = [Vec::new(), Vec::new()];
        for &t in &self.timesteps {
            let Some(alpha) = levels.alphas_cumprod.get(t) else {
                candle_core::bail!(
                    "timestep {t} is past the {} of the noise schedule",
                    levels.alphas_cumprod.len()
                )
            };
            columns[0].push(alpha.sqrt());
            columns[1].push((1.0 - alpha).sqrt());
        }
        let [signal, noise] = columns.map(|column| self.column(column));
        Ok([signal?, noise?])
    }

    fn column(&self, values: Vec<f32>) -> Result<Tensor> {
        Tensor::from_vec(values, (self.timesteps.len(), 1, 1, 1), &Device::Cpu)?
            .to_device(self.clean.device())?
            .to_dtype(self.clean.dtype())
    }
}

/// `Σ weight · mean((prediction - target)²)`, where the mean is over a row; in f32 or better.
///
/// # Errors
/// Those of candle; as many weights as rows are needed.
pub fn loss(prediction: &Tensor, target: &Tensor, weights: &[f64]) -> Result<Tensor> {
    let dtype = match prediction.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let difference = (prediction.to_dtype(dtype)? - target.to_dtype(dtype)?)?;
    let rows = difference.sqr()?.flatten_from(1)?.mean(1)?;
    let weights = Tensor::new(weights, &Device::Cpu)?
        .to_dtype(dtype)?
        .to_device(prediction.device())?;
    (rows * weights)?.sum_all()
}
