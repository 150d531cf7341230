//! Every operation against the composed f64 form, and the promises about bits: neither the batch
//! around an item nor the number of threads changes its result.

use super::kernel::{self, Kernel};
use super::parallel::with_threads;
use super::{
    Beside, Conv2d, Linear, Map, Term, Then, UpsampledConv2d, attention, beside, concat_channels,
    geglu, gelu, gemm, group_norm, layer_norm, quick_gelu, reference, silu,
};
use candle_core::{DType, Device, Result, Tensor, Var};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Reproducible numbers, each test from its own seed.
struct Numbers(StdRng);

impl Numbers {
    fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    /// Uniform in -1..1.
    fn tensor(&mut self, shape: &[usize]) -> Tensor {
        let numbers: Vec<f32> = (0..shape.iter().product())
            .map(|_| self.0.random_range(-1f32..1.0))
            .collect();
        Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
    }

    fn within(&mut self, range: std::ops::RangeInclusive<usize>) -> usize {
        self.0.random_range(range)
    }
}

fn f64(x: &Tensor) -> Tensor {
    x.to_dtype(DType::F64).unwrap()
}

/// The bits of an f32 tensor.
fn bits(x: &Tensor) -> Vec<u32> {
    let numbers: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
    numbers.into_iter().map(f32::to_bits).collect()
}

/// The root of the summed squared error over that of the exact result.
fn relative_error(y: &Tensor, exact: &Tensor) -> f64 {
    assert_eq!(y.dims(), exact.dims());
    let norm = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f64>();
    let error = norm(&(f64(y) - exact).unwrap()).unwrap();
    (error / norm(exact).unwrap().max(1e-300)).sqrt()
}

#[track_caller]
fn assert_close(what: &str, y: &Tensor, exact: &Tensor, limit: f64) {
    let error = relative_error(y, exact);
    assert!(
        error <= limit,
        "{what}: relative error {error:.2e}, limit {limit:.0e}"
    );
}

/// `run` with every kernel this machine has.
fn with_each_kernel(run: impl Fn(Kernel)) {
    for kernel in kernel::available() {
        gemm::with_kernel(kernel, || run(kernel));
    }
}

/// Item `i` of `f(x)` is `f` of item `i`, bit by bit, and so on one thread.
#[track_caller]
fn assert_items_independent(x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) {
    let whole = f(x).unwrap();
    assert_eq!(
        bits(&whole),
        bits(&with_threads(1, || f(x)).unwrap()),
        "threads"
    );
    for i in 0..x.dim(0).unwrap() {
        let alone = f(&x.narrow(0, i, 1).unwrap()).unwrap();
        let within = whole.narrow(0, i, 1).unwrap();
        assert_eq!(bits(&within), bits(&alone), "item {i} of {:?}", x.dims());
    }
}

#[test]
fn a_linear_map_is_the_f64_one_on_odd_sizes() {
    with_each_kernel(|kernel| {
        let mut numbers = Numbers::new(1);
        for (rows, depth, outputs) in [
            (1, 1, 1),
            (2, 3, 7),
            (13, 17, 48),
            (7, 130, 96),
            (97, 48, 3),
            (200, 333, 130),
            (5, 1290, 33),
        ] {
            let w = numbers.tensor(&[outputs, depth]);
            let b = numbers.tensor(&[outputs]);
            let x = numbers.tensor(&[1, rows, depth]);
            for bias in [None, Some(b)] {
                let layer = Linear::new(w.clone(), bias.clone()).unwrap();
                let bias = bias.as_ref().map(f64);
                let exact = reference::linear(&f64(&x), &f64(&w), bias.as_ref()).unwrap();
                let what = format!("{:?} {rows}x{depth}x{outputs}", kernel.level);
                assert_close(&what, &layer.forward(&x).unwrap(), &exact, 4e-7);
                assert_eq!(bits(&layer.weight().unwrap()), bits(&w));
            }
        }
    });
}

