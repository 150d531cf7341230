//! What PyTorch, diffusers and PEFT computed for training, for ours to be compared with.
//!
//! The files under `tests/golden/training` come from `tests/reference/training.py`; what is in them
//! stands in `tests/reference/README.md`.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
};

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use crate::{
    adapters::{Adapter, Axis, Change, Delta, LowRank, Magnitude, TokenEmbedding},
    models::{Model, ModelSource},
};

#[derive(Debug, Deserialize)]
struct Index {
    cases: Vec<Case>,
}

/// One setting: its data, what is trained, the loss and the gradients.
#[derive(Debug, Deserialize)]
pub(super) struct Case {
    pub name: String,
    /// `two-levels` or `demo`.
    pub model: String,
    pub method: String,
    file: String,
    /// `epsilon` or `v-prediction`.
    pub objective: String,
    pub min_snr_gamma: Option<f64>,
    /// The second half of the batch is the class's, and counts so much.
    pub prior_weight: Option<f64>,
    pub dora: bool,
    pub rslora: bool,
    /// The batch has each of them equally often, in this order.
    pub captions: Vec<String>,
    /// A word of `vectors` rows behind the table of tokens.
    pub word: Option<String>,
    pub vectors: usize,
    pub trajectory: Option<Trajectory>,
    /// By the name in the file, without what tells the factors apart.
    pub layers: BTreeMap<String, Layer>,
    #[serde(skip)]
    pub tensors: HashMap<String, Tensor>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct Layer {
    pub rank: usize,
    pub alpha: f64,
}

/// How torch's AdamW (betas 0.9 and 0.999, epsilon 1e-8) went on from the initial values.
#[derive(Debug, Deserialize)]
pub(super) struct Trajectory {
    pub steps: usize,
    /// Learning rates of the parts, at their highest.
    pub unet: f64,
    pub text: f64,
    pub weight_decay: f64,
    /// The norm of all gradients together is at most this.
    pub clip: f64,
    pub schedule: String,
    pub warmup: usize,
    /// After which steps there are weights, `after-N/…`.
    pub kept: Vec<usize>,
}

/// Runs where there is room on the stack: candle walks the graph of a UNet recursively.
pub(super) fn with_room(run: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(256 << 20).spawn(run);
    if let Err(panic) = thread.unwrap().join() {
        std::panic::resume_unwind(panic);
    }
}

/// All cases, those of the demo model only where it is compiled in.
pub(super) fn cases() -> Vec<Case> {
    let folder = golden().join("training");
    let text = std::fs::read_to_string(folder.join("cases.json")).unwrap();
    let mut cases = serde_json::from_str::<Index>(&text).unwrap().cases;
    cases.retain(|case| case.model != "demo" || cfg!(feature = "demo-model"));
    for case in &mut cases {
        case.tensors =
            candle_core::safetensors::load(folder.join(&case.file), &Device::Cpu).unwrap();
    }
    cases
}

/// The case of a name, such as `two-levels-dora`.
pub(super) fn case(name: &str) -> Case {
    let mut cases = cases();
    let place = cases.iter().position(|case| case.name == name);
    cases.swap_remove(place.unwrap_or_else(|| panic!("no such case: {name}")))
}

/// The model of some cases, in f32 on the CPU.
pub(super) fn model(name: &str) -> Model {
    model_in(name, DType::F32)
}

pub(super) fn model_in(name: &str, dtype: DType) -> Model {
    let source = match name {
        "demo" => ModelSource::Demo,
        _ => ModelSource::Folder(golden().join("models").join(name)),
    };
    Model::load(&source, &Device::Cpu, dtype).unwrap()
}

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The site of a layer: PEFT names those of text encoders without `text_model`, as transformers 5 does.
pub(super) fn site(layer: &str) -> String {
    match layer.strip_prefix("text_encoder.") {
        Some(path) => format!("text_encoder.text_model.{path}"),
        None => layer.to_owned(),
    }
}

impl Case {
    pub fn tensor(&self, name: &str) -> &Tensor {
        let found = self.tensors.get(name);
        found.unwrap_or_else(|| panic!("{}: no tensor {name}", self.name))
    }

