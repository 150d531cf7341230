use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::conv::{Conv2d, Patches};
use super::gemm::{self, Packed, Target};
use super::host;

/// A picture doubled by repeating every pixel, then a convolution, in one operation.
///
/// Of the nine numbers that a 3x3 kernel sees in a doubled picture at most four differ, so each of
/// the four places an output pixel can have in a block of two by two is a 2x2 convolution of the
/// small picture with summed weights: four ninths of the work, and the large picture never exists.
/// The sums are rounded to f32 once, when the weight is prepared.
#[derive(Debug, Clone)]
pub struct UpsampledConv2d {
    conv: Conv2d,
    /// By place `[top left, top right, bottom left, bottom right]`.
    places: Option<Arc<[Packed; 4]>>,
}

impl UpsampledConv2d {
    /// Prepares the summed weights, where the kernels of this module serve the convolution.
    pub fn new(conv: Conv2d) -> Self {
        let places = conv.packed_3x3().map(|packed| {
            let weight = packed.unpack();
            let bias = packed.bias();
            let place = |[py, px]: [usize; 2]| {
                let summed = summed(&weight, [py, px]);
                Packed::new(&summed, bias, packed.outputs, packed.depth, 4)
            };
            Arc::new([[0, 0], [0, 1], [1, 0], [1, 1]].map(place))
        });
        Self { conv, places }
    }

    /// The convolution of `x` `[b, h, w, in]` doubled and cut to `size`, height and width: `2h` or one
    /// less, `2w` or one less.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn forward(&self, x: &Tensor, size: [usize; 2]) -> Result<Tensor> {
        let (b, h, w, c) = x.dims4()?;
        match &self.places {
            // At the cut edge of an odd size the kernel sees zeros where the doubled pixel was.
            Some(places)
                if size == [2 * h, 2 * w] && host::is_plain([x]) && c == places[0].depth =>
            {
                double(places, x, [b, h, w])
            }
            _ => self.conv.forward_upsampled(x, size),
        }
    }
}

/// `[out, in, 3, 3]` to `[out, in, 2, 2]` for one place: its first row of weights is the kernel's
/// first alone at the top and the sum of two at the bottom, its second row the other way round; and
/// so with columns.
fn summed(weight: &[f32], [py, px]: [usize; 2]) -> Vec<f32> {
    let lines = |place: usize| match place {
        0 => [0..1, 1..3],
        _ => [0..2, 2..3],
    };
    let mut out = Vec::with_capacity(weight.len() / 9 * 4);
    for kernel in weight.chunks_exact(9) {
        for rows in lines(py) {
            for columns in lines(px) {
                let sum: f64 = rows
                    .clone()
                    .flat_map(|y| columns.clone().map(move |x| f64::from(kernel[y * 3 + x])))
                    .sum();
                out.push(sum as f32);
            }
        }
    }
    out
}

fn double(places: &[Packed; 4], x: &Tensor, [b, h, w]: [usize; 3]) -> Result<Tensor> {
    let (c, outputs) = (places[0].depth, places[0].outputs);
    host::with_slices([x], |[numbers]| {
        let zeros = vec![0.0; c];
        // SAFETY: the four products write one row of every block of two by two each, and together
        // every number of the shape.
        unsafe {
            host::new_tensor((b, 2 * h, 2 * w, outputs), |out| {
                for (i, weight) in places.iter().enumerate() {
                    let (py, px) = (i / 2, i % 2);
                    let source = Patches {
                        numbers,
                        zeros: &zeros,
                        stored: [h, w],
                        doubled: false,
                        input: [h, w],
                        output: [h, w],
                        kernel: [2, 2],
                        stride: 1,
                        padding: [1 - py, 1 - px],
                    };
                    let place = |row: usize| {
                        let (line, x) = (row / w, row % w);
                        (2 * line + py) * 2 * w + 2 * x + px
                    };
                    let target = Target::Scattered(&place);
                    gemm::product(
                        &gemm::current_kernel(),
                        weight,
                        b * h * w,
                        &source,
                        target,
                        out,
                    );
                }
                Ok(())
            })
        }
    })
}
