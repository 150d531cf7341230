//! Whole trajectories against diffusers': `tests/golden/schedulers`, made by
//! `tests/reference/schedulers.py`.

use std::{collections::BTreeMap, fs, path::PathBuf};

use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::Value;

use super::{PredictionType, Sampler, SchedulerConfig, SchedulerKind, sampler};
use crate::noise::{Generator, LatentNoise};

const TOLERANCE: f64 = 1e-5;
/// Euler's ancestral step from a sigma of 4096 (zero terminal SNR) takes the difference of two nearly
/// equal squares: what is left of it hangs on the last bit of a square root, which torch's vector
/// library does not always round as IEEE asks.
const TOLERANCE_OF_DIFFERENCES: f64 = 1e-4;
/// Height, width and channels.
const SHAPE: [usize; 3] = [2, 3, 3];

#[derive(Deserialize)]
struct Index {
    configs: BTreeMap<String, Value>,
    impossible: Vec<Impossible>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Impossible {
    kind: String,
    config: String,
}

#[derive(Deserialize)]
struct Case {
    kind: String,
    name: String,
    config: String,
    steps: usize,
    strength: Option<f64>,
    seed: u64,
    init_noise_sigma: f64,
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/schedulers")
}

fn index() -> Index {
    serde_json::from_slice(&fs::read(folder().join("index.json")).unwrap()).unwrap()
}

fn config(value: &Value) -> SchedulerConfig {
    SchedulerConfig::from_json(&value.to_string()).unwrap()
}

fn floats(file: &SafeTensors, name: &str) -> Vec<f32> {
    let bytes = file.tensor(name).unwrap().data();
    bytes
        .as_chunks()
        .0
        .iter()
        .copied()
        .map(f32::from_le_bytes)
        .collect()
}

/// The stand-in for a UNet of the reference script, operation by operation.
fn model(sample: &[f32], timestep: f32, prediction: PredictionType) -> Vec<f32> {
    let u = timestep / 1000.0;
    let slope = match prediction {
        PredictionType::Epsilon => u * (2.0 - u),
        PredictionType::VPrediction => 0.5 * u,
        PredictionType::Sample => 1.0 - 0.5 * u,
    };
    let bent = |x: f32| x * slope + 0.25 * (x / (1.0 + x * x)) - 0.125;
    sample.iter().copied().map(bent).collect()
}

struct Trajectory {
    timesteps: Vec<f32>,
    samples: Vec<f32>,
    noised: Vec<f32>,
}

fn run(case: &Case, sampler: &mut dyn Sampler, prediction: PredictionType) -> Trajectory {
    let mut noise = LatentNoise {
        generator: Generator::new(case.seed),
        shape: SHAPE,
    };
    let first = noise.draw();
    let image = case.strength.map(|_| {
        let original: Vec<f32> = first.iter().map(|x| x / 2.0).collect();
        (original, noise.draw())
    });
    let noised = |sampler: &dyn Sampler| {
        let (original, noise) = image.as_ref()?;
        sampler.add_noise(original, noise)
    };
    let mut out = Trajectory {
        timesteps: vec![],
        samples: vec![],
        noised: noised(sampler).unwrap_or_default(),
    };
    let sigma = sampler.init_noise_sigma();
    let mut sample = match &image {
        None => first.iter().map(|x| x * sigma).collect(),
        Some(_) => out.noised.clone(),
    };
    assert_eq!(sampler.done(), 0);
    while let Some(timestep) = sampler.timestep() {
        let output = model(&sampler.scale_model_input(&sample), timestep, prediction);
        sampler.step(&output, &mut sample, &mut || noise.draw());
        out.timesteps.push(timestep);
        out.samples.extend(&sample);
        out.noised.extend(noised(sampler).unwrap_or_default());
    }
    assert_eq!(sampler.done(), sampler.evaluations());
    out
}

/// The largest relative error of a step's sample, in the Euclidean norm.
fn error(what: &str, found: &[f32], expected: &[f32]) -> f64 {
    let size = SHAPE.iter().product();
    assert_eq!(found.len(), expected.len(), "{what}");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let steps = found.chunks(size).zip(expected.chunks(size));
    largest(steps.map(|(found, expected)| {
        let both = found.iter().zip(expected);
        let difference = norm(&mut both.map(|(a, b)| f64::from(a - b)));
        difference / norm(&mut expected.iter().map(|&b| b.into()))
    }))
}

/// Infinite if any is no number: `f64::max` would pass over it.
fn largest(errors: impl IntoIterator<Item = f64>) -> f64 {
    let errors = errors.into_iter();
    errors
        .map(|e| if e.is_nan() { f64::INFINITY } else { e })
        .fold(0.0, f64::max)
}

/// Whole ones equal, and those between (Karras' sigmas, `continuous`) up to the last bits of the
/// logarithms they come from, of which NumPy and torch have their own.
fn same_timesteps(found: &[f32], expected: &[f32]) -> bool {
    let close = |(a, b): (&f32, &f32)| match b.fract() {
        0.0 => a == b,
        _ => (a - b).abs() <= 1e-5 * b.abs().max(1.0),
    };
    found.len() == expected.len() && found.iter().zip(expected).all(close)
}

#[test]
fn every_step_is_that_of_diffusers() {
    let index = index();
    let mut bad = Vec::new();
    for kind in SchedulerKind::all() {
        let bytes = fs::read(folder().join(format!("{kind}.safetensors"))).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let cases: Vec<&Case> = index
            .cases
            .iter()
            .filter(|c| c.kind == kind.name())
            .collect();
        assert!(cases.len() >= 32, "{kind}: {} cases", cases.len());
        let mut worst = 0f64;
        for case in cases {
            let config = config(&index.configs[&case.config]);
            let prediction = config.prediction_type.unwrap_or_default();
            let mut sampler = sampler(kind, &config, case.steps, case.strength).unwrap();
            let sigma = f64::from(sampler.init_noise_sigma());
            let mut errors = vec![(sigma / case.init_noise_sigma - 1.0).abs()];
            let found = run(case, sampler.as_mut(), prediction);
            let what = format!("{kind} {}", case.name);
            let expected = |key: &str| floats(&golden, &format!("{}/{key}", case.name));
            let timesteps = expected("timesteps");
            if !same_timesteps(&found.timesteps, &timesteps) {
                bad.push(format!("{what}: {:?} for {timesteps:?}", found.timesteps));
                continue;
            }
            errors.push(error(&what, &found.samples, &expected("samples")));
            if case.strength.is_some() {
                errors.push(error(&what, &found.noised, &expected("noised")));
            }
            let largest = largest(errors);
            worst = worst.max(largest);
            let steep = config.rescale_betas_zero_snr == Some(true);
            let tolerance = match kind {
                SchedulerKind::EulerAncestral if steep => TOLERANCE_OF_DIFFERENCES,
                _ => TOLERANCE,
            };
            if largest > tolerance {
                bad.push(format!("{what}: relative error {largest:e}"));
            }
        }
        println!("{kind}: {worst:.1e}");
    }
    assert!(bad.is_empty(), "{bad:#?}");
}

#[test]
fn what_diffusers_cannot_do_is_finite_here() {
    let index = index();
    assert!(!index.impossible.is_empty());
    for Impossible { kind, config: name } in &index.impossible {
        let config = config(&index.configs[name]);
        let prediction = config.prediction_type.unwrap_or_default();
        let case = Case {
            kind: kind.clone(),
            name: name.clone(),
            config: name.clone(),
            steps: 20,
            strength: None,
            seed: 1,
            init_noise_sigma: 1.0,
        };
        let kind: SchedulerKind = kind.parse().unwrap();
        let mut sampler = sampler(kind, &config, case.steps, None).unwrap();
        let found = run(&case, sampler.as_mut(), prediction);
        assert!(found.samples.iter().all(|x| x.is_finite()), "{kind} {name}");
    }
}

#[test]
fn a_last_step_of_high_order_to_no_noise_is_refused() {
    let config = SchedulerConfig {
        lower_order_final: Some(false),
        ..Default::default()
    };
    let error = sampler(SchedulerKind::UniPc, &config, 20, None)
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("`lower_order_final` is false"),
        "{error}"
    );
}

