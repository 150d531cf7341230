//! `lorikeet serve`.

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use axum::http::HeaderValue;
use tokio::{net::TcpListener, sync::watch, time};

use super::{
    Failure,
    boot::open_engine,
    jobs::{JobOptions, JobPlace, Role},
    options::{ModelOptions, scheduler, seconds, size},
    store::{Place, StoreOptions},
};
use crate::{
    api::{self, AppState, Drain, HttpSettings},
    config::{Config, Defaults},
    engine::Wardrobe,
    pipeline::request::Limits,
    schedulers::SchedulerKind,
    telemetry::{self, LogFormat},
};

/// Serve pictures over HTTP
///
/// Listens while the model loads; /readyz says 200 once it paints. On SIGTERM or Ctrl-C it drains:
/// /readyz says 503, requests are taken for --drain-delay seconds more, and what was accepted is
/// finished within --drain-timeout. A second signal ends it at once.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lorikeet serve
  lorikeet serve --model /models/sd15 --listen 0.0.0.0:8080 --default-scheduler dpmpp_2m_karras
  curl http://127.0.0.1:8080/v1/images/generations -H 'Content-Type: application/json' \\
       -H 'Accept: image/png' -d '{\"prompt\": \"a red fox in the snow\", \"seed\": 7}' -o fox.png

Prompts weigh words as AUTOMATIC1111 does: (word:1.3), [word], BREAK. The API is documented at
/docs of the running server.")]
pub(super) struct ServeOptions {
    #[command(flatten, next_help_heading = "Model")]
    model: ModelOptions,

    #[command(flatten, next_help_heading = "Adapters")]
    adapters: StoreOptions,

    #[command(flatten, next_help_heading = "Training")]
    jobs: JobOptions,

