//! Linear maps and convolutions.

use candle_core::{Result, Tensor};

use super::graft;
use crate::ops::{Conv2d, host, reference};

/// `[out, in, kh, kw]` to the weight of the convolution that leads back, `[in, out, kh, kw]`.
fn transposed_weight(weight: &Tensor) -> Result<Tensor> {
    weight.transpose(0, 1)?.contiguous()?.flip(&[2, 3])
}

/// The gradient of a convolution's input, `[b, h, w, in]` with `input` its height and width, from that of
/// its result, for what the kernels do not serve: every number of `gradient` is put `stride` apart, and
/// the flipped kernel walks over that.
pub(in super::super) fn transposed_conv(
    gradient: &Tensor,
    weight: &Tensor,
    stride: usize,
    padding: [usize; 4],
    input: [usize; 2],
) -> Result<Tensor> {
    let (b, h, w, c) = gradient.dims4()?;
    let (_, _, kh, kw) = weight.dims4()?;
    let spread = match stride {
        1 => gradient.clone(),
        s => gradient
            .reshape((b, h, 1, w, 1, c))?
            .pad_with_zeros(2, 0, s - 1)?
            .pad_with_zeros(4, 0, s - 1)?
            .reshape((b, h * s, w * s, c))?
            .narrow(1, 0, (h - 1) * s + 1)?
            .narrow(2, 0, (w - 1) * s + 1)?,
    };
    // What of the input the kernel never saw below and to the right gets zeros.
    let [_, height, width, _] = [b, spread.dim(1)?, spread.dim(2)?, c];
    let (top, left) = (kh - 1 - padding[0], kw - 1 - padding[2]);
    let bottom = (input[0] + kh - 1).saturating_sub(height + top);
    let right = (input[1] + kw - 1).saturating_sub(width + left);
    let weight = transposed_weight(weight)?;
    reference::conv2d(&spread, &weight, None, 1, [top, bottom, left, right])?
        .narrow(1, 0, input[0])?
        .narrow(2, 0, input[1])
}

/// A convolution whose weight is trained: `conv` is the one with the detached weight.
///
/// candle's own backward of a convolution is written for no speed at all, and wants the weight as it lies
/// for its own layout.
pub(in super::super) fn trainable_conv(
    conv: &Conv2d,
    x: &Tensor,
    weight: &Tensor,
    stride: usize,
    padding: [usize; 4],
) -> Result<Tensor> {
    let value = conv.forward(&x.detach())?;
    let wants_input = x.track_op();
    let conv = conv.clone();
    graft([x, weight], value, move |[x, weight], _, gradient| {
        let input = match wants_input {
            true => Some(conv.back(gradient, [x.dim(1)?, x.dim(2)?])?),
            false => None,
        };
        let weight = weight_gradient(x, gradient, weight.dims4()?, stride, padding)?;
        Ok([input, Some(weight)])
    })
}

/// The gradient `[out, in, kh, kw]` of a convolution's weight: one matrix product for each place of the
/// kernel, with the input as that place sees it.
fn weight_gradient(
    x: &Tensor,
    gradient: &Tensor,
    (outputs, depth, kh, kw): (usize, usize, usize, usize),
    stride: usize,
    [top, bottom, left, right]: [usize; 4],
) -> Result<Tensor> {
    let (b, h, w, _) = gradient.dims4()?;
    let gradient = gradient.reshape((b * h * w, outputs))?.t()?.contiguous()?;
    // Room for whole strides at every place.
    let x = x
        .pad_with_zeros(1, top, bottom + stride - 1)?
        .pad_with_zeros(2, left, right + stride - 1)?;
    let mut places = Vec::with_capacity(kh * kw);
    for ky in 0..kh {
        for kx in 0..kw {
            let seen = x.narrow(1, ky, h * stride)?.narrow(2, kx, w * stride)?;
            let seen = match stride {
                1 => seen,
                s => seen
                    .contiguous()?
                    .reshape((b, h, s, w, s, depth))?
                    .narrow(2, 0, 1)?
                    .narrow(4, 0, 1)?,
            };
            let seen = seen.contiguous()?.reshape((b * h * w, depth))?;
            places.push(gradient.matmul(&seen)?);
        }
    }
    Tensor::stack(&places, 2)?.reshape((outputs, depth, kh, kw))
}

/// The gradient of a picture, `[b, h, w, c]`, from that of the doubled one, which `size` may have cut.
pub(in super::super) fn doubled_back(gradient: &Tensor, [h, w]: [usize; 2]) -> Result<Tensor> {
    let (b, height, width, c) = gradient.dims4()?;
    let whole = gradient
        .pad_with_zeros(1, 0, 2 * h - height)?
        .pad_with_zeros(2, 0, 2 * w - width)?;
    if !host::is_plain([&whole]) {
        return whole.reshape((b, h, 2, w, 2, c))?.sum((2, 4));
    }
    host::with_slices([&whole], |[numbers]| {
        let mut sums = Vec::with_capacity(b * h * w * c);
        for lines in numbers.chunks_exact(4 * w * c) {
            let (upper, lower) = lines.split_at(2 * w * c);
            for x in 0..w {
                let pair = 2 * x * c..2 * (x + 1) * c;
                let (a, b) = upper[pair.clone()].split_at(c);
                let (d, e) = lower[pair].split_at(c);
                sums.extend((0..c).map(|i| (a[i] + b[i]) + (d[i] + e[i])));
            }
        }
        Tensor::from_vec(sums, (b, h, w, c), gradient.device())
    })
}
