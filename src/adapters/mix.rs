//! Adapters of one request, mixed for one model: what [`models`](crate::models) takes beside its
//! weights.
//!
//! Low-rank factors of several adapters are joined along the rank, with strength and scale folded
//! into the second factor, so that a site costs two products however many adapters there are. Every
//! other form is composed and summed up in full.
//!
//! A magnitude over rows (DoRA) stays cheap: at strength `m`, with the row's ratio `ρ` of wanted to
//! present length, `W + m(ρ(W + ΔW) − W)` is the base's result times `1 + m(ρ − 1)`, and a low-rank
//! term whose rows are multiplied with `mρ`. Over columns, as with (IA)³ over inputs, the difference
//! has the size of the weight, and is held so.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};

use super::{Adapter, Axis, Change, Delta, LowRank, Magnitude};
use crate::models::{DeltaSet, Modules, Site, SiteDelta, SiteKind, Term};

/// An adapter of a request, and how much of it is wanted; 1 is what it was trained for, less than 0
/// the opposite.
#[derive(Debug, Clone, Copy)]
pub struct Share<'a> {
    pub adapter: &'a Adapter,
    /// In the UNet.
    pub unet: f64,
    /// In the text encoders.
    pub text: f64,
}

/// Why adapters cannot be mixed.
#[derive(Debug, thiserror::Error)]
pub enum MixError {
    #[error("`{site}`: the model has no such module")]
    NoSuchSite { site: String },
    #[error("`{site}`: {source}")]
    Tensor {
        site: String,
        source: candle_core::Error,
    },
}

/// The mixture of `shares` for a model, on its device and in its arithmetic, and the bytes it takes
/// there. A share of strength 0 adds nothing.
///
/// # Errors
/// An adapter read for another model, or a device that fails.
pub fn mix(modules: &Modules, shares: &[Share]) -> std::result::Result<(DeltaSet, u64), MixError> {
    let sites = modules.sites();
    let indices: HashMap<&str, usize> = sites
        .iter()
        .enumerate()
        .map(|(index, site)| (&*site.name, index))
        .collect();
    let mut mixtures: HashMap<usize, Mixture> = HashMap::new();
    for share in shares {
        for (name, delta) in &share.adapter.deltas {
            let strength = match name.starts_with("unet.") {
                true => share.unet,
                false => share.text,
            };
            if strength == 0.0 {
                continue;
            }
            let Some(&index) = indices.get(&**name) else {
                return Err(MixError::NoSuchSite {
                    site: name.to_string(),
                });
            };
            let site = &sites[index];
            mixtures
                .entry(index)
                .or_default()
                .add(site, delta, strength, || modules.weight(index))
                .map_err(|e| fault(site, e))?;
        }
    }
    let mut set = DeltaSet::default();
    let mut numbers = 0;
    for (index, mixture) in mixtures {
        let site = &sites[index];
        numbers += mixture.numbers(site);
        let delta = mixture.finish(site, &modules.device, modules.dtype);
        set.insert(index, delta.map_err(|e| fault(site, e))?);
    }
    Ok((set, (numbers * modules.dtype.size_in_bytes()) as u64))
}

fn fault(site: &Site, source: candle_core::Error) -> MixError {
    MixError::Tensor {
        site: site.name.to_string(),
        source,
    }
}

/// What the adapters so far add at one site; f32 on the CPU.
#[derive(Default)]
struct Mixture {
    downs: Vec<Tensor>,
    /// Strength and scale folded in.
    ups: Vec<Tensor>,
    dense: Option<Tensor>,
    scale: Option<Tensor>,
    bias: Option<Tensor>,
}

