//! What an adapter does to one site.
//!
//! Changes stay in the factors they came in, which are small, and are composed on demand: the
//! difference of a whole UNet would be as large as the UNet.

use candle_core::{CpuStorage, D, DType, Device, Result, Storage, Tensor};
use half::slice::HalfFloatSliceExt as _;

/// What an adapter does to the weight and bias of one site. Every tensor is on the CPU, in the type
/// its file had; whatever is computed is computed in f32.
///
/// At strength `m` the weight is `W + m·(W' − W)`, where `W' = W + ΔW` or, with a magnitude, that
/// sum with its rows or columns brought to given lengths (DoRA, Liu et al. 2024).
#[derive(Debug, Clone, Default)]
pub struct Delta {
    pub change: Option<Change>,
    pub magnitude: Option<Magnitude>,
    /// Added to the bias, `[out]`; a site without a bias then has this one.
    pub bias: Option<Tensor>,
}

/// A change of a weight.
#[derive(Debug, Clone)]
pub enum Change {
    /// LoRA (Hu et al. 2021) and LoCon.
    LowRank(LowRank),
    /// LoHa: the elementwise product of two low-rank matrices (Hyeon-Woo et al. 2021).
    Hadamard {
        left: Factors,
        right: Factors,
        scale: f64,
    },
    /// LoKr: the Kronecker product of two blocks, whole or factored.
    Kronecker {
        left: Block,
        right: Block,
        scale: f64,
    },
    /// The difference itself, in the shape of the weight; for a norm too.
    Whole(Tensor),
    /// (IA)³: `ΔW = W ⊙ w`, one number for each row or column (Liu et al. 2022).
    Gain { values: Tensor, axis: Axis },
}

/// `scale · up · down`, or with `mid` the Tucker form for kernels wider than one.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[rank, in]` for a linear map, `[rank, in, kh, kw]` for a convolution; `[rank, in]` for both
    /// with `mid`.
    pub down: Tensor,
    /// `[out, rank]`.
    pub up: Tensor,
    /// `[rank of up, rank of down, kh, kw]`, at a convolution.
    pub mid: Option<Tensor>,
    /// `alpha / rank`.
    pub scale: f64,
}

/// Two factors of a matrix, `a` `[out, rank]` and `b` `[rank, in·kh·kw]`; around a core
/// `[rank, rank, kh, kw]` they are `[rank, out]` and `[rank, in]`, as LyCORIS has them.
#[derive(Debug, Clone)]
pub struct Factors {
    pub a: Tensor,
    pub b: Tensor,
    pub core: Option<Tensor>,
}

/// One side of a Kronecker product.
#[derive(Debug, Clone)]
pub enum Block {
    Whole(Tensor),
    /// Factors, and the kernel of a block they make without a core.
    Product(Factors),
}

/// A target length for every row or column of a weight.
#[derive(Debug, Clone)]
pub struct Magnitude {
    pub values: Tensor,
    pub axis: Axis,
}

/// What a vector beside a weight counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Output features: one number for each row.
    Rows,
    /// Input features: one number for each column, that is for each input channel of a kernel.
    Columns,
}

impl Delta {
    /// `ΔW` in the shape of the weight, if it does not depend on the base's weight: no magnitude and
    /// no gain. Zeros if the weight stays as it is.
    ///
    /// # Errors
    /// Factors that do not fit the shape, which reading rules out.
    pub fn weight(&self, shape: &[usize]) -> Result<Option<Tensor>> {
        match (&self.change, &self.magnitude) {
            (_, Some(_)) | (Some(Change::Gain { .. }), None) => Ok(None),
            (Some(change), None) => change.map(wide)?.compose(shape).map(Some),
            (None, None) => Tensor::zeros(shape, DType::F32, &Device::Cpu).map(Some),
        }
    }

