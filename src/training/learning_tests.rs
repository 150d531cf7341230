//! Each method learns: pictures it never saw are predicted better, and what was not to change changes little.
//!
//! Short runs on the demo model. Losses are those of the run's own evaluations; *change* is the mean square
//! of what an adapter adds to a prediction, over the same grid of noise. The numbers beside the bounds were
//! measured; a trainer whose steps do nothing fails every one of them.

use candle_core::{Device, Tensor};

use super::{
    Evaluation, Run, Slice, captions, evaluation,
    golden::with_room,
    objective::Noised,
    options::{Method, TrainingDraft},
    painting,
    random::{Draw, Purpose},
    run_tests::{demo, draft, start},
    trainable::Trainable,
};
use crate::{
    adapters::Adapter,
    pipeline::{Pipeline, to_tensor},
    schedulers::{NoiseLevels, SchedulerConfig},
};

/// Trains to the end, and gives the last evaluation.
fn learn(pipeline: &Pipeline, draft: TrainingDraft) -> (Run, Evaluation) {
    let mut run = start(pipeline, draft, None);
    let mut last = None;
    loop {
        match run.slice(pipeline).unwrap() {
            Slice::Evaluated(found) => last = Some(found),
            Slice::Finished => break,
            _ => {}
        }
    }
    let last = last.unwrap();
    assert_eq!(last.step, run.options().total_steps());
    eprintln!(
        "loss {} of {}: {}",
        last.loss,
        last.base_loss,
        last.loss / last.base_loss
    );
    (run, last)
}

/// A picture of a prompt as the base paints it, and how it looks under noise.
struct Scene<'a> {
    pipeline: &'a Pipeline,
    noised: Noised,
}

impl<'a> Scene<'a> {
    fn of(pipeline: &'a Pipeline, prompt: &str) -> Self {
        let model = pipeline.model();
        let picture = painting::paint(pipeline, prompt, 128, 1, None).unwrap();
        let pixels = to_tensor(&picture, &Device::Cpu).unwrap();
        let mean = model.vae.encode(&pixels).unwrap().mean;
        let clean = (mean * model.vae.scaling_factor()).unwrap();
        let levels = 8;
        let noise = Draw::new(7, 0, 0, Purpose::Validation).normal(clean.elem_count() * levels);
        let clean = clean.repeat((levels, 1, 1, 1)).unwrap();
        Self {
            pipeline,
            noised: Noised {
                noise: Tensor::from_vec(noise, clean.shape(), &Device::Cpu).unwrap(),
                clean,
                timesteps: (0..levels).map(|level| 62 + 125 * level).collect(),
            },
        }
    }

    /// The mean square of what the adapter adds to the prediction for a prompt.
    fn change(&self, adapter: &Adapter, prompt: &str) -> f64 {
        let model = self.pipeline.model();
        let config = SchedulerConfig::from_json(&model.scheduler_config).unwrap();
        let levels = NoiseLevels::new(&config).unwrap();
        let predict = |adapter: &Adapter| {
            let trainable = Trainable::new(model.modules(), adapter).unwrap();
            let ids = captions::ids(model, prompt, &trainable.words()).unwrap();
            let ids = vec![ids; self.noised.timesteps.len()];
            evaluation::predict(model, &levels, &trainable, &self.noised, &ids).unwrap()
        };
        let base = Adapter::trained(Default::default(), Vec::new());
        let difference = (predict(adapter) - predict(&base)).unwrap();
        let mean = difference.sqr().unwrap().mean_all().unwrap();
        mean.to_scalar::<f32>().unwrap().into()
    }
}

fn measured(method: Method, steps: u64, held_out: u64) -> TrainingDraft {
    TrainingDraft {
        held_out: Some(held_out),
        evaluate_every: Some(1000),
        batch_size: Some(4),
        warmup_steps: None,
        ..draft(method, steps)
    }
}

/// What the subject's word changes, against the class's and others'.
fn drift(pipeline: &Pipeline, adapter: &Adapter, token_prompt: &str) -> [f64; 4] {
    let monster = Scene::of(pipeline, "a monster in a forest");
    let cat = Scene::of(pipeline, "a cat at night");
    let house = Scene::of(pipeline, "a house in the snow");
    let found = [
        monster.change(adapter, token_prompt),
        monster.change(adapter, "a monster in a forest"),
        cat.change(adapter, "a cat at night"),
        house.change(adapter, "a house in the snow"),
    ];
    eprintln!("changes {found:?}");
    found
}

#[test]
fn dreambooth_learns_its_subject_and_leaves_the_class() {
    with_room(|| {
        let pipeline = demo();
        let (run, found) = learn(
            &pipeline,
            TrainingDraft {
                instance_prompt: Some("a zorp monster".into()),
                class_prompt: Some("a monster".into()),
                class_images: Some(8),
                ..measured(Method::DreamBooth, 60, 2)
            },
        );
        assert!(found.loss < found.base_loss * 0.9, "{found:?}");
        let adapter = run.adapter().unwrap();
        let [token, class, others @ ..] = drift(&pipeline, &adapter, "a zorp monster in a forest");
        assert!(token > 3.0 * class, "{token} {class} {others:?}");
    });
}

#[test]
fn a_lora_learns_a_style_and_leaves_other_pictures() {
    with_room(|| {
        let pipeline = demo();
        let (run, found) = learn(&pipeline, measured(Method::Lora, 60, 4));
        assert!(found.loss < found.base_loss * 0.9, "{found:?}");
        let adapter = run.adapter().unwrap();
        drift(&pipeline, &adapter, "a blueprint drawing of a monster");
    });
}

#[test]
fn textual_inversion_learns_a_word_and_changes_nothing_else() {
    with_room(|| {
        let pipeline = demo();
        let (run, found) = learn(
            &pipeline,
            TrainingDraft {
                token: Some("<zorp>".into()),
                initializer: Some("monster".into()),
                ..measured(Method::TextualInversion, 60, 2)
            },
        );
        assert!(found.loss < found.base_loss * 0.9, "{found:?}");
        let adapter = run.adapter().unwrap();
        drift(&pipeline, &adapter, "a <zorp> in a forest");
    });
}

#[test]
fn pivotal_tuning_learns_a_word_and_then_more() {
    with_room(|| {
        let pipeline = demo();
        let (run, found) = learn(
            &pipeline,
            TrainingDraft {
                token: Some("<zorp>".into()),
                initializer: Some("monster".into()),
                instance_prompt: Some("a <zorp> monster".into()),
                class_prompt: Some("a monster".into()),
                class_images: Some(8),
                embedding_steps: Some(30),
                ..measured(Method::Pivotal, 40, 2)
            },
        );
        assert!(found.loss < found.base_loss * 0.9, "{found:?}");
        let adapter = run.adapter().unwrap();
        drift(&pipeline, &adapter, "a <zorp> monster in a forest");
    });
}
