use candle_core::{Result, Tensor, bail};

use super::gemm;
use super::gradient;
use super::host::{self, Out, Place};
use super::parallel;
use super::reference;
use super::simd::{Level, fma, sigmoid, vectorised};

/// Numbers of one task: enough to be worth a thread, few enough to stay in its cache.
const TASK: usize = 1 << 14;
/// Channels whose moments are kept in registers together.
const LANES: usize = 16;

/// Group normalisation, optionally followed by SiLU.
///
/// `x` is `[b, .., c]` channels-last, `weight` and `bias` `[c]`; statistics are taken over all
/// positions and the `c / groups` channels of a group, in f32 or better.
///
/// # Errors
/// If the shapes do not fit together, or `groups` does not divide `c`.
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    silu: bool,
) -> Result<Tensor> {
    let [b, .., c] = *x.dims() else {
        bail!("group norm: an input of shape {:?}", x.dims())
    };
    if groups == 0 || c % groups != 0 || weight.dims() != [c] || bias.dims() != [c] {
        bail!(
            "group norm: {c} channels in {groups} groups, with a weight of shape {:?} and a bias \
             of shape {:?}",
            weight.dims(),
            bias.dims()
        )
    }
    if x.track_op()
        && let Some(y) = gradient::group_norm(x, groups, weight, bias, eps, silu)?
    {
        return Ok(y);
    }
    if !host::is_plain([x, weight, bias]) || x.elem_count() == 0 {
        return reference::group_norm(x, groups, weight, bias, eps, silu);
    }
    let level = gemm::current_kernel().level;
    let shape = [b, x.elem_count() / b / c, c];
    host::with_slices([x, weight, bias], |[numbers, weight, bias]| {
        let affine = Affine::of_groups(level, numbers, shape, groups, weight, bias, eps);
        // SAFETY: `apply` writes every number of `x`'s shape.
        unsafe {
            host::new_tensor(x.shape(), |out| {
                affine.apply(level, numbers, shape, silu, out);
                Ok(())
            })
        }
    })
}

/// A factor and a shift for every channel of every item, `[b, c]` each.
struct Affine {
    scale: Vec<f32>,
    shift: Vec<f32>,
}

impl Affine {
    /// What normalises `x`, `[b, rows, c]`, by the moments of its groups.
    ///
    /// Moments are sums of `x - p` and `(x - p)²`, where the pivot `p` is the channel's first number:
    /// a mean far from zero then cancels nothing. Sums over pieces of rows, whose length depends on
    /// `c` alone, are joined in f64 and in order.
    fn of_groups(
        level: Level,
        x: &[f32],
        [b, rows, c]: [usize; 3],
        groups: usize,
        weight: &[f32],
        bias: &[f32],
        eps: f64,
    ) -> Self {
        let piece = (TASK / c).max(1);
        let pieces = rows.div_ceil(piece);
        let mut sums = vec![[0f32; 2]; b * pieces * c];
        let place = Place::new(&mut sums);
        run(b * pieces, b * rows * c, |task| {
            let (item, n) = (task / pieces, task % pieces);
            let item = &x[item * rows * c..][..rows * c];
            let end = rows.min((n + 1) * piece);
            // SAFETY: tasks write different parts of `sums`.
            let sums = unsafe { place.part(task * c, c) };
            moments(level, &item[n * piece * c..end * c], &item[..c], sums);
        });
        let width = c / groups;
        let count = (rows * width) as f64;
        let mut affine = Self {
            scale: vec![0.0; b * c],
            shift: vec![0.0; b * c],
        };
        let mut channels = vec![(0f64, 0f64); c];
        for item in 0..b {
            let pivots = &x[item * rows * c..][..c];
            for (channel, moments) in channels.iter_mut().enumerate() {
                let (mut sum, mut square) = (0f64, 0f64);
                for n in 0..pieces {
                    let [s, q] = sums[(item * pieces + n) * c + channel];
                    sum += f64::from(s);
                    square += f64::from(q);
                }
                let mean = sum / rows as f64;
                // Mean, and squared distances to it.
                *moments = (
                    f64::from(pivots[channel]) + mean,
                    (square - sum * mean).max(0.0),
                );
            }
            for (g, group) in channels.chunks_exact(width).enumerate() {
                let mean = group.iter().map(|(m, _)| m).sum::<f64>() / width as f64;
                let squares: f64 = group
                    .iter()
                    .map(|(m, square)| square + rows as f64 * (m - mean) * (m - mean))
                    .sum();
                let factor = 1.0 / (squares / count + eps).sqrt();
                for channel in g * width..(g + 1) * width {
                    let scale = factor * f64::from(weight[channel]);
                    affine.scale[item * c + channel] = scale as f32;
                    affine.shift[item * c + channel] =
                        (f64::from(bias[channel]) - mean * scale) as f32;
                }
            }
        }
        affine
    }

    fn apply(&self, level: Level, x: &[f32], [b, rows, c]: [usize; 3], silu: bool, out: Out) {
        let piece = (TASK / c).max(1);
        let pieces = rows.div_ceil(piece);
        run(b * pieces, b * rows * c, |task| {
            let (item, n) = (task / pieces, task % pieces);
            let start = (item * rows + n * piece) * c;
            let len = piece.min(rows - n * piece) * c;
            // SAFETY: tasks write different parts of `out`.
            let out = unsafe { out.part(start, len) };
            let (scale, shift) = (&self.scale[item * c..][..c], &self.shift[item * c..][..c]);
            let x = &x[start..start + len];
            match silu {
                true => affine_silu(level, x, scale, shift, out),
                false => affine(level, x, scale, shift, out),
            }
        });
    }
}

