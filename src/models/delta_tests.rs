//! Deltas beside the weights against the same deltas merged into them, and the promises about bits.

use std::{collections::HashMap, sync::Arc};

use candle_core::{DType, Device, Result, Tensor};

use super::{
    DeltaBatch, DeltaSet, Deltas, Model, Site, SiteDelta, SiteKind, Term,
    test_folder::{Folder, TEXT, UNET},
};
use crate::noise::Generator;

/// Which forms of delta a set has.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// Low rank, another rank at each site.
    LowRank,
    /// In full, with an output scale and a bias.
    Everything,
}

/// A set over all sites of text encoder and UNet, and its `(scale, ΔW, bias)` by site.
struct Made {
    set: Arc<DeltaSet>,
    merged: HashMap<usize, (Option<Tensor>, Tensor, Option<Tensor>)>,
}

struct Maker(Generator);

impl Maker {
    fn randn(&mut self, shape: &[usize], size: f64) -> Tensor {
        let values = self.0.randn(shape.iter().product());
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        (tensor * size).unwrap()
    }

    fn make(mut self, model: &Model, form: Form) -> Result<Made> {
        let mut set = DeltaSet::default();
        let mut merged = HashMap::new();
        for (index, site) in model.sites().iter().enumerate() {
            if site.name.starts_with("vae.") || site.kind == SiteKind::Embedding {
                continue;
            }
            let output = site.weight_shape[0];
            let everything = form == Form::Everything;
            let bias = (everything && has_bias(site)).then(|| self.randn(&[output], 0.1));
            let norm = matches!(site.kind, SiteKind::GroupNorm | SiteKind::LayerNorm);
            let scale = (everything && !norm)
                .then(|| self.randn(&[output], 0.1) + 1.0)
                .transpose()?;
            let (term, weight) = match (norm, everything) {
                (true, false) => continue,
                (true, true) => (None, self.randn(&[output], 0.1)),
                (false, true) => {
                    let weight = self.randn(&site.weight_shape, 0.05);
                    (Some(Term::dense(site.geometry, weight.clone())?), weight)
                }
                (false, false) => {
                    let (term, weight) = self.low_rank(site, 1 + index % 5)?;
                    (Some(term), weight)
                }
            };
            let delta = SiteDelta {
                terms: term.into_iter().collect(),
                scale: scale.clone(),
                bias: bias.clone(),
                weight: norm.then(|| weight.clone()),
            };
            set.insert(index, delta);
            merged.insert(index, (scale, weight, bias));
        }
        assert!(set.len() > 40, "{}", set.len());
        Ok(Made {
            set: Arc::new(set),
            merged,
        })
    }

    fn low_rank(&mut self, site: &Site, rank: usize) -> Result<(Term, Tensor)> {
        let mut shape = site.weight_shape.clone();
        let output = std::mem::replace(&mut shape[0], rank);
        let down = self.randn(&shape, 0.2);
        let up = self.randn(&[output, rank], 0.2);
        let weight = up
            .matmul(&down.flatten_from(1)?)?
            .reshape(site.weight_shape.as_slice())?;
        let term = Term::low_rank(site.geometry, down, up)?;
        Ok((term, weight))
    }
}

/// The UNet's attention has no biases but at its end.
fn has_bias(site: &Site) -> bool {
    !["to_q", "to_k", "to_v"]
        .iter()
        .any(|end| site.name.ends_with(end))
}

/// The model with the deltas in its weights.
fn merge(name: &str, base: &Model, made: &Made) -> Model {
    let folder = Folder::copy(name);
    for (file, part) in [(UNET, "unet."), (TEXT, "text_encoder.")] {
        folder.tensors(file, |tensors| {
            for (index, site) in base.sites().iter().enumerate() {
                let (Some((scale, delta, bias)), Some(path)) =
                    (made.merged.get(&index), site.name.strip_prefix(part))
                else {
                    continue;
                };
                let key = format!("{path}.weight");
                let mut weight = tensors[&key].clone();
                if let Some(scale) = scale {
                    let mut shape = vec![1; weight.rank()];
                    shape[0] = scale.dims()[0];
                    weight = weight
                        .broadcast_mul(&scale.reshape(shape).unwrap())
                        .unwrap();
                }
                tensors.insert(key, (weight + delta).unwrap());
                if let Some(bias) = bias {
                    let key = format!("{path}.bias");
                    let sum = (&tensors[&key] + bias).unwrap();
                    tensors.insert(key, sum);
                }
            }
        });
    }
    folder.load(DType::F32).unwrap()
}

