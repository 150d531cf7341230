//! What adapters change, site by site and row by row, beside the weights and never in them.
//!
//! A [`DeltaSet`] is a mixture of adapters made ready for one model: for each site what is added to
//! its result. A [`DeltaBatch`] says which rows of a forward are under which set. Rows are taken in
//! runs of one set, and every kernel works row by row, so a row under a set is the same, to the last
//! bit on a CPU, whatever its neighbours are under.

use std::{ops::Range, sync::Arc};

use candle_core::{Result, Tensor};

use super::ConvGeometry;
use crate::ops::{self, Beside, Map};
pub use ops::Term;

/// What the adapters of one set say of one site: `y = scale · (y₀ - b₀) + b₀ + Σ terms(x) + bias`,
/// where `y₀` is the site's own result and `b₀` its bias.
#[derive(Debug, Clone, Default)]
pub struct SiteDelta {
    pub terms: Vec<Term>,
    /// Factors of the output channels, `[out]`: DoRA, (IA)³.
    pub scale: Option<Tensor>,
    /// Added to the bias, `[out]`.
    pub bias: Option<Tensor>,
    /// Added to the weight of a norm, `[channels]`.
    pub weight: Option<Tensor>,
}

/// A mixture of adapters, made ready for one model.
#[derive(Debug, Clone, Default)]
pub struct DeltaSet {
    /// By the index of the site in `Model::sites`.
    sites: Vec<Option<SiteDelta>>,
}

impl DeltaSet {
    /// Puts a site's delta in, in place of what was there.
    pub fn insert(&mut self, site: usize, delta: SiteDelta) {
        if self.sites.len() <= site {
            self.sites.resize_with(site + 1, || None);
        }
        self.sites[site] = Some(delta);
    }

    /// Sites with a delta.
    pub fn len(&self) -> usize {
        self.sites.iter().flatten().count()
    }

    /// Whether no site has a delta.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same, of which nobody wants a gradient.
    fn detach(&self) -> Result<Self> {
        let site = |delta: &SiteDelta| {
            Ok(SiteDelta {
                terms: delta
                    .terms
                    .iter()
                    .map(Term::detach)
                    .collect::<Result<_>>()?,
                scale: delta.scale.as_ref().map(Tensor::detach),
                bias: delta.bias.as_ref().map(Tensor::detach),
                weight: delta.weight.as_ref().map(Tensor::detach),
            })
        };
        let sites = self.sites.iter();
        let sites = sites.map(|delta| delta.as_ref().map(site).transpose());
        Ok(Self {
            sites: sites.collect::<Result<_>>()?,
        })
    }

    fn get(&self, site: usize) -> Option<&SiteDelta> {
        self.sites.get(site)?.as_ref()
    }
}

/// The sets of a forward's rows, in runs of rows under the same one.
#[derive(Debug, Clone, Default)]
pub struct DeltaBatch {
    runs: Vec<Run>,
}

#[derive(Debug, Clone)]
struct Run {
    rows: Range<usize>,
    set: Option<Arc<DeltaSet>>,
}

impl DeltaBatch {
    /// One entry for each row, in order.
    pub fn new(rows: impl IntoIterator<Item = Option<Arc<DeltaSet>>>) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        for (row, set) in rows.into_iter().enumerate() {
            let same = |run: &Run| match (&run.set, &set) {
                (None, None) => true,
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                _ => false,
            };
            match runs.last_mut() {
                Some(run) if same(run) => run.rows.end = row + 1,
                _ => runs.push(Run {
                    rows: row..row + 1,
                    set,
                }),
            }
        }
        Self { runs }
    }

    /// The same, of which nobody wants a gradient.
    ///
    /// # Errors
    /// Those of candle.
    pub fn detach(&self) -> Result<Self> {
        let run = |run: &Run| {
            let set = run.set.as_ref().map(|set| set.detach()).transpose()?;
            Ok(Run {
                rows: run.rows.clone(),
                set: set.map(Arc::new),
            })
        };
        Ok(Self {
            runs: self.runs.iter().map(run).collect::<Result<_>>()?,
        })
    }

    /// How a forward takes it.
    pub fn deltas(&self) -> Deltas<'_> {
        match self.runs.iter().any(|run| run.set.is_some()) {
            true => Deltas(Some(self)),
            false => Deltas::NONE,
        }
    }
}

/// The deltas of a forward's rows, if there are any: what every layer is handed.
#[derive(Debug, Clone, Copy)]
pub struct Deltas<'a>(Option<&'a DeltaBatch>);

/// Runs of rows of a tensor, each with what the site's adapters say there.
pub(super) type Parts<'a> = Vec<(Range<usize>, Option<&'a SiteDelta>)>;

impl<'a> Deltas<'a> {
    /// The base model alone.
    pub const NONE: Self = Self(None);