#[test]
fn a_convolution_is_the_f64_one_on_odd_sizes() {
    with_each_kernel(|kernel| {
        let mut numbers = Numbers::new(2);
        for (size, depth, outputs, side, stride, padding) in [
            ([1, 1], 1, 1, 1, 1, [0; 4]),
            ([1, 1], 3, 5, 1, 1, [0; 4]),
            ([1, 5], 17, 48, 3, 1, [1; 4]),
            ([7, 3], 7, 17, 3, 2, [0, 1, 0, 1]),
            ([8, 8], 48, 96, 3, 2, [1; 4]),
            ([9, 6], 130, 7, 3, 1, [1; 4]),
            ([5, 5], 3, 130, 5, 1, [2; 4]),
            ([6, 11], 96, 48, 3, 1, [1; 4]),
            ([17, 19], 48, 17, 3, 1, [1; 4]),
            ([16, 20], 33, 20, 3, 1, [1; 4]),
            ([12, 13], 370, 20, 3, 1, [0, 1, 2, 0]),
            ([4, 4], 640, 33, 1, 1, [0; 4]),
        ] {
            let w = numbers.tensor(&[outputs, depth, side, side]);
            let b = numbers.tensor(&[outputs]);
            let x = numbers.tensor(&[2, size[0], size[1], depth]);
            for bias in [None, Some(b)] {
                let layer = Conv2d::new(w.clone(), bias.clone(), stride, padding).unwrap();
                let bias = bias.as_ref().map(f64);
                let exact =
                    reference::conv2d(&f64(&x), &f64(&w), bias.as_ref(), stride, padding).unwrap();
                let what = format!("{:?} {size:?} {depth}->{outputs} {side}", kernel.level);
                assert_close(&what, &layer.forward(&x).unwrap(), &exact, 1e-6);
                assert_eq!(bits(&layer.weight().unwrap()), bits(&w));
            }
        }
    });
}

#[test]
fn a_row_of_a_linear_map_does_not_depend_on_its_neighbours() {
    with_each_kernel(|_| {
        let mut numbers = Numbers::new(3);
        for _ in 0..12 {
            let (depth, outputs) = (numbers.within(1..=700), numbers.within(1..=200));
            let rows = numbers.within(2..=150);
            let layer = Linear::new(
                numbers.tensor(&[outputs, depth]),
                Some(numbers.tensor(&[outputs])),
            )
            .unwrap();
            assert_items_independent(&numbers.tensor(&[rows, depth]), |x| layer.forward(x));
        }
    });
}

#[test]
fn an_item_of_a_convolution_does_not_depend_on_its_neighbours() {
    with_each_kernel(|_| {
        let mut numbers = Numbers::new(4);
        for _ in 0..12 {
            let (depth, outputs) = (numbers.within(1..=130), numbers.within(1..=70));
            let (h, w) = (numbers.within(1..=24), numbers.within(1..=24));
            let batch = numbers.within(2..=5);
            let layer = Conv2d::new(
                numbers.tensor(&[outputs, depth, 3, 3]),
                Some(numbers.tensor(&[outputs])),
                numbers.within(1..=2),
                [1; 4],
            )
            .unwrap();
            assert_items_independent(&numbers.tensor(&[batch, h, w, depth]), |x| layer.forward(x));
        }
    });
}

#[test]
fn a_view_gives_what_its_copy_gives() {
    let mut numbers = Numbers::new(5);
    let x = numbers.tensor(&[9, 4, 21]).transpose(0, 1).unwrap();
    let x = x.narrow(1, 2, 5).unwrap();
    assert!(!x.is_contiguous());
    let layer = Linear::new(numbers.tensor(&[6, 21]), None).unwrap();
    let copy = layer.forward(&x.force_contiguous().unwrap()).unwrap();
    assert_eq!(bits(&layer.forward(&x).unwrap()), bits(&copy));
}