#[test]
fn the_timesteps_of_every_count_of_steps_are_those_of_diffusers() {
    let bytes = fs::read(folder().join("checksums.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&bytes).unwrap();
    for (name, tensor) in golden.iter() {
        let (kind, spacing) = name.split_once('.').unwrap();
        let kind: SchedulerKind = kind.parse().unwrap();
        let config = config(&serde_json::json!({
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "timestep_spacing": spacing,
        }));
        let expected = tensor
            .data()
            .as_chunks()
            .0
            .iter()
            .copied()
            .map(f64::from_le_bytes);
        for (steps, expected) in (1..).zip(expected) {
            let mut sampler = sampler(kind, &config, steps, None).unwrap();
            let calls = sampler.evaluations();
            let mut timesteps = Vec::with_capacity(calls);
            while let Some(timestep) = sampler.timestep() {
                timesteps.push(timestep);
                sampler.step(&[], &mut [], &mut Vec::new);
            }
            if kind == SchedulerKind::Heun {
                assert_eq!(calls, 2 * steps - 1, "{name} {steps}");
                timesteps = (0..steps)
                    .map(|i| timesteps[(2 * i).saturating_sub(1)])
                    .collect();
            }
            assert_eq!(timesteps.len(), steps, "{name}");
            let weighted = (1..)
                .zip(&timesteps)
                .map(|(i, &t)| f64::from(i) * f64::from(t));
            let sum: f64 = weighted.sum();
            // A NaN stands where diffusers itself makes another number of steps of it.
            let extra = spacing == "trailing" && expected.is_nan();
            assert!(
                extra || (sum - expected).abs() <= 1e-12 * expected,
                "{name} {steps}: {sum} for {expected}"
            );
        }
    }
}