    /// `W' − W` at strength one, in the shape of the base's weight, as f32 on the CPU.
    ///
    /// # Errors
    /// As [`Delta::weight`].
    pub fn weight_with(&self, base: &Tensor) -> Result<Tensor> {
        if let Some(weight) = self.weight(base.dims())? {
            return Ok(weight);
        }
        // In f64: the difference of nearly equal weights has fewer digits than they have.
        let base = base.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
        let change = match &self.change {
            Some(Change::Gain { values, axis }) => {
                let values = axis.beside(&values.to_dtype(DType::F64)?, base.rank())?;
                Some(base.broadcast_mul(&values)?)
            }
            Some(change) => {
                let weight = change.map(wide)?.compose(base.dims())?;
                Some(weight.to_dtype(DType::F64)?)
            }
            None => None,
        };
        let sum = match &change {
            Some(change) => (&base + change)?,
            None => base.clone(),
        };
        let delta = match (&self.magnitude, change) {
            (Some(magnitude), _) => {
                let ratio = magnitude
                    .axis
                    .beside(&magnitude.ratio(&sum)?, base.rank())?;
                (sum.broadcast_mul(&ratio)? - &base)?
            }
            (None, Some(change)) => change,
            (None, None) => base.zeros_like()?,
        };
        delta.to_dtype(DType::F32)
    }

    /// The same with every tensor in f32.
    ///
    /// # Errors
    /// Those of candle.
    pub fn wide(&self) -> Result<Self> {
        let magnitude = |m: &Magnitude| {
            Ok::<_, candle_core::Error>(Magnitude {
                values: wide(&m.values)?,
                axis: m.axis,
            })
        };
        Ok(Self {
            change: self.change.as_ref().map(|c| c.map(wide)).transpose()?,
            magnitude: self.magnitude.as_ref().map(magnitude).transpose()?,
            bias: self.bias.as_ref().map(wide).transpose()?,
        })
    }

    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let change = self.change.iter().flat_map(Change::tensors);
        change
            .chain(self.magnitude.iter().map(|m| &m.values))
            .chain(&self.bias)
    }
}

/// In f32, which every type of an adapter's file fits into.
pub(super) fn wide(tensor: &Tensor) -> Result<Tensor> {
    let (storage, layout) = tensor.storage_and_layout();
    if let Storage::Cpu(CpuStorage::F16(all)) = &*storage
        && let Some((start, end)) = layout.contiguous_offsets()
    {
        // Eight at a time where the processor can, which candle's conversion does not.
        let mut values = vec![0.0; end - start];
        all[start..end].convert_to_f32_slice(&mut values);
        return Tensor::from_vec(values, tensor.shape(), &Device::Cpu);
    }
    tensor.to_dtype(DType::F32)
}

impl Change {
    /// The same change of other tensors.
    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor> + Copy) -> Result<Self> {
        let block = |block: &Block| match block {
            Block::Whole(whole) => f(whole).map(Block::Whole),
            Block::Product(factors) => factors.map(f).map(Block::Product),
        };
        Ok(match self {
            Self::LowRank(low) => Self::LowRank(LowRank {
                down: f(&low.down)?,
                up: f(&low.up)?,
                mid: low.mid.as_ref().map(f).transpose()?,
                scale: low.scale,
            }),
            Self::Hadamard { left, right, scale } => Self::Hadamard {
                left: left.map(f)?,
                right: right.map(f)?,
                scale: *scale,
            },
            Self::Kronecker { left, right, scale } => Self::Kronecker {
                left: block(left)?,
                right: block(right)?,
                scale: *scale,
            },
            Self::Whole(weight) => Self::Whole(f(weight)?),
            Self::Gain { values, axis } => Self::Gain {
                values: f(values)?,
                axis: *axis,
            },
        })
    }

    /// `ΔW` of f32 tensors in the given shape; a gain, which has none of its own, is an error.
    pub(super) fn compose(&self, shape: &[usize]) -> Result<Tensor> {
        match self {
            Self::LowRank(low) => low.compose(shape),
            Self::Hadamard { left, right, scale } => {
                ((left.product()? * right.product()?)? * *scale)?.reshape(shape)
            }
            Self::Kronecker { left, right, scale } => {
                (kronecker(&left.whole()?, &right.whole()?, shape)? * *scale)?.reshape(shape)
            }
            Self::Whole(weight) => weight.reshape(shape),
            Self::Gain { .. } => candle_core::bail!("a gain needs the base's weight"),
        }
    }

    /// The rank of the factors, if there are any.
    pub fn rank(&self) -> Option<usize> {
        match self {
            Self::LowRank(low) => Some(low.rank()),
            Self::Hadamard { left, .. } => Some(left.rank()),
            Self::Kronecker { left, right, .. } => right.rank().or(left.rank()),
            Self::Whole(_) | Self::Gain { .. } => None,
        }
    }

    fn tensors(&self) -> Vec<&Tensor> {
        fn factors(f: &Factors) -> Vec<&Tensor> {
            [&f.a, &f.b].into_iter().chain(&f.core).collect()
        }
        fn block(block: &Block) -> Vec<&Tensor> {
            match block {
                Block::Whole(t) => vec![t],
                Block::Product(f) => factors(f),
            }
        }
        match self {
            Self::LowRank(low) => [&low.down, &low.up].into_iter().chain(&low.mid).collect(),
            Self::Hadamard { left, right, .. } => [factors(left), factors(right)].concat(),
            Self::Kronecker { left, right, .. } => [block(left), block(right)].concat(),
            Self::Whole(weight) => vec![weight],
            Self::Gain { values, .. } => vec![values],
        }
    }
}