    /// What lies under a prefix, such as `initial` or `gradient`, by the names of an adapter's file.
    pub fn under(&self, prefix: &str) -> BTreeMap<String, Tensor> {
        let named = |(key, tensor): (&String, &Tensor)| {
            let name = key.strip_prefix(prefix)?.strip_prefix('/')?;
            Some((name.to_owned(), tensor.clone()))
        };
        self.tensors.iter().filter_map(named).collect()
    }

    /// Start, caption, end and padding, a row for each sample.
    pub fn ids(&self) -> Vec<Vec<u32>> {
        let ids = self.tensor("ids").to_dtype(DType::U32).unwrap();
        ids.to_vec2().unwrap()
    }

    /// A row of numbers in f64, from a tensor of any shape and type.
    pub fn numbers(&self, name: &str) -> Vec<f64> {
        flat(self.tensor(name))
    }

    /// What the model was to say: in the file where it is not just the noise.
    pub fn target(&self) -> &Tensor {
        match &*self.objective {
            "epsilon" => self.tensor("noise"),
            _ => self.tensor("target"),
        }
    }

    /// What a layer's product counts.
    pub fn scale(&self, layer: Layer) -> f64 {
        let rank = layer.rank as f64;
        layer.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// The values under a prefix as an adapter, as if it had been read from a file.
    pub fn adapter(&self, prefix: &str) -> Adapter {
        let mut values = self.under(prefix);
        let mut take = |name: String| {
            let value = values.remove(&name);
            value.unwrap_or_else(|| panic!("{}: no {prefix}/{name}", self.name))
        };
        let mut deltas = BTreeMap::new();
        for (name, &layer) in &self.layers {
            let down = take(format!("{name}.lora_A.weight"));
            let up = take(format!("{name}.lora_B.weight"))
                .flatten_from(1)
                .unwrap();
            assert_eq!(
                (down.dims()[0], up.dims()[1]),
                (layer.rank, layer.rank),
                "{name}"
            );
            let scale = self.scale(layer);
            let magnitude = self.dora.then(|| Magnitude {
                values: take(format!("{name}.lora_magnitude_vector"))
                    .flatten_all()
                    .unwrap(),
                axis: Axis::Rows,
            });
            let change = Change::LowRank(LowRank {
                down,
                up,
                mid: None,
                scale,
            });
            let delta = Delta {
                change: Some(change),
                magnitude,
                bias: None,
            };
            deltas.insert(site(name).into(), delta);
        }
        let word = |token: &String| TokenEmbedding {
            token: token.clone(),
            vectors: take(token.clone()),
        };
        let embeddings = self.word.iter().map(word).collect();
        assert!(
            values.is_empty(),
            "{}: left over: {:?}",
            self.name,
            values.keys()
        );
        Adapter::trained(deltas, embeddings)
    }
}

/// The norm of the difference is small beside that of the expected.
pub(super) fn assert_close(name: &str, ours: &Tensor, theirs: &Tensor, relative: f64) {
    assert_eq!(ours.dims(), theirs.dims(), "{name}");
    let (ours, theirs) = (flat(ours), flat(theirs));
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let apart = norm(&mut ours.iter().zip(&theirs).map(|(a, b)| a - b));
    let error = apart / norm(&mut theirs.iter().copied());
    // In this form so that NaN fails.
    assert!(
        error <= relative,
        "{name}: relative error {error:.2e}, more than {relative:.0e}"
    );
}

fn flat(x: &Tensor) -> Vec<f64> {
    let x = x.to_dtype(DType::F64).unwrap();
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        adapters::{Share, mix},
        models::DeltaBatch,
    };

    fn single_steps() -> impl Iterator<Item = Case> {
        cases().into_iter().filter(|case| case.trajectory.is_none())
    }

    fn trajectories() -> impl Iterator<Item = Case> {
        cases().into_iter().filter(|case| case.trajectory.is_some())
    }

    /// Cumulative products of `1 - beta` for SD's betas, which both models have.
    fn alphas() -> Vec<f64> {
        let (first, last) = (0.00085f64.sqrt(), 0.012f64.sqrt());
        let beta = |i: usize| (first + (last - first) * i as f64 / 999.0).powi(2);
        let product = |all: &mut f64, i| {
            *all *= 1.0 - beta(i);
            Some(*all)
        };
        (0..1000).scan(1.0, product).collect()
    }

