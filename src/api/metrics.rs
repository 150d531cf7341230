//! `GET /metrics`, in Prometheus' text format.

use std::{collections::BTreeSet, time::Duration};

use axum::{
    extract::State,
    http::{Method, StatusCode, header},
    response::IntoResponse,
};
use metrics::{counter, gauge, histogram};
use tokio::time;

use super::{AppState, paint::unix_now, state::Stage};
use crate::{engine::AdapterUse, jobs::JobState};

/// Prometheus waits for ten seconds by default.
const LONGEST_LOOK: Duration = Duration::from_secs(2);

/// Figures for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "operations",
    responses((status = 200, description = "Prometheus' text format", body = String,
        content_type = "text/plain")))]
pub(super) async fn render(State(state): State<AppState>) -> impl IntoResponse {
    observe_engine(&state);
    observe_training(&state).await;
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let mut text = state.metrics().render();
    text.push_str(&lora_requests_info(&state));
    ([(header::CONTENT_TYPE, kind)], text)
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

/// How many training jobs there are, all replicas' together. Where the database is away for longer than
/// a look may take, the figures stay what they were.
async fn observe_training(state: &AppState) {
    let Ok(desk) = state.desk() else {
        return;
    };
    let Ok(Ok(counts)) = time::timeout(LONGEST_LOOK, desk.jobs.counts()).await else {
        return;
    };
    for state in JobState::ALL {
        let known = counts.iter().filter(|count| count.state == state);
        let jobs: u64 = known.map(|count| count.count).sum();
        gauge!("lorikeet_training_jobs", "state" => state.name()).set(jobs as f64);
    }
}

/// vLLM's gauge by which Kubernetes' inference gateway sends requests to where their adapter is in use.
/// The names are in its labels and its value is the time, so it is written at every look: as a series
/// of the recorder every set of names would stay for ever.
fn lora_requests_info(state: &AppState) -> String {
    let Ok(painter) = state.painter() else {
        return String::new();
    };
    let AdapterUse {
        waiting,
        running,
        most,
    } = painter.adapters();
    // A name has neither quotes nor commas.
    let list = |names: BTreeSet<String>| names.into_iter().collect::<Vec<_>>().join(",");
    let name = "vllm:lora_requests_info";
    format!(
        "# HELP {name} Adapters in use, as labels; the value is the time of looking.\n\
         # TYPE {name} gauge\n\
         {name}{{max_lora=\"{}\",waiting_lora_adapters=\"{}\",running_lora_adapters=\"{}\"}} {}\n",
        most,
        list(waiting),
        list(running),
        unix_now(),
    )
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
