//! What adapters change, site by site and row by row, beside the weights and never in them.
//!
//! A [`DeltaSet`] is a mixture of adapters made ready for one model: for each site what is added to
//! its result. A [`DeltaBatch`] says which rows of a forward are under which set. Rows are taken in
//! runs of one set, and every kernel works row by row, so a row under a set is the same, to the last
//! bit on a CPU, whatever its neighbours are under.

use std::{ops::Range, sync::Arc};

use candle_core::{Result, Tensor};

use super::ConvGeometry;
use crate::ops;

/// A part of what a site's adapters add.
#[derive(Debug, Clone)]
pub enum Term {
    /// `ΔW = up · down` of a linear map; strength and `alpha / rank` are folded into `up`.
    LowRank { down: ops::Linear, up: ops::Linear },
    /// `ΔW` of a linear map in full.
    Dense(ops::Linear),
    /// The convolution to the rank, with the site's own kernel, stride and padding, then a map over
    /// channels.
    LowRankConv { down: ops::Conv2d, up: ops::Linear },
    /// `ΔW` of a convolution in full.
    DenseConv(ops::Conv2d),
    /// [`Term::LowRankConv`] at a site that doubles the picture first.
    LowRankUpsampled {
        down: ops::UpsampledConv2d,
        up: ops::Linear,
    },
    /// [`Term::DenseConv`] at a site that doubles the picture first.
    DenseUpsampled(ops::UpsampledConv2d),
}

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

    /// The runs of rows at a site, or `None` where no row has a delta there. `start` says at which
    /// row of the tensor the rows of the forward begin: their own number, but where rows differ in
    /// length.
    pub(super) fn at(self, site: usize, start: impl Fn(usize) -> usize) -> Option<Parts<'a>> {
        let parts: Parts = self
            .0?
            .runs
            .iter()
            .map(|run| {
                let delta = run.set.as_ref().and_then(|set| set.get(site));
                (start(run.rows.start)..start(run.rows.end), delta)
            })
            .collect();
        parts
            .iter()
            .any(|(_, delta)| delta.is_some())
            .then_some(parts)
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

/// From a site's own result `y` for `x` to that under the adapters of its rows. `bias` is the site's own,
/// and `size` that of a doubled picture.
pub(super) fn adapt(
    parts: Option<Parts>,
    x: &Tensor,
    y: Tensor,
    bias: Option<&Tensor>,
    size: Option<[usize; 2]>,
) -> Result<Tensor> {
    let Some(parts) = parts else {
        return Ok(y);
    };
    each_part(&parts, |rows, delta| {
        let y = y.narrow(0, rows.start, rows.len())?;
        match delta {
            Some(delta) => delta.apply(&x.narrow(0, rows.start, rows.len())?, y, bias, size),
            None => Ok(y),
        }
    })
}

impl SiteDelta {
    /// From the site's own result `y` for `x` to that under the adapters. `own_bias` is the site's, and
    /// `size` that of a doubled picture.
    fn apply(
        &self,
        x: &Tensor,
        y: Tensor,
        own_bias: Option<&Tensor>,
        size: Option<[usize; 2]>,
    ) -> Result<Tensor> {
        let mut y = y;
        if let Some(scale) = &self.scale {
            y = match own_bias {
                Some(own) => y
                    .broadcast_sub(own)?
                    .broadcast_mul(scale)?
                    .broadcast_add(own)?,
                None => y.broadcast_mul(scale)?,
            };
        }
        for term in &self.terms {
            y = term.add(x, &y, size)?;
        }
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

impl Term {
    /// `ΔW = up · down` at a site: `down` is `[rank, in]` for a linear map and `[rank, in, kh, kw]` for a
    /// convolution, whose geometry says how it lies; `up` is `[out, rank]`.
    ///
    /// # Errors
    /// Shapes that do not fit together.
    pub fn low_rank(geometry: Option<ConvGeometry>, down: Tensor, up: Tensor) -> Result<Self> {
        let up = ops::Linear::new(up, None)?;
        let Some(at) = geometry else {
            let down = ops::Linear::new(down, None)?;
            return Ok(Self::LowRank { down, up });
        };
        let down = ops::Conv2d::new(down, None, at.stride, at.padding)?;
        Ok(match at.upsampled {
            true => Self::LowRankUpsampled {
                down: ops::UpsampledConv2d::new(down),
                up,
            },
            false => Self::LowRankConv { down, up },
        })
    }

    /// `ΔW` at a site, in the shape of its weight.
    ///
    /// # Errors
    /// Another number of dimensions than the site's kind has.
    pub fn dense(geometry: Option<ConvGeometry>, weight: Tensor) -> Result<Self> {
        let Some(at) = geometry else {
            return Ok(Self::Dense(ops::Linear::new(weight, None)?));
        };
        let conv = ops::Conv2d::new(weight, None, at.stride, at.padding)?;
        Ok(match at.upsampled {
            true => Self::DenseUpsampled(ops::UpsampledConv2d::new(conv)),
            false => Self::DenseConv(conv),
        })
    }

    /// `y` and what this term makes of `x`.
    fn add(&self, x: &Tensor, y: &Tensor, size: Option<[usize; 2]>) -> Result<Tensor> {
        let doubled = || match size {
            Some(size) => Ok(size),
            None => candle_core::bail!("a delta for a doubled picture at a site that doubles none"),
        };
        match self {
            Self::LowRank { down, up } => up.forward_add(&down.forward(x)?, y),
            Self::Dense(delta) => delta.forward_add(x, y),
            Self::LowRankConv { down, up } => up.forward_add(&down.forward(x)?, y),
            Self::DenseConv(delta) => delta.forward_add(x, y),
            Self::LowRankUpsampled { down, up } => up.forward_add(&down.forward(x, doubled()?)?, y),
            Self::DenseUpsampled(delta) => y + delta.forward(x, doubled()?)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let ranges = |start: fn(usize) -> usize| -> Vec<(Range<usize>, bool)> {
            let parts = batch.deltas().at(3, start).unwrap();
            parts
                .into_iter()
                .map(|(rows, delta)| (rows, delta.is_some()))
                .collect()
        };
        let expected = [(0..2, false), (2..4, true), (4..5, false), (5..6, true)];
        assert_eq!(ranges(|row| row), expected);
        assert_eq!(ranges(|row| row * 77)[1].0, 154..308);
        assert!(batch.deltas().at(2, |row| row).is_none());
        assert!(batch.deltas().at(99, |row| row).is_none());
        let none = DeltaBatch::new([None, None]);
        assert!(none.deltas().at(3, |row| row).is_none());
    }
}
