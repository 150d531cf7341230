//! `lorikeet train`.

mod course;
mod options;
mod work;

use std::{
    io::{self, IsTerminal as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use image::RgbImage;

use super::{Failure, store::open_store};
use crate::{
    config::Defaults,
    engine::{self, AdapterLoader},
    pipeline::request::{InvalidField, Limits},
    registry::{AdapterName, PutPolicy, Registry, Settings},
    telemetry::{self, LogFormat},
    trainer::{self, Trained},
    training::{
        Run,
        dataset::{ArchiveLimits, Dataset, files},
        options::{self as training, ModelFacts},
    },
};
use course::Course;
pub(super) use options::TrainOptions;
use work::Work;

/// candle walks the graph of a model recursively: hundreds of bytes for each of its operations.
const STACK: usize = 256 << 20;

/// Trains, and puts the adapter where it is served from.
pub(super) fn run(options: TrainOptions) -> Result<(), Failure> {
    telemetry::init_logs(LogFormat::Text, &options.log)
        .map_err(|error| Failure::usage(format!("--log: {error}")))?;
    let name: AdapterName = options
        .name
        .parse()
        .map_err(|error| Failure::usage(format!("--name: {error}")))?;
    let draft = options.draft()?;
    let config = options
        .model
        .into_config(1, 1, Limits::default(), Defaults::default(), 0)?;
    let opened = engine::open(
        &config.model,
        config.device,
        config.dtype,
        config.limits.clone(),
    );
    let pipeline = opened
        .map_err(|error| Failure::new(error.to_string()))?
        .into_pipeline();
    let facts = ModelFacts::of(&pipeline);
    let checked = draft
        .validate(&facts, &training::Limits::default())
        .map_err(refused)?;

    let runtime = super::runtime()?;
    let failed = |error: &dyn std::fmt::Display| Failure::new(error.to_string());
    let loader = AdapterLoader::new(pipeline.model()).map_err(|error| failed(&error))?;
    let store = open_store(&options.adapters)?;
    let registry = Registry::open(store, loader, Settings::default());
    let registry = runtime.block_on(registry).map_err(|error| failed(&error))?;
    let policy = match options.replace {
        true => PutPolicy::Upsert,
        false => PutPolicy::Create,
    };
    // A name that is taken is said now, and not after the training.
    let admitted = runtime.block_on(registry.admit(&name, policy));
    admitted
        .map_err(|error| Failure::new(format!("{error}; --replace puts this one in its place")))?;

    let files = files::from_path(&options.images, &ArchiveLimits::default());
    let files = files.map_err(|error| Failure::new(format!("--images: {error}")))?;
    let dataset = Dataset::open(files, &checked, facts.side_multiple);
    let dataset = dataset.map_err(|error| Failure::new(format!("--images: {error}")))?;
    for note in &dataset.notes {
        eprintln!("note: {note}");
    }
    if !dataset.ignored.is_empty() {
        eprintln!("note: not used: {}", dataset.ignored.join(", "));
    }
    trainer::check_room(&pipeline, &checked).map_err(|error| failed(&error))?;
    let work = Work::open(&options.data, &name)?;
    if options.restart {
        work.forget()?;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let asked = stop.clone();
    runtime.spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            asked.store(true, Relaxed);
        }
    });
    let course = Course {
        work: &work,
        stop: &stop,
        quiet: !io::stderr().is_terminal(),
    };
    let trained = on_a_large_stack(|| {
        let checkpoint = work.checkpoint()?;
        let run = Run::new(&pipeline, checked, dataset, checkpoint.as_deref());
        let mut run = run.map_err(|error| match error {
            crate::training::RunError::Checkpoint(error) => {
                Failure::new(format!("{}: {error} (--restart)", work.folder().display()))
            }
            error => Failure::new(error.to_string()),
        })?;
        course.follow(&mut run, &pipeline)?;
        let (prompt, seed) = trainer::preview(run.options());
        let picture = run.paint(&pipeline, &prompt, seed);
        let picture = picture.map_err(|error| failed(&error))?;
        Trained::of(&run, &pipeline, &picture).map_err(|error| failed(&error))
    })??;

    let prompt = trained.options.example_prompt();
    let published = trained.publish(&registry, &name, policy);
    runtime
        .block_on(published)
        .map_err(|error| failed(&error))?;
    work.forget()?;
    println!(
        "{}/{name}.safetensors",
        options.adapters.trim_end_matches('/')
    );
    println!("lorikeet generate \"{prompt}\" --adapter {name}");
    Ok(())
}

fn png(picture: &RgbImage) -> Result<Vec<u8>, Failure> {
    trainer::png(picture).map_err(|error| Failure::new(format!("cannot encode a picture: {error}")))
}

/// A refused field under the name of its option.
fn refused(error: InvalidField) -> Failure {
    Failure::usage(format!(
        "--{}: {}",
        error.field.replace('_', "-"),
        error.message
    ))
}

fn on_a_large_stack<T: Send>(run: impl FnOnce() -> T + Send) -> Result<T, Failure> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("training".into())
            .stack_size(STACK);
        let thread = thread.spawn_scoped(scope, run);
        let thread =
            thread.map_err(|error| Failure::new(format!("no thread to train on: {error}")))?;
        match thread.join() {
            Ok(value) => Ok(value),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