    /// Address and port; port 0 takes a free one and the log says which
    #[arg(
        long,
        env = "LORIKEET_LISTEN",
        default_value = "127.0.0.1:8080",
        value_name = "ADDR:PORT",
        help_heading = "Server"
    )]
    listen: SocketAddr,
    /// Web pages that may call, as origins such as https://example.org, or `*`; none by default
    #[arg(
        long,
        env = "LORIKEET_CORS_ORIGINS",
        value_delimiter = ',',
        value_name = "ORIGIN",
        help_heading = "Server"
    )]
    cors_origins: Vec<HeaderValue>,
    /// Seconds for which requests are still taken after a signal, for load balancers to notice
    #[arg(long, env = "LORIKEET_DRAIN_DELAY", default_value = "0", value_name = "SECONDS",
        value_parser = seconds, help_heading = "Server")]
    drain_delay: Duration,
    /// Seconds that accepted requests then have to finish
    #[arg(long, env = "LORIKEET_DRAIN_TIMEOUT", default_value = "30", value_name = "SECONDS",
        value_parser = seconds, help_heading = "Server")]
    drain_timeout: Duration,
    /// What to log, by level and module: info, debug, lorikeet=debug,warn
    #[arg(
        long,
        env = "LORIKEET_LOG",
        default_value = "info",
        value_name = "FILTER",
        help_heading = "Server"
    )]
    log: String,
    /// How log lines look
    #[arg(long, env = "LORIKEET_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text,
        help_heading = "Server")]
    log_format: LogFormat,

    /// Memory on the device for adapters as they are mixed for requests, in MiB
    #[arg(
        long,
        env = "LORIKEET_DEVICE_ADAPTER_MEMORY",
        default_value_t = 1024,
        value_name = "MIB",
        help_heading = "Adapters"
    )]
    device_adapter_memory: u32,

    /// Rows painted together in one step; a picture with guidance is two
    #[arg(
        long,
        env = "LORIKEET_MAX_BATCH",
        default_value_t = 16,
        value_name = "ROWS",
        help_heading = "Limits"
    )]
    max_batch: usize,
    /// Requests that may wait; more get 429
    #[arg(
        long,
        env = "LORIKEET_QUEUE",
        default_value_t = 64,
        value_name = "N",
        help_heading = "Limits"
    )]
    queue: usize,
    /// Longest side of a picture in pixels
    #[arg(long, env = "LORIKEET_MAX_SIZE", default_value_t = Limits::default().max_side,
        value_name = "PIXELS", help_heading = "Limits")]
    max_size: u32,
    /// Most steps of a request
    #[arg(long, env = "LORIKEET_MAX_STEPS", default_value_t = Limits::default().max_steps,
        value_name = "N", help_heading = "Limits")]
    max_steps: u32,
    /// Most pictures of a request
    #[arg(long, env = "LORIKEET_MAX_IMAGES", default_value_t = Limits::default().max_images,
        value_name = "N", help_heading = "Limits")]
    max_images: u32,
    /// Longest prompt in bytes
    #[arg(long, env = "LORIKEET_MAX_PROMPT", default_value_t = Limits::default().max_prompt_bytes,
        value_name = "BYTES", help_heading = "Limits")]
    max_prompt: usize,
    /// Largest body of a request in MiB
    #[arg(long, env = "LORIKEET_MAX_BODY", default_value_t = 32, value_name = "MIB",
        value_parser = clap::value_parser!(u32).range(1..=4096), help_heading = "Limits")]
    max_body: u32,
    /// Seconds for a request's body to arrive
    #[arg(long, env = "LORIKEET_BODY_TIMEOUT", default_value = "60", value_name = "SECONDS",
        value_parser = seconds, help_heading = "Limits")]
    body_timeout: Duration,
    /// Seconds for a request's pictures, waiting included
    #[arg(long, env = "LORIKEET_PAINT_TIMEOUT", default_value = "600", value_name = "SECONDS",
        value_parser = seconds, help_heading = "Limits")]
    paint_timeout: Duration,

    /// Size of pictures when a request does not say [default: the model's]
    #[arg(long, env = "LORIKEET_DEFAULT_SIZE", value_name = "WxH", value_parser = size,
        help_heading = "Defaults of requests")]
    default_size: Option<(u32, u32)>,
    /// Steps when a request does not say [default: the model's]
    #[arg(
        long,
        env = "LORIKEET_DEFAULT_STEPS",
        value_name = "N",
        help_heading = "Defaults of requests"
    )]
    default_steps: Option<u32>,
    /// Guidance scale when a request does not say [default: the model's]
    #[arg(
        long,
        env = "LORIKEET_DEFAULT_GUIDANCE",
        value_name = "X",
        allow_negative_numbers = true,
        help_heading = "Defaults of requests"
    )]
    default_guidance: Option<f64>,
    /// Scheduler when a request does not say [default: the model's]
    #[arg(long, env = "LORIKEET_DEFAULT_SCHEDULER", value_name = "NAME", value_parser = scheduler,
        help_heading = "Defaults of requests")]
    default_scheduler: Option<SchedulerKind>,
}

/// Serves until a signal comes.
pub(super) fn run(options: ServeOptions) -> Result<(), Failure> {
    telemetry::init_logs(options.log_format, &options.log)
        .map_err(|error| Failure::usage(format!("--log: {error}")))?;
    let metrics = telemetry::metrics().map_err(Failure::new)?;
    let settings = HttpSettings {
        max_body: options.max_body as usize * 1024 * 1024,
        body_timeout: options.body_timeout,
        paint_timeout: options.paint_timeout,
        cors_origins: options.cors_origins,
        lora_loading: options.adapters.allow_lora_loading,
        paints: options.jobs.role != Role::Train,
        max_training_upload: options.jobs.max_training_upload(),
    };
    let drain = Drain {
        delay: options.drain_delay,
        timeout: options.drain_timeout,
    };
    let limits = Limits {
        max_prompt_bytes: options.max_prompt,
        max_side: options.max_size,
        max_steps: options.max_steps,
        max_images: options.max_images,
    };
    let defaults = Defaults {
        size: options.default_size,
        steps: options.default_steps,
        guidance_scale: options.default_guidance,
        scheduler: options.default_scheduler,
    };
    let mut config = options.model.into_config(
        options.max_batch,
        options.queue,
        limits,
        defaults,
        u64::from(options.device_adapter_memory) << 20,
    )?;
    config.training_share = options.jobs.training_share;
    let jobs = options.jobs.open()?;
    let place = options.adapters.open()?;
    let runtime = super::runtime()?;
    let result = runtime.block_on(serve(
        config,
        place,
        jobs,
        options.listen,
        AppState::loading(settings, metrics),
        drain,
    ));
    // Abandoned work must not hold the process up.
    runtime.shutdown_background();
    result
}

