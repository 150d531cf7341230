//! Every operation against the composed f64 form, and the promises about bits: neither the batch
//! around an item nor the number of threads changes its result.

use super::kernel::{self, Kernel};
use super::parallel::with_threads;
use super::{Conv2d, Linear, gemm, reference};
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
                let what = format!("{} {rows}x{depth}x{outputs}", kernel.name);
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
                let what = format!("{} {size:?} {depth}->{outputs} {side}", kernel.name);
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
}
