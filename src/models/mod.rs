//! CLIP, UNet, VAE, tokenizer and the loading of model folders.
//!
//! Everything is driven by the folder's own config files (diffusers' layout); a value that is not
//! supported is an error at load, never a silently different picture. Feature maps, latents and
//! pictures are channels-last.
//!
//! Weights never change once they are loaded. What adapters add goes into a forward as an argument
//! ([`Deltas`]), row by row.

mod clip;
mod config;
mod deltas;
mod error;
pub(crate) mod header;
pub mod layers;
mod model;
mod modules;
mod resnet;
mod sites;
pub(crate) mod source;
mod tokenizer;
mod unet;
mod vae;
pub(crate) mod weights;

#[cfg(test)]
mod delta_tests;
#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod test_folder;
#[cfg(test)]
mod weight_fault_tests;

pub use clip::ClipTextModel;
pub use deltas::{DeltaBatch, DeltaSet, Deltas, SiteDelta, Term};
pub use error::LoadError;
pub use model::{Model, ModelSource, SuggestedDefaults};
pub use modules::Modules;
pub use sites::{ConvGeometry, Site, SiteKind};
pub use tokenizer::{EncodeError, Tokenizer};
pub use unet::UNet2DConditionModel;
pub use vae::{AutoencoderKl, Moments};
