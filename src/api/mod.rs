//! HTTP: routes, request and answer types, the one table from errors to statuses.
//!
//! Nothing here knows of tensors: a dialect's request becomes a [`RequestDraft`], the draft a job of
//! the [`Painter`], the job's pictures an answer. A route is registered with `routes!`, so that what
//! is served is what `/openapi.json` documents.
//!
//! [`RequestDraft`]: crate::pipeline::request::RequestDraft
//! [`Painter`]: crate::engine::Painter

mod accept;
mod adapters;
mod applying;
mod blocking;
mod body;
mod docs;
mod edits;
mod encode;
mod error;
mod fields;
mod health;
mod images;
mod incoming;
mod job_refusals;
mod layers;
mod metadata;
mod metrics;
mod models;
mod paint;
mod parameters;
mod parts;
mod refusals;
mod serve;
mod sse;
mod state;
mod training;
mod vllm;

use axum::{Router, routing::get};
use utoipa::OpenApi as _;
use utoipa_axum::{router::OpenApiRouter, routes};

pub use encode::{EncodeError, OutputFormat, encode, encode_plain};
pub use error::ApiError;
pub(crate) use parameters::parse_size;
pub use serve::{Drain, serve};
pub use state::{AppState, HttpSettings};

/// Every documented route. A new dialect adds its line here.
fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::with_openapi(docs::Document::openapi())
        .routes(routes!(images::create_image))
        .routes(routes!(edits::edit_image))
        .routes(routes!(models::list_models))
        .routes(routes!(models::get_model))
        .merge(adapters::routes())
        .merge(training::routes())
        .routes(routes!(vllm::load_lora_adapter))
        .routes(routes!(vllm::unload_lora_adapter))
        .routes(routes!(health::livez))
        .routes(routes!(health::readyz))
        .routes(routes!(health::startupz))
        .routes(routes!(metrics::render))
        .routes(routes!(docs::openapi_json))
}

/// The OpenAPI document as it is served, committed and printed by `lorikeet openapi`.
pub fn openapi_document() -> String {
    let mut document = routes()
        .into_openapi()
        .to_pretty_json()
        // Serialising plain data with string keys has no way to fail.
        .unwrap_or_else(|error| unreachable!("the document is plain data: {error}"));
    document.push('\n');
    document
}

/// The whole application, ready to be served.
pub fn app(state: AppState) -> Router {
    let (router, _) = routes().split_for_parts();
    let router = router
        .merge(docs::swagger_ui())
        .route("/", get(docs::root))
        .fallback(error::no_such_route)
        .method_not_allowed_fallback(error::no_such_method);
    layers::apply(router, &state).with_state(state)
}
