//! `/v1/training/jobs`: pictures in, an adapter out, some time later.
//!
//! A job is made whole or not at all: its pictures are decoded and its options checked before it is
//! accepted. From then on everything is told by its log, which can be followed from any entry on.

mod answer;
mod create;
mod events;
mod form;
mod identified;
mod look;
mod samples;
mod so_far;
mod wishes;

use utoipa_axum::{router::OpenApiRouter, routes};

use super::AppState;

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(look::list_jobs, create::create_job))
        .routes(routes!(look::get_job))
        .routes(routes!(events::job_events))
        .routes(routes!(wishes::cancel_job))
        .routes(routes!(wishes::pause_job))
        .routes(routes!(wishes::resume_job))
        .routes(routes!(samples::list_samples))
        .routes(routes!(samples::get_sample))
        .routes(routes!(so_far::publish_so_far))
}