#[test]
fn attention_is_the_f64_one_on_odd_sizes() {
    with_each_kernel(|kernel| {
        let mut numbers = Numbers::new(8);
        for (b, tq, tk, heads, d, causal) in [
            (1, 1, 1, 1, 1, false),
            (2, 7, 7, 3, 5, true),
            (1, 77, 77, 2, 33, true),
            (3, 100, 77, 2, 24, false),
            (1, 130, 517, 1, 40, false),
            (2, 19, 33, 5, 16, true),
            (1, 14, 2000, 1, 330, false),
        ] {
            let mut part = |t: usize| {
                let x = numbers.tensor(&[b, t, heads * d]);
                // Scores far apart, so that a softmax without its maximum would overflow.
                (x * 9.0).unwrap()
            };
            let (q, k, v) = (part(tq), part(tk), part(tk));
            let exact = reference::attention(&f64(&q), &f64(&k), &f64(&v), heads, causal).unwrap();
            let found = attention(&q, &k, &v, heads, causal).unwrap();
            let what = format!("{:?} {b} {tq} {tk} {heads} {d}", kernel.level);
            assert_close(&what, &found, &exact, 2e-5);
        }
    });
}

#[test]
fn norms_are_the_f64_ones_even_far_from_zero() {
    with_each_kernel(|kernel| {
        let mut numbers = Numbers::new(9);
        for (shape, groups, mean) in [
            (vec![1, 1, 1], 1, 0.0),
            (vec![2, 3, 5, 6], 3, 0.0),
            (vec![3, 17, 48], 8, 1.0),
            (vec![1, 40, 31, 37], 37, -30.0),
            (vec![2, 33, 9, 96], 4, 100.0),
            (vec![1, 5, 2570], 10, 3.0),
        ] {
            let c = shape[shape.len() - 1];
            let x = (numbers.tensor(&shape) + mean).unwrap();
            let (w, b) = (numbers.tensor(&[c]), numbers.tensor(&[c]));
            let what = format!("{:?} {shape:?}", kernel.level);
            for silu in [false, true] {
                let exact = reference::group_norm(&f64(&x), groups, &f64(&w), &f64(&b), 1e-6, silu);
                let found = group_norm(&x, groups, &w, &b, 1e-6, silu).unwrap();
                assert_close(&what, &found, &exact.unwrap(), 1e-5);
            }
            let exact = reference::layer_norm(&f64(&x), &f64(&w), &f64(&b), 1e-5).unwrap();
            let found = layer_norm(&x, &w, &b, 1e-5).unwrap();
            assert_close(&what, &found, &exact, 1e-5);
        }
    });
}

#[test]
fn activations_are_the_f64_ones_and_finite_everywhere() {
    with_each_kernel(|kernel| {
        let mut numbers = Numbers::new(10);
        for shape in [vec![9, 2], vec![3, 7, 26], vec![2, 20_000]] {
            let x = (numbers.tensor(&shape) * 12.0).unwrap();
            type Op = fn(&Tensor) -> Result<Tensor>;
            let table: [(&str, Op, Op); 4] = [
                ("silu", silu, reference::silu),
                ("quick gelu", quick_gelu, reference::quick_gelu),
                ("gelu", gelu, Tensor::gelu_erf),
                ("geglu", geglu, reference::geglu),
            ];
            for (name, fast, exact) in table {
                let what = format!("{:?} {name}", kernel.level);
                assert_close(&what, &fast(&x).unwrap(), &exact(&f64(&x)).unwrap(), 3e-7);
            }
        }
        let ends = Tensor::new(&[-3e38f32, -200.0, 0.0, 200.0, 3e38], &Device::Cpu).unwrap();
        for op in [silu, gelu, quick_gelu] {
            let found: Vec<f32> = op(&ends).unwrap().to_vec1().unwrap();
            assert!(
                found[0].abs() < 1e-30 && found[1].abs() < 1e-30,
                "{found:?}"
            );
            assert_eq!(found[2..], [0.0, 200.0, 3e38], "{found:?}");
        }
    });
}