    /// The runs of rows at a site, or `None` where no row has a delta there.
    pub(super) fn at(self, site: usize) -> Option<Parts<'a>> {
        let parts: Parts = self
            .0?
            .runs
            .iter()
            .map(|run| (run.rows.clone(), run.at(site)))
            .collect();
        parts
            .iter()
            .any(|(_, delta)| delta.is_some())
            .then_some(parts)
    }

    /// What is beside the map of a site. `start` says at which row of its input the rows of the forward
    /// begin: their own number, but where rows differ in length.
    pub(super) fn beside(self, site: usize, start: impl Fn(usize) -> usize) -> Vec<Beside<'a>> {
        let Some(batch) = self.0 else {
            return Vec::new();
        };
        let beside = |run: &'a Run| {
            run.at(site).map(|delta| Beside {
                rows: start(run.rows.start)..start(run.rows.end),
                terms: &delta.terms,
                scale: delta.scale.as_ref(),
                bias: delta.bias.as_ref(),
            })
        };
        batch.runs.iter().filter_map(beside).collect()
    }
}

impl Run {
    fn at(&self, site: usize) -> Option<&SiteDelta> {
        self.set.as_ref()?.get(site)
    }
}

/// Computes run by run, and joins the results along the rows.
pub(super) fn each_part(
    parts: &Parts,
    run: impl Fn(&Range<usize>, Option<&SiteDelta>) -> Result<Tensor>,
) -> Result<Tensor> {
    let mut results = parts
        .iter()
        .map(|(rows, delta)| run(rows, *delta))
        .collect::<Result<Vec<_>>>()?;
    match results.len() {
        1 => Ok(results.swap_remove(0)),
        _ => Tensor::cat(&results, 0),
    }
}

impl Term {
    /// `ΔW = up · down` at a site: `down` is `[rank, in]` for a linear map and `[rank, in, kh, kw]` for a
    /// convolution, whose geometry says how it lies; `up` is `[out, rank]`, strength and `alpha / rank`
    /// folded in.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub fn low_rank(geometry: Option<ConvGeometry>, down: Tensor, up: Tensor) -> Result<Self> {
        let (outputs, rank) = up.dims2()?;
        // Factors as large as what they make cost more than it does.
        let factors = down.elem_count() + up.elem_count();
        if factors * rank >= down.elem_count() * outputs && !down.track_op() && !up.track_op() {
            let mut shape = down.dims().to_vec();
            shape[0] = outputs;
            let weight = up.matmul(&down.flatten_from(1)?)?.reshape(shape)?;
            return Self::dense(geometry, weight);
        }
        let up = Some(ops::Linear::new(up, None)?);
        let map = map(geometry, down)?;
        Ok(Self { map, up })
    }

    /// `ΔW` at a site, in the shape of its weight.
    ///
    /// # Errors
    /// Another number of dimensions than the site's kind has.
    pub fn dense(geometry: Option<ConvGeometry>, weight: Tensor) -> Result<Self> {
        let map = map(geometry, weight)?;
        Ok(Self { map, up: None })
    }
}

/// The map with this weight that lies as a site does.
fn map(geometry: Option<ConvGeometry>, weight: Tensor) -> Result<Map> {
    let Some(at) = geometry else {
        return Ok(Map::Linear(ops::Linear::new(weight, None)?));
    };
    let conv = ops::Conv2d::new(weight, None, at.stride, at.padding)?;
    Ok(match at.upsampled {
        true => Map::Upsampled(ops::UpsampledConv2d::new(conv)),
        false => Map::Conv2d(conv),
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn factors_as_large_as_the_weight_are_multiplied_once() -> Result<()> {
        let linear = |outputs, rank, inputs| -> Result<bool> {
            let factor = |shape| Tensor::ones(shape, DType::F32, &Device::Cpu);
            let term = Term::low_rank(None, factor((rank, inputs))?, factor((outputs, rank))?)?;
            let x = factor((1, inputs))?;
            let y = match (&term.map, &term.up) {
                (Map::Linear(map), Some(up)) => up.forward(&map.forward(&x)?)?,
                (Map::Linear(map), None) => map.forward(&x)?,
                _ => unreachable!("no geometry was given"),
            };
            assert_eq!(y.to_vec2::<f32>()?, [vec![(rank * inputs) as f32; outputs]]);
            Ok(term.up.is_none())
        };
        assert!(!linear(48, 16, 48)?);
        assert!(linear(48, 24, 48)?);
        assert!(linear(48, 64, 128)?);
        Ok(())
    }

    #[test]
    fn rows_of_one_set_are_taken_together() {
        let mut full = DeltaSet::default();
        full.insert(3, SiteDelta::default());
        let (a, b) = (Arc::new(full), Arc::new(DeltaSet::default()));
        let batch = DeltaBatch::new([
            None,
            None,
            Some(a.clone()),
            Some(a.clone()),
            Some(b.clone()),
            Some(a),
        ]);
        let parts: Vec<_> = batch
            .deltas()
            .at(3)
            .unwrap()
            .into_iter()
            .map(|(rows, delta)| (rows, delta.is_some()))
            .collect();
        let expected = [(0..2, false), (2..4, true), (4..5, false), (5..6, true)];
        assert_eq!(parts, expected);
        let beside: Vec<_> = batch
            .deltas()
            .beside(3, |row| row * 77)
            .into_iter()
            .map(|one| one.rows)
            .collect();
        assert_eq!(beside, [154..308, 385..462]);
        let none = DeltaBatch::new([None, None]);
        for (batch, site) in [(&batch, 2), (&batch, 99), (&none, 3)] {
            assert!(batch.deltas().at(site).is_none());
            assert!(batch.deltas().beside(site, |row| row).is_empty());
        }
    }
}