async fn serve(
    config: Config,
    place: Option<Place>,
    jobs: Option<JobPlace>,
    listen: SocketAddr,
    state: AppState,
    drain: Drain,
) -> Result<(), Failure> {
    let listener = TcpListener::bind(listen)
        .await
        .map_err(|error| Failure::new(format!("cannot listen on {listen}: {error}")))?;
    let address = listener
        .local_addr()
        .map_err(|error| Failure::new(format!("cannot listen on {listen}: {error}")))?;
    tracing::info!("listening on http://{address}, loading the model");
    let signal = signal()?;
    let stop = watch::Sender::new(false);
    let stopping = stop.clone();
    // Training stops at the signal: another replica can go on with it while this one drains.
    let signal = async move {
        signal.await;
        stopping.send_replace(true);
    };
    let stopped = stop.subscribe();
    let loading = tokio::task::spawn_blocking(move || open_engine(&config));
    let load = {
        let state = state.clone();
        async move {
            let booted = loading
                .await
                .map_err(|error| Failure::new(format!("loading the model failed: {error}")))?
                .map_err(|error| Failure::new(error.to_string()))?;
            let (mut keeper, mut working) = (None, None);
            if let Some(place) = place {
                let registry = place.search(booted.loader.clone()).await?;
                tracing::info!(adapters = registry.all().len(), "adapters found");
                keeper = Some(registry.keep());
                if let Some(jobs) = jobs {
                    let workshop = jobs.open(&booted, registry.clone()).await?;
                    state.set_desk(workshop.desk.clone());
                    working = Some(tokio::spawn(workshop.work(stopped)));
                }
                let wardrobe = Wardrobe::new(registry, booted.mixer.clone());
                state.set_wardrobe(Arc::new(wardrobe));
            } else if jobs.is_some() {
                tracing::warn!("serving without training: there is no place for adapters");
            }
            let info = booted.painter.info();
            tracing::info!(
                model = info.name,
                device = info.device,
                "ready at http://{address}"
            );
            state.set_painter(booted.painter.clone());
            Ok::<_, Failure>((keeper, working))
        }
    };
    // The first follows what others change in the store, for as long as this serves.
    let (_keeper, working);
    let timeout = drain.timeout;
    let mut serving = std::pin::pin!(api::serve(listener, state, drain, signal));
    tokio::select! {
        result = &mut serving => return result.map_err(|error| Failure::new(error.to_string())),
        loaded = load => (_keeper, working) = loaded?,
    }
    let served = serving.await;
    // However serving ended.
    stop.send_replace(true);
    if let Some(working) = working
        && time::timeout(timeout, working).await.is_err()
    {
        tracing::warn!("a training job is left as it is; it goes on from its last checkpoint");
    }
    served.map_err(|error| Failure::new(error.to_string()))
}

/// Resolves on SIGTERM or Ctrl-C. A second one ends the process at once.
fn signal() -> Result<impl Future<Output = ()>, Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let cannot = |error| Failure::new(format!("cannot handle signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    Ok(async move {
        let mut next = async move || {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        next().await;
        tokio::spawn(async move {
            next().await;
            tracing::warn!("second signal: leaving without finishing");
            std::process::exit(1);
        });
    })
}