#[test]
fn what_is_added_on_the_way_is_added_once() {
    let mut numbers = Numbers::new(11);
    // More outputs than are finished at once, more rows than one tile.
    let linear = Linear::new(numbers.tensor(&[700, 21]), Some(numbers.tensor(&[700]))).unwrap();
    let (x, y) = (
        numbers.tensor(&[2, 101, 21]),
        numbers.tensor(&[2, 101, 700]),
    );
    let sum = (linear.forward(&x).unwrap() + &y).unwrap();
    assert_eq!(
        bits(&linear.run(&x, Then::Add(&y), &[]).unwrap()),
        bits(&sum)
    );
    assert!(linear.run(&x, Then::Add(&x), &[]).is_err());

    let w = numbers.tensor(&[19, 6, 3, 3]);
    let conv = Conv2d::new(w, Some(numbers.tensor(&[19])), 2, [1; 4]).unwrap();
    let x = numbers.tensor(&[3, 9, 14, 6]);
    let plain = conv.forward(&x).unwrap();
    let y = numbers.tensor(plain.dims());
    let sum = (&plain + &y).unwrap();
    assert_eq!(bits(&conv.run(&x, Then::Add(&y), &[]).unwrap()), bits(&sum));
    let shift = numbers.tensor(&[3, 19]);
    let wide = shift.unsqueeze(1).unwrap().unsqueeze(1).unwrap();
    let sum = plain.broadcast_add(&wide).unwrap();
    assert_eq!(
        bits(&conv.run(&x, Then::Shift(&shift), &[]).unwrap()),
        bits(&sum)
    );
    assert!(conv.run(&x, Then::Shift(&x), &[]).is_err());
    assert!(conv.run(&x, Then::Add(&x), &[]).is_err());
}

/// All that can be beside a map: a term in full, two of low rank, a scale and a bias.
struct Adapters {
    terms: Vec<Term>,
    scale: Tensor,
    bias: Tensor,
}

impl Adapters {
    /// Beside a map with a weight of `shape`, as `map` makes them.
    fn new(numbers: &mut Numbers, shape: &[usize], map: impl Fn(Tensor) -> Map) -> Self {
        let mut term = |rank: Option<usize>| {
            let mut down = shape.to_vec();
            down[0] = rank.unwrap_or(shape[0]);
            let up = rank.map(|rank| numbers.tensor(&[shape[0], rank]));
            Term {
                map: map(numbers.tensor(&down)),
                up: up.map(|up| Linear::new(up, None).unwrap()),
            }
        };
        Self {
            terms: vec![term(None), term(Some(3)), term(Some(32))],
            scale: numbers.tensor(&shape[..1]),
            bias: numbers.tensor(&shape[..1]),
        }
    }

    fn at(&self, rows: std::ops::Range<usize>) -> Beside<'_> {
        Beside {
            rows,
            terms: &self.terms,
            scale: Some(&self.scale),
            bias: Some(&self.bias),
        }
    }
}

/// What is beside rows of a map is what candle composes of it, leaves other rows' bits as they are, and
/// is the same, bit by bit, in any company and on one thread. `x` has five rows.
#[track_caller]
fn assert_beside(
    what: &str,
    x: &Tensor,
    [a, b]: [&Adapters; 2],
    (bias, size): (&Tensor, Option<[usize; 2]>),
    run: impl Fn(&Tensor, Then, &[Beside]) -> Result<Tensor>,
) {
    let base = run(x, Then::Nothing, &[]).unwrap();
    let beside = [a.at(1..2), b.at(3..5)];
    let whole = run(x, Then::Nothing, &beside).unwrap();
    let one = with_threads(1, || run(x, Then::Nothing, &beside).unwrap());
    assert_eq!(bits(&whole), bits(&one), "{what}: threads");
    let sum = run(x, Then::Add(&base), &beside).unwrap();
    assert_eq!(bits(&sum), bits(&(&whole + &base).unwrap()), "{what}: sum");
    for (i, adapters) in [None, Some(a), None, Some(b), Some(b)].iter().enumerate() {
        let row = |y: &Tensor| y.narrow(0, i, 1).unwrap();
        let Some(adapters) = adapters else {
            assert_eq!(bits(&row(&whole)), bits(&row(&base)), "{what}: row {i}");
            continue;
        };
        let beside = [adapters.at(0..1)];
        let alone = run(&row(x), Then::Nothing, &beside).unwrap();
        assert_eq!(bits(&alone), bits(&row(&whole)), "{what}: row {i}");
        let plain = |x: &Tensor, then: Then, _: &[Beside]| run(x, then, &[]);
        let composed = beside::composed(&row(x), Then::Nothing, &beside, Some(bias), size, plain);
        assert_close(what, &alone, &f64(&composed.unwrap()), 2e-6);
    }
}

