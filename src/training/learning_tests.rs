//! Each method learns: pictures it never saw are predicted better than by the model alone, and what was not
//! to change changes little.
//!
//! Short runs on the demo model, far shorter than those of `adapters/`. The losses of pictures held out are
//! the run's own evaluations. What was not to change is measured on pictures that the model paints for a
//! prompt, over the same noise levels: the loss there, and the *change*, the mean square of what the adapter
//! adds to a prediction. Beside each bound stands what was measured. A trainer whose steps do nothing leaves
//! every loss what it was, and fails all of them.

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

const MONSTER: &str = "a monster in a forest";
const CAT: &str = "a cat at night";

/// A short run that holds some of its pictures out.
fn short(method: Method, steps: u64, held_out: u64) -> TrainingDraft {
    TrainingDraft {
        held_out: Some(held_out),
        // Before the first step and after the last.
        evaluate_every: Some(1000),
        batch_size: Some(4),
        warmup_steps: Some(5),
        ..draft(method, steps)
    }
}

/// Trains to the end, and gives all evaluations.
fn learn(pipeline: &Pipeline, draft: TrainingDraft) -> (Run, Vec<Evaluation>) {
    let mut run = start(pipeline, draft, None);
    let mut evaluations = Vec::new();
    loop {
        match run.slice(pipeline).unwrap() {
            Slice::Evaluated(found) => evaluations.push(found),
            Slice::Finished => break,
            _ => {}
        }
    }
    let last = evaluations.last().map(|e| e.step);
    assert_eq!(last, Some(run.options().total_steps()));
    (run, evaluations)
}

/// The loss on the pictures held out after the last step, over that before the first.
fn left(evaluations: &[Evaluation]) -> f32 {
    let last = evaluations.last().unwrap();
    last.loss / last.base_loss
}

/// A picture as the model alone paints it, under noise.
struct Scene<'a> {
    pipeline: &'a Pipeline,
    levels: NoiseLevels,
    noised: Noised,
}

impl<'a> Scene<'a> {
    fn of(pipeline: &'a Pipeline, prompt: &str) -> Self {
        let model = pipeline.model();
        let canvas = painting::begin(pipeline, prompt, 128, 1, None).unwrap();
        let picture = canvas.finish(pipeline).unwrap();
        let pixels = to_tensor(&picture, &Device::Cpu).unwrap();
        let mean = model.vae.encode(&pixels).unwrap().mean;
        let clean = (mean * model.vae.scaling_factor()).unwrap();
        let clean = clean.repeat((8, 1, 1, 1)).unwrap();
        let noise = Draw::new(7, 0, 0, Purpose::Validation).normal(clean.elem_count());
        let config = SchedulerConfig::from_json(&model.scheduler_config).unwrap();
        Self {
            pipeline,
            levels: NoiseLevels::new(&config).unwrap(),
            noised: Noised {
                noise: Tensor::from_vec(noise, clean.shape(), &Device::Cpu).unwrap(),
                clean,
                timesteps: (0..8).map(|level| 62 + 125 * level).collect(),
            },
        }
    }

    fn predict(&self, adapter: &Adapter, prompt: &str) -> Tensor {
        let model = self.pipeline.model();
        let trainable = Trainable::new(model.modules(), adapter).unwrap();
        let ids = captions::ids(model, prompt, &trainable.words()).unwrap();
        let ids = vec![ids; self.noised.timesteps.len()];
        evaluation::predict(model, &self.levels, &trainable, &self.noised, &ids).unwrap()
    }

    /// The loss at a prompt with the adapter, over that of the model alone.
    fn loss(&self, adapter: &Adapter, prompt: &str) -> f32 {
        let target = self.noised.target(&self.levels).unwrap();
        let loss = |adapter| mean_square(&self.predict(adapter, prompt), &target);
        loss(adapter) / loss(&nothing())
    }

