//! Whole runs on the demo model.

use std::path::PathBuf;

use candle_core::{DType, Device};

use super::{
    Report, Run, RunError, Slice,
    dataset::{ArchiveLimits, Dataset, files},
    golden::with_room,
    options::{Limits, Method, ModelFacts, TrainingDraft, TrainingOptions},
};
use crate::{
    adapters::Format,
    models::{Model, ModelSource},
    pipeline::Pipeline,
};

pub(super) fn demo() -> Pipeline {
    let model = Model::load(&ModelSource::Demo, &Device::Cpu, DType::F32).unwrap();
    Pipeline::new(model, Device::Cpu).unwrap()
}

pub(super) fn draft(method: Method, steps: u64) -> TrainingDraft {
    TrainingDraft {
        method: Some(method),
        steps: Some(steps),
        batch_size: Some(2),
        seed: Some(5),
        sample_every: Some(0),
        warmup_steps: Some(0),
        ..TrainingDraft::default()
    }
}

fn dreambooth(steps: u64) -> TrainingDraft {
    TrainingDraft {
        instance_prompt: Some("a zorp monster".into()),
        ..draft(Method::DreamBooth, steps)
    }
}

pub(super) fn validated(draft: TrainingDraft, pipeline: &Pipeline) -> TrainingOptions {
    let defaults = pipeline.defaults();
    let facts = ModelFacts {
        unet_parameters: 4_400_000,
        sample_size: defaults.width,
        side_multiple: defaults.side_multiple,
    };
    draft.validate(&facts, &Limits::default()).unwrap()
}

pub(super) fn pictures(folder: &str, options: &TrainingOptions) -> Dataset {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/training")
        .join(folder);
    let files = files::from_path(&path, &ArchiveLimits::default()).unwrap();
    Dataset::open(files, options, 16).unwrap()
}

pub(super) fn start(pipeline: &Pipeline, draft: TrainingDraft, checkpoint: Option<&[u8]>) -> Run {
    let folder = match draft.method {
        Some(Method::Lora) => "style",
        _ => "subject",
    };
    let options = validated(draft, pipeline);
    let dataset = pictures(folder, &options);
    Run::new(pipeline, options, dataset, checkpoint).unwrap()
}

/// Runs on until `steps` are made.
fn advance(run: &mut Run, pipeline: &Pipeline, steps: u32) -> Vec<Report> {
    let mut reports = Vec::new();
    while run.step() < steps {
        match run.slice(pipeline).unwrap() {
            Slice::Step(report) => reports.push(report),
            Slice::Finished => break,
            _ => {}
        }
    }
    reports
}

fn saved(run: &Run) -> Vec<u8> {
    let adapter = run.adapter().unwrap();
    adapter.save(Format::Kohya, &Default::default()).unwrap()
}

#[test]
fn a_run_that_was_stopped_anywhere_ends_with_the_same_bytes() {
    with_room(|| {
        let pipeline = demo();
        let pivotal = TrainingDraft {
            token: Some("<zorp>".into()),
            instance_prompt: Some("a <zorp> monster".into()),
            initializer: Some("monster".into()),
            embedding_steps: Some(3),
            ..draft(Method::Pivotal, 3)
        };
        let prior = TrainingDraft {
            class_prompt: Some("a monster".into()),
            class_images: Some(2),
            gradient_accumulation: Some(2),
            flip: Some(true),
            ..dreambooth(4)
        };
        for draft in [prior, pivotal] {
            let mut whole = start(&pipeline, draft.clone(), None);
            let of = whole.options().total_steps();
            advance(&mut whole, &pipeline, of);
            assert!(matches!(whole.slice(&pipeline), Ok(Slice::Finished)));
            let expected = saved(&whole);
            for stop in 0..of {
                let mut first = start(&pipeline, draft.clone(), None);
                advance(&mut first, &pipeline, stop);
                let checkpoint = first.checkpoint().unwrap();
                drop(first);
                let mut second = start(&pipeline, draft.clone(), Some(&checkpoint));
                assert_eq!(second.step(), stop);
                advance(&mut second, &pipeline, of);
                assert!(saved(&second) == expected, "stopped after {stop} of {of}");
            }
        }
    });
}

