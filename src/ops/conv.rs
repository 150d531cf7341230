use candle_core::{Device, Result, Tensor, bail};
use std::sync::Arc;

use super::beside::{self, Beside, Map, Then};
use super::gemm::{self, Rows};
use super::linear::pack;
use super::packed::Packed;
use super::product::{self, Finish, Target};
use super::{gradient, host, reference};

/// A prepared 2-D convolution over channels-last pictures.
///
/// An f32 weight in host memory is held packed for the kernels, in that form only; a clone shares
/// it.
#[derive(Debug, Clone)]
pub struct Conv2d {
    weight: Weight,
    bias: Option<Tensor>,
    stride: usize,
    padding: [usize; 4],
}

#[derive(Debug, Clone)]
enum Weight {
    Packed {
        packed: Arc<Packed>,
        kernel: [usize; 2],
    },
    Plain(Tensor),
}

impl Conv2d {
    /// `weight` is `[out, in, kh, kw]` as in the files, `bias` `[out]`; `padding` is zeros added at
    /// `[top, bottom, left, right]` (the VAE's downsampler pads only below and to the right).
    ///
    /// # Errors
    /// If the shapes do not fit together, or the stride is zero.
    pub fn new(
        weight: Tensor,
        bias: Option<Tensor>,
        stride: usize,
        padding: [usize; 4],
    ) -> Result<Self> {
        let (outputs, depth, kh, kw) = weight.dims4()?;
        if let Some(b) = &bias
            && b.dims() != [outputs]
        {
            bail!(
                "conv2d: a bias of shape {:?} for {outputs} outputs",
                b.dims()
            )
        }
        if stride == 0 || weight.elem_count() == 0 {
            bail!(
                "conv2d: stride {stride}, weight {:?}: none may be 0",
                weight.dims()
            )
        }
        let weight = if host::is_plain(bias.iter().chain([&weight])) {
            let packed = pack(&weight, bias.as_ref(), outputs, depth, kh * kw)?;
            Weight::Packed {
                packed: Arc::new(packed),
                kernel: [kh, kw],
            }
        } else {
            Weight::Plain(weight)
        };
        Ok(Self {
            weight,
            bias,
            stride,
            padding,
        })
    }

