//! What is read can be written and read again as the same, or the writer says why not: cases that the
//! fuzz target found, or that it was written for.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde_json::{Map, json};

use super::{
    Adapter, AdapterError, Change, Format, ReadOptions,
    golden_tests::{base, relative_error},
    packing::{Packed, floats, of_values, pack, unpack},
};

/// `[12, 12]` in the model `two-levels`.
const SQUARE: &str = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";

fn parse(bytes: Vec<u8>) -> Result<Adapter, AdapterError> {
    let table = &base("two-levels").table;
    Adapter::parse("x", bytes, table, &ReadOptions::default())
}

fn part(end: &str, shape: &[usize]) -> Packed {
    floats(&format!("{SQUARE}.{end}"), shape)
}

fn alpha(value: f64) -> Packed {
    Packed {
        key: format!("{SQUARE}.alpha"),
        dtype: "F64",
        shape: vec![],
        bytes: value.to_le_bytes().into(),
    }
}

fn pair() -> [Packed; 2] {
    [
        part("lora_A.weight", &[2, 12]),
        part("lora_B.weight", &[12, 2]),
    ]
}

fn scale(adapter: &Adapter) -> f64 {
    match &adapter.deltas[SQUARE].change {
        Some(Change::LowRank(low)) => low.scale,
        other => panic!("{other:?}"),
    }
}

fn weight(adapter: &Adapter) -> Tensor {
    adapter.deltas[SQUARE].weight(&[12, 12]).unwrap().unwrap()
}

fn save(adapter: &Adapter, format: Format) -> Result<Vec<u8>, AdapterError> {
    adapter.save(format, &BTreeMap::new())
}

#[test]
fn the_core_of_a_linear_map_is_not_written_as_a_kernel() {
    let parts = [
        part("lora_down.weight", &[2, 12]),
        part("lora_up.weight", &[12, 3]),
        part("lora_mid.weight", &[3, 2, 1, 1]),
        alpha(1.0),
    ];
    let tensor = |i: usize| {
        let values: Vec<f32> = parts[i]
            .bytes
            .as_chunks()
            .0
            .iter()
            .map(|four| f32::from_le_bytes(*four))
            .collect();
        let shape = &parts[i].shape[..2];
        Tensor::from_vec(values, shape, &candle_core::Device::Cpu).unwrap()
    };
    let product = tensor(1).matmul(&tensor(2).matmul(&tensor(0)).unwrap());
    let expected = (product.unwrap() * 0.5).unwrap();
    let adapter = parse(pack(&parts, &[])).unwrap();
    assert!(relative_error(&weight(&adapter), &expected) < 1e-6);
    for format in [Format::Peft, Format::Kohya] {
        let bytes = save(&adapter, format).unwrap();
        let (tensors, _) = unpack(&bytes);
        assert!(tensors.iter().all(|tensor| tensor.shape.len() < 3));
        assert!(relative_error(&weight(&parse(bytes).unwrap()), &expected) < 1e-6);
    }
}

#[test]
fn an_alpha_that_f32_does_not_hold_is_none() {
    for (value, expected) in [(1e-50, 1.0), (1e-40, 1.0), (0.0, 1.0), (1e-30, 5e-31)] {
        let adapter = parse(pack(&[&pair()[..], &[alpha(value)]].concat(), &[])).unwrap();
        assert!((scale(&adapter) / expected - 1.0).abs() < 1e-12, "{value}");
        let again = parse(save(&adapter, Format::Kohya).unwrap()).unwrap();
        assert!((scale(&again) / expected - 1.0).abs() < 1e-6, "{value}");
    }
}

#[test]
fn what_would_not_be_read_is_not_written() {
    let values = vec![1e4; 24];
    let [down, up] = pair().map(|part| of_values(&part.key, &part.shape, &values));
    let adapter = parse(pack(&[down, up, alpha(1e6)], &[])).unwrap();
    let error = save(&adapter, Format::Peft).unwrap_err().to_string();
    assert!(
        error.contains("would hold 5e9; nothing above 1e6"),
        "{error}"
    );
    assert!(error.contains("lora_B.weight"), "{error}");
    let again = parse(save(&adapter, Format::Kohya).unwrap()).unwrap();
    assert!(relative_error(&weight(&again), &weight(&adapter)) < 1e-6);
}

#[test]
fn a_word_that_reads_as_something_else_is_not_written_alone() {
    for word in [
        "fox.alpha",
        "clip_g",
        "unet:0:up",
        "bundle_emb.x.y",
        "__metadata__",
    ] {
        let key = format!("bundle_emb.{word}.emb_params");
        let adapter = parse(pack(&[floats(&key, &[2, 10])], &[])).unwrap();
        assert_eq!(adapter.embeddings[0].token, word);
        let error = save(&adapter, Format::Embeddings).unwrap_err().to_string();
        assert!(
            error.contains(word) && error.contains("write kohya"),
            "{error}"
        );
        let again = parse(save(&adapter, Format::Kohya).unwrap()).unwrap();
        assert_eq!(again.embeddings[0].token, word);
    }
}

#[test]
fn texts_about_the_form_of_a_file_stay_with_it() {
    let texts = [
        ("unet", r#"["CrossAttention"]"#),
        ("unet:3:rank", "4"),
        ("<fox>", "<embed>"),
        ("sshs_legacy_hash", "0123abcd"),
        ("ss_output_name", "fox"),
    ];
    let adapter = parse(pack(&pair(), &texts)).unwrap();
    let again = parse(save(&adapter, Format::Peft).unwrap()).unwrap();
    let kept: Vec<&String> = again.metadata.keys().collect();
    assert_eq!(kept, ["format", "lora_adapter_metadata", "ss_output_name"]);
}

#[test]
fn patterns_are_names_but_for_a_few() {
    let read = |patterns: Map<String, serde_json::Value>| {
        let config = json!({"unet.lora_alpha": 2, "unet.alpha_pattern": patterns}).to_string();
        parse(pack(&pair(), &[("lora_adapter_metadata", &config)]))
    };
    let path = SQUARE.strip_prefix("unet.").unwrap();
    let named = |name: &str| {
        let others = (0..300).map(|i| (format!("^mid_block\\.{i}"), json!(7)));
        let patterns = others.chain([(name.into(), json!(8))]).collect();
        scale(&read(patterns).unwrap())
    };
    // Of rank 2.
    assert_eq!(named(&format!("^{path}")), 4.0);
    assert_eq!(named(&format!("^{}", path.replace('.', r"\."))), 4.0);
    assert_eq!(named("attn1.to_q"), 4.0);
    // Only from the beginning.
    assert_eq!(named("^attn1.to_q"), 1.0);
    let many = (0..257)
        .map(|i| (format!("(to_q|x{i})"), json!(8)))
        .collect();
    let error = read(many).unwrap_err().to_string();
    assert!(
        error.contains("257 patterns that are not names; at most 256"),
        "{error}"
    );
}
