//! Probes for supervisors and load balancers.

use axum::{Json, extract::State, http::StatusCode, response::IntoResponse};
use serde::Serialize;
use utoipa::ToSchema;

use super::{AppState, state::Stage};

/// A probe's answer.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProbeBody {
    /// `ok`, `loading`, `draining` or `broken`.
    #[schema(example = "ok")]
    status: &'static str,
    /// What that means, where it is not `ok`.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
}

fn answer(stage: Stage) -> (StatusCode, Json<ProbeBody>) {
    let (code, status, reason) = match stage {
        Stage::Ready => (StatusCode::OK, "ok", None),
        Stage::Loading => (
            StatusCode::SERVICE_UNAVAILABLE,
            "loading",
            Some("the model is still loading"),
        ),
        Stage::Draining => (
            StatusCode::SERVICE_UNAVAILABLE,
            "draining",
            Some("the server is shutting down"),
        ),
        Stage::Broken => (
            StatusCode::SERVICE_UNAVAILABLE,
            "broken",
            Some("the device is out of order; the log says why"),
        ),
    };
    (code, Json(ProbeBody { status, reason }))
}

/// Is the process alive?
///
/// 200 as long as the process answers at all. Restart it when this fails.
#[utoipa::path(get, path = "/livez", tag = "operations",
    responses((status = 200, description = "Alive", body = ProbeBody)))]
pub(super) async fn livez() -> impl IntoResponse {
    answer(Stage::Ready)
}

/// May requests be sent here?
///
/// 503 while the model loads, while the server shuts down, and when the device is out of order.
#[utoipa::path(get, path = "/readyz", tag = "operations",
    responses(
        (status = 200, description = "Send requests", body = ProbeBody),
        (status = 503, description = "Send them elsewhere", body = ProbeBody)))]
pub(super) async fn readyz(State(state): State<AppState>) -> impl IntoResponse {
    answer(state.stage())
}

/// Has the server finished starting?
///
/// 503 while the model loads, 200 ever after.
#[utoipa::path(get, path = "/startupz", tag = "operations",
    responses(
        (status = 200, description = "Started", body = ProbeBody),
        (status = 503, description = "Still starting", body = ProbeBody)))]
pub(super) async fn startupz(State(state): State<AppState>) -> impl IntoResponse {
    match state.painter() {
        Ok(_) => answer(Stage::Ready),
        Err(_) => answer(Stage::Loading),
    }
}
