use candle_core::{Device, Result, Tensor, bail};
use std::sync::Arc;

use super::beside::{self, Beside, Map, Then};
use super::gemm::{self, Matrix};
use super::gradient::{self, graft};
use super::packed::Packed;
use super::product::{self, Target};
use super::{host, reference};

/// A prepared affine map `y = x Wᵀ + b`.
///
/// An f32 weight in host memory is held packed for the kernels, in that form only; a clone shares
/// it.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

#[derive(Debug, Clone)]
enum Weight {
    Packed(Arc<Packed>),
    Plain(Tensor),
}

impl Linear {
    /// `weight` is `[out, in]`, `bias` `[out]`.
    ///
    /// # Errors
    /// If the shapes do not fit together.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let (outputs, depth) = weight.dims2()?;
        if let Some(b) = &bias
            && b.dims() != [outputs]
        {
            bail!(
                "linear: a bias of shape {:?} for {outputs} outputs",
                b.dims()
            )
        }
        let weight = if depth > 0 && host::is_plain(bias.iter().chain([&weight])) {
            Weight::Packed(Arc::new(pack(&weight, bias.as_ref(), outputs, depth, 1)?))
        } else {
            Weight::Plain(weight)
        };
        Ok(Self { weight, bias })
    }

    /// `x` is `[.., in]`; the result `[.., out]`.
    ///
    /// # Errors
    /// If the last dimension of `x` is not `in`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, Then::Nothing, &[])
    }

    /// [`Linear::forward`], and what is `beside` it, and `then`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn run(&self, x: &Tensor, then: Then, beside: &[Beside]) -> Result<Tensor> {
        if let Weight::Packed(packed) = &self.weight
            && host::is_plain(then.tensor().into_iter().chain([x]))
            && let Some(y) = forward(packed, x, then, beside)?
        {
            return Ok(y);
        }
        if beside.is_empty() {
            return match &self.weight {
                Weight::Plain(weight) if weight.track_op() => {
                    then.add(trainable(x, weight, self.bias.as_ref())?)
                }
                _ if host::is_tracked(then.tensor().into_iter().chain([x])) => {
                    let mut detached = None;
                    let value = self.run(&x.detach(), then.detach(&mut detached), &[])?;
                    let own = self.clone();
                    then.graft(x, value, move |gradient| own.back(gradient))
                }
                _ => then.add(reference::linear(x, &self.weight()?, self.bias.as_ref())?),
            };
        }
        if let [one] = beside
            && let Some(y) = gradient::low_rank(self, x, one)?
        {
            return then.add(y);
        }
        let run = |x: &Tensor, then: Then, beside: &[Beside]| self.run(x, then, beside);
        beside::composed(x, then, beside, self.bias.as_ref(), None, run)
    }

    /// The same map, of which nobody wants a gradient.
    ///
    /// # Errors
    /// Those of candle.
    pub fn detach(&self) -> Result<Self> {
        match &self.weight {
            Weight::Plain(weight) if weight.track_op() => {
                Self::new(weight.detach(), self.bias.clone())
            }
            _ => Ok(self.clone()),
        }
    }

    /// The gradient of the input from that of the result.
    fn back(&self, gradient: &Tensor) -> Result<Tensor> {
        self.transposed()?.forward(gradient)
    }

    /// The map of the way back, `y = x W`; a packed weight is not copied.
    ///
    /// # Errors
    /// Those of candle.
    pub(super) fn transposed(&self) -> Result<Self> {
        let weight = match &self.weight {
            Weight::Packed(packed) => Weight::Packed(Arc::new(packed.transposed())),
            Weight::Plain(weight) => Weight::Plain(weight.t()?),
        };
        Ok(Self { weight, bias: None })
    }

    /// The weight, if it is trained.
    pub(super) fn trained(&self) -> Option<&Tensor> {
        match &self.weight {
            Weight::Plain(weight) => Some(weight).filter(|weight| weight.track_op()),
            Weight::Packed(_) => None,
        }
    }

    pub(super) fn packed(&self) -> Option<&Packed> {
        match &self.weight {
            Weight::Packed(packed) => Some(packed),
            Weight::Plain(_) => None,
        }
    }

    /// The weight as `[out, in]`; unpacked, that is copied, on every call.
    ///
    /// # Errors
    /// Those of candle.
    pub fn weight(&self) -> Result<Tensor> {
        match &self.weight {
            Weight::Packed(p) => Tensor::from_vec(p.unpack(), (p.outputs, p.depth), &Device::Cpu),
            Weight::Plain(weight) => Ok(weight.clone()),
        }
    }
}

/// A map whose weight is trained, `[out, in]`; a bias is frozen.
fn trainable(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (outputs, depth) = weight.dims2()?;
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    let rows = x.detach().reshape(((), depth))?;
    let value = reference::linear(&rows, &weight.detach(), bias)?.reshape(shape)?;
    let wants_input = x.track_op();
    graft([x, weight], value, move |[x, weight], _, gradient| {
        let gradient = gradient.reshape(((), outputs))?;
        let input = match wants_input {
            true => Some(gradient.matmul(weight)?.reshape(x.shape())?),
            false => None,
        };
        let rows = x.reshape(((), depth))?;
        Ok([input, Some(gradient.t()?.matmul(&rows)?)])
    })
}

/// Packs a plain weight, `[outputs, depth, taps]`, and bias.
pub(super) fn pack(
    weight: &Tensor,
    bias: Option<&Tensor>,
    outputs: usize,
    depth: usize,
    taps: usize,
) -> Result<Packed> {
    match bias {
        Some(bias) => host::with_slices([weight, bias], |[w, b]| {
            Ok(Packed::new(w, Some(b), outputs, depth, taps))
        }),
        None => host::with_slices([weight], |[w]| {
            Ok(Packed::new(w, None, outputs, depth, taps))
        }),
    }
}

/// `None` where something beside the map is not packed.
fn forward(weight: &Packed, x: &Tensor, then: Then, beside: &[Beside]) -> Result<Option<Tensor>> {
    let mut shape = x.dims().to_vec();
    match shape.last_mut() {
        Some(last) if *last == weight.depth => *last = weight.outputs,
        _ => bail!(
            "linear: an input of shape {:?} for {} inputs",
            x.dims(),
            weight.depth
        ),
    }
    let more = then.tensor();
    if let Some(more) = more
        && more.dims() != then.shape(&shape)
    {
        bail!("linear: {:?} to be added to {shape:?}", more.dims())
    }
    let rows = x.elem_count() / weight.depth;
    let per_row = rows / shape[0].max(1);
    let Some(runs) = beside::runs(beside, weight, per_row, |map| match map {
        Map::Linear(map) => map.packed(),
        _ => None,
    })?
    else {
        return Ok(None);
    };
    let y = host::with_slices([x, more.unwrap_or(x)], |[numbers, more]| {
        let source = Matrix {
            numbers,
            depth: weight.depth,
            stride: weight.depth,
        };
        let target = Target::Rows(then.finish(more, per_row));
        let kernel = gemm::current_kernel();
        // SAFETY: the shape is `rows * outputs` numbers, and `product` writes them all; `beside::runs`
        // has checked the runs.
        unsafe {
            host::new_tensor(shape, |out| {
                product::product(&kernel, weight, rows, &source, &runs, target, out);
                Ok(())
            })
        }
    })?;
    Ok(Some(y))
}
