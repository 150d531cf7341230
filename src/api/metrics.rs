//! `GET /metrics`, in Prometheus' text format.

use std::time::Duration;

use axum::{
    extract::State,
    http::{Method, StatusCode, header},
    response::IntoResponse,
};
use metrics::{counter, gauge, histogram};

use super::{AppState, state::Stage};

/// Figures for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "operations",
    responses((status = 200, description = "Prometheus' text format", body = String,
        content_type = "text/plain")))]
pub(super) async fn render(State(state): State<AppState>) -> impl IntoResponse {
    observe_engine(&state);
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], state.metrics().render())
}

/// Takes the engine's own figures over; they are read when they are asked for.
fn observe_engine(state: &AppState) {
    let ready = state.stage() == Stage::Ready;
    gauge!("lorikeet_ready").set(f64::from(u8::from(ready)));
    let Ok(painter) = state.painter() else {
        return;
    };
    let stats = painter.stats();
    gauge!("lorikeet_queue_depth").set(stats.queued as f64);
    gauge!("lorikeet_running_rows").set(stats.running_rows as f64);
    counter!("lorikeet_steps_total").absolute(stats.steps);
    counter!("lorikeet_pictures_total").absolute(stats.pictures);
}

/// Counts an answered request.
pub(super) fn record(method: &Method, route: &str, status: StatusCode, took: Duration) {
    let labels = [
        ("method", method_label(method).to_owned()),
        ("route", route.to_owned()),
        ("status", status.as_u16().to_string()),
    ];
    counter!("lorikeet_http_requests_total", &labels).increment(1);
    histogram!("lorikeet_http_request_duration_seconds", &labels[..2]).record(took);
}

/// Clients may invent methods; labels must stay few.
fn method_label(method: &Method) -> &str {
    match method.as_str() {
        known @ ("GET" | "POST" | "PUT" | "PATCH" | "DELETE" | "HEAD" | "OPTIONS") => known,
        _ => "other",
    }
}
