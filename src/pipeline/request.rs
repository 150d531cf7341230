//! The one domain request every dialect and the command line translate into.

use image::{GrayImage, RgbImage};

use crate::schedulers::SchedulerKind;

/// What a client asked for, before validation: every field optional but the prompt.
#[derive(Debug, Clone, Default)]
pub struct RequestDraft {
    pub prompt: String,
    pub negative_prompt: Option<String>,
    /// Pixels.
    pub width: Option<u32>,
    pub height: Option<u32>,
    pub steps: Option<u64>,
    pub guidance_scale: Option<f64>,
    /// Seed of the first picture; picture `i` is drawn with `seed + i`. Random when absent.
    pub seed: Option<u64>,
    /// Number of pictures.
    pub n: Option<u64>,
    /// A scheduler's name, in our spelling, diffusers' class name or A1111's label.
    pub scheduler: Option<String>,
    /// Text-encoder layers left out at the end: 0 or absent is the last layer (diffusers' count).
    pub clip_skip: Option<u64>,
    /// Picture to start from (img2img), already decoded.
    pub image: Option<RgbImage>,
    /// White where the picture is to be painted anew (inpainting); needs `image`.
    pub mask: Option<GrayImage>,
    /// Share of the noise schedule that img2img runs, in (0, 1].
    pub strength: Option<f64>,
    /// Number of intermediate pictures wanted on the progress channel.
    pub previews: Option<u64>,
}

/// Bounds that the operator sets.
#[derive(Debug, Clone)]
pub struct Limits {
    pub max_prompt_bytes: usize,
    /// Pixels per side.
    pub max_side: u32,
    pub max_steps: u32,
    pub max_images: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_prompt_bytes: 16 * 1024, max_side: 2048, max_steps: 200, max_images: 8 }
    }
}

/// What the model itself fixes or suggests.
#[derive(Debug, Clone)]
pub struct ModelDefaults {
    pub width: u32,
    pub height: u32,
    /// Sides must be multiples of this many pixels (the VAE's factor times what the UNet halves).
    pub side_multiple: u32,
    pub steps: u32,
    pub guidance_scale: f64,
    pub scheduler: SchedulerKind,
    /// Number of text-encoder layers, the bound of `clip_skip`.
    pub text_layers: u32,
}

/// A field that cannot be used, with what would be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct InvalidField {
    pub field: &'static str,
    pub message: String,
}

/// A request that has been checked: every value can be used as it is.
#[derive(Debug, Clone)]
pub struct ImageRequest {
    pub prompt: String,
    pub negative_prompt: String,
    pub width: u32,
    pub height: u32,
    pub steps: u32,
    pub guidance_scale: f64,
    pub seed: u64,
    pub n: u32,
    pub scheduler: SchedulerKind,
    pub clip_skip: u32,
    pub init: Option<InitImage>,
    pub previews: u32,
}

/// Where img2img and inpainting start; pictures have the size of the request.
#[derive(Debug, Clone)]
pub struct InitImage {
    pub image: RgbImage,
    pub mask: Option<GrayImage>,
    pub strength: f64,
}
