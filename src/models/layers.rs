//! The layers the models are built of: `ops` with weights and a site name.

use std::cell::RefCell;

use candle_core::{Result, Tensor};

use super::{
    ConvGeometry, Deltas, LoadError, Site, SiteDelta, SiteKind,
    deltas::each_part,
    modules::{BaseWeight, Record},
    weights::Weights,
};
use crate::ops::{self, Then};

/// A place in a part's module tree while it is loaded.
#[derive(Debug, Clone)]
pub(super) struct Scope<'a> {
    weights: &'a Weights,
    record: &'a RefCell<Record>,
    /// What a site's name begins with, such as `unet`.
    part: &'a str,
    path: String,
}

impl<'a> Scope<'a> {
    pub fn new(weights: &'a Weights, record: &'a RefCell<Record>, part: &'a str) -> Self {
        Self {
            weights,
            record,
            part,
            path: String::new(),
        }
    }

    /// The submodule `name`, which may have dots.
    pub fn at(&self, name: &str) -> Self {
        let path = if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        };
        Self {
            path,
            ..self.clone()
        }
    }

    /// The submodule `name.index`.
    pub fn nth(&self, name: &str, index: usize) -> Self {
        self.at(&format!("{name}.{index}"))
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> std::result::Result<Tensor, LoadError> {
        self.weights.tensor(&format!("{}.{name}", self.path), shape)
    }

    /// Records a site, and returns its index among all of the model's.
    fn site(&self, kind: SiteKind, weight_shape: Vec<usize>, weight: BaseWeight) -> usize {
        self.conv_site(kind, weight_shape, weight, None)
    }

    fn conv_site(
        &self,
        kind: SiteKind,
        weight_shape: Vec<usize>,
        weight: BaseWeight,
        geometry: Option<ConvGeometry>,
    ) -> usize {
        let mut record = self.record.borrow_mut();
        record.weights.push(weight);
        record.sites.push(Site {
            name: format!("{}.{}", self.part, self.path).into(),
            kind,
            weight_shape,
            geometry,
        });
        record.sites.len() - 1
    }

    fn device_error(&self, source: candle_core::Error) -> LoadError {
        LoadError::Device {
            what: format!("{}.{}", self.part, self.path),
            source,
        }
    }
}

/// An affine map that knows its name.
#[derive(Debug, Clone)]
pub struct Linear {
    inner: ops::Linear,
    site: usize,
}

impl Linear {
    pub(super) fn load(
        scope: &Scope,
        input: usize,
        output: usize,
        bias: bool,
    ) -> std::result::Result<Self, LoadError> {
        let weight = scope.tensor("weight", &[output, input])?;
        Self::build(scope, weight, output, bias)
    }

    /// As [`Linear::load`], but the file may hold the map as a 1x1 convolution (old VAE files).
    pub(super) fn load_or_conv(
        scope: &Scope,
        input: usize,
        output: usize,
        bias: bool,
    ) -> std::result::Result<Self, LoadError> {
        let conv = [output, input, 1, 1];
        if scope.weights.shape(&format!("{}.weight", scope.path)) != Some(&conv) {
            return Self::load(scope, input, output, bias);
        }
        let weight = scope
            .tensor("weight", &conv)?
            .reshape((output, input))
            .map_err(|e| scope.device_error(e))?;
        Self::build(scope, weight, output, bias)
    }

    fn build(
        scope: &Scope,
        weight: Tensor,
        output: usize,
        bias: bool,
    ) -> std::result::Result<Self, LoadError> {
        let shape = weight.dims().to_vec();
        let bias = bias.then(|| scope.tensor("bias", &[output])).transpose()?;
        let inner = ops::Linear::new(weight, bias).map_err(|e| scope.device_error(e))?;
        let weight = BaseWeight::Linear(inner.clone());
        Ok(Self {
            inner,
            site: scope.site(SiteKind::Linear, shape, weight),
        })
    }

    /// `x` is `[rows, .., in]`; the result `[rows, .., out]`.
    pub fn forward(&self, x: &Tensor, deltas: Deltas) -> Result<Tensor> {
        self.forward_ragged(x, deltas, |row| row)
    }

