//! Whether and how a run is measured on the way.

use super::{
    Evaluations, Limits, TrainingDraft,
    check::{fault, whole},
};
use crate::pipeline::request::InvalidField;

const MOST_HELD_OUT: u32 = 200;
const MOST_PATIENCE: u32 = 1000;
/// Evaluations of a run where nobody says how often.
const EVALUATIONS: u32 = 10;

impl TrainingDraft {
    /// Any of the three fields switches evaluations on: a few pictures are all needed for training.
    pub(super) fn check_evaluations(
        &self,
        steps: u32,
        limits: &Limits,
    ) -> Result<Option<Evaluations>, InvalidField> {
        let patience = whole(
            "early_stop_patience",
            self.early_stop_patience,
            0,
            (0, MOST_PATIENCE),
            "it counts evaluations; 0 switches it off",
        )?;
        let patience = (patience > 0).then_some(patience);
        let every = whole(
            "evaluate_every",
            self.evaluate_every,
            steps.div_ceil(EVALUATIONS),
            (1, limits.max_steps),
            "it counts steps; leave it and `held_out` out for no evaluations",
        )?;
        let wanted = patience.is_some() || self.evaluate_every.is_some();
        match self.held_out {
            None if !wanted => Ok(None),
            None => Ok(Some(Evaluations {
                held_out: None,
                every,
                patience,
            })),
            Some(0) if !wanted => Ok(None),
            Some(0) => Err(fault(
                "held_out",
                "must be above 0 with `early_stop_patience` or `evaluate_every`: what is learned by heart \
                 measures nothing; leave it out for one picture in ten, or leave the others out",
            )),
            given => Ok(Some(Evaluations {
                held_out: Some(whole(
                    "held_out",
                    given,
                    0,
                    (0, MOST_HELD_OUT),
                    "one picture in ten is usual",
                )?),
                every,
                patience,
            })),
        }
    }
}
