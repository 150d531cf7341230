//! Our models against diffusers', on tiny random models and the demo model.
//!
//! The files under `tests/golden/models` come from `tests/reference/models.py`.

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, Result, Tensor};

use super::{Deltas, Model, ModelSource};

/// The relative error that f32 allows two orders of summation over networks of this depth.
const TOLERANCE: f64 = 1e-5;

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/models")
        .join(name)
}

fn load(name: &str) -> (Model, HashMap<String, Tensor>) {
    let source = match name {
        "demo" => ModelSource::Demo,
        _ => ModelSource::Folder(folder(name)),
    };
    let model = Model::load(&source, &Device::Cpu, DType::F32).unwrap();
    let file = folder(name).join("golden.safetensors");
    let golden = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    (model, golden)
}

/// Both the norm of the difference and its largest element are small beside the expected's.
fn assert_close(what: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let flat = |x: &Tensor| -> Vec<f64> {
        let x = x.to_dtype(DType::F64).unwrap();
        x.flatten_all().unwrap().to_vec1().unwrap()
    };
    let (found, expected) = (flat(found), flat(expected));
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let largest = |x: &mut dyn Iterator<Item = f64>| x.map(f64::abs).fold(0.0, f64::max);
    let differences: Vec<f64> = found.iter().zip(&expected).map(|(a, b)| a - b).collect();
    for (kind, error) in [
        (
            "norm",
            norm(&mut differences.iter().copied()) / norm(&mut expected.iter().copied()),
        ),
        (
            "largest",
            largest(&mut differences.iter().copied()) / largest(&mut expected.iter().copied()),
        ),
    ] {
        println!("{what}: {kind} {error:.2e}");
        assert!(
            error <= TOLERANCE,
            "{what}: relative error ({kind}) {error:e}"
        );
    }
}

fn contexts(golden: &HashMap<String, Tensor>) -> Vec<Tensor> {
    (0..)
        .map_while(|i| golden.get(&format!("unet.context{i}")).cloned())
        .collect()
}

fn check(name: &str) -> Result<()> {
    let (model, golden) = load(name);
    let ids: Vec<Vec<u32>> = golden["text.ids"].to_dtype(DType::U32)?.to_vec2()?;
    for skip in 0..3 {
        let hidden = model.text_encoder.forward(&ids, skip, Deltas::NONE)?;
        let what = format!("{name} text.skip{skip}");
        assert_close(&what, &hidden, &golden[&format!("text.skip{skip}")]);
    }

    let timesteps: Vec<f32> = golden["unet.timesteps"].to_vec1()?;
    let out = model.unet.forward(
        &golden["unet.sample"],
        &timesteps,
        &contexts(&golden),
        Deltas::NONE,
    )?;
    assert_close(&format!("{name} unet"), &out, &golden["unet.out"]);

    let moments = model.vae.encode(&golden["vae.x"])?;
    assert_close(&format!("{name} mean"), &moments.mean, &golden["vae.mean"]);
    assert_close(
        &format!("{name} logvar"),
        &moments.logvar,
        &golden["vae.logvar"],
    );
    assert_close(&format!("{name} std"), &moments.std()?, &golden["vae.std"]);
    let picture = model.vae.decode(&golden["vae.z"])?;
    assert_close(&format!("{name} decode"), &picture, &golden["vae.out"]);
    Ok(())
}

#[test]
fn two_levels_in_f32_with_old_names_equal_diffusers() -> Result<()> {
    check("two-levels")
}

#[test]
fn three_levels_in_an_fp16_variant_equal_diffusers() -> Result<()> {
    check("three-levels")
}

#[test]
fn four_levels_in_bf16_shards_equal_diffusers() -> Result<()> {
    check("four-levels")
}

#[cfg(feature = "demo-model")]
#[test]
fn the_demo_model_equals_diffusers() -> Result<()> {
    check("demo")
}

/// The inputs `formula` makes in the reference script.
fn formula(h: usize, w: usize, c: usize, period: usize) -> Result<Tensor> {
    let values: Vec<f32> = (0..h)
        .flat_map(|y| (0..w).flat_map(move |x| (0..c).map(move |k| (y, x, k))))
        .map(|(y, x, k)| {
            let n = (y * 7919 + x * 10473 + k * 12997) % period;
            n as f32 / period as f32 * 2.0 - 1.0
        })
        .collect();
    Tensor::from_vec(values, (1, h, w, c), &Device::Cpu)
}