/// Stopped after any slice, in the middle of an evaluation too.
#[test]
fn a_run_that_ends_early_ends_with_its_best_wherever_it_was_stopped() {
    with_room(|| {
        let pipeline = demo();
        // Steps that are far too large: the second makes worse what the first made.
        let draft = TrainingDraft {
            early_stop_patience: Some(1),
            evaluate_every: Some(1),
            learning_rate: Some(0.3),
            batch_size: Some(4),
            ..dreambooth(6)
        };
        let finish = |run: &mut Run| {
            let mut slices = Vec::new();
            loop {
                match run.slice(&pipeline).unwrap() {
                    Slice::Finished => break slices,
                    slice => slices.push(slice),
                }
            }
        };
        let mut whole = start(&pipeline, draft.clone(), None);
        let (mut after_best, mut evaluations, mut slices) = (None, Vec::new(), 0);
        loop {
            match whole.slice(&pipeline).unwrap() {
                Slice::Finished => break,
                Slice::Evaluated(found) => {
                    evaluations.push(found);
                    // The last evaluation has brought the best back already.
                    after_best = found.best.then(|| saved(&whole)).or(after_best);
                }
                _ => {}
            }
            slices += 1;
        }
        let (best, loss) = whole.best().unwrap();
        assert!(whole.step() < 6, "{evaluations:?}");
        assert_eq!(whole.step(), best + 1, "{evaluations:?}");
        assert_eq!(evaluations[0].loss, evaluations[0].base_loss);
        assert!(!evaluations[0].best && evaluations[0].step == 0);
        assert!(evaluations[1..].iter().all(|e| e.loss >= loss));
        let expected = saved(&whole);
        assert!(
            after_best.unwrap() == expected,
            "the best is what is published"
        );

        let prepared = 8;
        for stop in prepared..=slices {
            let mut first = start(&pipeline, draft.clone(), None);
            for _ in 0..stop {
                first.slice(&pipeline).unwrap();
            }
            let checkpoint = first.checkpoint().unwrap();
            let mut second = start(&pipeline, draft.clone(), Some(&checkpoint));
            finish(&mut second);
            assert!(
                saved(&second) == expected,
                "after {stop} of {slices} slices"
            );
            assert_eq!(second.best(), whole.best());
        }
    });
}

#[test]
fn another_runs_checkpoint_is_refused() {
    with_room(|| {
        let pipeline = demo();
        let checkpoint = start(&pipeline, dreambooth(4), None).checkpoint().unwrap();
        let options = validated(dreambooth(5), &pipeline);
        let dataset = pictures("subject", &options);
        let error = Run::new(&pipeline, options, dataset, Some(&checkpoint)).unwrap_err();
        assert!(matches!(error, RunError::Checkpoint(_)), "{error}");
        assert!(error.to_string().contains("of another run"), "{error}");
    });
}

#[test]
fn every_method_learns_something_and_what_it_saves_is_read_back() {
    with_room(|| {
        let pipeline = demo();
        let inversion = TrainingDraft {
            token: Some("<zorp>".into()),
            initializer: Some("monster".into()),
            ..draft(Method::TextualInversion, 3)
        };
        let dora = TrainingDraft {
            variant: Some(super::options::Variant::Dora),
            targets: Some(super::options::Targets::Convs),
            ..dreambooth(3)
        };
        for draft in [dreambooth(3), draft(Method::Lora, 3), inversion, dora] {
            let mut run = start(&pipeline, draft, None);
            let before = saved(&run);
            let reports = advance(&mut run, &pipeline, 3);
            assert_eq!(reports.len(), 3);
            assert!(
                reports
                    .iter()
                    .all(|r| r.loss.is_finite() && r.gradient_norm > 0.0)
            );
            let file = saved(&run);
            assert!(file != before);
            let table = crate::adapters::SiteTable::new(pipeline.model().sites()).unwrap();
            let options = crate::adapters::ReadOptions::default();
            let read =
                crate::adapters::Adapter::parse("a", bytes::Bytes::from(file), &table, &options);
            let (read, own) = (read.unwrap(), run.adapter().unwrap());
            assert!(read.unmatched.is_empty());
            assert!(read.deltas.keys().eq(own.deltas.keys()));
            assert_eq!(read.embeddings.len(), own.embeddings.len());
        }
    });
}
