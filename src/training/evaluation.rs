//! The loss on pictures that nothing is learned from: what says whether a run learns, where the loss of its
//! steps says more of the noise that they drew.
//!
//! Noise and timesteps are the same in every evaluation, as are the pictures, so that two losses differ by
//! what was learned and nothing else. The first evaluation is made before the first step: for a LoRA this is
//! the loss of the model alone, for a word that of its initializer.

use std::{mem, sync::Arc};

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::{
    checkpoint::Values,
    objective::{self, Noised},
    options::TrainingOptions,
    trainable::Trainable,
};
use crate::{
    models::{DeltaBatch, Model},
    schedulers::NoiseLevels,
};

/// Noise levels at which a picture is measured.
const LEVELS: usize = 8;

/// What an evaluation found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Steps made.
    pub step: u32,
    /// Mean square error on the pictures held out, every noise level weighing the same.
    pub loss: f32,
    /// The same before the first step.
    pub base_loss: f32,
    /// None was lower in this phase of the run.
    pub best: bool,
}

/// What the evaluations so far found: part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Found {
    // f32, as these are compared: an f64 may come back from JSON with another last bit.
    base_loss: f32,
    /// Of the last evaluation.
    step: u32,
    /// Step and loss of the best one in the last phase.
    best: Option<(u32, f32)>,
    /// Evaluations since.
    without: u32,
}

/// Decides when a run is measured, and by what it finds when the run ends.
#[derive(Debug)]
pub(super) struct Evaluator {
    every: u32,
    patience: Option<u32>,
    /// The first step of the last phase, and the end of it.
    last_phase: (u32, u32),
    /// Pictures held out.
    pictures: usize,
    /// Points that are measured at a time.
    at_a_time: usize,
    found: Option<Found>,
    /// What the run had learned at the best evaluation; kept for a run that ends early.
    best: Values,
    /// Of the evaluation that is being made, point by point.
    losses: Vec<f64>,
}

/// A picture that is held out, and the timesteps at which it is measured next.
#[derive(Debug, PartialEq)]
pub(super) struct Points {
    pub picture: usize,
    pub timesteps: Vec<usize>,
}

impl Evaluator {
    /// Goes on from what a checkpoint has of it. `None` if nothing is to be measured.
    pub fn new(
        options: &TrainingOptions,
        pictures: usize,
        found: Option<Found>,
        best: Values,
    ) -> Option<Self> {
        let evaluations = options.evaluations.as_ref()?;
        let word = options.embedding.as_ref().map_or(0, |phase| phase.steps);
        let before = if options.lora.is_some() { word } else { 0 };
        Some(Self {
            every: evaluations.every,
            patience: evaluations.patience,
            last_phase: (before, options.total_steps()),
            pictures,
            at_a_time: (options.batch_size as usize).min(LEVELS),
            found,
            best,
            losses: Vec::new(),
        })
    }

    /// For a checkpoint. An evaluation that has not come to its end begins anew after it.
    pub fn state(&self) -> (Option<Found>, Values) {
        (self.found.clone(), self.best.clone())
    }

    /// Whether the run is measured before it goes on.
    pub fn is_due(&self, step: u32) -> bool {
        let (_, end) = self.last_phase;
        let wanted = step.is_multiple_of(self.every) || step == end;
        wanted && self.found.as_ref().is_none_or(|found| found.step != step)
    }

    /// Whether patience has run out.
    pub fn stops(&self) -> bool {
        let without = self.found.as_ref().map_or(0, |found| found.without);
        self.patience.is_some_and(|patience| without >= patience)
    }

    /// The best evaluation of the last phase: its step, and its loss.
    pub fn best(&self) -> Option<(u32, f32)> {
        self.found.as_ref()?.best
    }

