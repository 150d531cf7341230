//! Every way back against candle's own through the composed operations, in f64.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{Collected, recomputed};
use crate::ops::{
    self, Beside, Conv2d, Linear, Map, Term, Then, UpsampledConv2d, gemm, kernel, reference,
};

fn uniform(seed: u64, shape: &[usize]) -> Tensor {
    let mut rng = StdRng::seed_from_u64(seed);
    let numbers: Vec<f32> = (0..shape.iter().product())
        .map(|_| rng.random_range(-1f32..1.0))
        .collect();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

/// The gradients of `Σ y w`, where `w` are fixed numbers, for every variable.
fn gradients(vars: &[Var], y: &Tensor) -> Vec<Option<Tensor>> {
    let weights = uniform(99, y.dims()).to_dtype(y.dtype()).unwrap();
    let store = (y * weights)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    vars.iter().map(|v| store.get(v).cloned()).collect()
}

/// `ours` of f32 variables has the value and the gradients of `exact` of f64 ones, with every kernel.
#[track_caller]
fn assert_same(
    inputs: &[Tensor],
    ours: impl Fn(&[Tensor]) -> Result<Tensor>,
    exact: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let vars = |dtype| -> Vec<Var> {
        let var = |t: &Tensor| Var::from_tensor(&t.to_dtype(dtype).unwrap()).unwrap();
        inputs.iter().map(var).collect()
    };
    let tensors = |vars: &[Var]| {
        vars.iter()
            .map(|v| v.as_tensor().clone())
            .collect::<Vec<_>>()
    };
    let wide = vars(DType::F64);
    let value = exact(&tensors(&wide)).unwrap();
    let expected = gradients(&wide, &value);
    for kernel in kernel::available() {
        gemm::with_kernel(kernel, || {
            let own = vars(DType::F32);
            let y = ours(&tensors(&own)).unwrap();
            assert_close("value", &y, &value);
            for (i, (found, expected)) in gradients(&own, &y).iter().zip(&expected).enumerate() {
                let what = format!("gradient {i}, {:?}", kernel.level);
                let found = found
                    .as_ref()
                    .unwrap_or_else(|| panic!("{what} is missing"));
                assert_close(&what, found, expected.as_ref().unwrap());
            }
        });
    }
}

#[track_caller]
fn assert_close(what: &str, found: &Tensor, exact: &Tensor) {
    assert_eq!(found.dims(), exact.dims(), "{what}");
    let norm = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f64>();
    let difference = (found.to_dtype(DType::F64).unwrap() - exact).unwrap();
    let error = (norm(&difference).unwrap() / norm(exact).unwrap()).sqrt();
    assert!(error < 2e-6, "{what}: relative error {error:.1e}");
}

fn wide(t: &Tensor) -> Tensor {
    t.to_dtype(DType::F64).unwrap()
}

#[test]
fn a_frozen_linear_map_passes_gradients_on_and_keeps_none() {
    for (rows, depth, outputs) in [(1, 1, 1), (7, 33, 50), (130, 48, 17)] {
        let (w, b) = (uniform(1, &[outputs, depth]), uniform(2, &[outputs]));
        let map = Linear::new(w.clone(), Some(b.clone())).unwrap();
        let x = uniform(3, &[2, rows, depth]);
        let more = uniform(4, &[2, rows, outputs]);
        let exact = |x: &Tensor| reference::linear(x, &wide(&w), Some(&wide(&b)));
        assert_same(
            std::slice::from_ref(&x),
            |x| map.forward(&x[0]),
            |x| exact(&x[0]),
        );
        assert_same(
            &[x.clone(), more],
            |x| map.run(&x[0], Then::Add(&x[1]), &[]),
            |x| exact(&x[0])? + &x[1],
        );
        assert_same(
            &[x, uniform(5, &[2, outputs])],
            |x| map.run(&x[0], Then::Shift(&x[1]), &[]),
            |x| exact(&x[0])?.broadcast_add(&x[1].unsqueeze(1)?),
        );
    }
    let map = Linear::new(uniform(1, &[3, 4]), None).unwrap();
    let x = Var::from_tensor(&uniform(2, &[5, 4])).unwrap();
    let store = map
        .forward(&x)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert_eq!(store.get_ids().count(), 1, "the input's alone");
}

#[test]
fn convolutions_pass_gradients_on_at_every_geometry() {
    // Strides leave the same rest on both sides: candle's own way back fails where they do not.
    for (size, depth, outputs, side, stride, padding) in [
        ([1, 1], 1, 1, 1, 1, [0; 4]),
        ([5, 8], 17, 6, 3, 1, [1; 4]),
        ([6, 8], 3, 20, 3, 2, [1; 4]),
        ([6, 8], 5, 18, 3, 2, [0, 1, 0, 1]),
        ([9, 5], 4, 3, 1, 2, [0; 4]),
        ([6, 7], 2, 5, 5, 3, [2, 1, 2, 0]),
    ] {
        let w = uniform(1, &[outputs, depth, side, side]);
        let b = uniform(2, &[outputs]);
        let conv = Conv2d::new(w.clone(), Some(b.clone()), stride, padding).unwrap();
        let x = uniform(3, &[2, size[0], size[1], depth]);
        let exact =
            |x: &Tensor, w: &Tensor| reference::conv2d(x, w, Some(&wide(&b)), stride, padding);
        assert_same(
            &[x.clone(), uniform(4, &[2, outputs])],
            |x| conv.run(&x[0], Then::Shift(&x[1]), &[]),
            |x| exact(&x[0], &wide(&w))?.broadcast_add(&x[1].reshape((2, 1, 1, outputs))?),
        );
        // The weight trained as well; with the composed way back too.
        assert_same(
            &[x.clone(), w.clone()],
            |x| Conv2d::new(x[1].clone(), Some(b.clone()), stride, padding)?.forward(&x[0]),
            |x| exact(&x[0], &x[1]),
        );
        let gradient = conv.forward(&x).unwrap();
        let kernels = conv.back(&gradient, size).unwrap();
        let composed =
            super::transposed_conv(&wide(&gradient), &wide(&w), stride, padding, size).unwrap();
        assert_close("the composed way back", &kernels, &composed);
    }
}

#[test]
fn a_doubled_picture_passes_gradients_on_also_where_it_is_cut() {
    for size in [[6, 10], [5, 10], [5, 9]] {
        let (w, b) = (uniform(1, &[7, 18, 3, 3]), uniform(2, &[7]));
        let conv = Conv2d::new(w.clone(), Some(b.clone()), 1, [1; 4]).unwrap();
        let conv = UpsampledConv2d::new(conv);
        assert_same(
            &[uniform(3, &[2, 3, 5, 18])],
            |x| conv.forward(&x[0], size),
            |x| {
                let large = reference::upsample_nearest_2x(&x[0])?
                    .narrow(1, 0, size[0])?
                    .narrow(2, 0, size[1])?;
                reference::conv2d(&large, &wide(&w), Some(&wide(&b)), 1, [1; 4])
            },
        );
    }
}

#[test]
fn what_is_trained_beside_a_map_gets_its_gradient() {
    let (w, b) = (uniform(1, &[20, 6, 3, 3]), uniform(2, &[20]));
    let inputs = [
        uniform(3, &[3, 5, 4, 6]),
        uniform(4, &[2, 6, 3, 3]),
        uniform(5, &[20, 2]),
        uniform(6, &[20]),
    ];
    // Of three rows the last two have something beside them.
    let beside = |map: Map, up: &Tensor, scale: &Tensor| -> Result<(Vec<Term>, Tensor)> {
        let up = Some(Linear::new(up.clone(), None)?);
        Ok((vec![Term { map, up }], scale.clone()))
    };
    for upsampled in [false, true] {
        let run = |x: &[Tensor], w: Tensor, b: Tensor| -> Result<Tensor> {
            let conv = |w: &Tensor, b| Conv2d::new(w.clone(), b, 1, [1; 4]);
            let (own, down) = (conv(&w, Some(b))?, conv(&x[1], None)?);
            let map = match upsampled {
                true => Map::Upsampled(UpsampledConv2d::new(down)),
                false => Map::Conv2d(down),
            };
            let (terms, scale) = beside(map, &x[2], &x[3])?;
            let beside = [Beside {
                rows: 1..3,
                terms: &terms,
                scale: Some(&scale),
                bias: None,
            }];
            match upsampled {
                true => UpsampledConv2d::new(own).run(&x[0], [10, 8], &beside),
                false => own.run(&x[0], Then::Nothing, &beside),
            }
        };
        let exact = |x: &[Tensor]| {
            let large = match upsampled {
                true => reference::upsample_nearest_2x(&x[0])?,
                false => x[0].clone(),
            };
            let conv = |x: &Tensor, w: &Tensor| reference::conv2d(x, w, None, 1, [1; 4]);
            let y = conv(&large, &wide(&w))?;
            let rows = |t: &Tensor| t.narrow(0, 1, 2);
            let low = conv(&rows(&large)?, &x[1])?;
            let low = reference::linear(&low, &x[2], None)?;
            let changed = (rows(&y)?.broadcast_mul(&x[3])? + low)?;
            Tensor::cat(&[&y.narrow(0, 0, 1)?, &changed], 0)?.broadcast_add(&wide(&b))
        };
        assert_same(&inputs, |x| run(x, w.clone(), b.clone()), exact);
    }
}

#[test]
fn a_low_rank_delta_beside_a_frozen_map_is_one_operation() {
    for (rows, depth, outputs, rank) in [(1, 3, 2, 1), (7, 33, 50, 4), (130, 48, 17, 20)] {
        let (w, b) = (uniform(1, &[outputs, depth]), uniform(2, &[outputs]));
        let map = Linear::new(w.clone(), Some(b.clone())).unwrap();
        let inputs = [
            uniform(3, &[2, rows, depth]),
            uniform(4, &[rank, depth]),
            uniform(5, &[outputs, rank]),
            uniform(6, &[2, rows, outputs]),
        ];
        let exact = |x: &[Tensor]| {
            let low = reference::linear(&x[0], &x[1], None)?;
            let y = reference::linear(&x[0], &wide(&w), Some(&wide(&b)))?;
            y + reference::linear(&low, &x[2], None)?
        };
        let ours = |x: &[Tensor], then: Then| {
            let linear = |w: &Tensor| Linear::new(w.clone(), None);
            let term = Term {
                map: Map::Linear(linear(&x[1])?),
                up: Some(linear(&x[2])?),
            };
            let beside = Beside {
                rows: 0..2,
                terms: std::slice::from_ref(&term),
                scale: None,
                bias: None,
            };
            map.run(&x[0], then, &[beside])
        };
        assert_same(&inputs[..3], |x| ours(x, Then::Nothing), exact);
        assert_same(
            &inputs,
            |x| ours(x, Then::Add(&x[3])),
            |x| exact(x)? + &x[3],
        );
    }
    // Only the factors want a gradient: none is made for the input.
    let [down, up] =
        [uniform(1, &[2, 3]), uniform(2, &[4, 2])].map(|t| Var::from_tensor(&t).unwrap());
    let term = Term {
        map: Map::Linear(Linear::new(down.as_tensor().clone(), None).unwrap()),
        up: Some(Linear::new(up.as_tensor().clone(), None).unwrap()),
    };
    let beside = Beside {
        rows: 0..5,
        terms: std::slice::from_ref(&term),
        scale: None,
        bias: None,
    };
    let map = Linear::new(uniform(3, &[4, 3]), None).unwrap();
    let y = map
        .run(&uniform(4, &[5, 3]), Then::Nothing, &[beside])
        .unwrap();
    let store = y.sum_all().unwrap().backward().unwrap();
    assert_eq!(store.get_ids().count(), 2, "the factors' alone");
}

#[test]
fn attention_gives_all_three_gradients_and_keeps_no_scores() {
    for (b, tq, tk, heads, d, causal) in [
        (1, 1, 2, 1, 1, false),
        (2, 5, 9, 3, 7, false),
        (1, 77, 77, 2, 20, true),
        (1, 150, 77, 2, 24, false),
        (1, 3, 5, 1, 4, true),
    ] {
        let c = heads * d;
        assert_same(
            &[
                uniform(1, &[b, tq, c]),
                uniform(2, &[b, tk, c]),
                uniform(3, &[b, tk, c]),
            ],
            |x| ops::attention(&x[0], &x[1], &x[2], heads, causal),
            |x| reference::attention(&x[0], &x[1], &x[2], heads, causal),
        );
        // The composed way back, which GPUs take.
        let wide = |seed, t| uniform(seed, &[b, t, c]).to_dtype(DType::F64).unwrap();
        let vars = [wide(1, tq), wide(2, tk), wide(3, tk)].map(|t| Var::from_tensor(&t).unwrap());
        let [q, k, v] = vars.each_ref().map(Var::as_tensor);
        let exact = gradients(
            &vars,
            &reference::attention(q, k, v, heads, causal).unwrap(),
        );
        let own = gradients(&vars, &ops::attention(q, k, v, heads, causal).unwrap());
        for (own, exact) in own.iter().zip(&exact) {
            assert_close("composed", own.as_ref().unwrap(), exact.as_ref().unwrap());
        }
    }
}

#[test]
fn norms_pass_gradients_on() {
    for (shape, groups) in [
        (vec![2, 5, 7, 12], 3),
        (vec![1, 1, 3, 4], 2),
        (vec![3, 40, 40], 8),
    ] {
        let c = shape[shape.len() - 1];
        let (w, b) = (uniform(1, &[c]), uniform(2, &[c]));
        // A mean far from zero.
        let x = (uniform(3, &shape) + 3.0).unwrap();
        for silu in [false, true] {
            assert_same(
                std::slice::from_ref(&x),
                |x| ops::group_norm(&x[0], groups, &w, &b, 1e-5, silu),
                |x| reference::group_norm(&x[0], groups, &wide(&w), &wide(&b), 1e-5, silu),
            );
        }
        assert_same(
            &[x],
            |x| ops::layer_norm(&x[0], &w, &b, 1e-5),
            |x| reference::layer_norm(&x[0], &wide(&w), &wide(&b), 1e-5),
        );
    }
}

#[test]
fn activations_pass_gradients_on() {
    type Op = fn(&Tensor) -> Result<Tensor>;
    let ops: [[Op; 2]; 4] = [
        [ops::silu, reference::silu],
        [ops::quick_gelu, reference::quick_gelu],
        [ops::gelu, Tensor::gelu_erf],
        [ops::geglu, reference::geglu],
    ];
    for shape in [vec![1, 2], vec![3, 5, 14], vec![40, 900]] {
        let x = (uniform(1, &shape) * 6.0).unwrap();
        for [own, exact] in ops {
            assert_same(std::slice::from_ref(&x), |x| own(&x[0]), |x| exact(&x[0]));
        }
    }
    assert_same(
        &[uniform(1, &[2, 3, 5]), uniform(2, &[2, 3, 4])],
        |x| ops::concat_channels(&x[0], &x[1]),
        |x| Tensor::cat(&[&x[0], &x[1]], 2),
    );
}

#[test]
fn a_block_computed_again_gives_the_same_gradients() {
    let inner = Var::from_tensor(&uniform(1, &[6, 6])).unwrap();
    let inputs = [uniform(2, &[4, 6]), uniform(3, &[4, 6])].map(|t| Var::from_tensor(&t).unwrap());
    let [a, b] = inputs.each_ref().map(Var::as_tensor);
    let weight = inner.as_tensor().clone();
    let block = move |[a, b]: [&Tensor; 2], weight: &Tensor| {
        ops::gelu(&Linear::new(weight.clone(), None)?.forward(&ops::silu(a)?)?)? + b
    };
    // Two blocks, one after the other, with the same variable inside.
    let whole = |run: &dyn Fn([&Tensor; 2]) -> Result<Tensor>| -> Result<(Tensor, GradStore)> {
        let y = run([&run([a, b])?, a])?;
        let loss = (&y * uniform(4, &[4, 6]))?.sum_all()?;
        Ok((y, loss.backward()?))
    };
    let (y, expected) = whole(&|x| block(x, &weight)).unwrap();
    let collected = Collected::new([inner.as_tensor()]);
    let (again, found) = whole(&|x| {
        let value = block(x.map(Tensor::detach).each_ref(), &weight.detach())?;
        let weight = weight.clone();
        recomputed(x, value, &collected, move |x| block(x, &weight))
    })
    .unwrap();
    assert!(found.get(&inner).is_none());
    assert_close("value", &again, &wide(&y));
    for var in &inputs {
        let exact = wide(expected.get(var).unwrap());
        assert_close("gradient", found.get(var).unwrap(), &exact);
    }
    let exact = wide(expected.get(&inner).unwrap());
    assert_close("gradient inside", &collected.get(&inner).unwrap(), &exact);
}
