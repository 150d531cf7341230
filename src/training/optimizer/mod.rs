//! Optimisers: from gradients to new values, on plain slices in host memory.
//!
//! What is trained is small (an adapter of rank 8 for SD 1.5 has 1.6 million numbers), so one path for
//! every device is fast enough, means one result on every device, and leaves the whole state open to
//! a checkpoint: [`Optimizer::state`] and [`Optimizer::load`] bring back every bit of it. Sums are
//! taken in a fixed order.

mod adamw;
mod clip;
#[cfg(test)]
mod golden_tests;
mod prodigy;
mod quantised;
mod schedule;
mod state;
mod sums;

use serde::{Deserialize, Serialize};

use adamw::AdamW;
use prodigy::Prodigy;
use state::Shelf;

pub use clip::clip;
pub use schedule::RateSchedule;
pub use state::{State, StateTensor};

/// One tensor that is trained.
#[derive(Debug)]
pub struct Param<'a> {
    pub name: &'a str,
    pub values: &'a mut [f32],
    /// Changed by [`clip`] alone.
    pub gradient: &'a mut [f32],
    /// Of this step, the schedule's multiplier in it.
    pub learning_rate: f64,
}

/// Which rule turns gradients into changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum Rule {
    /// Loshchilov & Hutter 2019, with the arithmetic of `torch.optim.AdamW`.
    AdamW,
    /// The same, with moments kept in eight bits (Dettmers et al. 2022).
    AdamW8bit,
    /// Mishchenko & Defazio 2024: finds the size of its steps by itself; the learning rate is a
    /// factor of it, usually 1.
    Prodigy,
}

/// A rule and its constants.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub rule: Rule,
    /// How slowly the mean of the gradients is forgotten.
    pub beta1: f64,
    /// How slowly the mean of their squares is forgotten.
    pub beta2: f64,
    /// Added to the root of the second moment, after its correction.
    pub eps: f64,
    /// Share of the values lost at each step, times the learning rate.
    pub weight_decay: f64,
}

/// Why no step was made, or no state taken over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptimizerError {
    #[error(
        "the gradient of `{name}` has a value that is not finite; lower the learning rate, or \
         train in f32"
    )]
    NotFinite { name: String },
    #[error("the optimiser was made for {expected}, and was given {found}")]
    Parameters { expected: String, found: String },
    #[error("prodigy takes one learning rate for all parameters; `{name}` has another")]
    Rates { name: String },
    #[error("the optimiser's state `{key}` {reason}")]
    State { key: String, reason: String },
}

/// A rule with what it remembers of every parameter.
#[derive(Debug)]
pub struct Optimizer {
    settings: Settings,
    /// Names and sizes, in the order in which sums are taken.
    parameters: Vec<(String, usize)>,
    steps: u64,
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    AdamW(AdamW),
    Prodigy(Prodigy),
}

impl Optimizer {
    /// An optimiser for parameters of these names and sizes.
    pub fn new(settings: Settings, parameters: impl IntoIterator<Item = (String, usize)>) -> Self {
        let parameters: Vec<_> = parameters.into_iter().collect();
        let sizes = parameters.iter().map(|(_, size)| *size);
        let memory = match settings.rule {
            Rule::AdamW => Memory::AdamW(AdamW::new(sizes, false)),
            Rule::AdamW8bit => Memory::AdamW(AdamW::new(sizes, true)),
            Rule::Prodigy => Memory::Prodigy(Prodigy::new(sizes)),
        };
        Self {
            settings,
            parameters,
            steps: 0,
            memory,
        }
    }

    /// Steps made.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// How far Prodigy believes the solution is; one for the other rules.
    pub fn distance(&self) -> f64 {
        match &self.memory {
            Memory::AdamW(_) => 1.0,
            Memory::Prodigy(prodigy) => prodigy.distance(),
        }
    }