    /// `forward(x) + y`; `y` is `[rows, .., out]`.
    pub fn forward_add(&self, x: &Tensor, y: &Tensor, deltas: Deltas) -> Result<Tensor> {
        let beside = deltas.beside(self.site, |row| row);
        self.inner.run(x, Then::Add(y), &beside)
    }

    /// [`Linear::forward`] of rows that differ in length and follow each other: row `i` of the forward
    /// begins at row `start(i)` of `x`.
    pub fn forward_ragged(
        &self,
        x: &Tensor,
        deltas: Deltas,
        start: impl Fn(usize) -> usize,
    ) -> Result<Tensor> {
        let beside = deltas.beside(self.site, start);
        self.inner.run(x, Then::Nothing, &beside)
    }
}

/// A 2-D convolution over channels-last pictures that knows its name.
#[derive(Debug, Clone)]
pub struct Conv2d {
    inner: ops::Conv2d,
    site: usize,
}

/// The shape of a convolution: channels, square kernel, stride and zeros around.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConvShape {
    pub input: usize,
    pub output: usize,
    pub kernel: usize,
    pub stride: usize,
    /// `[top, bottom, left, right]`.
    pub padding: [usize; 4],
}

impl ConvShape {
    /// Stride one, as much padding as keeps the size (for odd kernels).
    pub fn same(input: usize, output: usize, kernel: usize) -> Self {
        Self {
            input,
            output,
            kernel,
            stride: 1,
            padding: [kernel / 2; 4],
        }
    }
}

impl Conv2d {
    pub(super) fn load(scope: &Scope, shape: ConvShape) -> std::result::Result<Self, LoadError> {
        Self::load_at(scope, shape, false)
    }

    fn load_at(
        scope: &Scope,
        shape: ConvShape,
        upsampled: bool,
    ) -> std::result::Result<Self, LoadError> {
        let ConvShape {
            input,
            output,
            kernel,
            stride,
            padding,
        } = shape;
        let dims = vec![output, input, kernel, kernel];
        let weight = scope.tensor("weight", &dims)?;
        let bias = scope.tensor("bias", &[output])?;
        let geometry = ConvGeometry {
            stride,
            padding,
            upsampled,
        };
        let inner = ops::Conv2d::new(weight, Some(bias), stride, padding)
            .map_err(|e| scope.device_error(e))?;
        let weight = BaseWeight::Conv2d(inner.clone());
        Ok(Self {
            inner,
            site: scope.conv_site(SiteKind::Conv2d, dims, weight, Some(geometry)),
        })
    }

    /// `x` is `[b, h, w, in]`; the result `[b, h', w', out]`.
    pub fn forward(&self, x: &Tensor, deltas: Deltas) -> Result<Tensor> {
        self.run(x, Then::Nothing, deltas)
    }

    /// `forward(x) + y`; `y` is `[b, h', w', out]`.
    pub fn forward_add(&self, x: &Tensor, y: &Tensor, deltas: Deltas) -> Result<Tensor> {
        self.run(x, Then::Add(y), deltas)
    }

    /// `forward(x) + y`; `y` is `[b, out]`, one row for all positions of an item.
    pub fn forward_shift(&self, x: &Tensor, y: &Tensor, deltas: Deltas) -> Result<Tensor> {
        self.run(x, Then::Shift(y), deltas)
    }

    fn run(&self, x: &Tensor, then: Then, deltas: Deltas) -> Result<Tensor> {
        let beside = deltas.beside(self.site, |row| row);
        self.inner.run(x, then, &beside)
    }
}

/// A picture doubled in size (nearest neighbour), then a 3x3 convolution that knows its name.
#[derive(Debug, Clone)]
pub struct UpsampledConv2d {
    inner: ops::UpsampledConv2d,
    site: usize,
}

impl UpsampledConv2d {
    pub(super) fn load(scope: &Scope, channels: usize) -> std::result::Result<Self, LoadError> {
        let conv = Conv2d::load_at(scope, ConvShape::same(channels, channels, 3), true)?;
        Ok(Self {
            inner: ops::UpsampledConv2d::new(conv.inner),
            site: conv.site,
        })
    }

    /// `x` is `[b, h, w, c]`; the result `[b, size[0], size[1], c]`, where a size is the double or one
    /// less.
    pub fn forward(&self, x: &Tensor, size: [usize; 2], deltas: Deltas) -> Result<Tensor> {
        let beside = deltas.beside(self.site, |row| row);
        self.inner.run(x, size, &beside)
    }
}

