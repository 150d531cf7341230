//! Adapter files, read into deltas by site, and written.
//!
//! A file is one of many dialects. [`SiteTable`] holds every name any of them has for a module of
//! one model, made from the model's own [`Site`](crate::models::Site)s; a key of the file is looked
//! up there whole, and its end says what the tensor is. [`Adapter`] is the result: a [`Delta`] for
//! each site, words for the text encoder, and the keys that mean nothing to this model. A file of
//! which nothing matches is refused; nothing is dropped in silence.
//!
//! # Dialects
//!
//! | names | who writes them |
//! |---|---|
//! | `unet.….lora_A.weight`, `.lora_B.weight`, `.lora_magnitude_vector` | PEFT and diffusers; alphas are in the header's `lora_adapter_metadata`. `base_model.model.…` is PEFT's own prefix |
//! | `unet.….to_q.lora.down.weight`, `….q_proj.lora_linear_layer.down.weight` | diffusers' `train_dreambooth_lora.py` of 2023 |
//! | `….attn1.processor.to_q_lora.down.weight` | diffusers' attention processors, with `unet.` before them or not |
//! | `lora_unet_….lora_down.weight`, `.alpha` | [kohya](https://github.com/kohya-ss/sd-scripts); `lora_te_`, `lora_te1_`, `lora_te2_` for text encoders; the UNet's blocks as diffusers or as Stability numbers them |
//! | `….lora_mid.weight`, `.hada_*`, `.lokr_*`, `.weight` with `.on_input`, `.diff`, `.diff_b`, `.w_norm`, `.b_norm`, `.dora_scale` | [LyCORIS](https://github.com/KohakuBlueleaf/LyCORIS), behind kohya's names |
//! | `unet:7:up`, `text_encoder:0:down`, `<word>` | [cloneofsimo](https://github.com/cloneofsimo/lora), places by number |
//! | `<word>`; `emb_params`; `clip_l`, `clip_g`; `bundle_emb.<word>.…` | textual inversion: diffusers, kohya, SDXL trainers, A1111's bundles |
//!
//! Text encoders are read with the prefix `text_model.` (transformers 4) and without (5).
//!
//! Files come from strangers: the header is checked before anything is believed, shapes are compared
//! with the model's before a byte is read, ranks and values are bounded, and pickles are not run.

mod adapter;
mod alphas;
mod build;
mod compare;
mod delta;
mod embeddings;
mod error;
mod family;
mod file;
mod mix;
mod numbers;
mod positions;
mod read;
mod roles;
mod save;
mod sgm;
mod summary;
mod table;

#[cfg(test)]
mod fault_tests;
#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod packing;
#[cfg(test)]
mod property_tests;
#[cfg(test)]
mod rewrite_tests;

pub use adapter::{Adapter, Dialect, TokenEmbedding};
pub use delta::{Axis, Block, Change, Delta, Factors, LowRank, Magnitude};
pub use error::AdapterError;
pub use family::Family;
pub use mix::{MixError, Share, mix};
pub use read::ReadOptions;
pub use save::Format;
pub use summary::Summary;
pub use table::SiteTable;