    /// One step. The parameters must be those it was made for, in the same order; their gradients
    /// are taken to be finite, which [`clip`] checks.
    pub fn step(&mut self, params: &mut [Param<'_>]) -> Result<(), OptimizerError> {
        self.check(params)?;
        match &mut self.memory {
            Memory::AdamW(adamw) => adamw.step(&self.settings, self.steps + 1, params),
            Memory::Prodigy(prodigy) => prodigy.step(&self.settings, params)?,
        }
        self.steps += 1;
        Ok(())
    }

    /// Everything it remembers, by name.
    pub fn state(&self) -> State {
        let mut state = State::new();
        state.insert(STEPS.into(), StateTensor::of_u64(self.steps));
        match &self.memory {
            Memory::AdamW(adamw) => adamw.save(&self.parameters, &mut state),
            Memory::Prodigy(prodigy) => prodigy.save(&self.parameters, &mut state),
        }
        state
    }

    /// Takes over what [`Optimizer::state`] gave, of an optimiser made with the same arguments.
    ///
    /// After an error the optimiser is of no use.
    pub fn load(&mut self, state: State) -> Result<(), OptimizerError> {
        let mut shelf = Shelf(state);
        self.steps = shelf.take_u64(STEPS)?;
        match &mut self.memory {
            Memory::AdamW(adamw) => adamw.load(&self.parameters, &mut shelf)?,
            Memory::Prodigy(prodigy) => prodigy.load(&self.parameters, &mut shelf)?,
        }
        shelf.must_be_empty()
    }

    fn check(&self, params: &[Param<'_>]) -> Result<(), OptimizerError> {
        let differ = |expected, found| Err(OptimizerError::Parameters { expected, found });
        if params.len() != self.parameters.len() {
            return differ(
                format!("{} parameters", self.parameters.len()),
                format!("{}", params.len()),
            );
        }
        for (param, (name, size)) in params.iter().zip(&self.parameters) {
            let same_sizes = param.values.len() == *size && param.gradient.len() == *size;
            if param.name != name || !same_sizes {
                return differ(
                    format!("`{name}` of {size} values"),
                    format!(
                        "`{}` of {} values with a gradient of {}",
                        param.name,
                        param.values.len(),
                        param.gradient.len()
                    ),
                );
            }
        }
        Ok(())
    }
}

/// The key of the number of steps: no parameter's name is empty.
const STEPS: &str = "/steps";

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [(&str, usize); 3] = [("down", 5000), ("up", 300), ("one", 1)];

    fn settings(rule: Rule) -> Settings {
        Settings {
            rule,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 1e-2,
        }
    }

    fn new(rule: Rule) -> Optimizer {
        Optimizer::new(
            settings(rule),
            SIZES.map(|(name, size)| (name.into(), size)),
        )
    }

    fn start() -> Vec<Vec<f32>> {
        SIZES.map(|(_, size)| wave(size, 0)).to_vec()
    }

    /// Numbers without a pattern that matters.
    fn wave(size: usize, step: usize) -> Vec<f32> {
        (0..size)
            .map(|i| ((i * 7 + step * 13) as f32 * 0.37).sin() * 0.01)
            .collect()
    }

    fn step(optimizer: &mut Optimizer, values: &mut [Vec<f32>], number: usize, rate: f64) {
        let mut gradients: Vec<Vec<f32>> = values
            .iter()
            .map(|values| {
                let noise = wave(values.len(), number + 1);
                values.iter().zip(noise).map(|(v, n)| v + n).collect()
            })
            .collect();
        let mut params: Vec<Param<'_>> = SIZES
            .iter()
            .zip(values.iter_mut().zip(&mut gradients))
            .map(|((name, _), (values, gradient))| Param {
                name,
                values,
                gradient,
                learning_rate: rate,
            })
            .collect();
        optimizer.step(&mut params).unwrap();
    }

    #[test]
    fn a_run_cut_in_two_by_its_state_is_the_same_to_the_bit() {
        for rule in [Rule::AdamW, Rule::AdamW8bit, Rule::Prodigy] {
            for cut in [0, 1, 7] {
                let (mut whole, mut values) = (new(rule), start());
                let (mut first, mut cut_values) = (new(rule), start());
                for number in 0..12 {
                    step(&mut whole, &mut values, number, 0.01);
                }
                for number in 0..cut {
                    step(&mut first, &mut cut_values, number, 0.01);
                }
                let mut second = new(rule);
                second.load(first.state()).unwrap();
                drop(first);
                for number in cut..12 {
                    step(&mut second, &mut cut_values, number, 0.01);
                }
                assert_eq!(values, cut_values, "{rule:?} cut after {cut}");
                assert_eq!(whole.state(), second.state(), "{rule:?} cut after {cut}");
                assert_eq!(second.steps(), 12);
            }
        }
    }

    #[test]
    fn a_state_of_another_optimiser_is_refused_by_its_key() {
        let adamw = new(Rule::AdamW).state();
        let error = new(Rule::Prodigy).load(adamw.clone()).unwrap_err();
        assert!(error.to_string().contains("is missing"), "{error}");
        let error = new(Rule::AdamW8bit).load(adamw.clone()).unwrap_err();
        assert!(error.to_string().contains("`down/"), "{error}");

        let mut more = adamw.clone();
        more.insert("ghost/m".into(), StateTensor::of_u64(1));
        let error = new(Rule::AdamW).load(more).unwrap_err();
        assert!(error.to_string().contains("`ghost/m`"), "{error}");

        let mut other_size = adamw.clone();
        other_size.insert("up/v".into(), StateTensor::of_f32(&[0.0; 299]));
        let error = new(Rule::AdamW).load(other_size).unwrap_err();
        assert!(error.to_string().contains("`up/v`"), "{error}");
        assert!(error.to_string().contains("299"), "{error}");

        let mut other_type = adamw;
        other_type.insert("up/v".into(), StateTensor::of_f64(0.0));
        let error = new(Rule::AdamW).load(other_type).unwrap_err();
        assert!(error.to_string().contains("F64"), "{error}");
    }

    #[test]
    fn parameters_in_another_order_are_refused() {
        let mut optimizer = new(Rule::AdamW);
        let (mut a, mut b) = (vec![0.0; 300], vec![0.0; 300]);
        let mut params = [Param {
            name: "up",
            values: &mut a,
            gradient: &mut b,
            learning_rate: 1.0,
        }];
        let error = optimizer.step(&mut params).unwrap_err();
        assert!(error.to_string().contains("3 parameters"), "{error}");
        assert_eq!(optimizer.steps(), 0);
    }

    #[test]
    fn eight_bits_go_where_thirty_two_go() {
        let run = |rule| {
            let (mut optimizer, mut values) = (new(rule), start());
            for number in 0..200 {
                step(&mut optimizer, &mut values, number, 1e-4);
            }
            values
        };
        let (exact, eight) = (run(Rule::AdamW), run(Rule::AdamW8bit));
        // The small tensors are not quantised at all.
        assert_eq!(exact[1..], eight[1..]);
        let distance = |a: &[f32], b: &[f32]| -> f64 {
            let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
            squares.sum::<f64>().sqrt()
        };
        let way = distance(&start()[0], &exact[0]);
        let apart = distance(&exact[0], &eight[0]);
        assert!(apart > 0.0 && apart < 0.1 * way, "{apart} of {way}");
    }

    #[test]
    fn prodigy_finds_the_scale_of_its_steps_and_refuses_two_rates() {
        // ½·|x - 3|² from 0: the distance to the solution is 3 in every coordinate.
        let mut optimizer = Optimizer::new(
            Settings {
                weight_decay: 0.0,
                ..settings(Rule::Prodigy)
            },
            [("x".into(), 4), ("y".into(), 2)],
        );
        let (mut x, mut y) = (vec![0.0f32; 4], vec![0.0f32; 2]);
        let mut go = |rates: [f64; 2]| {
            let mut gx: Vec<f32> = x.iter().map(|x| x - 3.0).collect();
            let mut gy: Vec<f32> = y.iter().map(|y| y - 3.0).collect();
            let mut params = [
                Param {
                    name: "x",
                    values: &mut x,
                    gradient: &mut gx,
                    learning_rate: rates[0],
                },
                Param {
                    name: "y",
                    values: &mut y,
                    gradient: &mut gy,
                    learning_rate: rates[1],
                },
            ];
            optimizer.step(&mut params).map(|()| optimizer.distance())
        };
        for _ in 0..1500 {
            go([1.0, 1.0]).unwrap();
        }
        let distance = go([1.0, 1.0]).unwrap();
        assert!((0.03..=3.1).contains(&distance), "{distance}");
        let error = go([1.0, 0.5]).unwrap_err();
        assert_eq!(error, OptimizerError::Rates { name: "y".into() });
        assert!(
            x.iter().chain(&y).all(|x| (x - 3.0).abs() < 0.05),
            "{x:?} {y:?}"
        );
    }
}
