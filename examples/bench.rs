//! Times the models and the pipeline alone, in process. `benches/compare.py` runs it beside diffusers.
//!
//! ```text
//! bench unet    --model DIR --batch 2 --width 32 --height 32 --rounds N       latents
//! bench adapted --model DIR --batch 8 --width 32 --height 32 --ranks 16,64 --rounds N
//! bench vae     --model DIR --width 32 --height 32 --rounds N                 latents
//! bench picture --model DIR --width W --height H --steps S --guidance G --scheduler NAME --seed 1 --rounds N
//! ```
//!
//! Prints one line of JSON: `{"name": …, "seconds": [one number a round], "peak_rss_mb": …}`, or
//! `{"name": …, "error": …}`. One round before the first is not counted.
//!
//! `adapted` is `unet` with low-rank deltas on the attention's linear maps, several arms in turn in every
//! round: the base alone, an adapter of each rank on all rows, and of the first rank another on each
//! row. It prints each arm's seconds by name, and ratios of their medians: of an adapter by the base,
//! and of several adapters by one.

use std::{process::ExitCode, sync::Arc, time::Instant};

use candle_core::{DType, Device, Tensor};
use clap::Parser;
use lorikeet::{
    models::{DeltaBatch, DeltaSet, Deltas, Model, ModelSource, SiteDelta, SiteKind, Term},
    noise::Generator,
    ops,
    pipeline::{
        Pipeline,
        request::{Limits, RequestDraft},
    },
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    Unet,
    Adapted,
    Vae,
    Picture,
}

#[derive(Debug, Parser)]
struct Options {
    what: What,
    #[arg(long)]
    model: ModelSource,
    #[arg(long, default_value_t = 1)]
    batch: usize,
    #[arg(long)]
    width: usize,
    #[arg(long)]
    height: usize,
    #[arg(long)]
    steps: Option<u64>,
    #[arg(long)]
    guidance: Option<f64>,
    #[arg(long)]
    scheduler: Option<String>,
    #[arg(long)]
    seed: Option<u64>,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    #[arg(long, value_delimiter = ',', default_values_t = [16, 64])]
    ranks: Vec<usize>,
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let options = Options::parse();
    let name = format!("{:?}", options.what).to_lowercase();
    match measure(&options) {
        Ok(figures) => {
            let mut line = serde_json::json!({"name": name, "peak_rss_mb": peak_rss_mb()});
            match figures {
                Figures::Rounds(seconds) => line["seconds"] = seconds.into(),
                Figures::Arms(arms) => {
                    line["ratios"] = ratios(&arms).into();
                    let arms = arms
                        .into_iter()
                        .map(|(name, seconds)| (name, seconds.into()));
                    line["seconds"] = serde_json::Value::Object(arms.collect());
                }
            }
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let error = error.to_string();
            println!("{}", serde_json::json!({"name": name, "error": error}));
            ExitCode::FAILURE
        }
    }
}

enum Figures {
    /// Seconds of each round.
    Rounds(Vec<f64>),
    /// Seconds of each round, arm by arm.
    Arms(Vec<(String, Vec<f64>)>),
}

