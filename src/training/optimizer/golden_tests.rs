//! Trajectories against those of torch, prodigyopt and bitsandbytes:
//! `tests/golden/training/optimizers.safetensors`, made by `tests/reference/optimizers.py`.

use std::{fs, path::PathBuf};

use safetensors::SafeTensors;

use super::{
    quantised::{BLOCK, Codes, Quantised, SIGNED, UNSIGNED},
    *,
};

const NAMES: [&str; 3] = ["one", "seven", "matrix"];
const TOLERANCE: f64 = 1e-6;
/// Of Prodigy's distance, which grows from how far the values went: in its first steps that is near their
/// last bits, in which the order of operations shows.
const OF_DISTANCE: f64 = 1e-4;

struct Golden(Vec<u8>);

impl Golden {
    fn read() -> Self {
        let file = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/training/optimizers.safetensors");
        Self(fs::read(file).unwrap())
    }

    fn numbers<const N: usize>(&self, name: &str) -> Vec<[u8; N]> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap();
        tensor.data().as_chunks().0.to_vec()
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        let numbers = self.numbers(name).into_iter();
        numbers.map(f32::from_le_bytes).collect()
    }

    fn f64(&self, name: &str) -> Vec<f64> {
        let numbers = self.numbers(name).into_iter();
        numbers.map(f64::from_le_bytes).collect()
    }
}

/// Follows a case's gradients; gives the norms before clipping and the distances.
fn follow(case: &str, settings: Settings, most: Option<f64>, rate: f64) {
    let golden = Golden::read();
    let rates = golden.f64(&format!("{case}/multipliers"));
    let values = NAMES.map(|name| golden.f32(&format!("{case}/{name}.values")));
    let gradients = NAMES.map(|name| golden.f32(&format!("{case}/{name}.gradients")));
    let norms = golden.f64(&format!("{case}/norms"));
    let distances = golden.f64(&format!("{case}/distances"));
    let steps = rates.len();
    assert!(steps >= 25);
    let sizes = values.each_ref().map(|values| values.len() / (steps + 1));
    let mut found: Vec<Vec<f32>> = values
        .iter()
        .zip(sizes)
        .map(|(values, size)| values[..size].to_vec())
        .collect();
    let names = NAMES.map(String::from).into_iter().zip(sizes);
    let mut optimizer = Optimizer::new(settings, names);
    for (step, multiplier) in rates.iter().enumerate() {
        let mut now: Vec<Vec<f32>> = gradients
            .iter()
            .zip(sizes)
            .map(|(all, size)| all[step * size..][..size].to_vec())
            .collect();
        let mut params: Vec<Param<'_>> = NAMES
            .iter()
            .zip(found.iter_mut().zip(&mut now))
            .map(|(name, (values, gradient))| Param {
                name,
                values,
                gradient,
                learning_rate: rate * multiplier,
            })
            .collect();
        let norm = clip(&mut params, most).unwrap();
        assert!(
            (norm / norms[step] - 1.0).abs() < TOLERANCE,
            "{case} {step}"
        );
        optimizer.step(&mut params).unwrap();
        let distance = optimizer.distance() / distances[step];
        assert!(
            (distance - 1.0).abs() < OF_DISTANCE,
            "{case}, step {step}: {distance} of the distance"
        );
        for ((found, expected), name) in found.iter().zip(&values).zip(NAMES) {
            let expected = &expected[(step + 1) * found.len()..][..found.len()];
            let most = expected.iter().fold(0.0f32, |most, e| most.max(e.abs()));
            for (found, expected) in found.iter().zip(expected) {
                let error = f64::from((found - expected).abs()) / f64::from(most);
                assert!(
                    error < TOLERANCE,
                    "{case}, {name}, step {step}: {error:.1e}, {found} for {expected}"
                );
            }
        }
    }
}

const USUAL: Settings = Settings {
    rule: Rule::AdamW,
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    weight_decay: 1e-2,
};

#[test]
fn adamw_goes_torch_s_way() {
    follow("adamw", USUAL, None, 1e-2);
    follow("adamw-clipped", USUAL, Some(1.0), 3e-3);
    let odd = Settings {
        beta1: 0.4,
        beta2: 0.95,
        eps: 1e-3,
        weight_decay: 0.3,
        ..USUAL
    };
    follow("adamw-odd", odd, None, 5e-2);
}