    /// `x` is `[b, h, w, in]`; the result `[b, h', w', out]`.
    ///
    /// # Errors
    /// If `x` has another number of channels, or is smaller than the kernel.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, Then::Nothing, &[])
    }

    /// [`Conv2d::forward`], and what is `beside` it, and `then`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn run(&self, x: &Tensor, then: Then, beside: &[Beside]) -> Result<Tensor> {
        if let Some(y) = self.packed_run(x, None, then, beside, |map| match map {
            Map::Conv2d(map) => self.packed_like(map),
            _ => None,
        })? {
            return Ok(y);
        }
        if beside.is_empty() {
            return match &self.weight {
                Weight::Plain(weight) if weight.track_op() => {
                    let (still, stride) = (self.detach()?, self.stride);
                    let y = gradient::trainable_conv(&still, x, weight, stride, self.padding)?;
                    then.add(y)
                }
                _ if host::is_tracked(then.tensor().into_iter().chain([x])) => {
                    let mut detached = None;
                    let value = self.run(&x.detach(), then.detach(&mut detached), &[])?;
                    let (own, size) = (self.clone(), [x.dim(1)?, x.dim(2)?]);
                    then.graft(x, value, move |gradient| own.back(gradient, size))
                }
                _ => then.add(self.reference(x)?),
            };
        }
        let run = |x: &Tensor, then: Then, beside: &[Beside]| self.run(x, then, beside);
        beside::composed(x, then, beside, self.bias.as_ref(), None, run)
    }

    /// The convolution of `x`, doubled in size by repeating every pixel and cut to `size` (height and
    /// width, at most the double), and what is `beside` it. On a CPU the large picture never exists.
    pub(super) fn run_upsampled(
        &self,
        x: &Tensor,
        size: [usize; 2],
        beside: &[Beside],
    ) -> Result<Tensor> {
        let (_, h, w, _) = x.dims4()?;
        if size[0] > 2 * h || size[1] > 2 * w {
            bail!("conv2d: {h}x{w} doubled does not reach {size:?}")
        }
        if let Some(y) = self.packed_run(x, Some(size), Then::Nothing, beside, |map| match map {
            Map::Upsampled(map) => self.packed_like(map.conv()),
            _ => None,
        })? {
            return Ok(y);
        }
        if beside.is_empty() {
            let large = reference::upsample_nearest_2x(x)?;
            let large = large.narrow(1, 0, size[0])?.narrow(2, 0, size[1])?;
            return self.run(&large, Then::Nothing, &[]);
        }
        let run = |x: &Tensor, _: Then, beside: &[Beside]| self.run_upsampled(x, size, beside);
        let bias = self.bias.as_ref();
        beside::composed(x, Then::Nothing, beside, bias, Some(size), run)
    }

    /// The same map, of which nobody wants a gradient.
    ///
    /// # Errors
    /// Those of candle.
    pub fn detach(&self) -> Result<Self> {
        match &self.weight {
            Weight::Plain(weight) if weight.track_op() => Self::new(
                weight.detach(),
                self.bias.clone(),
                self.stride,
                self.padding,
            ),
            _ => Ok(self.clone()),
        }
    }

    /// The gradient of the input, whose height and width are `input`, from that of the result.
    pub(super) fn back(&self, gradient: &Tensor, input: [usize; 2]) -> Result<Tensor> {
        let (b, h, w, c) = gradient.dims4()?;
        let (packed, [kh, kw]) = match &self.weight {
            Weight::Packed { packed, kernel } if host::is_plain([gradient]) => (packed, *kernel),
            _ => {
                let weight = self.weight()?;
                let (stride, padding) = (self.stride, self.padding);
                return gradient::transposed_conv(gradient, &weight, stride, padding, input);
            }
        };
        let weight = packed.transposed();
        let [top, _, left, _] = self.padding;
        host::with_slices([gradient], |[numbers]| {
            let zeros = vec![0.0; c];
            let source = Patches {
                numbers,
                zeros: &zeros,
                stored: [h, w],
                doubled: false,
                spread: self.stride,
                input: [(h - 1) * self.stride + 1, (w - 1) * self.stride + 1],
                output: input,
                kernel: [kh, kw],
                stride: 1,
                padding: [kh - 1 - top, kw - 1 - left],
            };
            let rows = b * input[0] * input[1];
            let target = Target::Rows(Finish::Nothing);
            let kernel = gemm::current_kernel();
            // SAFETY: the shape is `rows` rows of numbers, and `product` writes them all.
            unsafe {
                host::new_tensor((b, input[0], input[1], weight.outputs), |out| {
                    product::product(&kernel, &weight, rows, &source, &[], target, out);
                    Ok(())
                })
            }
        })
    }

    fn reference(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref();
        reference::conv2d(x, &self.weight()?, bias, self.stride, self.padding)
    }

    /// The packed weight of `other`, if it walks over a picture as this one does.
    fn packed_like<'a>(&self, other: &'a Self) -> Option<&'a Packed> {
        match (&self.weight, &other.weight) {
            (Weight::Packed { kernel: own, .. }, Weight::Packed { kernel, packed }) => {
                (own == kernel && self.stride == other.stride && self.padding == other.padding)
                    .then_some(packed)
            }
            _ => None,
        }
    }

    /// `None` where not all is packed.
    fn packed_run<'a>(
        &self,
        x: &Tensor,
        upsampled: Option<[usize; 2]>,
        then: Then,
        beside: &[Beside<'a>],
        like: impl Fn(&'a Map) -> Option<&'a Packed>,
    ) -> Result<Option<Tensor>> {
        let Weight::Packed {
            packed: weight,
            kernel,
        } = &self.weight
        else {
            return Ok(None);
        };
        if !host::is_plain(then.tensor().into_iter().chain([x])) {
            return Ok(None);
        }
        let (b, stored_h, stored_w, c) = x.dims4()?;
        if c != weight.depth {
            bail!("conv2d: {c} channels in an input for {}", weight.depth)
        }
        let [top, bottom, left, right] = self.padding;
        let [h, w] = upsampled.unwrap_or([stored_h, stored_w]);
        let (ph, pw) = (h + top + bottom, w + left + right);
        if ph < kernel[0] || pw < kernel[1] {
            bail!("conv2d: a padded input of {ph}x{pw} is smaller than the kernel {kernel:?}")
        }
        let size = [ph - kernel[0], pw - kernel[1]].map(|room| room / self.stride + 1);
        let shape = [b, size[0], size[1], weight.outputs];
        let more = then.tensor();
        if let Some(more) = more
            && more.dims() != then.shape(&shape)
        {
            bail!("conv2d: {:?} to be added to {shape:?}", more.dims())
        }
        let per_row = size[0] * size[1];
        let Some(runs) = beside::runs(beside, weight, per_row, like)? else {
            return Ok(None);
        };
        let y = host::with_slices([x, more.unwrap_or(x)], |[numbers, more]| {
            let zeros = vec![0.0; c];
            let source = Patches {
                numbers,
                zeros: &zeros,
                stored: [stored_h, stored_w],
                doubled: upsampled.is_some(),
                spread: 1,
                input: [h, w],
                output: size,
                kernel: *kernel,
                stride: self.stride,
                padding: [top, left],
            };
            let target = Target::Rows(then.finish(more, per_row));
            let kernel = gemm::current_kernel();
            // SAFETY: the shape is `b * per_row` rows of numbers, and `product` writes them all;
            // `beside::runs` has checked the runs.
            unsafe {
                host::new_tensor(&shape, |out| {
                    product::product(&kernel, weight, b * per_row, &source, &runs, target, out);
                    Ok(())
                })
            }
        })?;
        Ok(Some(y))
    }

    /// The weight as `[out, in, kh, kw]`; unpacked, that is copied, on every call.
    ///
    /// # Errors
    /// Those of candle.
    pub fn weight(&self) -> Result<Tensor> {
        match &self.weight {
            Weight::Packed { packed, kernel } => {
                let shape = (packed.outputs, packed.depth, kernel[0], kernel[1]);
                Tensor::from_vec(packed.unpack(), shape, &Device::Cpu)
            }
            Weight::Plain(weight) => Ok(weight.clone()),
        }
    }

    /// The packed weight, if it is a 3x3 kernel of stride 1 that keeps the size.
    pub(super) fn packed_3x3(&self) -> Option<&Packed> {
        match &self.weight {
            Weight::Packed { packed, kernel } => {
                (*kernel == [3, 3] && self.stride == 1 && self.padding == [1; 4]).then_some(packed)
            }
            Weight::Plain(_) => None,
        }
    }

    /// The bias, `[out]`.
    pub(super) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

/// The patches under a kernel, one row for each output pixel, one tap for each kernel position.
pub(super) struct Patches<'a> {
    pub numbers: &'a [f32],
    /// One pixel of zeros, for positions outside the picture.
    pub zeros: &'a [f32],
    /// The picture as it lies in memory.
    pub stored: [usize; 2],
    /// Whether every pixel in memory stands for two by two.
    pub doubled: bool,
    /// How far apart the kernel sees the pixels in memory, with zeros between them.
    pub spread: usize,
    /// The picture the kernel sees.
    pub input: [usize; 2],
    pub output: [usize; 2],
    pub kernel: [usize; 2],
    pub stride: usize,
    /// Above and to the left.
    pub padding: [usize; 2],
}

// SAFETY: every pointer is that of a whole pixel, `zeros.len()` numbers, of a checked slice.
unsafe impl Rows for Patches<'_> {
    fn point(&self, row: usize, stride: usize, table: &mut [*const f32]) {
        let c = self.zeros.len();
        let [h, w] = self.input;
        let halving = usize::from(self.doubled);
        let (row, x) = (row / self.output[1], row % self.output[1]);
        let (item, y) = (row / self.output[0], row % self.output[0]);
        for ky in 0..self.kernel[0] {
            let y = (y * self.stride + ky).wrapping_sub(self.padding[0]);
            for kx in 0..self.kernel[1] {
                let x = (x * self.stride + kx).wrapping_sub(self.padding[1]);
                let seen = y < h
                    && x < w
                    && y.is_multiple_of(self.spread)
                    && x.is_multiple_of(self.spread);
                table[(ky * self.kernel[1] + kx) * stride] = if seen {
                    let (y, x) = ((y / self.spread) >> halving, (x / self.spread) >> halving);
                    let pixel = (item * self.stored[0] + y) * self.stored[1] + x;
                    self.numbers[pixel * c..][..c].as_ptr()
                } else {
                    self.zeros.as_ptr()
                };
            }
        }
    }
}