fn measure(options: &Options) -> Outcome<Figures> {
    let device = Device::Cpu;
    ops::keep_freed();
    let model = Model::load(&options.model, &device, DType::F32)?;
    let mut noise = Generator::new(1);
    let mut randn = |shape: &[usize]| {
        Tensor::from_vec(noise.randn(shape.iter().product()), shape, &Device::Cpu)
    };
    let (h, w) = (options.height, options.width);
    match options.what {
        What::Unet | What::Adapted => {
            let sample = randn(&[options.batch, h, w, model.unet.in_channels()])?;
            let context = (0..options.batch)
                .map(|_| randn(&[77, model.unet.context_width()]))
                .collect::<Result<Vec<_>, _>>()?;
            let timesteps = vec![500.0; options.batch];
            let forward = |deltas| -> Outcome<()> {
                model.unet.forward(&sample, &timesteps, &context, deltas)?;
                Ok(())
            };
            if options.what == What::Unet {
                return timed(options.rounds, || forward(Deltas::NONE));
            }
            let mut set =
                |rank| -> Outcome<_> { Ok(Some(Arc::new(low_rank(&model, rank, &mut randn)?))) };
            let mut batches = vec![("base".to_owned(), DeltaBatch::default())];
            for &rank in &options.ranks {
                let set = set(rank)?;
                let rows = std::iter::repeat_n(set, options.batch);
                batches.push((format!("r={rank}"), DeltaBatch::new(rows)));
            }
            if let Some(&rank) = options.ranks.first() {
                let rows = (0..options.batch)
                    .map(|_| set(rank))
                    .collect::<Outcome<Vec<_>>>()?;
                batches.push((format!("r={rank}, one a row"), DeltaBatch::new(rows)));
            }
            let mut arms: Vec<_> = batches
                .iter()
                .map(|(name, _)| (name.clone(), Vec::new()))
                .collect();
            for round in 0..=options.rounds {
                for ((_, batch), (_, seconds)) in batches.iter().zip(&mut arms) {
                    let start = Instant::now();
                    forward(batch.deltas())?;
                    if round > 0 {
                        seconds.push(start.elapsed().as_secs_f64());
                    }
                }
            }
            Ok(Figures::Arms(arms))
        }
        What::Vae => {
            let latents = randn(&[options.batch, h, w, model.vae.latent_channels()])?;
            timed(options.rounds, || {
                model.vae.decode(&latents)?;
                Ok(())
            })
        }
        What::Picture => {
            let pipeline = Pipeline::new(model, device)?;
            let draft = RequestDraft {
                prompt: "a red mushroom in a meadow".into(),
                width: Some(w.try_into()?),
                height: Some(h.try_into()?),
                steps: options.steps,
                guidance_scale: options.guidance,
                scheduler: options.scheduler.clone(),
                seed: options.seed,
                n: Some(options.batch as u64),
                ..RequestDraft::default()
            };
            let request = draft.validate(&pipeline.defaults(), &Limits::default())?;
            timed(options.rounds, || {
                let mut paintings = pipeline.begin(&request)?;
                while paintings
                    .iter()
                    .any(|painting| painting.progress().0 < painting.progress().1)
                {
                    let outputs = pipeline.predict(&paintings.iter().collect::<Vec<_>>())?;
                    for (painting, output) in paintings.iter_mut().zip(outputs) {
                        pipeline.advance(painting, &output);
                    }
                }
                for painting in &paintings {
                    pipeline.decode(painting.latents(), painting.shape())?;
                }
                Ok(())
            })
        }
    }
}

/// Random low-rank deltas on the linear maps of the UNet's attention, where adapters have them.
fn low_rank(
    model: &Model,
    rank: usize,
    randn: &mut impl FnMut(&[usize]) -> Result<Tensor, candle_core::Error>,
) -> Outcome<DeltaSet> {
    let mut set = DeltaSet::default();
    for (index, site) in model.sites().iter().enumerate() {
        let attention = site.name.contains(".attn1.") || site.name.contains(".attn2.");
        if !attention || site.kind != SiteKind::Linear {
            continue;
        }
        let (output, input) = (site.weight_shape[0], site.weight_shape[1]);
        let (down, up) = (randn(&[rank, input])?, randn(&[output, rank])?);
        let term = Term::low_rank(site.geometry, down, up)?;
        let delta = SiteDelta {
            terms: vec![term],
            ..SiteDelta::default()
        };
        set.insert(index, delta);
    }
    Ok(set)
}

/// Medians of adapted arms by the base's, and of several adapters by one of the same rank.
fn ratios(arms: &[(String, Vec<f64>)]) -> serde_json::Map<String, serde_json::Value> {
    let median = |seconds: &[f64]| {
        let mut sorted = seconds.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let by = |a: &(String, Vec<f64>), b: &(String, Vec<f64>)| {
        (
            format!("{} / {}", a.0, b.0),
            (median(&a.1) / median(&b.1)).into(),
        )
    };
    let mut ratios: serde_json::Map<_, _> = arms[1..].iter().map(|arm| by(arm, &arms[0])).collect();
    if let [_, one, .., each] = arms {
        ratios.extend([by(each, one)]);
    }
    ratios
}

/// Seconds of each round, the first left out.
fn timed(rounds: usize, mut work: impl FnMut() -> Outcome<()>) -> Outcome<Figures> {
    work()?;
    let seconds = (0..rounds)
        .map(|_| {
            let start = Instant::now();
            work()?;
            Ok(start.elapsed().as_secs_f64())
        })
        .collect::<Outcome<_>>()?;
    Ok(Figures::Rounds(seconds))
}

/// The most memory this process has held so far, where the system tells.
fn peak_rss_mb() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kb: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kb / 1024)
}