impl LowRank {
    pub fn rank(&self) -> usize {
        self.down.dims()[0]
    }

    fn compose(&self, shape: &[usize]) -> Result<Tensor> {
        let weight = match &self.mid {
            Some(mid) => tucker(mid, &self.up, &self.down)?,
            None => self.up.matmul(&self.down.flatten_from(1)?)?,
        };
        (weight * self.scale)?.reshape(shape)
    }
}

impl Factors {
    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            a: f(&self.a)?,
            b: f(&self.b)?,
            core: self.core.as_ref().map(f).transpose()?,
        })
    }

    /// Rows of `b`.
    pub fn rank(&self) -> usize {
        self.b.dims()[0]
    }

    /// `[out, in·kh·kw]`, or `[out, in, kh, kw]` around a core.
    fn product(&self) -> Result<Tensor> {
        match &self.core {
            Some(core) => tucker(core, &self.a.t()?, &self.b),
            None => self.a.matmul(&self.b),
        }
    }
}

impl Block {
    /// Of its factors.
    pub fn rank(&self) -> Option<usize> {
        match self {
            Self::Whole(_) => None,
            Self::Product(factors) => Some(factors.rank()),
        }
    }

    fn whole(&self) -> Result<Tensor> {
        match self {
            Self::Whole(tensor) => Ok(tensor.clone()),
            Self::Product(factors) => factors.product(),
        }
    }
}

impl Magnitude {
    /// What each row or column of `v` is multiplied with to have its length; 0 where `v` is 0.
    /// A vector in the dtype of `v`.
    pub fn ratio(&self, v: &Tensor) -> Result<Tensor> {
        let lines = match self.axis {
            Axis::Rows => v.flatten_from(1)?,
            Axis::Columns => v.transpose(0, 1)?.flatten_from(1)?,
        };
        let length = lines.sqr()?.sum(D::Minus1)?.sqrt()?;
        let ratio = (self.values.to_dtype(v.dtype())? / &length)?;
        length.eq(0f64)?.where_cond(&ratio.zeros_like()?, &ratio)
    }
}

impl Axis {
    /// A vector as it is broadcast over a weight of so many dimensions.
    pub(super) fn beside(self, values: &Tensor, dimensions: usize) -> Result<Tensor> {
        let mut shape = vec![1; dimensions];
        shape[match self {
            Self::Rows => 0,
            Self::Columns => 1,
        }] = values.elem_count();
        values.reshape(shape)
    }
}

/// `einsum("ijkl,oi,jn->onkl", core, out, input)`.
fn tucker(core: &Tensor, out: &Tensor, input: &Tensor) -> Result<Tensor> {
    let (_, j, kh, kw) = core.dims4()?;
    let (o, n) = (out.dim(0)?, input.dim(1)?);
    let half = out.contiguous()?.matmul(&core.flatten_from(1)?)?; // [o, j·kh·kw]
    let half = half
        .reshape((o, j, kh * kw))?
        .transpose(1, 2)?
        .reshape((o * kh * kw, j))?;
    half.matmul(&input.contiguous()?)?
        .reshape((o, kh * kw, n))?
        .transpose(1, 2)?
        .reshape((o, n, kh, kw))
}

/// The Kronecker product of `left` `[u, p]` and `right` `[v, q, …]`, whose kernel is that of the
/// weight.
fn kronecker(left: &Tensor, right: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (u, p) = left.dims2()?;
    let kernel: usize = shape[2..].iter().product();
    let v = right.dim(0)?;
    let q = right.elem_count() / (v * kernel);
    let left = left.reshape((u, 1, p, 1, 1))?;
    let right = right.reshape((1, v, 1, q, kernel))?;
    left.broadcast_mul(&right)
}