    /// What the adapter changes at a prompt.
    fn change(&self, adapter: &Adapter, prompt: &str) -> f32 {
        mean_square(
            &self.predict(adapter, prompt),
            &self.predict(&nothing(), prompt),
        )
    }
}

fn nothing() -> Adapter {
    Adapter::trained(Default::default(), Vec::new())
}

fn mean_square(a: &Tensor, b: &Tensor) -> f32 {
    let square = (a - b).unwrap().sqr().unwrap();
    square.mean_all().unwrap().to_scalar().unwrap()
}

#[test]
fn dreambooth_learns_its_subject_and_the_class_stays_what_it_was() {
    with_room(|| {
        let pipeline = demo();
        let draft = TrainingDraft {
            instance_prompt: Some("a zorp monster".into()),
            class_prompt: Some("a monster".into()),
            class_images: Some(8),
            ..short(Method::DreamBooth, 30, 2)
        };
        let (run, evaluations) = learn(&pipeline, draft);
        // 0.66.
        assert!(left(&evaluations) < 0.8, "{evaluations:?}");
        let adapter = run.adapter().unwrap();
        let scene = Scene::of(&pipeline, MONSTER);
        // 0.99; after 60 steps 0.98, and without prior preservation 1.41.
        let class = scene.loss(&adapter, MONSTER);
        assert!(class < 1.1, "{class}");
        // 1.57 times; after 60 steps 1.99, and without prior preservation 0.99.
        let [word, class] =
            ["a zorp monster in a forest", MONSTER].map(|prompt| scene.change(&adapter, prompt));
        assert!(word > 1.3 * class, "{word} {class}");
        // 1.08; after 60 steps 1.18, and without prior preservation 1.66.
        let other = Scene::of(&pipeline, CAT).loss(&adapter, CAT);
        assert!(other < 1.3, "{other}");
    });
}

#[test]
fn a_lora_learns_a_style_from_captioned_pictures() {
    with_room(|| {
        let pipeline = demo();
        let (_, evaluations) = learn(&pipeline, short(Method::Lora, 20, 4));
        // 0.57.
        assert!(left(&evaluations) < 0.8, "{evaluations:?}");
    });
}

#[test]
fn textual_inversion_learns_a_word_and_changes_nothing_else() {
    with_room(|| {
        let pipeline = demo();
        let draft = TrainingDraft {
            token: Some("<zorp>".into()),
            initializer: Some("monster".into()),
            ..short(Method::TextualInversion, 40, 2)
        };
        let (run, evaluations) = learn(&pipeline, draft);
        // 0.89.
        assert!(left(&evaluations) < 0.95, "{evaluations:?}");
        let adapter = run.adapter().unwrap();
        assert_eq!(Scene::of(&pipeline, MONSTER).change(&adapter, MONSTER), 0.0);
    });
}

#[test]
fn pivotal_tuning_learns_a_word_and_then_what_the_word_alone_cannot_say() {
    with_room(|| {
        let pipeline = demo();
        let draft = TrainingDraft {
            token: Some("<zorp>".into()),
            initializer: Some("monster".into()),
            instance_prompt: Some("a <zorp> monster".into()),
            class_prompt: Some("a monster".into()),
            class_images: Some(4),
            embedding_steps: Some(20),
            evaluate_every: Some(20),
            ..short(Method::Pivotal, 20, 2)
        };
        let (run, evaluations) = learn(&pipeline, draft);
        let word = evaluations.iter().find(|e| e.step == 20).unwrap();
        // 0.96, and 0.68 with the LoRA.
        assert!(word.loss < word.base_loss * 0.98, "{evaluations:?}");
        assert!(left(&evaluations) < 0.8, "{evaluations:?}");
        let adapter = run.adapter().unwrap();
        // 1.04.
        let class = Scene::of(&pipeline, MONSTER).loss(&adapter, MONSTER);
        assert!(class < 1.15, "{class}");
    });
}
