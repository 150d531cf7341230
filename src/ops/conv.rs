use candle_core::{Device, Result, Tensor, bail};
use std::sync::Arc;

use super::gemm::{self, Finish, Packed, Rows, Target};
use super::linear::pack;
use super::{host, reference};

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
        self.run(x, None, Then::Nothing)
    }

    /// `forward(x) + y`, where `y` has the shape of the result: the sum costs nothing on the way.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward_add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        self.run(x, None, Then::Add(y))
    }

    /// `forward(x) + y`, where `y` is `[b, out]`, the same for all positions of an item.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward_shift(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        self.run(x, None, Then::Shift(y))
    }

    /// The convolution of `x`, doubled in size by repeating every pixel and cut to `size` (height and
    /// width, at most the double). On a CPU the large picture never exists.
    pub(super) fn forward_upsampled(&self, x: &Tensor, size: [usize; 2]) -> Result<Tensor> {
        let (_, h, w, _) = x.dims4()?;
        if size[0] > 2 * h || size[1] > 2 * w {
            bail!("conv2d: {h}x{w} doubled does not reach {size:?}")
        }
        self.run(x, Some(size), Then::Nothing)
    }

    fn run(&self, x: &Tensor, upsampled: Option<[usize; 2]>, then: Then) -> Result<Tensor> {
        let more = match then {
            Then::Nothing => None,
            Then::Add(y) | Then::Shift(y) => Some(y),
        };
        if let Weight::Packed { packed, kernel } = &self.weight
            && host::is_plain(more.into_iter().chain([x]))
        {
            return forward(
                packed,
                *kernel,
                self.stride,
                self.padding,
                x,
                upsampled,
                then,
            );
        }
        let large = match upsampled {
            Some([h, w]) => {
                let large = reference::upsample_nearest_2x(x)?;
                Some(large.narrow(1, 0, h)?.narrow(2, 0, w)?)
            }
            None => None,
        };
        let y = reference::conv2d(
            large.as_ref().unwrap_or(x),
            &self.weight()?,
            self.bias.as_ref(),
            self.stride,
            self.padding,
        )?;
        match then {
            Then::Nothing => Ok(y),
            Then::Add(more) => y + more,
            Then::Shift(more) => y.broadcast_add(&more.unsqueeze(1)?.unsqueeze(1)?),
        }
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
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

/// What is added to a convolution's result.
#[derive(Clone, Copy)]
enum Then<'a> {
    Nothing,
    /// `[b, h', w', out]`.
    Add(&'a Tensor),
    /// `[b, out]`.
    Shift(&'a Tensor),
}

fn forward(
    weight: &Packed,
    kernel: [usize; 2],
    stride: usize,
    [top, bottom, left, right]: [usize; 4],
    x: &Tensor,
    upsampled: Option<[usize; 2]>,
    then: Then,
) -> Result<Tensor> {
    let (b, stored_h, stored_w, c) = x.dims4()?;
    if c != weight.depth {
        bail!("conv2d: {c} channels in an input for {}", weight.depth)
    }
    let [h, w] = upsampled.unwrap_or([stored_h, stored_w]);
    let (ph, pw) = (h + top + bottom, w + left + right);
    if ph < kernel[0] || pw < kernel[1] {
        bail!("conv2d: a padded input of {ph}x{pw} is smaller than the kernel {kernel:?}")
    }
    let size = [(ph - kernel[0]) / stride + 1, (pw - kernel[1]) / stride + 1];
    let (more, expected) = match then {
        Then::Nothing => (x, x.dims().to_vec()),
        Then::Add(y) => (y, vec![b, size[0], size[1], weight.outputs]),
        Then::Shift(y) => (y, vec![b, weight.outputs]),
    };
    if more.dims() != expected {
        bail!(
            "conv2d: {:?} to be added, expected {expected:?}",
            more.dims()
        )
    }
    host::with_slices([x, more], |[numbers, more]| {
        let zeros = vec![0.0; c];
        let source = Patches {
            numbers,
            zeros: &zeros,
            stored: [stored_h, stored_w],
            doubled: upsampled.is_some(),
            input: [h, w],
            output: size,
            kernel,
            stride,
            padding: [top, left],
        };
        let finish = match then {
            Then::Nothing => Finish::Nothing,
            Then::Add(_) => Finish::Add(more),
            Then::Shift(_) => Finish::Shift {
                shifts: more,
                rows: size[0] * size[1],
            },
        };
        let rows = b * size[0] * size[1];
        // SAFETY: the shape is `rows * outputs` numbers, and `product` writes them all.
        unsafe {
            host::new_tensor((b, size[0], size[1], weight.outputs), |out| {
                let target = Target::Rows(finish);
                gemm::product(&gemm::current_kernel(), weight, rows, &source, target, out);
                Ok(())
            })
        }
    })
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
                table[(ky * self.kernel[1] + kx) * stride] = if y < h && x < w {
                    let pixel = (item * self.stored[0] + (y >> halving)) * self.stored[1];
                    self.numbers[(pixel + (x >> halving)) * c..][..c].as_ptr()
                } else {
                    self.zeros.as_ptr()
                };
            }
        }
    }
}
