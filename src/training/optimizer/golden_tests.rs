//! Trajectories against PyTorch's and the papers': `tests/golden/training/optimizers.safetensors`, made
//! by `tests/reference/optimizers.py`.

use std::{fs, path::PathBuf};

use safetensors::SafeTensors;

use super::*;

const NAMES: [&str; 3] = ["one", "seven", "matrix"];
const TOLERANCE: f64 = 1e-6;

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
        assert!((distance - 1.0).abs() < TOLERANCE, "{case}, step {step}");
        for ((found, expected), name) in found.iter().zip(&values).zip(NAMES) {
            let expected = &expected[(step + 1) * found.len()..][..found.len()];
            let most = expected.iter().fold(0.0f32, |most, e| most.max(e.abs()));
            for (found, expected) in found.iter().zip(expected) {
                let error = f64::from((found - expected).abs()) / f64::from(most);
                assert!(
                    error < TOLERANCE,
                    "{case}, {name}, step {step}: {found} for {expected}"
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
fn prodigy_goes_its_paper_s_way() {
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
