//! HTTP: routes, request and answer types, the one table from errors to statuses.
//!
//! Nothing here knows of tensors: a dialect's request becomes a [`RequestDraft`], the draft a job of
//! the [`Painter`], the job's pictures an answer. A route is registered with `routes!`, so that what
//! is served is what `/openapi.json` documents.
//!
//! [`RequestDraft`]: crate::pipeline::request::RequestDraft
//! [`Painter`]: crate::engine::Painter
#![allow(dead_code)]

mod accept;
mod encode;
mod error;
mod health;
mod models;
mod state;

pub use encode::{OutputFormat, encode};
pub use error::ApiError;
pub use state::{AppState, HttpSettings};
