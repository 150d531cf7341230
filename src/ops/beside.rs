//! What adapters add beside a map, to some of its rows.
//!
//! The kernels take it along in the map's own product, where all of it is packed like the map. Else it
//! is composed, run by run.

use std::ops::Range;

use candle_core::{D, Result, Tensor};

use super::gradient::graft;
use super::host;
use super::packed::Packed;
use super::product::Finish;
use super::runs::Run;
use super::{Conv2d, Linear, UpsampledConv2d};

/// A map of one of the kinds that others are put beside.
#[derive(Debug, Clone)]
pub enum Map {
    Linear(Linear),
    Conv2d(Conv2d),
    Upsampled(UpsampledConv2d),
}

/// A part of what is added to a map's result: `map(x)`, or `up(map(x))`.
#[derive(Debug, Clone)]
pub struct Term {
    /// Of the kind and the geometry of the map it is beside, without a bias.
    pub map: Map,
    /// Over channels, without a bias.
    pub up: Option<Linear>,
}

impl Term {
    /// The same, of which nobody wants a gradient.
    ///
    /// # Errors
    /// Those of candle.
    pub fn detach(&self) -> Result<Self> {
        Ok(Self {
            map: match &self.map {
                Map::Linear(map) => Map::Linear(map.detach()?),
                Map::Conv2d(map) => Map::Conv2d(map.detach()?),
                Map::Upsampled(map) => Map::Upsampled(map.detach()?),
            },
            up: self.up.as_ref().map(Linear::detach).transpose()?,
        })
    }
}

/// What is beside a map for a run of rows of its input's first dimension:
/// `y = scale · (y₀ - b₀) + b₀ + Σ terms(x) + bias`, where `y₀` is the map's own result and `b₀` its
/// bias.
#[derive(Debug, Clone)]
pub struct Beside<'a> {
    pub rows: Range<usize>,
    pub terms: &'a [Term],
    /// `[out]`.
    pub scale: Option<&'a Tensor>,
    /// `[out]`.
    pub bias: Option<&'a Tensor>,
}

/// What is added to a map's result at last, at no cost on the way.
#[derive(Debug, Clone, Copy)]
pub enum Then<'a> {
    Nothing,
    /// Of the result's shape.
    Add(&'a Tensor),
    /// `[rows, out]`, the same for all positions of a row.
    Shift(&'a Tensor),
}

impl<'a> Then<'a> {
    pub(super) fn tensor(self) -> Option<&'a Tensor> {
        match self {
            Self::Nothing => None,
            Self::Add(y) | Self::Shift(y) => Some(y),
        }
    }

    /// The shape its tensor must have at a map with results of `shape`.
    pub(super) fn shape(self, shape: &[usize]) -> Vec<usize> {
        match self {
            Self::Shift(_) => vec![shape[0], shape[shape.len() - 1]],
            _ => shape.to_vec(),
        }
    }

    /// Its form for a product, with its tensor's numbers and how many of the product's rows are one of
    /// the map's.
    pub(super) fn finish(self, numbers: &[f32], per_row: usize) -> Finish<'_> {
        match self {
            Self::Nothing => Finish::Nothing,
            Self::Add(_) => Finish::Add(numbers),
            Self::Shift(_) => Finish::Shift {
                shifts: numbers,
                rows: per_row,
            },
        }
    }

    /// The same of what nobody wants a gradient of, once `detached` holds it.
    pub(super) fn detach(self, detached: &'a mut Option<Tensor>) -> Self {
        *detached = self.tensor().map(Tensor::detach);
        match (self, &*detached) {
            (Self::Add(_), Some(more)) => Then::Add(more),
            (Self::Shift(_), Some(more)) => Then::Shift(more),
            _ => Then::Nothing,
        }
    }

    /// `value`, a map's result for `x` with what is added, in the graph. `back` leads from the result's
    /// gradient to the input's.
    pub(super) fn graft(
        self,
        x: &Tensor,
        value: Tensor,
        back: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Result<Tensor> {
        let wants_input = x.track_op();
        let back = move |gradient: &Tensor| wants_input.then(|| back(gradient)).transpose();
        match self {
            Self::Nothing => graft([x], value, move |_, _, gradient| Ok([back(gradient)?])),
            Self::Add(more) => graft([x, more], value, move |_, _, gradient| {
                Ok([back(gradient)?, Some(gradient.clone())])
            }),
            Self::Shift(more) => graft([x, more], value, move |_, _, gradient| {
                let (rows, width) = (gradient.dim(0)?, gradient.dim(D::Minus1)?);
                let shifts = gradient.reshape((rows, (), width))?.sum(1)?;
                Ok([back(gradient)?, Some(shifts)])
            }),
        }
    }

    /// `y` and what is added.
    pub(super) fn add(self, y: Tensor) -> Result<Tensor> {
        match self {
            Self::Nothing => Ok(y),
            Self::Add(more) => y + more,
            Self::Shift(more) => {
                let mut shape = vec![1; y.rank()];
                shape[0] = more.dim(0)?;
                shape[y.rank() - 1] = more.dim(1)?;
                y.broadcast_add(&more.reshape(shape)?)
            }
        }
    }

    fn narrow(self, rows: &Range<usize>, narrowed: &'a mut Option<Tensor>) -> Result<Self> {
        if let Some(more) = self.tensor() {
            *narrowed = Some(more.narrow(0, rows.start, rows.len())?);
        }
        Ok(match (self, &*narrowed) {
            (Self::Add(_), Some(more)) => Then::Add(more),
            (Self::Shift(_), Some(more)) => Then::Shift(more),
            _ => Then::Nothing,
        })
    }
}

