//! Gradients against differences of the loss itself, on the odd tiny model.
//!
//! The loss is that of training, with the model in f64 and the variables in f32 as they always are. A
//! direction moves all tensors of one kind at once; what is compared with the change of the loss is the
//! gradient's product with the way that the f32 values really went, so that their rounding is no error.
//! Differences at three distances are extrapolated to none (Romberg), which leaves an error far below
//! that of the arithmetic: numbers of the delta are scaled in f32 before they are widened (1e-7 of a
//! value, over a way of a hundredth of it and more).
//!
//! What this shows: that the ways back composed for f64 (those of GPUs too) and the kernels' ways in f32
//! are the derivative of this loss, in every kind of tensor of every method, without a word of PyTorch's.
//! What it cannot: it finds an error in a tensor by that tensor's share of its kind's slope, so that one
//! that hardly matters could be wrong (the golden gradients have each tensor by itself); and it says
//! nothing of what the loss ought to be.
//!
//! Under DoRA the lengths of rows count as constant, so that plain differences of A and B are not
//! the gradient. There the magnitudes move along with the lengths, which leaves their ratio as it was.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use super::{
    golden::{Case, cases, model, model_in, site, with_room},
    gradient_tests::{levels, passage},
    random::{Draw, Purpose},
    step::{self, Passage, gradients},
    trainable::{Parameter, Trainable},
};
use crate::{models::Model, ops::Collected, schedulers::NoiseLevels};

/// Distances at which the loss is taken, in units of the tensors' own sizes.
const DISTANCES: [f64; 3] = [1.0 / 32.0, 1.0 / 64.0, 1.0 / 128.0];
const DIRECTIONS: u64 = 2;

/// One case, in f64.
struct Probe<'a> {
    case: &'a Case,
    model: &'a Model,
    levels: NoiseLevels,
    trainable: Trainable,
    parameters: Vec<Parameter>,
    passage: Passage,
    start: Vec<Vec<f32>>,
}

impl<'a> Probe<'a> {
    fn new(case: &'a Case, model: &'a Model) -> Self {
        let trainable = Trainable::new(model.modules(), &case.adapter("initial")).unwrap();
        let parameters = trainable.parameters();
        Self {
            case,
            model,
            levels: levels(model, case),
            start: parameters.iter().map(|p| flat(&p.var)).collect(),
            trainable,
            parameters,
            passage: passage(case, false),
        }
    }

    fn gradients(&self) -> Vec<Vec<f32>> {
        let (model, levels) = (self.model, &self.levels);
        let (trainable, parameters) = (&self.trainable, &self.parameters);
        gradients(model, levels, trainable, parameters, &self.passage)
            .unwrap()
            .1
    }

    fn set(&self, values: &[Vec<f32>]) {
        for (parameter, values) in self.parameters.iter().zip(values) {
            let var = &parameter.var;
            let values = Tensor::from_slice(values, var.shape(), var.device()).unwrap();
            var.set(&values).unwrap();
        }
    }

    /// The loss with these values.
    fn loss(&self, values: &[Vec<f32>]) -> f64 {
        self.set(values);
        let none = Collected::new([]);
        let loss = step::loss(
            self.model,
            &self.levels,
            &self.trainable,
            &self.passage,
            &none,
        );
        let loss = loss.unwrap().to_scalar::<f64>().unwrap();
        self.set(&self.start);
        loss
    }

    /// The start, moved.
    fn moved(&self, direction: &[Vec<f64>], distance: f64) -> Vec<Vec<f32>> {
        let tensors = self.start.iter().zip(direction);
        let mut values: Vec<Vec<f32>> = tensors
            .map(|(start, way)| {
                let numbers = start.iter().zip(way);
                numbers
                    .map(|(x, way)| (f64::from(*x) + distance * way) as f32)
                    .collect()
            })
            .collect();
        for (i, parameter) in self.parameters.iter().enumerate() {
            let Some(layer) = parameter.name.strip_suffix(".lora_magnitude_vector") else {
                continue;
            };
            let before = self.lengths(layer, &self.start);
            let lengths = before.iter().zip(self.lengths(layer, &values));
            for (magnitude, (before, after)) in values[i].iter_mut().zip(lengths) {
                *magnitude = (f64::from(*magnitude) * after / before) as f32;
            }
        }
        values
    }

    /// The lengths of the rows of `W + ΔW` at a site.
    fn lengths(&self, name: &str, values: &[Vec<f32>]) -> Vec<f64> {
        let modules = self.model.modules();
        let index = modules.sites().iter().position(|s| &*s.name == name);
        let base = modules.weight(index.unwrap()).unwrap();
        let base = base.flatten_from(1).unwrap().to_vec2::<f64>().unwrap();
        let of = |end: &str| {
            let name = format!("{name}.{end}");
            let at = self.parameters.iter().position(|p| p.name == name);
            &values[at.unwrap()]
        };
        let (down, up) = (of("lora_A.weight"), of("lora_B.weight"));
        let mut layers = self.case.layers.iter();
        let (_, layer) = layers.find(|(layer, _)| site(layer) == name).unwrap();
        let scale = self.case.scale(*layer);
        let rows = base.iter().zip(up.chunks(layer.rank));
        rows.map(|(row, up)| {
            let changed = row.iter().enumerate().map(|(k, w)| {
                let columns = up.iter().enumerate();
                let delta: f64 = columns
                    .map(|(r, up)| f64::from(*up) * f64::from(down[r * row.len() + k]))
                    .sum();
                (w + scale * delta).powi(2)
            });
            changed.sum::<f64>().sqrt()
        })
        .collect()
    }