    /// Mean squares of the difference, one for each sample.
    fn mean_squares(a: &Tensor, b: &Tensor) -> Vec<f64> {
        let squares = (a - b).unwrap().sqr().unwrap().flatten_from(1).unwrap();
        flat(&squares.mean(1).unwrap())
    }

    #[test]
    fn painting_with_the_initial_values_predicts_what_training_starts_from() {
        for name in ["two-levels", "demo"] {
            let Some(first) = single_steps().find(|case| case.model == name) else {
                continue;
            };
            let model = model(&first.model);
            for case in single_steps().filter(|case| case.model == name) {
                let adapter = case.adapter("initial");
                let share = Share {
                    adapter: &adapter,
                    unet: 1.0,
                    text: 1.0,
                };
                let (set, _) = mix(model.modules(), &[share]).unwrap();
                let rows = case.ids().len();
                let batch = DeltaBatch::new(vec![Some(Arc::new(set)); rows]);
                let more = adapter.embeddings.first().map(|word| &word.vectors);
                let embedded = model.text_encoder.embed(&case.ids(), more).unwrap();
                let hidden = model
                    .text_encoder
                    .encode(&embedded, 0, batch.deltas())
                    .unwrap();
                let contexts: Vec<Tensor> = (0..rows).map(|i| hidden.get(i).unwrap()).collect();
                let timesteps: Vec<f32> = case
                    .numbers("timesteps")
                    .into_iter()
                    .map(|t| t as f32)
                    .collect();
                let noisy = case.tensor("noisy");
                let ours = model
                    .unet
                    .forward(noisy, &timesteps, &contexts, batch.deltas())
                    .unwrap();
                let what = format!("{} prediction", case.name);
                assert_close(&what, &ours, case.tensor("prediction"), 1e-5);
                let squares = mean_squares(&ours, case.target());
                let loss: f64 = squares
                    .iter()
                    .zip(case.numbers("weights"))
                    .map(|(a, w)| a * w)
                    .sum();
                let theirs = case.numbers("loss")[0];
                assert!(
                    (loss / theirs - 1.0).abs() < 1e-5,
                    "{}: {loss}, not {theirs}",
                    case.name
                );
            }
        }
    }

    #[test]
    fn inputs_targets_and_weights_have_the_formulas_of_the_objective() {
        let alphas = alphas();
        for case in single_steps() {
            let levels: Vec<f64> = case
                .numbers("timesteps")
                .into_iter()
                .map(|t| alphas[t as usize])
                .collect();
            let n = levels.len();
            let column = |of: &dyn Fn(f64) -> f64| {
                let values: Vec<f32> = levels.iter().map(|&a| of(a) as f32).collect();
                Tensor::from_vec(values, (n, 1, 1, 1), &Device::Cpu).unwrap()
            };
            let (signal, noise) = (column(&f64::sqrt), column(&|a| (1.0 - a).sqrt()));
            let mixed = |a: &str, b: &str| -> (Tensor, Tensor) {
                let times = |x: &str, by| case.tensor(x).broadcast_mul(by).unwrap();
                (times(a, &signal), times(b, &noise))
            };
            let (x, e) = mixed("x0", "noise");
            let noisy = (x + e).unwrap();
            assert_close(&case.name, &noisy, case.tensor("noisy"), 1e-6);
            if case.objective == "v-prediction" {
                let (e, x) = mixed("noise", "x0");
                assert_close(&case.name, &(e - x).unwrap(), case.target(), 1e-6);
            }
            let weight = |(i, a): (usize, &f64)| match (case.prior_weight, case.min_snr_gamma) {
                (Some(prior), None) => (if i < n / 2 { 1.0 } else { prior }) / (n / 2) as f64,
                (None, Some(gamma)) => {
                    let snr = a / (1.0 - a);
                    snr.min(gamma) / (snr + 1.0) / n as f64
                }
                _ => 1.0 / n as f64,
            };
            let weights: Vec<f64> = levels.iter().enumerate().map(weight).collect();
            for (ours, theirs) in weights.iter().zip(case.numbers("weights")) {
                assert!(
                    (ours / theirs - 1.0).abs() < 1e-5,
                    "{}: {ours}, not {theirs}",
                    case.name
                );
            }
        }
    }