/// What goes into a forward of three rows.
struct Input {
    ids: Vec<Vec<u32>>,
    sample: Tensor,
    timesteps: Vec<f32>,
    contexts: Vec<Tensor>,
}

impl Input {
    fn new(model: &Model) -> Self {
        let mut maker = Maker(Generator::new(77));
        let (c, width) = (model.unet.in_channels(), model.unet.context_width());
        Self {
            ids: (0..3).map(|row| (row..row + 9).collect()).collect(),
            // Odd sides, so that a doubled picture is cut.
            sample: maker.randn(&[3, 7, 10, c], 1.0),
            timesteps: vec![999.0, 3.5, 400.0],
            contexts: [9, 4, 9].map(|t| maker.randn(&[t, width], 1.0)).into(),
        }
    }

    /// UNet and text encoder for some of the rows.
    fn run(&self, model: &Model, rows: &[usize], deltas: Deltas) -> [Tensor; 2] {
        let pick = |x: &Tensor| {
            let parts: Vec<_> = rows.iter().map(|&i| x.narrow(0, i, 1).unwrap()).collect();
            Tensor::cat(&parts, 0).unwrap()
        };
        let timesteps: Vec<f32> = rows.iter().map(|&i| self.timesteps[i]).collect();
        let contexts: Vec<_> = rows.iter().map(|&i| self.contexts[i].clone()).collect();
        let ids: Vec<_> = rows.iter().map(|&i| self.ids[i].clone()).collect();
        [
            model
                .unet
                .forward(&pick(&self.sample), &timesteps, &contexts, deltas)
                .unwrap(),
            model.text_encoder.forward(&ids, 1, deltas).unwrap(),
        ]
    }
}

fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    let norm = |x: Tensor| {
        let sum = x.to_dtype(DType::F64)?.sqr()?.sum_all()?;
        Ok::<_, candle_core::Error>(sum.to_scalar::<f64>()?.sqrt())
    };
    norm((found - expected).unwrap()).unwrap() / norm(expected.clone()).unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    let values: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn deltas_beside_the_weights_are_the_merged_ones() -> Result<()> {
    let name = "two-levels";
    let base = Folder::copy(name).load(DType::F32).unwrap();
    let input = Input::new(&base);
    for form in [Form::LowRank, Form::Everything] {
        let made = Maker(Generator::new(5)).make(&base, form)?;
        let merged = merge(name, &base, &made);
        let batch = DeltaBatch::new((0..3).map(|_| Some(made.set.clone())));
        let beside = input.run(&base, &[0, 1, 2], batch.deltas());
        let within = input.run(&merged, &[0, 1, 2], Deltas::NONE);
        let plain = input.run(&base, &[0, 1, 2], Deltas::NONE);
        for ((beside, within), plain) in beside.iter().zip(&within).zip(&plain) {
            let error = relative_error(beside, within);
            assert!(error < 1e-5, "{error:e}");
            assert!(relative_error(plain, within) > 0.05, "the deltas do much");
        }
    }
    Ok(())
}

#[test]
fn a_row_under_adapters_does_not_depend_on_its_neighbours() -> Result<()> {
    for name in ["two-levels", "three-levels"] {
        let model = Folder::copy(name).load(DType::F32).unwrap();
        let input = Input::new(&model);
        let before = input.run(&model, &[0, 1, 2], Deltas::NONE);
        let make = |seed, form| {
            Maker(Generator::new(seed))
                .make(&model, form)
                .map(|m| m.set)
        };
        let a = make(1, Form::LowRank)?;
        let b = make(2, Form::Everything)?;
        for sets in [
            [Some(&a), None, Some(&b)],
            [None, Some(&b), Some(&b)],
            [Some(&a), Some(&b), Some(&a)],
        ] {
            let batch = DeltaBatch::new(sets.map(|set| set.cloned()));
            let together = input.run(&model, &[0, 1, 2], batch.deltas());
            for (row, set) in sets.iter().enumerate() {
                let alone = DeltaBatch::new([set.cloned()]);
                let alone = input.run(&model, &[row], alone.deltas());
                for (alone, together) in alone.iter().zip(&together) {
                    let within = together.narrow(0, row, 1)?;
                    assert_eq!(bits(alone), bits(&within), "{name} row {row}");
                }
            }
        }
        let after = input.run(&model, &[0, 1, 2], Deltas::NONE);
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(bits(before), bits(after), "the base is as it was");
        }
    }
    Ok(())
}