    /// How far the slopes that these gradients promise along a direction are from the loss's own, by what
    /// such slopes are in size.
    fn error(&self, gradients: &[Vec<f32>], kind: &str, number: u64) -> f64 {
        let mut direction = Vec::new();
        for (i, (parameter, start)) in self.parameters.iter().zip(&self.start).enumerate() {
            let size = match self.kind(parameter) == kind {
                true => rms(start),
                false => 0.0,
            };
            let draw = Draw::new(7, number, i as u64, Purpose::Noise).normal(start.len());
            direction.push(
                draw.iter()
                    .map(|x| f64::from(*x) * size)
                    .collect::<Vec<_>>(),
            );
        }
        let rests = DISTANCES.map(|distance| {
            let [there, back] = [distance, -distance].map(|d| self.moved(&direction, d));
            let change = self.loss(&there) - self.loss(&back);
            let mut promised = 0.0;
            for (parameter, (gradient, (a, b))) in self
                .parameters
                .iter()
                .zip(gradients.iter().zip(there.iter().zip(&back)))
            {
                // A magnitude that only kept a ratio is no way.
                if self.kind(parameter) == kind {
                    let ways = a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b));
                    promised += gradient
                        .iter()
                        .zip(ways)
                        .map(|(g, w)| f64::from(*g) * w)
                        .sum::<f64>();
                }
            }
            (change - promised) / (2.0 * distance)
        });
        // Errors of the order of the distance's square and fourth power go.
        let [a, b, c] = rests;
        let (ab, bc) = ((4.0 * b - a) / 3.0, (4.0 * c - b) / 3.0);
        let rest = (16.0 * bc - ab) / 15.0;
        let all = gradients.iter().flatten().zip(direction.iter().flatten());
        let usual = all
            .map(|(g, d)| (f64::from(*g) * d).powi(2))
            .sum::<f64>()
            .sqrt();
        (rest / usual).abs()
    }

    /// What a tensor is, such as `UNet lora_A.weight 4`: its part, its place and its dimensions.
    fn kind(&self, parameter: &Parameter) -> String {
        let ends = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"];
        let end = ends.into_iter().find(|end| parameter.name.ends_with(end));
        // Both factors of a convolution by the first's.
        let down = parameter.name.replace("lora_B", "lora_A");
        let down = self.parameters.iter().find(|p| p.name == down);
        let rank = down.map_or(1, |p| p.var.rank());
        format!("{:?} {} {rank}", parameter.part, end.unwrap_or("rows"))
    }

    /// Every kind there is, with the number of its tensors.
    fn kinds(&self) -> BTreeMap<String, usize> {
        let mut kinds = BTreeMap::new();
        for parameter in &self.parameters {
            *kinds.entry(self.kind(parameter)).or_default() += 1;
        }
        kinds
    }
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.detach().flatten_all().unwrap().to_vec1().unwrap()
}

fn rms(values: &[f32]) -> f64 {
    let squares: f64 = values.iter().map(|x| f64::from(*x).powi(2)).sum();
    (squares / values.len() as f64).sqrt()
}

fn tiny() -> Vec<Case> {
    let mut cases = cases();
    cases.retain(|case| case.model == "two-levels" && case.trajectory.is_none());
    cases
}

#[test]
fn gradients_of_every_method_are_slopes_of_the_loss() {
    with_room(|| {
        let (wide, single) = (model_in("two-levels", DType::F64), model("two-levels"));
        let mut found = Vec::new();
        for case in &tiny() {
            let probe = Probe::new(case, &wide);
            let exact = probe.gradients();
            let kernels = Probe::new(case, &single).gradients();
            for kind in probe.kinds().into_keys() {
                for number in 0..DIRECTIONS {
                    let errors = [&exact, &kernels].map(|g| probe.error(g, &kind, number));
                    let what = format!("{} {kind}: {errors:?}", case.name);
                    // The ratio of magnitude and length, in f32, scales the module's own result too.
                    let [wide, single] = if case.dora { [2e-4; 2] } else { [1e-5, 1e-4] };
                    assert!(errors[0] < wide, "{what} in f64");
                    assert!(errors[1] < single, "{what} in f32");
                }
                found.push(kind);
            }
        }
        found.sort();
        found.dedup();
        let all = [
            "Embedding rows 2",
            "Text lora_A.weight 2",
            "Text lora_B.weight 2",
            "UNet lora_A.weight 2",
            "UNet lora_A.weight 4",
            "UNet lora_B.weight 2",
            "UNet lora_B.weight 4",
            "UNet lora_magnitude_vector 1",
        ];
        assert_eq!(found, all);
    });
}

#[test]
fn a_gradient_that_is_off_by_a_hundredth_is_no_slope() {
    with_room(|| {
        let wide = model_in("two-levels", DType::F64);
        let cases = tiny();
        let probe = Probe::new(&cases[0], &wide);
        let mut wrong = probe.gradients();
        wrong.iter_mut().flatten().for_each(|g| *g *= 1.01);
        for kind in probe.kinds().into_keys() {
            let worst = (0..DIRECTIONS).map(|number| probe.error(&wrong, &kind, number));
            assert!(worst.fold(0.0, f64::max) > 1e-3, "{kind}");
        }
    });
}
