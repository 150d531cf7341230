//! Times the models and the pipeline alone, in process. `benches/compare.py` runs it beside diffusers.
//!
//! ```text
//! bench unet    --model DIR --batch 2 --width 32 --height 32 --rounds N       latents
//! bench adapted --model DIR --batch 8 --width 32 --height 32 --ranks 16,64 --rounds N
//! bench vae     --model DIR --width 32 --height 32 --rounds N                 latents
//! bench picture --model DIR --width W --height H --steps S --guidance G --scheduler NAME --seed 1 --rounds N
//! bench step    --model DIR --batch 4 --width 16 --height 16 --ranks 4 --rounds N [--checkpointing]      latents
//! bench estimate …                                     as step: what its memory should be, here and on a GPU
//! ```
//!
//! Prints one line of JSON: `{"name": …, "seconds": [one number a round], "peak_rss_mb": …}`, or
//! `{"name": …, "error": …}`. One round before the first is not counted.
//!
//! `adapted` is `unet` with low-rank deltas on the attention's linear maps, several arms in turn in every
//! round: the base alone, an adapter of each rank on all rows, and of the first rank another on each
//! row. It prints each arm's seconds by name, and ratios of their medians: of an adapter by the base,
//! and of several adapters by one.
//!
//! `step` is a step of training as `benches/training.py` times it: noise, forward, loss, backward, clipping and
//! AdamW, with latents and embeddings at hand; a LoRA of the first rank on the UNet's attention. It prints
//! what that script prints, `{"name": …, "seconds": […], "median": …, "peak_rss_mb": …, "resident_mb": …,
//! "peak_step_rss_mb": …, "numbers": …}`: `resident_mb` is what the process holds before the first step. And it
//! prints `estimated`, the bytes that `training::estimate` promises between the two.

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
    schedulers::{NoiseLevels, SchedulerConfig},
    training::estimate::{Estimate, Work},
    training::{
        Captions, Passage, Rates, Trainable, gradients,
        objective::Noised,
        optimizer::Optimizer,
        options::{Lora, Rule, Settings, Targets, Variant},
        update,
    },
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    Unet,
    Adapted,
    Vae,
    Picture,
    Step,
    Estimate,
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
    /// Blocks are computed again on the way back.
    #[arg(long)]
    checkpointing: bool,
}

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The way back through a UNet is recursive.
const STACK: usize = 256 << 20;

