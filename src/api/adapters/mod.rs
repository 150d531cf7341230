//! `/v1/adapters`: the registry over HTTP.
//!
//! Files go through without being held: an upload is written aside while it arrives, checked whole,
//! and then seen; a download is read while it leaves. What an upload was read as (dialect, sites,
//! ranks, and the keys that mean nothing to the model) is in its answer.

mod answer;
mod change;
mod check;
mod conditions;
mod create;
mod describe;
mod file;
mod look;
mod named;
mod preview;

use utoipa_axum::{router::OpenApiRouter, routes};

use super::AppState;
pub(in crate::api) use file::location;

pub(super) fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(look::list_adapters, create::create_adapter))
        .routes(routes!(
            look::get_adapter,
            change::patch_adapter,
            change::delete_adapter
        ))
        .routes(routes!(change::pin_adapter))
        .routes(routes!(change::unpin_adapter))
        .routes(routes!(file::get_file, file::put_file))
        .routes(routes!(preview::get_preview, preview::put_preview))
}
