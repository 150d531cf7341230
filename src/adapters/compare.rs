//! Whether two adapters do the same.

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor};

use super::{Adapter, Change, Delta};
use crate::models::Site;

/// What f32 keeps of a small product: relative to the norm of all of it.
const TOLERANCE: f64 = 1e-6;

impl Adapter {
    /// Where `other` does something else to the model with these sites, if anywhere: every ΔW, bias,
    /// magnitude, gain and word must be the same within a millionth.
    ///
    /// # Errors
    /// Factors that do not fit their sites, which reading rules out.
    pub fn difference(&self, other: &Self, sites: &[Site]) -> Result<Option<String>> {
        if let Some(site) = odd_one_out(self.deltas.keys(), other.deltas.keys()) {
            return Ok(Some(format!("only one of them changes `{site}`")));
        }
        let shapes: BTreeMap<&str, &[usize]> = sites
            .iter()
            .map(|site| (&*site.name, &site.weight_shape[..]))
            .collect();
        let (ours, theirs) = (self.wide()?, other.wide()?);
        for ((site, ours), theirs) in ours.deltas.iter().zip(theirs.deltas.values()) {
            let Some(shape) = shapes.get(&**site) else {
                return Ok(Some(format!("the model has no `{site}`")));
            };
            if let Some(what) = ours.difference(theirs, shape)? {
                return Ok(Some(format!("{what} of `{site}` differs")));
            }
        }
        let words = |adapter: &Self| -> BTreeMap<String, Tensor> {
            let words = adapter.embeddings.iter();
            words
                .map(|word| (word.token.clone(), word.vectors.clone()))
                .collect()
        };
        let (ours, theirs) = (words(self), words(other));
        if let Some(word) = odd_one_out(ours.keys(), theirs.keys()) {
            return Ok(Some(format!("only one of them has the word `{word}`")));
        }
        for ((word, ours), theirs) in ours.iter().zip(theirs.values()) {
            if !same(ours, theirs)? {
                return Ok(Some(format!("the word `{word}` differs")));
            }
        }
        Ok(None)
    }
}

impl Delta {
    /// What of it is not the other's. What depends on the base's weight is compared in its parts.
    fn difference(&self, other: &Self, shape: &[usize]) -> Result<Option<&'static str>> {
        let gain = |delta: &Self| match &delta.change {
            Some(Change::Gain { values, axis }) => Some((values.clone(), *axis)),
            _ => None,
        };
        let magnitude = |delta: &Self| delta.magnitude.as_ref().map(|m| (m.values.clone(), m.axis));
        let change = |delta: &Self| match &delta.change {
            Some(Change::Gain { .. }) | None => Ok(None),
            Some(change) => change.compose(shape).map(Some),
        };
        let vectors = |a: Option<(Tensor, _)>, b: Option<(Tensor, _)>| match (a, b) {
            (None, None) => Ok(true),
            (Some((a, axis)), Some((b, other))) if axis == other => same(&a, &b),
            _ => Ok(false),
        };
        let tensors = |a: Option<Tensor>, b: Option<Tensor>| match (a, b) {
            (None, None) => Ok(true),
            (Some(a), Some(b)) => same(&a, &b),
            _ => Ok(false),
        };
        Ok(if !tensors(change(self)?, change(other)?)? {
            Some("the difference")
        } else if !vectors(gain(self), gain(other))? {
            Some("the gain")
        } else if !vectors(magnitude(self), magnitude(other))? {
            Some("the magnitude")
        } else if !tensors(self.bias.clone(), other.bias.clone())? {
            Some("the bias")
        } else {
            None
        })
    }
}

/// What only one of two sorted lists has.
fn odd_one_out<T: Ord + ToString>(
    ours: impl Iterator<Item = T>,
    theirs: impl Iterator<Item = T>,
) -> Option<String> {
    let ours: std::collections::BTreeSet<T> = ours.collect();
    let theirs: std::collections::BTreeSet<T> = theirs.collect();
    ours.symmetric_difference(&theirs)
        .next()
        .map(ToString::to_string)
}

fn same(ours: &Tensor, theirs: &Tensor) -> Result<bool> {
    if ours.dims() != theirs.dims() {
        return Ok(false);
    }
    let norm = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f64>().map(f64::sqrt);
    let (ours, theirs) = (ours.to_dtype(DType::F64)?, theirs.to_dtype(DType::F64)?);
    let (apart, whole) = (norm(&(&ours - &theirs)?)?, norm(&ours)?);
    // False for NaN.
    Ok(apart <= TOLERANCE * whole)
}

#[cfg(test)]
mod tests {
    use super::super::golden_tests::{base, cases, read};
    use super::*;
    use crate::models::SiteKind;

    #[test]
    fn an_adapter_is_itself_and_nothing_that_is_slightly_off() {
        for case in cases() {
            let adapter = read(&case);
            let sites: Vec<Site> = base(&case.model)
                .kinds
                .iter()
                .map(|(name, (kind, shape))| Site {
                    name: name.as_str().into(),
                    kind: *kind,
                    weight_shape: shape.clone(),
                    geometry: None,
                })
                .filter(|site| site.kind != SiteKind::Embedding)
                .collect();
            let says = |other: &Adapter| adapter.difference(other, &sites).unwrap();
            assert_eq!(says(&adapter), None, "{}", case.name);

            let off = |t: &Tensor| (t * (1.0 + 1e-5)).unwrap();
            for site in adapter.deltas.keys() {
                let mut other = adapter.clone();
                let delta = other.deltas.get_mut(site).unwrap();
                let what = if let Some(bias) = &mut delta.bias {
                    *bias = off(bias);
                    "the bias"
                } else if let Some(magnitude) = &mut delta.magnitude {
                    magnitude.values = off(&magnitude.values);
                    "the magnitude"
                } else {
                    match delta.change.as_mut().unwrap() {
                        Change::LowRank(low) => low.scale *= 1.0 + 1e-5,
                        Change::Hadamard { scale, .. } | Change::Kronecker { scale, .. } => {
                            *scale *= 1.0 + 1e-5;
                        }
                        Change::Whole(t) | Change::Gain { values: t, .. } => *t = off(t),
                    }
                    match delta.change {
                        Some(Change::Gain { .. }) => "the gain",
                        _ => "the difference",
                    }
                };
                assert_eq!(says(&other), Some(format!("{what} of `{site}` differs")));
                other.deltas.remove(site);
                assert!(says(&other).unwrap().contains("only one of them changes"));
            }
            if let Some(word) = adapter.embeddings.first() {
                let mut other = adapter.clone();
                other.embeddings[0].vectors = off(&word.vectors);
                assert!(says(&other).unwrap().starts_with("the word"));
                other.embeddings.remove(0);
                assert!(says(&other).unwrap().contains("has the word"));
            }
        }
    }
}
