//! The layers the models are built of: `ops` with weights and a site name.

use std::{cell::RefCell, sync::Arc};

use candle_core::{Result, Tensor};

use super::{LoadError, Site, SiteKind, weights::Weights};
use crate::ops;

/// A place in a part's module tree while it is loaded.
#[derive(Debug, Clone)]
pub(super) struct Scope<'a> {
    weights: &'a Weights,
    sites: &'a RefCell<Vec<Site>>,
    /// What a site's name begins with, such as `unet`.
    part: &'a str,
    path: String,
}

impl<'a> Scope<'a> {
    pub fn new(weights: &'a Weights, sites: &'a RefCell<Vec<Site>>, part: &'a str) -> Self {
        Self {
            weights,
            sites,
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

    fn site(&self, kind: SiteKind, weight_shape: Vec<usize>) -> Arc<str> {
        let name: Arc<str> = format!("{}.{}", self.part, self.path).into();
        self.sites.borrow_mut().push(Site {
            name: name.clone(),
            kind,
            weight_shape,
        });
        name
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
    site: Arc<str>,
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
        Ok(Self {
            inner: ops::Linear::new(weight, bias).map_err(|e| scope.device_error(e))?,
            site: scope.site(SiteKind::Linear, shape),
        })
    }

    /// `x` is `[.., in]`; the result `[.., out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.inner.forward(x)
    }

    /// `forward(x) + y`; `y` is `[.., out]`.
    pub fn forward_add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        self.inner.forward_add(x, y)
    }

    /// The module's name, as [`Site::name`].
    pub fn site(&self) -> &Arc<str> {
        &self.site
    }
}

/// A 2-D convolution over channels-last pictures that knows its name.
#[derive(Debug, Clone)]
pub struct Conv2d {
    inner: ops::Conv2d,
    site: Arc<str>,
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
        Ok(Self {
            inner: ops::Conv2d::new(weight, Some(bias), stride, padding)
                .map_err(|e| scope.device_error(e))?,
            site: scope.site(SiteKind::Conv2d, dims),
        })
    }

    /// `x` is `[b, h, w, in]`; the result `[b, h', w', out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.inner.forward(x)
    }

    /// `forward(x) + y`; `y` is `[b, h', w', out]`.
    pub fn forward_add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        self.inner.forward_add(x, y)
    }

    /// `forward(x) + y`; `y` is `[b, out]`, one row for all positions of an item.
    pub fn forward_shift(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        self.inner.forward_shift(x, y)
    }

    /// The module's name, as [`Site::name`].
    pub fn site(&self) -> &Arc<str> {
        &self.site
    }
}

/// A picture doubled in size (nearest neighbour), then a 3x3 convolution that knows its name.
#[derive(Debug, Clone)]
pub struct UpsampledConv2d {
    inner: ops::UpsampledConv2d,
    site: Arc<str>,
}

impl UpsampledConv2d {
    pub(super) fn load(scope: &Scope, channels: usize) -> std::result::Result<Self, LoadError> {
        let conv = Conv2d::load(scope, ConvShape::same(channels, channels, 3))?;
        Ok(Self {
            inner: ops::UpsampledConv2d::new(conv.inner),
            site: conv.site,
        })
    }

    /// `x` is `[b, h, w, c]`; the result `[b, size[0], size[1], c]`, where a size is the double or one
    /// less.
    pub fn forward(&self, x: &Tensor, size: [usize; 2]) -> Result<Tensor> {
        self.inner.forward(x, size)
    }

    /// The module's name, as [`Site::name`].
    pub fn site(&self) -> &Arc<str> {
        &self.site
    }
}

/// Group normalisation that knows its name.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    groups: usize,
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    site: Arc<str>,
}

impl GroupNorm {
    /// The caller has checked that `groups` divides `channels`.
    pub(super) fn load(
        scope: &Scope,
        groups: usize,
        channels: usize,
        eps: f64,
    ) -> std::result::Result<Self, LoadError> {
        Ok(Self {
            groups,
            weight: scope.tensor("weight", &[channels])?,
            bias: scope.tensor("bias", &[channels])?,
            eps,
            site: scope.site(SiteKind::GroupNorm, vec![channels]),
        })
    }

    /// `x` is `[b, .., channels]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, self.groups, &self.weight, &self.bias, self.eps, false)
    }

    /// [`GroupNorm::forward`], then SiLU.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        ops::group_norm(x, self.groups, &self.weight, &self.bias, self.eps, true)
    }

    /// The module's name, as [`Site::name`].
    pub fn site(&self) -> &Arc<str> {
        &self.site
    }
}

/// Layer normalisation that knows its name.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    site: Arc<str>,
}

impl LayerNorm {
    pub(super) fn load(
        scope: &Scope,
        channels: usize,
        eps: f64,
    ) -> std::result::Result<Self, LoadError> {
        Ok(Self {
            weight: scope.tensor("weight", &[channels])?,
            bias: scope.tensor("bias", &[channels])?,
            eps,
            site: scope.site(SiteKind::LayerNorm, vec![channels]),
        })
    }

    /// `x` is `[.., channels]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::layer_norm(x, &self.weight, &self.bias, self.eps)
    }

    /// The module's name, as [`Site::name`].
    pub fn site(&self) -> &Arc<str> {
        &self.site
    }
}

/// A table of rows that knows its name.
#[derive(Debug, Clone)]
pub struct Embedding {
    /// `[rows, width]`.
    table: Tensor,
    site: Arc<str>,
}

impl Embedding {
    pub(super) fn load(
        scope: &Scope,
        rows: usize,
        width: usize,
    ) -> std::result::Result<Self, LoadError> {
        Ok(Self {
            table: scope.tensor("weight", &[rows, width])?,
            site: scope.site(SiteKind::Embedding, vec![rows, width]),
        })
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

    /// The module's name, as [`Site::name`].
    pub fn site(&self) -> &Arc<str> {
        &self.site
    }
}