    /// What is measured next. `timesteps` is the length of the noise schedule.
    pub fn points(&self, timesteps: usize) -> Points {
        let first = self.losses.len() % LEVELS;
        let levels = first..(first + self.at_a_time).min(LEVELS);
        Points {
            picture: self.losses.len() / LEVELS,
            // The middles of equal parts of the schedule.
            timesteps: levels
                .map(|level| (2 * level + 1) * timesteps / (2 * LEVELS))
                .collect(),
        }
    }

    /// Points measured, and how many there are.
    pub fn progress(&self) -> (usize, usize) {
        (self.losses.len(), self.pictures * LEVELS)
    }

    /// Takes the losses of [`Evaluator::points`]; `values` are what the run has learned. Gives the
    /// evaluation when it is complete.
    pub fn take<E>(
        &mut self,
        step: u32,
        losses: Vec<f64>,
        values: impl FnOnce() -> Result<Values, E>,
    ) -> Result<Option<Evaluation>, E> {
        self.losses.extend(losses);
        let (done, of) = self.progress();
        if done < of {
            return Ok(None);
        }
        let losses = mem::take(&mut self.losses);
        let loss = (losses.iter().sum::<f64>() / losses.len().max(1) as f64) as f32;
        let mut found = self.found.take().unwrap_or(Found {
            base_loss: loss,
            step,
            best: None,
            without: 0,
        });
        found.step = step;
        // What has not learned yet is no candidate, and a word that has is still without its LoRA.
        let counts = step > self.last_phase.0;
        let best = found.best.is_none_or(|(_, best)| loss < best);
        if counts {
            found.without += 1;
        }
        if counts && best {
            found.best = Some((step, loss));
            found.without = 0;
            if self.patience.is_some() {
                self.best = values()?;
            }
        }
        let evaluation = Evaluation {
            step,
            loss,
            base_loss: found.base_loss,
            best: counts && best,
        };
        self.found = Some(found);
        Ok(Some(evaluation))
    }

    /// The values that the run ends with, where they are not the last ones.
    pub fn ending(&self, step: u32) -> Option<&Values> {
        let over = step == self.last_phase.1 || self.stops();
        (self.patience.is_some() && over && !self.best.is_empty()).then_some(&self.best)
    }
}

/// The mean square error at each row of `noised`, with what has been learned.
///
/// # Errors
/// Those of candle.
pub(super) fn losses(
    model: &Model,
    levels: &NoiseLevels,
    trainable: &Trainable,
    noised: &Noised,
    ids: &[Vec<u32>],
) -> candle_core::Result<Vec<f64>> {
    let prediction = predict(model, levels, trainable, noised, ids)?;
    let target = noised.target(levels)?;
    let loss = |row: usize| {
        let of = |tensor: &Tensor| tensor.narrow(0, row, 1);
        let loss = objective::loss(&of(&prediction)?, &of(&target)?, &[1.0])?;
        loss.to_dtype(DType::F64)?.to_scalar()
    };
    (0..ids.len()).map(loss).collect()
}