    #[test]
    fn every_value_has_a_gradient_of_its_shape_and_not_of_zeros() {
        let shapes = |tensors: BTreeMap<String, Tensor>| -> Vec<(String, Vec<usize>)> {
            tensors
                .into_iter()
                .map(|(name, t)| (name, t.dims().to_vec()))
                .collect()
        };
        for case in single_steps() {
            assert_eq!(case.name, format!("{}-{}", case.model, case.method));
            let initial = shapes(case.under("initial"));
            assert!(!initial.is_empty(), "{}", case.name);
            let mut kinds = vec!["gradient"];
            if case.model == "two-levels" {
                kinds.push("gradient64");
            }
            for kind in kinds {
                let gradients = case.under(kind);
                assert!(
                    gradients
                        .values()
                        .all(|g| flat(g).iter().any(|x| *x != 0.0))
                );
                assert_eq!(shapes(gradients), initial, "{} {kind}", case.name);
            }
            for (name, gradient) in case.under("gradient64") {
                assert_close(&name, &case.under("gradient")[&name], &gradient, 2e-5);
            }
        }
    }

    #[test]
    fn ids_are_those_of_our_tokenizer() {
        for case in cases() {
            let model = model(&case.model);
            let (tokenizer, first) = (&model.tokenizer, model.text_encoder.vocabulary() as u32);
            let rows = case.ids();
            let each = rows.len() / case.captions.len();
            for (row, ids) in rows.iter().enumerate() {
                let mut ours = vec![tokenizer.bos()];
                let caption = &case.captions[row / each];
                let word = case.word.as_deref().unwrap_or("<no word>");
                for (i, text) in caption.split(word).enumerate() {
                    if i > 0 {
                        ours.extend(first..first + case.vectors as u32);
                    }
                    ours.extend(tokenizer.encode(text).unwrap());
                }
                ours.push(tokenizer.eos());
                ours.resize(model.text_encoder.max_positions(), tokenizer.pad());
                assert_eq!(&ours, ids, "{}: {caption}", case.name);
            }
        }
    }

    #[test]
    fn a_trajectory_warms_up_is_clipped_now_and_then_and_moves_every_tensor() {
        for case in trajectories() {
            let t = case.trajectory.as_ref().unwrap();
            assert_eq!(
                (&*t.schedule, t.weight_decay),
                ("cosine", 1e-2),
                "{}",
                case.name
            );
            let rates = case.numbers("rates");
            for (step, pair) in rates.chunks(2).enumerate() {
                let (step, warmup) = (step as f64, t.warmup as f64);
                let done = (step - warmup) / (t.steps as f64 - warmup);
                let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
                let factor = if done < 0.0 { step / warmup } else { cosine };
                for (found, rate) in pair.iter().zip([t.unet, t.text]) {
                    assert!(
                        (found - rate * factor).abs() < 1e-12,
                        "{}: {step}",
                        case.name
                    );
                }
            }
            let clipped = case
                .numbers("norms")
                .iter()
                .filter(|n| **n > t.clip)
                .count();
            assert!((5..=15).contains(&clipped), "{}: {clipped}", case.name);
            let losses = case.numbers("losses");
            assert_eq!((losses.len(), rates.len()), (t.steps, 2 * t.steps));
            assert_eq!(t.kept.last(), Some(&t.steps));
            let initial = case.under("initial");
            for step in &t.kept {
                let after = case.under(&format!("after-{step}"));
                assert!(after.keys().eq(initial.keys()), "{}", case.name);
                assert!(
                    after
                        .iter()
                        .all(|(name, value)| flat(value) != flat(&initial[name]))
                );
            }
        }
    }

    #[test]
    #[should_panic(expected = "a.lora_B.weight: relative error 1.00e-1, more than 1e-4")]
    fn a_tensor_too_far_away_is_named() {
        let theirs = Tensor::new(&[3f32, 4.0], &Device::Cpu).unwrap();
        let ours = Tensor::new(&[3f32, 4.5], &Device::Cpu).unwrap();
        assert_close("a.lora_B.weight", &ours, &theirs, 1e-4);
    }

    #[test]
    fn a_case_is_found_by_its_name() {
        assert!(case("two-levels-dora").dora);
    }
}
