use candle_core::{Result, Tensor};

/// A prepared 2-D convolution over channels-last pictures.
#[derive(Debug, Clone)]
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    stride: usize,
    padding: [usize; 4],
}

impl Conv2d {
    /// `weight` is `[out, in, kh, kw]` as in the files, `bias` `[out]`; `padding` is zeros added at
    /// `[top, bottom, left, right]` (the VAE's downsampler pads only below and to the right).
    pub fn new(
        weight: Tensor,
        bias: Option<Tensor>,
        stride: usize,
        padding: [usize; 4],
    ) -> Result<Self> {
        Ok(Self {
            weight,
            bias,
            stride,
            padding,
        })
    }

    /// `x` is `[b, h, w, in]`; the result `[b, h', w', out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [top, bottom, left, right] = self.padding;
        let x = x.permute((0, 3, 1, 2))?;
        let x = x
            .pad_with_zeros(2, top, bottom)?
            .pad_with_zeros(3, left, right)?;
        let y = x.contiguous()?.conv2d(&self.weight, 0, self.stride, 1, 1)?;
        let y = y.permute((0, 2, 3, 1))?.contiguous()?;
        match &self.bias {
            Some(b) => y.broadcast_add(b),
            None => Ok(y),
        }
    }

    /// The weight as `[out, in, kh, kw]`.
    pub fn weight(&self) -> Result<Tensor> {
        Ok(self.weight.clone())
    }

    /// The bias, `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}
