//! Lorikeet: Stable Diffusion over HTTP, with LoRA adapters swapped per request.
//!
//! Dependencies point one way:
//! `main -> cli -> api -> engine -> pipeline -> {models, schedulers, noise} -> ops`.

pub mod api;
pub mod cli;
pub mod config;
pub mod engine;
pub mod models;
pub mod noise;
pub mod ops;
pub mod pipeline;
pub mod schedulers;
pub mod telemetry;
