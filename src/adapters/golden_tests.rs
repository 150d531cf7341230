//! Every dialect against the tool that writes it, or its formulas.
//!
//! The files under `tests/golden/adapters` come from `tests/reference/adapters.py`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    sync::LazyLock,
};

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::{Adapter, Format, ReadOptions, SiteTable};
use crate::models::{Model, ModelSource, SiteKind};

/// What f32 keeps of a small product.
const TOLERANCE: f64 = 1e-6;

#[derive(Debug, Deserialize)]
struct Index {
    cases: Vec<Case>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Case {
    pub name: String,
    pub model: String,
    dialect: String,
    unmatched: Vec<String>,
    pub tokens: Vec<String>,
}

/// A tiny model's names, and the weights that some deltas depend on.
pub(super) struct Base {
    pub table: SiteTable,
    pub kinds: HashMap<String, (SiteKind, Vec<usize>)>,
    weights: HashMap<String, Tensor>,
}

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

pub(super) fn bytes(name: &str) -> Vec<u8> {
    std::fs::read(golden().join(format!("adapters/{name}.safetensors"))).unwrap()
}

fn load_base(name: &str, variant: &str) -> Base {
    let folder = golden().join("models").join(name);
    let model = Model::load(
        &ModelSource::Folder(folder.clone()),
        &Device::Cpu,
        DType::F32,
    )
    .unwrap();
    let mut weights = HashMap::new();
    for (part, file) in [
        (
            "unet.",
            format!("unet/diffusion_pytorch_model{variant}.safetensors"),
        ),
        (
            "text_encoder.text_model.",
            format!("text_encoder/model{variant}.safetensors"),
        ),
    ] {
        let file = folder.join(file);
        for (key, tensor) in candle_core::safetensors::load(file, &Device::Cpu).unwrap() {
            let Some(path) = key.strip_suffix(".weight") else {
                continue;
            };
            // transformers 4 writes the text encoder with the prefix, transformers 5 without.
            let path = path.strip_prefix("text_model.").unwrap_or(path);
            weights.insert(format!("{part}{path}"), tensor);
        }
    }
    Base {
        table: SiteTable::new(model.sites()).unwrap(),
        kinds: model
            .sites()
            .iter()
            .map(|s| (s.name.to_string(), (s.kind, s.weight_shape.clone())))
            .collect(),
        weights,
    }
}

static TWO: LazyLock<Base> = LazyLock::new(|| load_base("two-levels", ""));
static THREE: LazyLock<Base> = LazyLock::new(|| load_base("three-levels", ".fp16"));

pub(super) fn base(model: &str) -> &'static Base {
    match model {
        "two-levels" => &TWO,
        "three-levels" => &THREE,
        other => panic!("no such model: {other}"),
    }
}

pub(super) fn cases() -> Vec<Case> {
    let text = std::fs::read_to_string(golden().join("adapters/index.json")).unwrap();
    serde_json::from_str::<Index>(&text).unwrap().cases
}

fn options(case: &Case) -> ReadOptions {
    ReadOptions {
        tokens: case.tokens.clone(),
    }
}

pub(super) fn read(case: &Case) -> Adapter {
    let table = &base(&case.model).table;
    Adapter::parse(&case.name, bytes(&case.name), table, &options(case))
        .unwrap_or_else(|error| panic!("{}: {error}", case.name))
}

/// Everything an adapter does: `W' − W`, biases, words.
pub(super) fn effects(adapter: &Adapter, base: &Base) -> BTreeMap<String, Tensor> {
    let mut effects = BTreeMap::new();
    for (site, delta) in &adapter.deltas {
        if delta.change.is_some() || delta.magnitude.is_some() {
            let weight = match delta.weight(&base.kinds[&**site].1).unwrap() {
                Some(weight) => weight,
                None => delta.weight_with(&base.weights[&**site]).unwrap(),
            };
            assert_eq!(weight.dims(), base.kinds[&**site].1, "{site}");
            effects.insert(site.to_string(), weight);
        }
        if let Some(bias) = &delta.bias {
            effects.insert(format!("{site}+bias"), bias.clone());
        }
    }
    for word in &adapter.embeddings {
        effects.insert(format!("{}+token", word.token), word.vectors.clone());
    }
    effects
}

