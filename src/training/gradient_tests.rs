//! Gradients and twenty steps against PyTorch, diffusers and PEFT.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::{
    golden::{Case, assert_close, cases, model, with_room},
    objective::Noised,
    optimizer::{Optimizer, RateSchedule, Rule, Settings},
    step::{Captions, Passage, Rates, gradients, update},
    trainable::{Parameter, Trainable},
};
use crate::{
    models::Model,
    schedulers::{NoiseLevels, PredictionType, SchedulerConfig},
};

pub(super) fn levels(model: &Model, case: &Case) -> NoiseLevels {
    let config = SchedulerConfig::from_json(&model.scheduler_config).unwrap();
    let mut levels = NoiseLevels::new(&config).unwrap();
    if case.objective == "v-prediction" {
        levels.prediction = PredictionType::VPrediction;
    }
    levels
}

pub(super) fn passage(case: &Case, recompute: bool) -> Passage {
    let timesteps = case.numbers("timesteps").into_iter().map(|t| t as usize);
    Passage {
        noised: Noised {
            clean: case.tensor("x0").clone(),
            noise: case.tensor("noise").clone(),
            timesteps: timesteps.collect(),
        },
        captions: Captions::Ids(case.ids()),
        weights: case.numbers("weights"),
        recompute,
    }
}

/// The batch of one step of a trajectory: its second half is the class's.
fn passage_at(case: &Case, step: usize) -> Passage {
    let clean = case.tensor("x0").clone();
    let rows = clean.dims()[0];
    let timesteps = case.numbers("timesteps");
    let timesteps = timesteps[step * rows..][..rows].iter().map(|t| *t as usize);
    let half = rows / 2;
    let weight = |row| {
        if row < half {
            1.0
        } else {
            case.prior_weight.unwrap()
        }
    };
    Passage {
        noised: Noised {
            clean,
            noise: case.tensor("noise").get(step).unwrap(),
            timesteps: timesteps.collect(),
        },
        captions: Captions::Ids(case.ids()),
        weights: (0..rows).map(|row| weight(row) / half as f64).collect(),
        recompute: false,
    }
}

/// Golden tensors by our names: text encoders with `text_model`, and in our shapes.
fn theirs(case: &Case, prefix: &str, parameters: &[Parameter]) -> BTreeMap<String, Tensor> {
    let rename = |(name, tensor): (String, Tensor)| {
        let name = match name.strip_prefix("text_encoder.") {
            Some(path) => format!("text_encoder.text_model.{path}"),
            None => name,
        };
        let ours = parameters.iter().find(|p| p.name == name);
        let ours = ours.unwrap_or_else(|| panic!("{}: nobody trains {name}", case.name));
        (name, tensor.reshape(ours.var.shape()).unwrap())
    };
    let named: BTreeMap<_, _> = case.under(prefix).into_iter().map(rename).collect();
    assert_eq!(named.len(), parameters.len(), "{}", case.name);
    named
}

fn assert_gradients(name: &'static str) {
    with_room(move || {
        let mut some = cases();
        some.retain(|case| case.model == name && case.trajectory.is_none());
        let Some(first) = some.first() else { return };
        let model = model(&first.model);
        for case in &some {
            let trainable = Trainable::new(model.modules(), &case.adapter("initial")).unwrap();
            let parameters = trainable.parameters();
            let expected = theirs(case, "gradient", &parameters);
            let levels = levels(&model, case);
            for recompute in [false, true] {
                let passage = passage(case, recompute);
                let (loss, found) =
                    gradients(&model, &levels, &trainable, &parameters, &passage).unwrap();
                let theirs = case.numbers("loss")[0];
                assert!((loss / theirs - 1.0).abs() < 1e-5, "{}: {loss}", case.name);
                for (parameter, found) in parameters.iter().zip(found) {
                    let what = format!("{} {} recompute {recompute}", case.name, parameter.name);
                    let shape = parameter.var.shape().clone();
                    let found = Tensor::from_vec(found, shape, &Device::Cpu).unwrap();
                    assert_close(&what, &found, &expected[&parameter.name], 1e-4);
                }
            }
        }
    });
}

#[test]
fn gradients_of_every_method_are_pytorchs_on_an_odd_tiny_model() {
    assert_gradients("two-levels");
}

#[test]
fn gradients_of_every_method_are_pytorchs_on_the_demo_model() {
    assert_gradients("demo");
}

#[test]
fn twenty_steps_follow_pytorchs() {
    with_room(|| {
        for case in cases() {
            let Some(course) = &case.trajectory else {
                continue;
            };
            let model = model(&case.model);
            let levels = levels(&model, &case);
            let trainable = Trainable::new(model.modules(), &case.adapter("initial")).unwrap();
            let parameters = trainable.parameters();
            let settings = Settings {
                rule: Rule::AdamW,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-8,
                weight_decay: course.weight_decay,
            };
            let sizes = parameters
                .iter()
                .map(|p| (p.name.clone(), p.var.elem_count()));
            let mut optimizer = Optimizer::new(settings, sizes);
            let losses = case.numbers("losses");
            let initial = theirs(&case, "initial", &parameters);
            assert_eq!(losses.len(), course.steps);
            for (step, expected_loss) in losses.into_iter().enumerate() {
                let passage = passage_at(&case, step);
                let (loss, mut found) =
                    gradients(&model, &levels, &trainable, &parameters, &passage).unwrap();
                let error = (loss / expected_loss - 1.0).abs();
                assert!(error < 1e-3, "{} step {step}: {loss}", case.name);
                let (warmup, steps) = (course.warmup as u64, course.steps as u64);
                let factor = RateSchedule::Cosine.multiplier(step as u64, warmup, steps);
                let rates = Rates {
                    unet: course.unet * factor,
                    text: course.text * factor,
                    embedding: 0.0,
                };
                update(
                    &mut optimizer,
                    &parameters,
                    &mut found,
                    Some(course.clip),
                    rates,
                )
                .unwrap();
                if course.kept.contains(&(step + 1)) {
                    let expected = theirs(&case, &format!("after-{}", step + 1), &parameters);
                    // The way is compared, not where it ends: the values hardly move.
                    for parameter in &parameters {
                        let name = &parameter.name;
                        let what = format!("{} {name} after {}", case.name, step + 1);
                        let way = |to: &Tensor| (to - &initial[name]).unwrap();
                        let found = way(&parameter.var.as_detached_tensor());
                        assert_close(&what, &found, &way(&expected[name]), 1e-3);
                    }
                }
            }
        }
    });
}