/// Group normalisation that knows its name.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    groups: usize,
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    site: usize,
}

impl GroupNorm {
    /// The caller has checked that `groups` divides `channels`.
    pub(super) fn load(
        scope: &Scope,
        groups: usize,
        channels: usize,
        eps: f64,
    ) -> std::result::Result<Self, LoadError> {
        let weight = scope.tensor("weight", &[channels])?;
        let base = BaseWeight::Plain(weight.clone());
        Ok(Self {
            groups,
            weight,
            bias: scope.tensor("bias", &[channels])?,
            eps,
            site: scope.site(SiteKind::GroupNorm, vec![channels], base),
        })
    }

    /// `x` is `[b, .., channels]`.
    pub fn forward(&self, x: &Tensor, deltas: Deltas) -> Result<Tensor> {
        self.run(x, deltas, false)
    }

    /// [`GroupNorm::forward`], then SiLU.
    pub fn forward_silu(&self, x: &Tensor, deltas: Deltas) -> Result<Tensor> {
        self.run(x, deltas, true)
    }

    fn run(&self, x: &Tensor, deltas: Deltas, silu: bool) -> Result<Tensor> {
        let (w, b) = (&self.weight, &self.bias);
        adapt_norm(self.site, x, [w, b], deltas, |x, w, b| {
            ops::group_norm(x, self.groups, w, b, self.eps, silu)
        })
    }
}

/// Layer normalisation that knows its name.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    site: usize,
}

impl LayerNorm {
    pub(super) fn load(
        scope: &Scope,
        channels: usize,
        eps: f64,
    ) -> std::result::Result<Self, LoadError> {
        let weight = scope.tensor("weight", &[channels])?;
        let base = BaseWeight::Plain(weight.clone());
        Ok(Self {
            weight,
            bias: scope.tensor("bias", &[channels])?,
            eps,
            site: scope.site(SiteKind::LayerNorm, vec![channels], base),
        })
    }

    /// `x` is `[rows, .., channels]`.
    pub fn forward(&self, x: &Tensor, deltas: Deltas) -> Result<Tensor> {
        let (w, b) = (&self.weight, &self.bias);
        adapt_norm(self.site, x, [w, b], deltas, |x, w, b| {
            ops::layer_norm(x, w, b, self.eps)
        })
    }
}

/// A norm whose weight and bias may differ from run to run of the rows.
fn adapt_norm(
    site: usize,
    x: &Tensor,
    [weight, bias]: [&Tensor; 2],
    deltas: Deltas,
    norm: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let Some(parts) = deltas.at(site) else {
        return norm(x, weight, bias);
    };
    let sum = |own: &Tensor, more: Option<&Tensor>| match more {
        Some(more) => own + more,
        None => Ok(own.clone()),
    };
    each_part(&parts, |rows, delta| {
        let x = x.narrow(0, rows.start, rows.len())?;
        let more = |part: fn(&SiteDelta) -> Option<&Tensor>| delta.and_then(part);
        let weight = sum(weight, more(|delta| delta.weight.as_ref()))?;
        let bias = sum(bias, more(|delta| delta.bias.as_ref()))?;
        norm(&x, &weight, &bias)
    })
}

/// A table of rows that knows its name.
#[derive(Debug, Clone)]
pub struct Embedding {
    /// `[rows, width]`.
    table: Tensor,
}

impl Embedding {
    pub(super) fn load(
        scope: &Scope,
        rows: usize,
        width: usize,
    ) -> std::result::Result<Self, LoadError> {
        let table = scope.tensor("weight", &[rows, width])?;
        let base = BaseWeight::Plain(table.clone());
        scope.site(SiteKind::Embedding, vec![rows, width], base);
        Ok(Self { table })
    }

    /// The rows of `ids` (u32, `[n]`) as `[n, width]`.
    pub fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        self.table.index_select(ids, 0)
    }

    /// The first `n` rows, `[n, width]`.
    pub fn first(&self, n: usize) -> Result<Tensor> {
        self.table.narrow(0, 0, n)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.table.dims()[0]
    }

    pub(super) fn dtype(&self) -> candle_core::DType {
        self.table.dtype()
    }

    pub(super) fn device(&self) -> &candle_core::Device {
        self.table.device()
    }
}
