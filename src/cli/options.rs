//! Options that `serve` and `generate` share.

use crate::{
    api::parse_size,
    config::{Config, Defaults, InvalidOption},
    engine::{DeviceChoice, Precision},
    models::ModelSource,
    ops,
    pipeline::request::{AdapterChoice, Limits},
    schedulers::SchedulerKind,
};

/// Which model.
#[derive(Debug, clap::Args)]
pub(super) struct SourceOption {
    /// The model: `demo` (inside the binary) or a folder in diffusers layout
    #[arg(
        long,
        env = "LORIKEET_MODEL",
        default_value = "demo",
        value_name = "demo|DIR"
    )]
    pub(super) model: ModelSource,
}

/// Which model, on what.
#[derive(Debug, clap::Args)]
pub(super) struct ModelOptions {
    #[command(flatten)]
    source: SourceOption,
    /// Where to paint: auto, cpu, or cuda:N
    #[arg(long, env = "LORIKEET_DEVICE", default_value_t = DeviceChoice::Auto, value_name = "auto|cpu|cuda:N")]
    device: DeviceChoice,
    /// Arithmetic of the models; auto is f32 on a CPU, which knows no other, and f16 on a GPU
    #[arg(long, env = "LORIKEET_DTYPE", default_value_t = Precision::Auto, value_name = "auto|f32|f16|bf16")]
    dtype: Precision,
    /// CPU threads for painting [default: one per core]
    #[arg(long, env = "LORIKEET_THREADS", value_name = "N")]
    threads: Option<usize>,
}

impl ModelOptions {
    /// Checks the options, and sizes the thread pools by them: call it once, before any painting.
    pub(super) fn into_config(
        self,
        max_batch: usize,
        queue: usize,
        limits: Limits,
        defaults: Defaults,
        device_adapter_bytes: u64,
    ) -> Result<Config, InvalidOption> {
        let config = Config {
            model: self.source.model,
            device: self.device,
            dtype: self.dtype,
            threads: self.threads,
            max_batch,
            queue,
            limits,
            defaults,
            device_adapter_bytes,
            training_share: 0.0,
        }
        .validate()?;
        if let Some(threads) = config.threads {
            // Our operations have a pool of their own; candle's and the picture formats share rayon's.
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let ours = ops::set_threads(threads);
            // They fail only when they are running already, and then with their size.
            if !ours || pool.build_global().is_err() {
                tracing::warn!("--threads comes too late: the threads are running already");
            }
        }
        Ok(config)
    }
}

/// `fox`, `fox=0.8`, or `fox=0.8:0.2` for UNet and text encoder.
pub(super) fn adapter(text: &str) -> Result<AdapterChoice, String> {
    let (name, strengths) = text.split_once('=').unwrap_or((text, "1"));
    let (unet, text) = strengths.split_once(':').unwrap_or((strengths, strengths));
    let number = |text: &str| {
        text.trim().parse::<f64>().map_err(|_| {
            format!("`{text}` is not a strength; write NAME, NAME=0.8 or NAME=0.8:0.2 (UNet, text encoder)")
        })
    };
    Ok(AdapterChoice {
        name: name.trim().into(),
        unet: number(unet)?,
        text: number(text)?,
        sha256: None,
    })
}

/// `512x384`.
pub(super) fn size(text: &str) -> Result<(u32, u32), String> {
    parse_size(text).ok_or_else(|| "must be WIDTHxHEIGHT in pixels, such as 512x512".into())
}

/// A scheduler by any of its names.
pub(super) fn scheduler(name: &str) -> Result<SchedulerKind, String> {
    name.parse()
        .map_err(|error: <SchedulerKind as std::str::FromStr>::Err| error.to_string())
}

/// `2.5`, in seconds.
pub(super) fn seconds(text: &str) -> Result<std::time::Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| std::time::Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "must be a number of seconds, such as 2.5".into())
}
