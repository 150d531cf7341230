use candle_core::{Device, Result, Tensor, bail};
use std::sync::Arc;

use super::gemm::{self, Packed, Rows};
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
        match &self.weight {
            Weight::Packed { packed, kernel } if host::is_plain([x]) => {
                forward(packed, *kernel, self.stride, self.padding, x)
            }
            _ => reference::conv2d(
                x,
                &self.weight()?,
                self.bias.as_ref(),
                self.stride,
                self.padding,
            ),
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

    /// The bias, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

fn forward(
    weight: &Packed,
    kernel: [usize; 2],
    stride: usize,
    [top, bottom, left, right]: [usize; 4],
    x: &Tensor,
) -> Result<Tensor> {
    let (b, h, w, c) = x.dims4()?;
    if c != weight.depth {
        bail!("conv2d: {c} channels in an input for {}", weight.depth)
    }
    let (ph, pw) = (h + top + bottom, w + left + right);
    if ph < kernel[0] || pw < kernel[1] {
        bail!("conv2d: a padded input of {ph}x{pw} is smaller than the kernel {kernel:?}")
    }
    let size = [(ph - kernel[0]) / stride + 1, (pw - kernel[1]) / stride + 1];
    host::with_slice(x, |numbers| {
        let zeros = vec![0.0; c];
        let source = Patches {
            numbers,
            zeros: &zeros,
            input: [h, w],
            output: size,
            kernel,
            stride,
            padding: [top, left],
        };
        let rows = b * size[0] * size[1];
        // SAFETY: the shape is `rows * outputs` numbers, and `product` writes them all.
        unsafe {
            host::new_tensor(x, (b, size[0], size[1], weight.outputs), |out| {
                gemm::product(&gemm::current_kernel(), weight, rows, &source, out);
                Ok(())
            })
        }
    })
}

/// The patches under a kernel, one row for each output pixel, one tap for each kernel position.
struct Patches<'a> {
    numbers: &'a [f32],
    /// One pixel of zeros, for positions outside the picture.
    zeros: &'a [f32],
    input: [usize; 2],
    output: [usize; 2],
    kernel: [usize; 2],
    stride: usize,
    /// Above and to the left.
    padding: [usize; 2],
}

// SAFETY: every pointer is that of a whole pixel, `zeros.len()` numbers, of a checked slice.
unsafe impl Rows for Patches<'_> {
    fn point(&self, row: usize, stride: usize, table: &mut [*const f32]) {
        let c = self.zeros.len();
        let [h, w] = self.input;
        let (row, x) = (row / self.output[1], row % self.output[1]);
        let (item, y) = (row / self.output[0], row % self.output[0]);
        for ky in 0..self.kernel[0] {
            let y = (y * self.stride + ky).wrapping_sub(self.padding[0]);
            for kx in 0..self.kernel[1] {
                let x = (x * self.stride + kx).wrapping_sub(self.padding[1]);
                table[(ky * self.kernel[1] + kx) * stride] = if y < h && x < w {
                    self.numbers[((item * h + y) * w + x) * c..][..c].as_ptr()
                } else {
                    self.zeros.as_ptr()
                };
            }
        }
    }
}
