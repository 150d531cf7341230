//! Whole pictures against diffusers: `tests/golden/pictures`, made by `tests/reference/pictures.py`, and
//! those with adapters, `tests/golden/adapter-pictures`, by `adapter_pictures.py`.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device};
use image::{GrayImage, RgbImage};
use serde::Deserialize;

use super::{
    Mixture, Pipeline,
    request::{ImageRequest, InitImage},
};
use crate::{
    adapters::{Adapter, ReadOptions, SiteTable},
    engine::{Mixer, Portion},
    models::{Model, ModelSource, Modules},
    registry::{Generation, Resident},
};

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
    #[serde(default)]
    adapters: Vec<Used>,
}

/// An adapter of a case.
#[derive(Deserialize)]
struct Used {
    /// From the project's folder.
    file: String,
    unet: f64,
    text_encoder: f64,
    /// Of vectors whose file names none.
    word: Option<String>,
}

fn project() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rgb(file: &Path) -> RgbImage {
    image::open(file).unwrap().into_rgb8()
}

fn gray(file: &Path) -> GrayImage {
    image::open(file).unwrap().into_luma8()
}

impl Case {
    /// `inputs` has the pictures to start from.
    fn request(&self, inputs: &Path, modules: &Arc<Modules>) -> ImageRequest {
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
                image: rgb(&inputs.join(input)),
                mask: self.mask.as_deref().map(|mask| gray(&inputs.join(mask))),
                strength: self.strength.unwrap(),
            }),
            previews: 0,
            adapters: Vec::new(),
            mixture: (!self.adapters.is_empty()).then(|| self.mixture(modules)),
        }
    }

    fn mixture(&self, modules: &Arc<Modules>) -> Arc<Resident<Mixture>> {
        let table = SiteTable::new(modules.sites()).unwrap();
        let portion = |used: &Used| {
            let path = project().join(&used.file);
            let options = ReadOptions {
                tokens: used.word.iter().cloned().collect(),
            };
            let adapter = Adapter::open(&path, &table, &options).unwrap();
            assert_eq!(adapter.unmatched, [""; 0], "{}", used.file);
            Portion {
                name: used.file.clone(),
                generation: Generation::of(used.file.as_bytes()),
                adapter: Arc::new(adapter),
                unet: used.unet,
                text: used.text_encoder,
            }
        };
        let portions = self.adapters.iter().map(portion).collect();
        let mixer = Arc::new(Mixer::new(modules.clone(), u64::MAX));
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(mixer.mix(portions)).unwrap()
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

/// Compares every case of a folder, and says how many there were. What they start from lies under
/// `inputs`.
fn check(folder: &str, inputs: &Path) -> usize {
    let folder = project().join("tests/golden").join(folder);
    let index = fs::read_to_string(folder.join("index.json")).unwrap();
    let index: Index = serde_json::from_str(&index).unwrap();
    let pipeline = demo();
    let modules = pipeline.model().modules();
    let mut bad = Vec::new();
    let only = std::env::var("LORIKEET_TEST_PICTURES").unwrap_or_default();
    for case in index.cases.iter().filter(|case| case.name.contains(&only)) {
        let pictures = paint(&pipeline, &case.request(inputs, modules));
        assert_eq!(pictures.len(), case.files.len(), "{}", case.name);
        for (ours, file) in pictures.iter().zip(&case.files) {
            let (most, equal) = compare(ours, &rgb(&folder.join(file)));
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
    index.cases.len()
}

#[test]
fn the_same_seed_paints_the_same_picture_as_diffusers() {
    let cases = check("pictures", &project().join("tests/golden/pictures"));
    assert!(cases > 50, "{cases}");
}

#[test]
fn the_same_adapter_paints_the_same_picture_as_in_diffusers() {
    let cases = check("adapter-pictures", &project());
    assert!(cases > 30, "{cases}");
}
