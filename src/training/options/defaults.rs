//! What a method does on a model of some size when nothing else is said.

use super::{Method, ModelFacts};

/// Models with fewer parameters in their UNet train in minutes on a CPU and need steps a hundred times
/// as long as Stable Diffusion's.
const SMALL: u64 = 100_000_000;

/// A recipe: a row of the table below.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Defaults {
    pub steps: u32,
    pub batch_size: u32,
    pub gradient_accumulation: u32,
    pub learning_rate: f64,
    pub rank: u32,
    /// Of the text encoder; it is trained if there is one.
    pub text_learning_rate: Option<f64>,
    pub vectors: u32,
    pub embedding_steps: u32,
    pub embedding_learning_rate: f64,
    pub warmup_steps: u32,
    pub class_images: u32,
}

/// Of diffusers' training scripts and their READMEs; pivotal tuning is cloneofsimo's.
const LARGE_DREAMBOOTH: Defaults = Defaults {
    steps: 500,
    batch_size: 1,
    gradient_accumulation: 1,
    learning_rate: 1e-4,
    rank: 4,
    text_learning_rate: None,
    vectors: 1,
    embedding_steps: 1000,
    embedding_learning_rate: 5e-4,
    warmup_steps: 0,
    class_images: 100,
};
const LARGE_LORA: Defaults = Defaults {
    steps: 1000,
    batch_size: 4,
    gradient_accumulation: 4,
    ..LARGE_DREAMBOOTH
};
const LARGE_INVERSION: Defaults = Defaults {
    steps: 3000,
    batch_size: 4,
    learning_rate: 5e-4,
    ..LARGE_DREAMBOOTH
};
const LARGE_PIVOTAL: Defaults = Defaults {
    text_learning_rate: Some(1e-5),
    ..LARGE_DREAMBOOTH
};
/// Tried on the demo model.
const SMALL_DREAMBOOTH: Defaults = Defaults {
    steps: 300,
    batch_size: 8,
    gradient_accumulation: 1,
    learning_rate: 3e-3,
    rank: 8,
    text_learning_rate: Some(3e-3),
    vectors: 4,
    embedding_steps: 200,
    embedding_learning_rate: 1e-3,
    warmup_steps: 20,
    class_images: 32,
};
const SMALL_LORA: Defaults = Defaults {
    steps: 500,
    learning_rate: 2e-3,
    text_learning_rate: None,
    ..SMALL_DREAMBOOTH
};
const SMALL_INVERSION: Defaults = Defaults {
    learning_rate: 1e-3,
    ..SMALL_DREAMBOOTH
};
const SMALL_PIVOTAL: Defaults = Defaults {
    learning_rate: 2e-3,
    text_learning_rate: Some(2e-3),
    ..SMALL_DREAMBOOTH
};

impl Defaults {
    pub(super) fn of(method: Method, model: &ModelFacts) -> Self {
        match (method, model.unet_parameters < SMALL) {
            (Method::DreamBooth, true) => SMALL_DREAMBOOTH,
            (Method::Lora, true) => SMALL_LORA,
            (Method::TextualInversion, true) => SMALL_INVERSION,
            (Method::Pivotal, true) => SMALL_PIVOTAL,
            (Method::DreamBooth, false) => LARGE_DREAMBOOTH,
            (Method::Lora, false) => LARGE_LORA,
            (Method::TextualInversion, false) => LARGE_INVERSION,
            (Method::Pivotal, false) => LARGE_PIVOTAL,
        }
    }
}