/// What the model says to noisy latents. Nothing is kept for a way back.
///
/// # Errors
/// Those of candle.
pub(super) fn predict(
    model: &Model,
    levels: &NoiseLevels,
    trainable: &Trainable,
    noised: &Noised,
    ids: &[Vec<u32>],
) -> candle_core::Result<Tensor> {
    let deltas = Arc::new(trainable.deltas()?);
    let batch = DeltaBatch::new(ids.iter().map(|_| Some(deltas.clone()))).detach()?;
    let words = trainable.rows()?.map(|rows| rows.detach());
    let encoder = &model.text_encoder;
    let hidden = encoder.encode(&encoder.embed(ids, words.as_ref())?, 0, batch.deltas())?;
    let context = (0..ids.len()).map(|row| hidden.get(row));
    let context = context.collect::<candle_core::Result<Vec<_>>>()?;
    let timesteps: Vec<f32> = noised.timesteps.iter().map(|&t| t as f32).collect();
    let sample = noised.sample(levels)?;
    let unet = &model.unet;
    unet.forward(&sample, &timesteps, &context, batch.deltas())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn evaluator(every: u32, patience: Option<u32>, last_phase: (u32, u32)) -> Evaluator {
        Evaluator {
            every,
            patience,
            last_phase,
            pictures: 1,
            at_a_time: LEVELS,
            found: None,
            best: Values::new(),
            losses: Vec::new(),
        }
    }

    /// Goes through a run whose losses are these, one for each evaluation; gives those that were best, and
    /// the step at which the run ended and that of the values it ends with.
    fn follow(mut evaluator: Evaluator, losses: &[f32]) -> (Vec<u32>, u32, Option<u32>) {
        let mut losses = losses.iter();
        let (mut best, mut step) = (Vec::new(), 0);
        loop {
            if evaluator.is_due(step) {
                let loss = f64::from(*losses.next().unwrap());
                let values = BTreeMap::from([(step.to_string(), (vec![], vec![]))]);
                let found = evaluator.take(step, vec![loss; LEVELS], || Ok::<_, ()>(values));
                let found = found.unwrap().unwrap();
                assert!(!evaluator.is_due(step));
                best.extend(found.best.then_some(found.step));
            }
            if step == evaluator.last_phase.1 || evaluator.stops() {
                break;
            }
            step += 1;
        }
        assert_eq!(losses.next(), None);
        let kept = evaluator.ending(step).map(|values| values.keys().next());
        let kept = kept.map(|step| step.unwrap().parse().unwrap());
        (best, step, kept)
    }

    #[test]
    fn a_run_ends_when_patience_does_with_the_best_it_had() {
        let run = |losses: &[f32]| follow(evaluator(10, Some(2), (0, 45)), losses);
        let better = [9.0, 5.0, 4.0, 3.0, 2.0, 1.0];
        assert_eq!(
            run(&better),
            (vec![10, 20, 30, 40, 45], 45, Some(45)),
            "to the end"
        );
        assert_eq!(
            run(&[9.0, 5.0, 4.0, 4.0, 6.0]),
            (vec![10, 20], 40, Some(20))
        );
        let late = [9.0, 5.0, 6.0, 4.0, 6.0, 5.0];
        assert_eq!(
            run(&late),
            (vec![10, 30], 45, Some(30)),
            "the last is not the best"
        );
        // A run that never gets better than the base ends with the least bad of what it learned.
        assert_eq!(run(&[1.0, 5.0, 6.0, 7.0]), (vec![10], 30, Some(10)));
        let forever = follow(evaluator(20, None, (0, 40)), &[1.0, 2.0, 3.0]);
        assert_eq!(forever, (vec![20], 40, None));
    }

    #[test]
    fn of_two_phases_the_second_is_judged() {
        let run = follow(
            evaluator(5, Some(1), (10, 40)),
            &[9.0, 8.0, 7.0, 8.0, 6.0, 6.5],
        );
        assert_eq!(run, (vec![15, 20], 25, Some(20)));
    }

    #[test]
    fn every_picture_is_measured_at_every_level_whatever_the_batch() {
        for at_a_time in [1, 3, 8] {
            let mut evaluator = evaluator(1, None, (0, 10));
            (evaluator.pictures, evaluator.at_a_time) = (2, at_a_time);
            let (mut seen, mut slices) = (Vec::new(), 0);
            loop {
                let points = evaluator.points(1000);
                assert!((1..=at_a_time).contains(&points.timesteps.len()));
                let losses = vec![slices.into(); points.timesteps.len()];
                seen.extend(points.timesteps.iter().map(|&t| (points.picture, t)));
                slices += 1;
                let found = evaluator.take(0, losses, || Ok::<_, ()>(Values::new()));
                if found.unwrap().is_some() {
                    break;
                }
            }
            let levels = [62, 187, 312, 437, 562, 687, 812, 937];
            let expected = (0..2).flat_map(|picture| levels.map(|t| (picture, t)));
            assert_eq!(seen, expected.collect::<Vec<_>>());
        }
    }
}