/// Every 7th row and 5th column, as the reference script keeps.
fn sparse(x: &Tensor) -> Result<Tensor> {
    let every = |axis: usize, step: usize| -> Result<Tensor> {
        let indices: Vec<u32> = (0..x.dim(axis)? as u32).step_by(step).collect();
        Tensor::new(indices, &Device::Cpu)
    };
    x.index_select(&every(1, 7)?, 1)?
        .index_select(&every(2, 5)?, 2)
}

#[test]
fn a_large_picture_is_coded_in_the_tiles_of_diffusers() -> Result<()> {
    let (model, golden) = load("two-levels");
    let picture = model.vae.decode(&formula(136, 123, 4, 1009)?)?;
    assert_close("tiled decode", &sparse(&picture)?, &golden["tiled.out"]);
    let moments = model.vae.encode(&formula(272, 246, 3, 1013)?)?;
    let mean = sparse(&moments.mean)?;
    assert_close("tiled encode", &mean, &golden["tiled.mean"]);
    Ok(())
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() -> Result<()> {
    for name in ["two-levels", "three-levels"] {
        let (model, golden) = load(name);
        let sample = &golden["unet.sample"];
        let timesteps: Vec<f32> = golden["unet.timesteps"].to_vec1()?;
        let contexts = contexts(&golden);
        let together = model
            .unet
            .forward(sample, &timesteps, &contexts, Deltas::NONE)?;
        // Backwards too: equal contexts take the batched path, unequal ones the other.
        for rows in [vec![0], vec![1], vec![2], vec![2, 0], vec![1, 1, 0, 2, 2]] {
            let pick = |x: &Tensor| {
                let parts: Vec<Tensor> = rows
                    .iter()
                    .map(|i| x.narrow(0, *i, 1))
                    .collect::<Result<_>>()?;
                Tensor::cat(&parts, 0)
            };
            let t: Vec<f32> = rows.iter().map(|i| timesteps[*i]).collect();
            let c: Vec<Tensor> = rows.iter().map(|i| contexts[*i].clone()).collect();
            let found = model.unet.forward(&pick(sample)?, &t, &c, Deltas::NONE)?;
            assert_same_bits(&found, &pick(&together)?);
        }

        let picture = model.vae.decode(&golden["vae.z"])?;
        let alone = model.vae.decode(&golden["vae.z"].narrow(0, 1, 1)?)?;
        assert_same_bits(&alone, &picture.narrow(0, 1, 1)?);
        let both = model.vae.encode(&golden["vae.x"])?.mean;
        let alone = model.vae.encode(&golden["vae.x"].narrow(0, 1, 1)?)?.mean;
        assert_same_bits(&alone, &both.narrow(0, 1, 1)?);
    }
    Ok(())
}

fn assert_same_bits(a: &Tensor, b: &Tensor) {
    let bits = |x: &Tensor| -> Vec<u32> {
        let values: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    };
    assert_eq!(bits(a), bits(b));
}

#[test]
fn ids_equal_those_of_transformers() {
    let mut names = vec!["two-levels", "three-levels", "four-levels"];
    if cfg!(feature = "demo-model") {
        names.push("demo");
    }
    for name in names {
        let (model, _) = load(name);
        let file = std::fs::read(folder(name).join("tokens.json")).unwrap();
        let golden: serde_json::Value = serde_json::from_slice(&file).unwrap();
        let special = |key: &str| golden["special"][key].as_u64().unwrap() as u32;
        assert_eq!(model.tokenizer.bos(), special("bos"), "{name}");
        assert_eq!(model.tokenizer.eos(), special("eos"), "{name}");
        assert_eq!(model.tokenizer.pad(), special("pad"), "{name}");
        for row in golden["texts"].as_array().unwrap() {
            let text = row[0].as_str().unwrap();
            let expected: Vec<u32> = serde_json::from_value(row[1].clone()).unwrap();
            assert_eq!(
                model.tokenizer.encode(text).unwrap(),
                expected,
                "{name}: {text:?}"
            );
        }
    }
}