impl Mixture {
    /// `base` is the site's own weight, asked for only where the delta depends on it.
    fn add(
        &mut self,
        site: &Site,
        delta: &Delta,
        strength: f64,
        base: impl FnOnce() -> Result<Tensor>,
    ) -> Result<()> {
        let delta = &delta.wide()?;
        if let Some(bias) = &delta.bias {
            plus(&mut self.bias, (bias * strength)?)?;
        }
        let shape = &site.weight_shape;
        let rows = match (&delta.change, &delta.magnitude) {
            (
                Some(Change::Gain {
                    values,
                    axis: Axis::Rows,
                }),
                None,
            ) => return self.gain((values.flatten_all()? * strength)?),
            (Some(Change::Gain { .. }), _)
            | (
                _,
                Some(Magnitude {
                    axis: Axis::Columns,
                    ..
                }),
            ) => {
                let weight = delta.weight_with(&base()?)?;
                return plus(&mut self.dense, (weight * strength)?);
            }
            (change, Some(magnitude)) => {
                // In f64: the ratio is nearly one, and what counts is its difference from it.
                let base = base()?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
                let sum = match change {
                    Some(change) => (base + change.compose(shape)?.to_dtype(DType::F64)?)?,
                    None => base,
                };
                let ratio = magnitude.ratio(&sum)?;
                let gain = ((&ratio - 1.0)? * strength)?;
                self.gain(gain.to_dtype(DType::F32)?)?;
                Some(ratio.to_dtype(DType::F32)?)
            }
            (_, None) => None,
        };
        match &delta.change {
            Some(Change::LowRank(low)) if low.mid.is_none() => {
                self.low_rank(low, strength, rows.as_ref())
            }
            Some(change) => {
                let mut weight = change.compose(shape)?;
                if let Some(rows) = rows {
                    weight = weight.broadcast_mul(&Axis::Rows.beside(&rows, shape.len())?)?;
                }
                plus(&mut self.dense, (weight * strength)?)
            }
            None => Ok(()),
        }
    }

    /// `rows` are factors of the output channels.
    fn low_rank(&mut self, low: &LowRank, strength: f64, rows: Option<&Tensor>) -> Result<()> {
        let up = (&low.up * (low.scale * strength))?;
        self.ups.push(match rows {
            Some(rows) => up.broadcast_mul(&rows.unsqueeze(1)?)?,
            None => up,
        });
        self.downs.push(low.down.clone());
        Ok(())
    }

    /// Adds to the factors of the output channels, which begin at one.
    fn gain(&mut self, gain: Tensor) -> Result<()> {
        if self.scale.is_none() {
            self.scale = Some(gain.ones_like()?);
        }
        plus(&mut self.scale, gain)
    }

    /// How many numbers it will hold.
    fn numbers(&self, site: &Site) -> usize {
        let count = |tensors: &[Tensor]| tensors.iter().map(Tensor::elem_count).sum::<usize>();
        let mut kernels =
            count(&self.downs) + self.dense.iter().map(Tensor::elem_count).sum::<usize>();
        if site.geometry.is_some_and(|geometry| geometry.upsampled) {
            // Four kernels of 2x2 beside the one of 3x3.
            kernels += kernels * 16 / 9;
        }
        let vectors = self.scale.iter().chain(&self.bias).map(Tensor::elem_count);
        kernels + count(&self.ups) + vectors.sum::<usize>()
    }

    fn finish(self, site: &Site, device: &Device, dtype: DType) -> Result<SiteDelta> {
        let norm = matches!(site.kind, SiteKind::GroupNorm | SiteKind::LayerNorm);
        let place = |tensor: Tensor| tensor.to_device(device)?.to_dtype(dtype);
        let mut delta = SiteDelta {
            scale: self.scale.map(place).transpose()?,
            bias: self.bias.map(place).transpose()?,
            ..SiteDelta::default()
        };
        if !self.downs.is_empty() {
            let down = place(Tensor::cat(&self.downs, 0)?)?;
            let up = place(Tensor::cat(&self.ups, 1)?)?;
            delta.terms.push(Term::low_rank(site.geometry, down, up)?);
        }
        match self.dense {
            Some(weight) if norm => delta.weight = Some(place(weight)?),
            Some(weight) => delta
                .terms
                .push(Term::dense(site.geometry, place(weight)?)?),
            None => {}
        }
        Ok(delta)
    }
}