#[test]
fn what_is_beside_a_map_comes_with_its_product() {
    with_each_kernel(|kernel| {
        let mut numbers = Numbers::new(16);
        // Tiles of many runs and runs of many tiles; weights that are streamed whole and in pieces.
        for (tokens, depth, outputs) in [(1, 5, 3), (7, 330, 40), (130, 48, 96), (3, 700, 1000)] {
            let linear = |weight| Map::Linear(Linear::new(weight, None).unwrap());
            let shape = [outputs, depth];
            let [a, b] = [0, 1].map(|_| Adapters::new(&mut numbers, &shape, linear));
            let (weight, bias) = (numbers.tensor(&shape), numbers.tensor(&[outputs]));
            let layer = Linear::new(weight, Some(bias.clone())).unwrap();
            let x = numbers.tensor(&[5, tokens, depth]);
            let what = format!("{:?} linear {tokens} {shape:?}", kernel.level);
            assert_beside(&what, &x, [&a, &b], (&bias, None), |x, then, beside| {
                layer.run(x, then, beside)
            });
        }
        for (h, w, stride, depth, outputs) in [(7, 9, 2, 5, 20), (12, 5, 1, 48, 33)] {
            let shape = [outputs, depth, 3, 3];
            let conv = |weight, bias| Conv2d::new(weight, bias, stride, [1; 4]).unwrap();
            let [a, b] =
                [0, 1].map(|_| Adapters::new(&mut numbers, &shape, |w| Map::Conv2d(conv(w, None))));
            let (weight, bias) = (numbers.tensor(&shape), numbers.tensor(&[outputs]));
            let layer = conv(weight.clone(), Some(bias.clone()));
            let x = numbers.tensor(&[5, h, w, depth]);
            let what = format!("{:?} conv {h}x{w} {shape:?}", kernel.level);
            assert_beside(&what, &x, [&a, &b], (&bias, None), |x, then, beside| {
                layer.run(x, then, beside)
            });
            if stride > 1 {
                continue;
            }
            let double = |weight, bias| UpsampledConv2d::new(conv(weight, bias));
            let [a, b] = [0, 1]
                .map(|_| Adapters::new(&mut numbers, &shape, |w| Map::Upsampled(double(w, None))));
            let layer = double(weight, Some(bias.clone()));
            for size in [[2 * h, 2 * w], [2 * h - 1, 2 * w]] {
                let what = format!("{what} to {size:?}");
                let given = (&bias, Some(size));
                assert_beside(&what, &x, [&a, &b], given, |x, then, beside| {
                    then.add(layer.run(x, size, beside)?)
                });
            }
        }
    });
}

#[test]
fn what_is_beside_a_map_reaches_gradients() {
    let mut numbers = Numbers::new(17);
    let trained = Var::from_tensor(&numbers.tensor(&[2, 8])).unwrap();
    let down = Linear::new(trained.as_tensor().clone(), None).unwrap();
    let up = Linear::new(numbers.tensor(&[4, 2]), None).unwrap();
    let terms = [Term {
        map: Map::Linear(down),
        up: Some(up),
    }];
    let beside = |rows| Beside {
        rows,
        terms: &terms,
        scale: None,
        bias: None,
    };
    let layer = Linear::new(numbers.tensor(&[4, 8]), None).unwrap();
    let (x, more) = (numbers.tensor(&[3, 5, 8]), numbers.tensor(&[3, 4]));
    let y = layer.run(&x, Then::Shift(&more), &[beside(1..2)]).unwrap();
    let base = layer.run(&x, Then::Shift(&more), &[]).unwrap();
    let row = |y: &Tensor, i| bits(&y.narrow(0, i, 1).unwrap());
    assert_eq!([row(&y, 0), row(&y, 2)], [row(&base, 0), row(&base, 2)]);
    assert_ne!(row(&y, 1), row(&base, 1));
    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&trained).is_some());
}

