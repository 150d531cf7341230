use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::beside::{self, Beside, Map, Then};
use super::conv::{Conv2d, Patches};
use super::gemm;
use super::packed::Packed;
use super::product::{self, Target};
use super::runs::Run;
use super::{gradient, host};

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
        self.run(x, size, &[])
    }

    /// [`UpsampledConv2d::forward`], and what is `beside` it.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn run(&self, x: &Tensor, size: [usize; 2], beside: &[Beside]) -> Result<Tensor> {
        let (_, h, w, c) = x.dims4()?;
        if beside.is_empty() && x.track_op() && self.places.is_some() {
            let value = self.run(&x.detach(), size, &[])?;
            let conv = self.conv.clone();
            return Then::Nothing.graft(x, value, move |gradient| {
                gradient::doubled_back(&conv.back(gradient, size)?, [h, w])
            });
        }
        // At the cut edge of an odd size the kernel sees zeros where the doubled pixel was.
        let Some(places) = self
            .places
            .as_ref()
            .filter(|places| size == [2 * h, 2 * w] && host::is_plain([x]) && c == places[0].depth)
        else {
            return self.conv.run_upsampled(x, size, beside);
        };
        if let Some(runs) = place_runs(places, beside, h * w)? {
            return double(places, x, &runs);
        }
        let run = |x: &Tensor, _: Then, beside: &[Beside]| self.run(x, size, beside);
        let bias = self.conv.bias();
        beside::composed(x, Then::Nothing, beside, bias, Some(size), run)
    }

    /// The same map, of which nobody wants a gradient.
    ///
    /// # Errors
    /// Those of candle.
    pub fn detach(&self) -> Result<Self> {
        Ok(Self::new(self.conv.detach()?))
    }

    pub(super) fn conv(&self) -> &Conv2d {
        &self.conv
    }
}

/// What is beside each of the four small convolutions: theirs of every map beside the large one.
fn place_runs<'a>(
    places: &[Packed; 4],
    beside: &[Beside<'a>],
    per_row: usize,
) -> Result<Option<Vec<Vec<Run<'a>>>>> {
    let at = |place: usize| {
        beside::runs(beside, &places[place], per_row, move |map| match map {
            Map::Upsampled(map) => map.places.as_ref().map(|places| &places[place]),
            _ => None,
        })
    };
    (0..4).map(at).collect()
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

fn double(places: &[Packed; 4], x: &Tensor, runs: &[Vec<Run>]) -> Result<Tensor> {
    let (b, h, w, _) = x.dims4()?;
    let (c, outputs) = (places[0].depth, places[0].outputs);
    host::with_slices([x], |[numbers]| {
        let zeros = vec![0.0; c];
        // SAFETY: the four products write one row of every block of two by two each, and together
        // every number of the shape.
        unsafe {
            host::new_tensor((b, 2 * h, 2 * w, outputs), |out| {
                for (i, (weight, runs)) in places.iter().zip(runs).enumerate() {
                    let (py, px) = (i / 2, i % 2);
                    let source = Patches {
                        numbers,
                        zeros: &zeros,
                        stored: [h, w],
                        doubled: false,
                        spread: 1,
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
                    let kernel = gemm::current_kernel();
                    product::product(&kernel, weight, b * h * w, &source, runs, target, out);
                }
                Ok(())
            })
        }
    })
}
