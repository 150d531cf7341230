//! Whole pictures against diffusers: `tests/golden/pictures`, made by
//! `tests/reference/pictures.py`.

use std::{fs, path::PathBuf};

use candle_core::{DType, Device};
use image::{GrayImage, RgbImage};
use serde::Deserialize;

use super::{
    Pipeline,
    request::{ImageRequest, InitImage},
};
use crate::models::{Model, ModelSource};

#[derive(Deserialize)]
struct Index {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    files: Vec<String>,
    prompt: String,
    negative_prompt: String,
    width: u32,
    height: u32,
    steps: u32,
    guidance_scale: f64,
    seed: u64,
    n: u32,
    scheduler: String,
    clip_skip: u32,
    strength: Option<f64>,
    input: Option<String>,
    mask: Option<String>,
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/pictures")
}

fn rgb(file: &str) -> RgbImage {
    image::open(folder().join(file)).unwrap().into_rgb8()
}

fn gray(file: &str) -> GrayImage {
    image::open(folder().join(file)).unwrap().into_luma8()
}

impl Case {
    fn request(&self) -> ImageRequest {
        ImageRequest {
            prompt: self.prompt.clone(),
            negative_prompt: self.negative_prompt.clone(),
            width: self.width,
            height: self.height,
            steps: self.steps,
            guidance_scale: self.guidance_scale,
            seed: self.seed,
            n: self.n,
            scheduler: self.scheduler.parse().unwrap(),
            clip_skip: self.clip_skip,
            init: self.input.as_deref().map(|input| InitImage {
                image: rgb(input),
                mask: self.mask.as_deref().map(gray),
                strength: self.strength.unwrap(),
            }),
            previews: 0,
            adapters: Vec::new(),
            mixture: None,
        }
    }
}

fn demo() -> Pipeline {
    let model = Model::load(&ModelSource::Demo, &Device::Cpu, DType::F32).unwrap();
    Pipeline::new(model, Device::Cpu).unwrap()
}

fn paint(pipeline: &Pipeline, request: &ImageRequest) -> Vec<RgbImage> {
    let mut paintings = pipeline.begin(request).unwrap();
    while paintings[0].sampler.timestep().is_some() {
        let outputs = pipeline
            .predict(&paintings.iter().collect::<Vec<_>>())
            .unwrap();
        for (painting, output) in paintings.iter_mut().zip(outputs) {
            pipeline.advance(painting, &output);
        }
    }
    paintings
        .iter()
        .map(|painting| pipeline.decode(&painting.latents, painting.shape).unwrap())
        .collect()
}

/// Largest difference of a channel value, and the share of values that are equal.
fn compare(ours: &RgbImage, theirs: &RgbImage) -> (u8, f64) {
    assert_eq!(ours.dimensions(), theirs.dimensions());
    let pairs = ours.as_raw().iter().zip(theirs.as_raw());
    let most = pairs.clone().map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    let equal = pairs.clone().filter(|(a, b)| a == b).count();
    (most, equal as f64 / pairs.len() as f64)
}

#[test]
fn the_same_seed_paints_the_same_picture_as_diffusers() {
    let index = fs::read_to_string(folder().join("index.json")).unwrap();
    let index: Index = serde_json::from_str(&index).unwrap();
    assert!(index.cases.len() > 50, "{}", index.cases.len());
    let pipeline = demo();
    let mut bad = Vec::new();
    let only = std::env::var("LORIKEET_TEST_PICTURES").unwrap_or_default();
    for case in index.cases.iter().filter(|case| case.name.contains(&only)) {
        let pictures = paint(&pipeline, &case.request());
        assert_eq!(pictures.len(), case.files.len(), "{}", case.name);
        for (ours, file) in pictures.iter().zip(&case.files) {
            let (most, equal) = compare(ours, &rgb(file));
            println!(
                "{file}: differs by {most} at most, {:.2} % equal",
                100.0 * equal
            );
            if most > 1 || equal < 0.99 {
                bad.push(format!("{file}: by {most}, {:.2} % equal", 100.0 * equal));
            }
        }
    }
    assert!(bad.is_empty(), "{bad:#?}");
}
