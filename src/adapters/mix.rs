//! Adapters of one request, mixed for one model: what [`models`](crate::models) takes beside its
//! weights.
//!
//! Low-rank factors of several adapters are joined along the rank, with strength and scale folded
//! into the second factor, so that a site costs two products however many adapters there are. Every
//! other form is composed and summed up in full. What depends on the base's weight (DoRA, and (IA)³
//! over inputs) is not mixed yet, and says so.

use std::collections::HashMap;

use candle_core::{Result, Tensor};

use super::{Adapter, Axis, Change, Delta, LowRank};
use crate::models::{DeltaSet, Site, SiteDelta, SiteKind, Term};

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
    #[error("`{site}`: {form} depends on the base's weight and cannot be applied yet")]
    NeedsBase { site: String, form: &'static str },
    #[error("`{site}`: the model has no such module")]
    NoSuchSite { site: String },
    #[error("`{site}`: {source}")]
    Tensor {
        site: String,
        source: candle_core::Error,
    },
}

/// The mixture of `shares`, for the model whose sites these are. A share of strength 0 adds nothing.
///
/// # Errors
/// An adapter read for another model, or a form that is not mixed yet.
pub fn mix(sites: &[Site], shares: &[Share]) -> std::result::Result<DeltaSet, MixError> {
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
            mixtures
                .entry(index)
                .or_default()
                .add(&sites[index], delta, strength)?;
        }
    }
    let mut set = DeltaSet::default();
    for (index, mixture) in mixtures {
        let site = &sites[index];
        set.insert(index, mixture.finish(site).map_err(|e| fault(site, e))?);
    }
    Ok(set)
}

fn fault(site: &Site, source: candle_core::Error) -> MixError {
    MixError::Tensor {
        site: site.name.to_string(),
        source,
    }
}

/// What the adapters so far add at one site.
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
    fn add(
        &mut self,
        site: &Site,
        delta: &Delta,
        strength: f64,
    ) -> std::result::Result<(), MixError> {
        let needs_base = |form| MixError::NeedsBase {
            site: site.name.to_string(),
            form,
        };
        if delta.magnitude.is_some() {
            return Err(needs_base("DoRA's magnitude"));
        }
        if let Some(Change::Gain {
            axis: Axis::Columns,
            ..
        }) = delta.change
        {
            return Err(needs_base("(IA)³ over inputs"));
        }
        self.join(site, delta, strength).map_err(|e| fault(site, e))
    }

    fn join(&mut self, site: &Site, delta: &Delta, strength: f64) -> Result<()> {
        match &delta.change {
            Some(Change::LowRank(LowRank {
                down,
                up,
                mid: None,
                scale,
            })) => {
                self.downs.push(down.clone());
                self.ups.push((up * (scale * strength))?);
            }
            Some(Change::Gain { values, .. }) => {
                let gain = (values.flatten_all()? * strength)?;
                // A gain adds to the weight itself: the factor begins at one.
                let one = gain.ones_like()?;
                plus(&mut self.scale, gain, Some(one))?;
            }
            Some(_) => {
                if let Some(weight) = delta.weight(&site.weight_shape)? {
                    plus(&mut self.dense, (weight * strength)?, None)?;
                }
            }
            None => {}
        }
        match &delta.bias {
            Some(bias) => plus(&mut self.bias, (bias * strength)?, None),
            None => Ok(()),
        }
    }

    fn finish(self, site: &Site) -> Result<SiteDelta> {
        let norm = matches!(site.kind, SiteKind::GroupNorm | SiteKind::LayerNorm);
        let mut delta = SiteDelta {
            scale: self.scale,
            bias: self.bias,
            ..SiteDelta::default()
        };
        if !self.downs.is_empty() {
            let down = Tensor::cat(&self.downs, 0)?;
            let up = Tensor::cat(&self.ups, 1)?;
            delta.terms.push(Term::low_rank(site.geometry, down, up)?);
        }
        match self.dense {
            Some(weight) if norm => delta.weight = Some(weight),
            Some(weight) => delta.terms.push(Term::dense(site.geometry, weight)?),
            None => {}
        }
        Ok(delta)
    }
}

/// Adds to a sum that begins at `start`, or at what is added.
fn plus(sum: &mut Option<Tensor>, more: Tensor, start: Option<Tensor>) -> Result<()> {
    let before = sum.take().or(start);
    *sum = Some(match before {
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

    /// The same mixture with every change composed on its own and summed up in full.
    fn in_full(sites: &[Site], shares: &[Share]) -> DeltaSet {
        let mut set = DeltaSet::default();
        for (index, site) in sites.iter().enumerate() {
            let mut mixture = Mixture::default();
            let mut any = false;
            for share in shares {
                let Some(delta) = share.adapter.deltas.get(&site.name) else {
                    continue;
                };
                any = true;
                let strength = match site.name.starts_with("unet.") {
                    true => share.unet,
                    false => share.text,
                };
                let gain = Delta {
                    change: match &delta.change {
                        Some(gain @ Change::Gain { .. }) => Some(gain.clone()),
                        _ => None,
                    },
                    bias: delta.bias.clone(),
                    magnitude: None,
                };
                mixture.join(site, &gain, strength).unwrap();
                if let Some(weight) = delta.weight(&site.weight_shape).unwrap() {
                    plus(&mut mixture.dense, (weight * strength).unwrap(), None).unwrap();
                }
            }
            if any {
                set.insert(index, mixture.finish(site).unwrap());
            }
        }
        set
    }

    #[test]
    fn a_mixture_does_what_its_parts_do() {
        let cases = cases();
        let (mut mixed, mut refused) = (0, 0);
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
                match mix(model.sites(), &shares) {
                    Ok(set) => {
                        let found = run(&model, Some(set));
                        let expected = run(&model, Some(in_full(model.sites(), &shares)));
                        for (found, expected) in found.iter().zip(&expected) {
                            let error = relative_error(found, expected);
                            assert!(error < 1e-5, "{error:e}");
                        }
                        assert!(relative_error(&base[0], &expected[0]) > 1e-4);
                        mixed += 1;
                    }
                    Err(error) => {
                        let text = error.to_string();
                        assert!(text.contains("cannot be applied yet"), "{text}");
                        refused += 1;
                    }
                }
            }
        }
        assert!(mixed >= 6, "{mixed} mixed, {refused} refused");
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
        let set = mix(model.sites(), &[share]).unwrap();
        assert!(set.is_empty());
        let plain = run(&model, None);
        for (found, plain) in run(&model, Some(set)).iter().zip(&plain) {
            let bits = |x: &Tensor| -> Vec<f32> { x.flatten_all().unwrap().to_vec1().unwrap() };
            assert_eq!(bits(found), bits(plain));
        }
    }
}