#[test]
fn prodigy_goes_its_authors_way() {
    let rule = Rule::Prodigy;
    follow("prodigy", Settings { rule, ..USUAL }, None, 1.0);
    let warm = Settings {
        rule,
        beta2: 0.99,
        weight_decay: 0.0,
        ..USUAL
    };
    follow("prodigy-warm", warm, Some(0.5), 0.7);
}

/// Numbers as they are after a time in eight bits.
fn through(values: &[f32], table: &'static Codes) -> Vec<f32> {
    let mut quantised = Quantised::zeros(values.len(), table);
    let mut out = vec![0.0; values.len()];
    for (block, values) in values.chunks(BLOCK).enumerate() {
        quantised.write(block, values);
    }
    for (block, out) in out.chunks_mut(BLOCK).enumerate() {
        quantised.read(block, out);
    }
    out
}

#[test]
fn eight_bits_hold_what_bitsandbytes_has_them_hold() {
    let golden = Golden::read();
    for (name, table) in [("signed", &*SIGNED), ("unsigned", &*UNSIGNED)] {
        let of = |part: &str| golden.f32(&format!("eight/{name}.{part}"));
        // A map's own numbers come back, if the codes are the same.
        let map = of("map");
        assert_eq!(map.len(), BLOCK);
        for (found, expected) in through(&map, table).iter().zip(&map) {
            assert!(
                (found - expected).abs() <= 1e-7,
                "{name}: {found}, not {expected}"
            );
        }
        let (numbers, scales) = (of("numbers"), of("scales"));
        let found = through(&numbers, table);
        for (i, (found, expected)) in found.iter().zip(of("again")).enumerate() {
            // What is theirs zero and ours the least code is closer than this.
            let most = 4e-7 * scales[i / BLOCK];
            let number = numbers[i];
            assert!(
                (found - expected).abs() <= most,
                "{name}: {number} became {found}, not {expected}"
            );
        }
    }
}

#[test]
fn adamw_of_eight_bits_goes_bitsandbytes_s_way() {
    let golden = Golden::read();
    let (values, gradients) = (golden.f32("eight/values"), golden.f32("eight/gradients"));
    let size = gradients.len() / 10;
    let settings = Settings {
        rule: Rule::AdamW8bit,
        ..USUAL
    };
    let mut optimizer = Optimizer::new(settings, [("x".into(), size)]);
    let mut found = values[..size].to_vec();
    let distance = |a: &[f32], b: &[f32]| -> f64 {
        let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
        squares.sum::<f64>().sqrt()
    };
    for (step, gradient) in gradients.chunks(size).enumerate() {
        let mut gradient = gradient.to_vec();
        let mut params = [Param {
            name: "x",
            values: &mut found,
            gradient: &mut gradient,
            learning_rate: 1e-2,
        }];
        optimizer.step(&mut params).unwrap();
        let done = step + 1;
        if done % 5 == 0 {
            let expected = &values[done / 5 * size..][..size];
            let way = distance(&values[..size], expected);
            let apart = distance(&found, expected) / way;
            println!("after {done}: {apart:.1e} of the way");
            // A rounding that falls on the other side of a border is a whole code's difference.
            assert!(apart < 1e-3, "after {done}: {apart} of the way");
        }
    }
    assert_eq!(values.len(), 3 * size);
}

#[test]
fn learning_rates_rise_and_fall_as_in_diffusers() {
    let golden = Golden::read();
    let mut compared = 0;
    for (name, schedule) in [
        ("constant", RateSchedule::Constant),
        ("linear", RateSchedule::Linear),
        ("cosine", RateSchedule::Cosine),
    ] {
        for (warmup, steps) in [(0, 40), (7, 40), (40, 40), (1, 2), (60, 40)] {
            let expected = golden.f64(&format!("schedule/{name}/{warmup}/{steps}"));
            for (step, expected) in expected.iter().enumerate() {
                let found = schedule.multiplier(step as u64, warmup, steps);
                assert!(
                    (found - expected).abs() < 1e-12,
                    "{name} {warmup}/{steps}, step {step}: {found} for {expected}"
                );
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 3 * (40 + 40 + 40 + 2 + 40));
}