#[test]
fn an_upsampled_convolution_is_that_of_the_large_picture() {
    let mut numbers = Numbers::new(12);
    let conv = Conv2d::new(numbers.tensor(&[5, 7, 3, 3]), None, 1, [1; 4]).unwrap();
    let x = numbers.tensor(&[2, 4, 6, 7]);
    let large = reference::upsample_nearest_2x(&x).unwrap();
    for [h, w] in [[8, 12], [7, 12], [7, 11]] {
        let cut = large.narrow(1, 0, h).unwrap().narrow(2, 0, w).unwrap();
        let exact = conv.forward(&cut).unwrap();
        let found = conv.run_upsampled(&x, [h, w], &[]).unwrap();
        assert_eq!(bits(&found), bits(&exact));
        // And as it goes with gradients, through candle's operations.
        let var = Var::from_tensor(&x).unwrap();
        let composed = conv.run_upsampled(var.as_tensor(), [h, w], &[]).unwrap();
        assert_close("composed", &composed, &f64(&exact), 1e-6);
    }
    assert!(conv.run_upsampled(&x, [9, 12], &[]).is_err());
}

#[test]
fn four_small_kernels_are_one_on_the_doubled_picture() {
    with_each_kernel(|kernel| {
        let mut numbers = Numbers::new(15);
        for ([h, w], depth, outputs) in [([1, 1], 1, 1), ([4, 6], 7, 5), ([13, 9], 33, 600)] {
            let (weight, bias) = (
                numbers.tensor(&[outputs, depth, 3, 3]),
                numbers.tensor(&[outputs]),
            );
            let x = numbers.tensor(&[3, h, w, depth]);
            let conv = Conv2d::new(weight.clone(), Some(bias.clone()), 1, [1; 4]).unwrap();
            let double = UpsampledConv2d::new(conv);
            let what = format!("{:?} {h}x{w} {depth}->{outputs}", kernel.level);
            for size in [[2 * h, 2 * w], [2 * h - 1, 2 * w], [2 * h - 1, 2 * w - 1]] {
                let large = reference::upsample_nearest_2x(&f64(&x)).unwrap();
                let cut = large.narrow(1, 0, size[0]).unwrap();
                let cut = cut.narrow(2, 0, size[1]).unwrap();
                let exact =
                    reference::conv2d(&cut, &f64(&weight), Some(&f64(&bias)), 1, [1; 4]).unwrap();
                assert_close(&what, &double.forward(&x, size).unwrap(), &exact, 1e-6);
                assert_items_independent(&x, |x| double.forward(x, size));
            }
            assert!(double.forward(&x, [2 * h + 1, 2 * w]).is_err());
        }
    });
}

#[test]
fn channels_are_joined_in_order() {
    let mut numbers = Numbers::new(13);
    let (a, b) = (
        numbers.tensor(&[2, 50, 3, 70]),
        numbers.tensor(&[2, 50, 3, 41]),
    );
    let joined = concat_channels(&a, &b).unwrap();
    assert_eq!(bits(&joined), bits(&Tensor::cat(&[&a, &b], 3).unwrap()));
    assert!(concat_channels(&a, &b.narrow(0, 0, 1).unwrap()).is_err());
}