pub(super) fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.dims(), expected.dims());
    let flat = |x: &Tensor| -> Vec<f64> {
        let x = x.to_dtype(DType::F64).unwrap();
        x.flatten_all().unwrap().to_vec1().unwrap()
    };
    let (found, expected) = (flat(found), flat(expected));
    let norm = |x: Vec<f64>| x.into_iter().map(|x| x * x).sum::<f64>().sqrt();
    norm(found.iter().zip(&expected).map(|(a, b)| a - b).collect()) / norm(expected)
}

pub(super) fn assert_same(
    what: &str,
    found: &BTreeMap<String, Tensor>,
    expected: &BTreeMap<String, Tensor>,
) {
    let names = |map: &BTreeMap<String, Tensor>| map.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(found), names(expected), "{what}");
    for (name, found) in found {
        let error = relative_error(found, &expected[name]);
        assert!(
            error <= TOLERANCE,
            "{what}: {name}: relative error {error:e}"
        );
    }
}

#[test]
fn every_dialect_does_what_its_tool_says() {
    let all = candle_core::safetensors::load(
        golden().join("adapters/expected.safetensors"),
        &Device::Cpu,
    )
    .unwrap();
    for case in cases() {
        let adapter = read(&case);
        assert_eq!(adapter.dialect.to_string(), case.dialect, "{}", case.name);
        assert_eq!(adapter.unmatched, case.unmatched, "{}", case.name);
        let prefix = format!("{}/", case.name);
        let expected = all
            .iter()
            .filter_map(|(key, t)| Some((key.strip_prefix(&prefix)?.to_owned(), t.clone())))
            .collect();
        assert_same(&case.name, &effects(&adapter, base(&case.model)), &expected);
    }
}

#[test]
fn what_is_written_as_kohya_reads_the_same_and_twice_the_same() {
    for case in cases() {
        let adapter = read(&case);
        let base = base(&case.model);
        let extra = BTreeMap::from([("ss_output_name".into(), "again".into())]);
        let bytes = adapter.save(Format::Kohya, &extra).unwrap();
        assert_eq!(bytes, adapter.save(Format::Kohya, &extra).unwrap());
        let again =
            Adapter::parse("again", bytes.clone(), &base.table, &ReadOptions::default()).unwrap();
        assert_eq!(again.unmatched, Vec::<String>::new(), "{}", case.name);
        assert_eq!(again.metadata["ss_output_name"], "again");
        assert_same(&case.name, &effects(&again, base), &effects(&adapter, base));
        // What was read from it is written as it is.
        assert_eq!(
            again.save(Format::Kohya, &extra).unwrap(),
            bytes,
            "{}",
            case.name
        );
    }
}

#[test]
fn what_is_written_as_peft_reads_the_same() {
    let mut refused = BTreeSet::new();
    for case in cases() {
        let adapter = read(&case);
        let base = base(&case.model);
        if adapter.deltas.is_empty() {
            continue;
        }
        match adapter.save(Format::Peft, &BTreeMap::new()) {
            Ok(bytes) => {
                let again =
                    Adapter::parse("again", bytes, &base.table, &ReadOptions::default()).unwrap();
                assert_eq!(again.dialect, super::Dialect::Peft);
                let mut expected = effects(&adapter, base);
                // Words go into a file of their own.
                expected.retain(|name, _| !name.ends_with("+token"));
                assert_same(&case.name, &effects(&again, base), &expected);
            }
            Err(error) => {
                assert!(error.to_string().contains("write kohya instead"), "{error}");
                refused.insert(case.name);
            }
        }
    }
    let expected = [
        "dora",
        "full",
        "ia3",
        "ia3-matrix",
        "loha",
        "lokr",
        "peft-bias",
    ];
    assert_eq!(refused, expected.map(String::from).into());
}

#[test]
fn words_are_written_as_diffusers_reads_them() {
    for name in ["bundle", "words-diffusers", "words-cog", "cloneofsimo"] {
        let case = cases().into_iter().find(|c| c.name == name).unwrap();
        let adapter = read(&case);
        let base = base(&case.model);
        let bytes = adapter.save(Format::Embeddings, &BTreeMap::new()).unwrap();
        let again = Adapter::parse("again", bytes, &base.table, &ReadOptions::default()).unwrap();
        let mut expected = effects(&adapter, base);
        expected.retain(|name, _| name.ends_with("+token"));
        assert_same(name, &effects(&again, base), &expected);
    }
}