/// Tasks on all threads, or on this one where all numbers together are few.
fn run(tasks: usize, numbers: usize, task: impl Fn(usize) + Sync) {
    if numbers <= TASK {
        (0..tasks).for_each(task);
    } else {
        parallel::run(tasks, task);
    }
}

vectorised! {
    /// Sums of `x - p` and `(x - p)²` for every channel over the rows of `x`.
    fn moments<FMA>(x: &[f32], pivots: &[f32], sums: &mut [[f32; 2]]) {
        let c = pivots.len();
        let whole = c / LANES * LANES;
        for at in (0..whole).step_by(LANES) {
            lane_moments::<FMA, LANES>(x, c, at, pivots, sums);
        }
        for at in whole..c {
            lane_moments::<FMA, 1>(x, c, at, pivots, sums);
        }
    }
}

/// [`moments`] of `W` channels. Four rows are summed side by side: additions wait for each other.
#[inline(always)]
fn lane_moments<const FMA: bool, const W: usize>(
    x: &[f32],
    c: usize,
    at: usize,
    pivots: &[f32],
    sums: &mut [[f32; 2]],
) {
    const SIDE_BY_SIDE: usize = 4;
    let mut pivot = [0f32; W];
    pivot.copy_from_slice(&pivots[at..at + W]);
    let mut sum = [[0f32; W]; SIDE_BY_SIDE];
    let mut square = [[0f32; W]; SIDE_BY_SIDE];
    let mut rows = x.chunks_exact(SIDE_BY_SIDE * c);
    for rows in &mut rows {
        for i in 0..SIDE_BY_SIDE {
            let row = &rows[i * c + at..][..W];
            for l in 0..W {
                let d = row[l] - pivot[l];
                sum[i][l] += d;
                square[i][l] = fma::<FMA>(d, d, square[i][l]);
            }
        }
    }
    for row in rows.remainder().chunks_exact(c) {
        let row = &row[at..][..W];
        for l in 0..W {
            let d = row[l] - pivot[l];
            sum[0][l] += d;
            square[0][l] = fma::<FMA>(d, d, square[0][l]);
        }
    }
    for l in 0..W {
        let join = |s: &[[f32; W]; SIDE_BY_SIDE]| (s[0][l] + s[1][l]) + (s[2][l] + s[3][l]);
        sums[at + l] = [join(&sum), join(&square)];
    }
}

vectorised! {
    /// `x scale + shift`, row by row.
    fn affine<FMA>(x: &[f32], scale: &[f32], shift: &[f32], out: &mut [f32]) {
        let c = scale.len();
        for (x, out) in x.chunks_exact(c).zip(out.chunks_exact_mut(c)) {
            for ((out, x), (a, b)) in out.iter_mut().zip(x).zip(scale.iter().zip(shift)) {
                *out = fma::<FMA>(*x, *a, *b);
            }
        }
    }
}

vectorised! {
    /// [`affine`], then SiLU.
    fn affine_silu<FMA>(x: &[f32], scale: &[f32], shift: &[f32], out: &mut [f32]) {
        let c = scale.len();
        for (x, out) in x.chunks_exact(c).zip(out.chunks_exact_mut(c)) {
            for ((out, x), (a, b)) in out.iter_mut().zip(x).zip(scale.iter().zip(shift)) {
                let y = fma::<FMA>(*x, *a, *b);
                *out = y * sigmoid::<FMA>(y);
            }
        }
    }
}

/// Layer normalisation over the last dimension; `x` is `[.., c]`, `weight` and `bias` `[c]`.
///
/// # Errors
/// If the shapes do not fit together.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let c = x.dims().last().copied().unwrap_or_default();
    if weight.dims() != [c] || bias.dims() != [c] {
        bail!(
            "layer norm: an input of shape {:?}, a weight of shape {:?} and a bias of shape {:?}",
            x.dims(),
            weight.dims(),
            bias.dims()
        )
    }
    if x.track_op()
        && let Some(y) = gradient::layer_norm(x, weight, bias, eps)?
    {
        return Ok(y);
    }
    if !host::is_plain([x, weight, bias]) || x.elem_count() == 0 {
        return reference::layer_norm(x, weight, bias, eps);
    }
    let level = gemm::current_kernel().level;
    let rows = x.elem_count() / c;
    let piece = (TASK / c).max(1);
    host::with_slices([x, weight, bias], |[numbers, weight, bias]| {
        // SAFETY: the tasks write every row of `x`'s shape, each its own.
        unsafe {
            host::new_tensor(x.shape(), |out| {
                run(rows.div_ceil(piece), rows * c, |task| {
                    let start = task * piece * c;
                    let len = piece.min(rows - task * piece) * c;
                    let out = out.part(start, len);
                    let x = &numbers[start..start + len];
                    normalise_rows(level, x, weight, bias, eps as f32, out);
                });
                Ok(())
            })
        }
    })
}

vectorised! {
    /// Layer normalisation of every row.
    fn normalise_rows<FMA>(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        let c = weight.len();
        for (x, out) in x.chunks_exact(c).zip(out.chunks_exact_mut(c)) {
            let mean = sum::<FMA>(x, |x| x) / c as f32;
            let variance = sum::<FMA>(x, |x| (x - mean) * (x - mean)) / c as f32;
            let factor = 1.0 / (variance + eps).sqrt();
            for ((out, x), (w, b)) in out.iter_mut().zip(x).zip(weight.iter().zip(bias)) {
                *out = fma::<FMA>((x - mean) * factor, *w, *b);
            }
        }
    }
}

/// The sum of `f(x)`, in sixteen interleaved sums that are then joined in order.
#[inline(always)]
fn sum<const FMA: bool>(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for l in 0..LANES {
            lanes[l] += f(x[l]);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += f(*x);
    }
    lanes.iter().sum()
}