/// The runs of a product with `weight`, `per_row` of whose rows are one of the map's; `None` where the
/// kernels do not serve all of it. `packed` finds in a term's map the weight that goes with `weight`.
pub(super) fn runs<'a>(
    beside: &[Beside<'a>],
    weight: &Packed,
    per_row: usize,
    packed: impl Fn(&'a Map) -> Option<&'a Packed>,
) -> Result<Option<Vec<Run<'a>>>> {
    let outputs = weight.outputs;
    let fits = |w: &&Packed| w.outputs == outputs && w.bias().is_none();
    let mut runs = Vec::with_capacity(beside.len());
    for one in beside {
        let vectors = [one.scale, one.bias].into_iter().flatten();
        if !host::is_plain(vectors.clone()) || vectors.clone().any(|v| v.dims() != [outputs]) {
            return Ok(None);
        }
        let terms = one.terms.iter().map(|term| {
            let map = packed(&term.map).filter(|map| map.taps == weight.taps)?;
            let map = Some(map).filter(|map| map.depth == weight.depth)?;
            match &term.up {
                None => Some(map).filter(fits).map(|map| (map, None)),
                Some(up) => {
                    let up = up.packed().filter(fits)?;
                    let leads = map.outputs == up.depth && map.bias().is_none();
                    leads.then_some((map, Some(up)))
                }
            }
        });
        let Some(terms) = terms.collect() else {
            return Ok(None);
        };
        let vector = |v: Option<&Tensor>| v.map(|v| v.to_vec1()).transpose();
        runs.push(Run {
            rows: one.rows.start * per_row..one.rows.end * per_row,
            scale: vector(one.scale)?,
            terms,
            bias: vector(one.bias)?,
        });
    }
    Ok(Some(runs))
}

/// A map with `bias`, whose own form is `run`, and what is `beside` it, composed of them. `size` is that
/// of a doubled picture.
pub(super) fn composed(
    x: &Tensor,
    then: Then,
    beside: &[Beside],
    bias: Option<&Tensor>,
    size: Option<[usize; 2]>,
    run: impl Fn(&Tensor, Then, &[Beside]) -> Result<Tensor>,
) -> Result<Tensor> {
    let rows = x.dim(0)?;
    if let [one] = beside
        && one.rows == (0..rows)
    {
        let y = run(x, Then::Nothing, &[])?;
        return then.add(one.composed(x, y, bias, size)?);
    }
    // One run alone goes the way it would in any other company.
    let part = |rows: Range<usize>, beside: Option<&Beside>| {
        let mut narrowed = None;
        let then = then.narrow(&rows, &mut narrowed)?;
        let beside = beside.map(|one| Beside {
            rows: 0..rows.len(),
            ..one.clone()
        });
        run(
            &x.narrow(0, rows.start, rows.len())?,
            then,
            beside.as_slice(),
        )
    };
    let mut parts = Vec::new();
    let mut next = 0;
    for one in beside {
        if next < one.rows.start {
            parts.push(part(next..one.rows.start, None)?);
        }
        parts.push(part(one.rows.clone(), Some(one))?);
        next = one.rows.end;
    }
    if next < rows {
        parts.push(part(next..rows, None)?);
    }
    Tensor::cat(&parts, 0)
}

impl Beside<'_> {
    /// From the map's own result `y` for `x`, all of whose rows this is beside.
    fn composed(
        &self,
        x: &Tensor,
        mut y: Tensor,
        own: Option<&Tensor>,
        size: Option<[usize; 2]>,
    ) -> Result<Tensor> {
        if let Some(scale) = self.scale {
            y = match own {
                Some(own) => y
                    .broadcast_sub(own)?
                    .broadcast_mul(scale)?
                    .broadcast_add(own)?,
                None => y.broadcast_mul(scale)?,
            };
        }
        for Term { map, up } in self.terms {
            let more = match (map, size) {
                (Map::Linear(map), _) => map.forward(x)?,
                (Map::Conv2d(map), _) => map.forward(x)?,
                (Map::Upsampled(map), Some(size)) => map.forward(x, size)?,
                (Map::Upsampled(_), None) => {
                    candle_core::bail!("a doubling map beside one that doubles nothing")
                }
            };
            y = match up {
                Some(up) => up.run(&more, Then::Add(&y), &[])?,
                None => (y + more)?,
            };
        }
        match self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}