#[test]
fn an_item_of_the_other_operations_does_not_depend_on_its_neighbours() {
    with_each_kernel(|_| {
        let mut numbers = Numbers::new(14);
        for _ in 0..6 {
            let (heads, d) = (numbers.within(1..=4), numbers.within(1..=50));
            let (tokens, c) = (numbers.within(1..=300), heads * d);
            let context = numbers.tensor(&[1, 77, c]);
            let (w, b) = (numbers.tensor(&[c]), numbers.tensor(&[c]));
            let items = numbers.within(2..=4);
            let x = numbers.tensor(&[items, tokens, c]);
            assert_items_independent(&x, |x| attention(x, x, x, heads, false));
            assert_items_independent(&x, |x| {
                let context = context.broadcast_as((x.dim(0)?, 77, c))?;
                attention(x, &context, &context, heads, false)
            });
            assert_items_independent(&x, |x| group_norm(x, heads, &w, &b, 1e-5, true));
            assert_items_independent(&x, |x| layer_norm(x, &w, &b, 1e-5));
            assert_items_independent(&x, silu);
        }
    });
}

#[test]
fn gradients_reach_inputs_and_weights() {
    let mut numbers = Numbers::new(6);
    let x = Var::from_tensor(&numbers.tensor(&[2, 5, 5, 8])).unwrap();
    let w = Var::from_tensor(&numbers.tensor(&[4, 8, 3, 3])).unwrap();
    let trained = Conv2d::new(w.as_tensor().clone(), None, 1, [1; 4]).unwrap();
    let frozen = Conv2d::new(w.as_detached_tensor(), None, 1, [1; 4]).unwrap();
    let linear = Linear::new(numbers.tensor(&[3, 8]), None).unwrap();
    let loss = |y: Tensor| y.sqr()?.sum_all()?.backward();
    let grads = loss(trained.forward(x.as_tensor()).unwrap()).unwrap();
    assert!(grads.get(&x).is_some() && grads.get(&w).is_some());
    let grads = loss(frozen.forward(x.as_tensor()).unwrap()).unwrap();
    assert!(grads.get(&x).is_some());
    let grads = loss(linear.forward(x.as_tensor()).unwrap()).unwrap();
    assert!(grads.get(&x).is_some());
}

#[test]
fn misshapen_arguments_are_errors() {
    let mut numbers = Numbers::new(7);
    let mut t = |shape: &[usize]| numbers.tensor(shape);
    assert!(Linear::new(t(&[3, 4]), Some(t(&[4]))).is_err());
    assert!(Conv2d::new(t(&[3, 4, 3, 3]), Some(t(&[4])), 1, [0; 4]).is_err());
    assert!(Conv2d::new(t(&[3, 4, 3, 3]), None, 0, [0; 4]).is_err());
    let linear = Linear::new(t(&[3, 4]), None).unwrap();
    assert!(linear.forward(&t(&[2, 3])).is_err());
    let conv = Conv2d::new(t(&[3, 4, 3, 3]), None, 1, [0; 4]).unwrap();
    assert!(conv.forward(&t(&[1, 2, 9, 4])).is_err());
    assert!(conv.forward(&t(&[1, 9, 9, 3])).is_err());
    assert!(conv.forward(&t(&[9, 9, 4])).is_err());
    assert!(attention(&t(&[1, 2, 6]), &t(&[1, 3, 6]), &t(&[1, 2, 6]), 2, false).is_err());
    assert!(attention(&t(&[1, 2, 6]), &t(&[1, 3, 6]), &t(&[1, 3, 6]), 4, false).is_err());
    assert!(group_norm(&t(&[1, 2, 6]), 4, &t(&[6]), &t(&[6]), 1e-5, true).is_err());
    assert!(group_norm(&t(&[1, 2, 6]), 0, &t(&[6]), &t(&[6]), 1e-5, true).is_err());
    assert!(group_norm(&t(&[1, 2, 6]), 3, &t(&[6]), &t(&[5]), 1e-5, true).is_err());
    assert!(layer_norm(&t(&[2, 6]), &t(&[5]), &t(&[6]), 1e-5).is_err());
    assert!(geglu(&t(&[2, 5])).is_err());
}