/// Adds to a sum that begins at what is added.
fn plus(sum: &mut Option<Tensor>, more: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(before) => (before + more)?,
        None => more,
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{DType, Device};

    use super::super::golden_tests::{Case, cases, read, relative_error};
    use super::*;
    use crate::{
        models::{DeltaBatch, Model, ModelSource},
        noise::Generator,
    };

    fn model(name: &str) -> Model {
        let folder = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let folder = folder.join("tests/golden/models").join(name);
        Model::load(&ModelSource::Folder(folder), &Device::Cpu, DType::F32).unwrap()
    }

    /// UNet and text encoder on some input.
    fn run(model: &Model, set: Option<DeltaSet>) -> [Tensor; 2] {
        let mut noise = Generator::new(3);
        let mut randn = |shape: &[usize]| {
            let values = noise.randn(shape.iter().product());
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let sample = randn(&[1, 6, 7, model.unet.in_channels()]);
        let context = randn(&[5, model.unet.context_width()]);
        let batch = DeltaBatch::new([set.map(Arc::new)]);
        let deltas = batch.deltas();
        let unet = model.unet.forward(&sample, &[300.0], &[context], deltas);
        let ids = vec![(1..8).collect()];
        let text = model.text_encoder.forward(&ids, 0, deltas);
        [unet.unwrap(), text.unwrap()]
    }

    /// The same mixture with every difference in the size of its weight, by the definition of
    /// [`Delta::weight_with`], and summed up.
    fn in_full(modules: &Modules, shares: &[Share]) -> DeltaSet {
        let mut set = DeltaSet::default();
        for (index, site) in modules.sites().iter().enumerate() {
            let mut mixture = Mixture::default();
            for share in shares {
                let Some(delta) = share.adapter.deltas.get(&site.name) else {
                    continue;
                };
                let strength = match site.name.starts_with("unet.") {
                    true => share.unet,
                    false => share.text,
                };
                if let Some(bias) = &delta.wide().unwrap().bias {
                    plus(&mut mixture.bias, (bias * strength).unwrap()).unwrap();
                }
                let weight = delta.weight_with(&modules.weight(index).unwrap()).unwrap();
                plus(&mut mixture.dense, (weight * strength).unwrap()).unwrap();
            }
            if mixture.dense.is_some() {
                let delta = mixture.finish(site, &Device::Cpu, DType::F32);
                set.insert(index, delta.unwrap());
            }
        }
        set
    }

    #[test]
    fn a_mixture_does_what_its_parts_do() {
        let cases = cases();
        let mut mixed = 0;
        for name in ["two-levels", "three-levels"] {
            let model = model(name);
            let base = run(&model, None);
            let of = |case: &&Case| case.model == name;
            let adapters: Vec<Adapter> = cases
                .iter()
                .filter(of)
                .map(read)
                .filter(|adapter| !adapter.deltas.is_empty())
                .collect();
            for pair in adapters.windows(2) {
                let shares = [
                    Share {
                        adapter: &pair[0],
                        unet: 0.7,
                        text: -0.5,
                    },
                    Share {
                        adapter: &pair[1],
                        unet: -0.3,
                        text: 1.2,
                    },
                ];
                let found = run(&model, Some(mix(model.modules(), &shares).unwrap().0));
                let expected = run(&model, Some(in_full(model.modules(), &shares)));
                for (found, expected) in found.iter().zip(&expected) {
                    let error = relative_error(found, expected);
                    assert!(error < 1e-5, "{error:e}");
                }
                assert!(relative_error(&base[0], &expected[0]) > 1e-4);
                mixed += 1;
            }
        }
        assert!(mixed >= 12, "{mixed} pairs");
    }

    #[test]
    fn strength_zero_is_the_base_to_the_last_bit() {
        let case = &cases()[0];
        let adapter = read(case);
        let model = model(&case.model);
        let share = Share {
            adapter: &adapter,
            unet: 0.0,
            text: 0.0,
        };
        let (set, bytes) = mix(model.modules(), &[share]).unwrap();
        assert_eq!(bytes, 0);
        assert!(set.is_empty());
        let plain = run(&model, None);
        for (found, plain) in run(&model, Some(set)).iter().zip(&plain) {
            let bits = |x: &Tensor| -> Vec<f32> { x.flatten_all().unwrap().to_vec1().unwrap() };
            assert_eq!(bits(found), bits(plain));
        }
    }
}
