//! Logs and metrics, set up once per process.

use std::{
    io::{self, IsTerminal as _},
    sync::OnceLock,
};

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line, for collectors.
    Json,
}

/// Upper bounds of the latency histogram in seconds: from a probe to a large picture on a CPU.
const LATENCY_BUCKETS: [f64; 14] = [
    0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
];

/// Logs to standard error, so that standard output stays free for results. `filter` is that of
/// `tracing`: `info`, `lorikeet=debug,warn`. A second call in a process changes nothing.
pub fn init_logs(format: LogFormat, filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| error.to_string())?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // Colours are for people, not for files and collectors.
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    // It fails only where a subscriber is there already.
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
}

/// Installs the process-wide recorder on the first call, and gives its handle on every call.
pub fn metrics() -> Result<PrometheusHandle, String> {
    static HANDLE: OnceLock<Result<PrometheusHandle, String>> = OnceLock::new();
    HANDLE.get_or_init(install).clone()
}

fn install() -> Result<PrometheusHandle, String> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &LATENCY_BUCKETS)
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|error| error.to_string())?;
    describe_counter!(
        "lorikeet_http_requests_total",
        "Requests answered, by method, route and status"
    );
    describe_histogram!(
        "lorikeet_http_request_duration_seconds",
        Unit::Seconds,
        "From a request's headers to its answer's headers"
    );
    describe_histogram!(
        "lorikeet_forward_seconds",
        Unit::Seconds,
        "One denoising step of a batch"
    );
    describe_gauge!("lorikeet_ready", "1 while /readyz says 200");
    describe_gauge!(
        "lorikeet_queue_depth",
        "Requests waiting for their first step"
    );
    describe_gauge!("lorikeet_running_rows", "Rows in the running batch");
    describe_counter!("lorikeet_steps_total", "Denoising steps done, per picture");
    describe_counter!("lorikeet_pictures_total", "Pictures finished");
    describe_gauge!("lorikeet_adapters", "Adapters in the registry");
    describe_gauge!(
        "lorikeet_adapter_store_up",
        "1 while the adapter store could be listed the last time"
    );
    describe_counter!(
        "lorikeet_adapter_hits_total",
        "Leases answered by a tier at once"
    );
    describe_counter!(
        "lorikeet_adapter_misses_total",
        "Leases that had to wait for a load into a tier"
    );
    describe_counter!(
        "lorikeet_adapter_evictions_total",
        "Adapters put out of a tier for others"
    );
    describe_histogram!(
        "lorikeet_adapter_load_seconds",
        Unit::Seconds,
        "Reading an adapter from the store, and bringing it into host memory in all"
    );
    describe_gauge!(
        "lorikeet_adapter_resident_bytes",
        Unit::Bytes,
        "Bytes of adapters in a tier"
    );
    Ok(handle)
}