fn main() -> ExitCode {
    let options = Options::parse();
    let name = format!("{:?}", options.what).to_lowercase();
    ops::keep_freed();
    let measured = std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK);
        match thread.spawn_scoped(scope, || measure(&options)) {
            Ok(thread) => thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(error) => Err(error.into()),
        }
    });
    match measured {
        Ok(figures) => {
            let mut line = serde_json::json!({"name": name, "peak_rss_mb": peak_rss_mb()});
            match figures {
                Figures::Estimates(estimates) => {
                    for (name, estimate) in estimates {
                        line[name] = format!("{} bytes: {estimate:?}", estimate.total()).into();
                    }
                }
                Figures::Step(step) => {
                    line["peak_rss_mb"] = step.before_mb.max(peak_rss_mb()).into();
                    line["resident_mb"] = step.resident_mb.into();
                    line["peak_step_rss_mb"] = step.forgotten.then(peak_rss_mb).flatten().into();
                    line["numbers"] = step.numbers.into();
                    line["estimated"] = step.estimate.total().into();
                    line["median"] = median(&step.seconds).into();
                    line["seconds"] = step.seconds.into();
                }
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
    Step(Steps),
    Estimates([(&'static str, Estimate); 3]),
}

/// What training steps took.
struct Steps {
    seconds: Vec<f64>,
    /// Numbers that are trained.
    numbers: usize,
    estimate: Estimate,
    /// Held before the first step.
    resident_mb: Option<u64>,
    /// The most that was held before the timed steps.
    before_mb: Option<u64>,
    /// Whether the peak is that of the timed steps alone.
    forgotten: bool,
}

fn measure(options: &Options) -> Outcome<Figures> {
    let device = Device::Cpu;
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
        What::Estimate => {
            let lora = lora(options)?;
            let host = work(options, &model, &lora);
            let gpu = |bytes| Work {
                bytes,
                on_host: false,
                ..host
            };
            Ok(Figures::Estimates([
                ("cpu_f32", host.estimate()),
                ("gpu_f32", gpu(4).estimate()),
                ("gpu_f16", gpu(2).estimate()),
            ]))
        }
        What::Step => {
            let latents = randn(&[options.batch, h, w, model.unet.out_channels()])?;
            let context = (0..options.batch)
                .map(|_| randn(&[77, model.unet.context_width()]))
                .collect::<Result<Vec<_>, _>>()?;
            steps(options, &model, &latents, &context).map(Figures::Step)
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

/// The LoRA that steps train.
fn lora(options: &Options) -> Outcome<Lora> {
    let rank = *options.ranks.first().ok_or("--ranks: give one")?;
    Ok(Lora {
        rank: rank.try_into()?,
        alpha: rank as f64,
        targets: Targets::Attention,
        variant: Variant::Lora,
        rslora: false,
        learning_rate: 1e-4,
        text_learning_rate: None,
        steps: options.rounds.try_into()?,
    })
}

/// What a step has to do, here and in f32.
fn work<'a>(options: &Options, model: &'a Model, lora: &'a Lora) -> Work<'a> {
    Work {
        sites: model.sites(),
        rows: options.batch,
        latents: [options.height, options.width],
        tokens: 77,
        bytes: 4,
        heads: model.unet.heads(),
        on_host: true,
        recompute: options.checkpointing,
        rule: Rule::AdamW,
        lora: Some(lora),
        vectors: 0,
    }
}

/// Steps of a LoRA's training, of which the first is not counted.
fn steps(options: &Options, model: &Model, latents: &Tensor, context: &[Tensor]) -> Outcome<Steps> {
    let lora = lora(options)?;
    let levels = NoiseLevels::new(&SchedulerConfig::from_json(&model.scheduler_config)?)?;
    let trainable = Trainable::begin(model.modules(), &lora, 1)?;
    let parameters = trainable.parameters();
    let sizes = parameters
        .iter()
        .map(|parameter| (parameter.name.clone(), parameter.var.elem_count()));
    let settings = Settings {
        rule: Rule::AdamW,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 1e-2,
    };
    let mut optimizer = Optimizer::new(settings, sizes);
    let mut noise = Generator::new(2);
    let rows = options.batch;
    let mut step = |number: usize| -> Outcome<()> {
        let count = latents.elem_count();
        let passage = Passage {
            noised: Noised {
                clean: latents.clone(),
                noise: Tensor::from_vec(noise.randn(count), latents.dims(), &Device::Cpu)?,
                timesteps: (0..rows)
                    .map(|row| (number * 331 + row * 217) % 1000)
                    .collect(),
            },
            captions: Captions::Encoded(context.to_vec()),
            weights: vec![1.0 / rows as f64; rows],
            recompute: options.checkpointing,
        };
        let (_, mut found) = gradients(model, &levels, &trainable, &parameters, &passage)?;
        let rates = Rates {
            unet: lora.learning_rate,
            text: 0.0,
            embedding: 0.0,
        };
        update(&mut optimizer, &parameters, &mut found, Some(1.0), rates)?;
        Ok(())
    };
    let estimate = work(options, model, &lora).estimate();
    ops::give_back_freed();
    let resident_mb = status_mb("VmRSS:");
    step(0)?;
    let before_mb = peak_rss_mb();
    // The kernel then counts the peak anew, where it lets us.
    let forgotten = std::fs::write("/proc/self/clear_refs", "5").is_ok();
    let mut seconds = Vec::with_capacity(options.rounds);
    for number in 1..=options.rounds {
        let start = Instant::now();
        step(number)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    Ok(Steps {
        seconds,
        numbers: parameters.iter().map(|p| p.var.elem_count()).sum(),
        estimate,
        resident_mb,
        before_mb,
        forgotten,
    })
}

/// Medians of adapted arms by the base's, and of several adapters by one of the same rank.
fn ratios(arms: &[(String, Vec<f64>)]) -> serde_json::Map<String, serde_json::Value> {
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

fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
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
    status_mb("VmHWM:")
}

fn status_mb(key: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(key))?;
    let kb: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kb / 1024)
}
