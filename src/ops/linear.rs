use candle_core::{Device, Result, Tensor, bail};
use std::sync::Arc;

use super::gemm::{self, Finish, Matrix, Packed, Target};
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
        match &self.weight {
            Weight::Packed(packed) if host::is_plain([x]) => forward(packed, x, None),
            _ => reference::linear(x, &self.weight()?, self.bias.as_ref()),
        }
    }

    /// `forward(x) + y`, where `y` has the shape of the result: the sum costs nothing on the way.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward_add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Weight::Packed(packed) if host::is_plain([x, y]) => forward(packed, x, Some(y)),
            _ => reference::linear(x, &self.weight()?, self.bias.as_ref())? + y,
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

    /// The bias, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
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

fn forward(weight: &Packed, x: &Tensor, add: Option<&Tensor>) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    match shape.last_mut() {
        Some(last) if *last == weight.depth => *last = weight.outputs,
        _ => bail!(
            "linear: an input of shape {:?} for {} inputs",
            x.dims(),
            weight.depth
        ),
    }
    if let Some(add) = add
        && add.dims() != shape
    {
        bail!("linear: {:?} to be added to {shape:?}", add.dims())
    }
    let rows = x.elem_count() / weight.depth;
    host::with_slices([x, add.unwrap_or(x)], |[numbers, more]| {
        let source = Matrix {
            numbers,
            depth: weight.depth,
            stride: weight.depth,
        };
        let finish = match add {
            Some(_) => Finish::Add(more),
            None => Finish::Nothing,
        };
        // SAFETY: the shape is `rows * outputs` numbers, and `product` writes them all.
        unsafe {
            host::new_tensor(shape, |out| {
                let target = Target::Rows(finish);
                gemm::product(&gemm::current_kernel(), weight, rows, &source, target, out);
                Ok(())
            })
        }
    })
}
