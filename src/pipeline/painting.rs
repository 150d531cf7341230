//! One picture on its way from noise to latents: the state a request carries between steps.

use std::sync::Arc;

use candle_core::Tensor;

use super::Mixture;
use crate::{models::DeltaSet, noise::LatentNoise, registry::Resident, schedulers::Sampler};

/// A picture in the making. It knows nothing of its neighbours in a batch.
pub struct Painting {
    pub(super) seed: u64,
    /// Height, width, channels.
    pub(super) shape: [usize; 3],
    pub(super) sampler: Box<dyn Sampler>,
    /// The noisy latents, channels-last, in the sampler's scale.
    pub(super) latents: Vec<f32>,
    pub(super) noise: LatentNoise,
    /// What the prompt says, `[t, d]`.
    pub(super) condition: Tensor,
    /// Present where classifier-free guidance is on.
    pub(super) guidance: Option<Guidance>,
    pub(super) inpaint: Option<Inpaint>,
    /// What the model last took the picture for, in latents; kept where previews are wanted.
    pub(super) denoised: Option<Vec<f32>>,
    /// The adapters it is painted with; held for as long as they are in use.
    pub(super) mixture: Option<Arc<Resident<Mixture>>>,
}

/// Classifier-free guidance (Ho and Salimans 2022, eq. 6, in diffusers' parametrisation).
pub(super) struct Guidance {
    pub scale: f32,
    /// What the negative prompt says, `[t, d]`.
    pub uncondition: Tensor,
}

/// What keeps the unmasked part of a picture (4-channel inpainting, as in diffusers).
pub(super) struct Inpaint {
    /// One value per latent pixel, `[h, w]`: 1 where to paint.
    pub mask: Vec<f32>,
    /// The picture's own latents, `[h, w, c]`.
    pub original: Vec<f32>,
    /// The noise the picture starts with, `[h, w, c]`.
    pub noise: Vec<f32>,
}

impl Painting {
    /// Rows this picture takes in a forward.
    pub fn rows(&self) -> usize {
        1 + usize::from(self.guidance.is_some())
    }

    /// What its adapters add beside the weights.
    pub(super) fn deltas(&self) -> Option<&Arc<DeltaSet>> {
        self.mixture.as_ref()?.value.deltas.as_ref()
    }

    /// Height, width and channels of the latents.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Model evaluations done and in all.
    pub fn progress(&self) -> (usize, usize) {
        (self.sampler.done(), self.sampler.evaluations())
    }

    /// The latents as they are now, `[h, w, c]`.
    pub fn latents(&self) -> &[f32] {
        &self.latents
    }

    /// What the model last took the picture for, in latents; only where previews were asked for.
    pub fn denoised(&self) -> Option<&[f32]> {
        self.denoised.as_deref()
    }

    /// The seed its noise is drawn with.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Takes the picture one evaluation further. `rows` is the model's output for this picture's
    /// rows, one after the other: unconditioned first where there are two.
    pub(super) fn advance(&mut self, rows: &[f32]) {
        let guided;
        let output = match &self.guidance {
            None => rows,
            Some(guidance) => {
                let (uncondition, condition) = rows.split_at(rows.len() / 2);
                guided = guide(uncondition, condition, guidance.scale);
                &guided
            }
        };
        if self.denoised.is_some() {
            self.denoised = Some(self.sampler.denoised(output, &self.latents));
        }
        let noise = &mut self.noise;
        self.sampler
            .step(output, &mut self.latents, &mut || noise.draw());
        if let Some(inpaint) = &self.inpaint {
            let kept = self.sampler.add_noise(&inpaint.original, &inpaint.noise);
            inpaint.keep(
                kept.as_deref().unwrap_or(&inpaint.original),
                &mut self.latents,
            );
        }
    }
}

impl Inpaint {
    /// Puts `kept` back wherever the mask does not ask for paint.
    fn keep(&self, kept: &[f32], latents: &mut [f32]) {
        let channels = latents.len() / self.mask.len();
        for (i, &mask) in self.mask.iter().enumerate() {
            for j in i * channels..(i + 1) * channels {
                latents[j] = (1.0 - mask) * kept[j] + mask * latents[j];
            }
        }
    }
}

/// `u + s (c - u)`.
fn guide(uncondition: &[f32], condition: &[f32], scale: f32) -> Vec<f32> {
    uncondition
        .iter()
        .zip(condition)
        .map(|(u, c)| u + scale * (c - u))
        .collect()
}
