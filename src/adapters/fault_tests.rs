//! Files with something wrong in them: each is refused with an error that names the key, the limit
//! or the fix.

use super::{
    Adapter, AdapterError, Family, ReadOptions, SiteTable,
    golden_tests::{base, bytes},
    packing::{Packed, floats, of_values, pack},
};
use crate::models::{Site, SiteKind};

/// `[12, 12]` in the model `two-levels`.
const SQUARE: &str = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
const SQUARE_KOHYA: &str = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";

fn parse(bytes: Vec<u8>) -> Result<Adapter, AdapterError> {
    Adapter::parse(
        "x.safetensors",
        bytes,
        &base("two-levels").table,
        &ReadOptions::default(),
    )
}

/// The error of a file must say all of this.
#[track_caller]
fn refused(bytes: Vec<u8>, says: &[&str]) {
    let error = parse(bytes)
        .map(|a| format!("{a:?}"))
        .unwrap_err()
        .to_string();
    for text in says {
        assert!(error.contains(text), "{error:?} does not say {text:?}");
    }
    assert!(
        error.starts_with("x.safetensors: "),
        "{error:?} does not name the file"
    );
}

#[track_caller]
fn tensors_refused(tensors: &[Packed], says: &[&str]) {
    refused(pack(tensors, &[]), says);
}

fn square(end: &str) -> String {
    format!("{SQUARE}.{end}")
}

fn kohya(end: &str, shape: &[usize]) -> Packed {
    floats(&format!("{SQUARE_KOHYA}.{end}"), shape)
}

fn pair(rank: usize) -> Vec<Packed> {
    vec![
        floats(&square("lora_A.weight"), &[rank, 12]),
        floats(&square("lora_B.weight"), &[12, rank]),
    ]
}

#[test]
fn the_pair_the_others_spoil_is_good() {
    let adapter = parse(pack(&pair(3), &[])).unwrap();
    assert_eq!(adapter.deltas.len(), 1);
    assert_eq!(adapter.bytes(), 2 * 3 * 12 * 4);
}

#[test]
fn a_header_whose_length_reads_like_a_pickle_is_a_header() {
    // 0x80 and a version are a length of 640 bytes too.
    let file = (0..640)
        .map(|n| pack(&pair(3), &[("padding", &*"x".repeat(n))]))
        .find(|file| file.starts_with(&640u64.to_le_bytes()));
    assert_eq!(parse(file.unwrap()).unwrap().deltas.len(), 1);
}

#[test]
fn what_is_not_safetensors() {
    refused(vec![], &["0 bytes are too few"]);
    refused(
        b"PK\x03\x04 and so on".into(),
        &["zip", "pickle", "convert it: python -c"],
    );
    refused(
        b"\x80\x02}q\x00. and so on".into(),
        &["pickle", "save_file"],
    );
    refused(b"<!DOCTYPE html><html></html>".into(), &["header claims"]);
    let good = pack(&pair(3), &[]);
    let mut huge = good.clone();
    huge[..8].copy_from_slice(&(1u64 << 63).to_le_bytes());
    refused(huge, &["header claims 9223372036854775808 bytes"]);
    refused(
        good[..good.len() - 1].to_vec(),
        &["lora_B.weight", "truncated"],
    );
    let text = String::from_utf8_lossy(&good).into_owned();
    assert!(text.contains("[144,288]"));
    let at = text.find("[144,288]").unwrap();
    let mut overlapping = good.clone();
    overlapping[at..at + 9].copy_from_slice(b"[100,244]");
    refused(overlapping, &["lora_B.weight", "the tensor before it ends"]);
}

#[test]
fn a_header_as_long_as_a_pickles_first_bytes_is_none() {
    let filled = |n: usize| pack(&pair(3), &[("note", &"x".repeat(n))]);
    // 0x280: the bytes 80 02, with which pickles begin.
    let bytes = filled(0x280 - (filled(0).len() - 8 - 2 * 3 * 12 * 4));
    assert_eq!(bytes[..3], [0x80, 2, 0]);
    assert_eq!(parse(bytes).unwrap().deltas.len(), 1);
}

#[test]
fn values_out_of_bounds() {
    for (value, says) in [
        (f32::NAN, "NaN"),
        (f32::INFINITY, "inf"),
        (2e6, "no adapter needs more than 1e6"),
    ] {
        let mut tensors = pair(1);
        tensors[0] = of_values(&square("lora_A.weight"), &[1, 12], &[value; 12]);
        tensors_refused(&tensors, &[&square("lora_A.weight"), says]);
        let mut tensors = pair(1);
        tensors.push(of_values(&square("alpha"), &[], &[value]));
        tensors_refused(&tensors, &[&square("alpha"), says]);
    }
    let mut tensors = pair(1);
    tensors.push(floats(&square("alpha"), &[2]));
    tensors_refused(&tensors, &["[2]", "one number"]);
    let mut tensors = pair(1);
    tensors[1].dtype = "I32";
    tensors_refused(&tensors, &["lora_B.weight", "F16, BF16 or F32"]);
}

#[test]
fn ranks_out_of_bounds() {
    tensors_refused(&pair(0), &["rank 0", "from 1 to 4096"]);
    tensors_refused(&pair(100_000), &["rank 100000", "from 1 to 4096"]);
    let words = vec![floats("sks", &[257, 10])];
    tensors_refused(&words, &["257 vectors", "256"]);
}

#[test]
fn shapes_of_another_model() {
    let down = floats(&square("lora_A.weight"), &[3, 13]);
    let tensors = vec![down, pair(3).remove(1)];
    tensors_refused(&tensors, &[SQUARE, "[3, 13]", "[3, 12]", "model family"]);
    let up = floats(&square("lora_B.weight"), &[12, 4]);
    tensors_refused(&[pair(3).remove(0), up], &["[12, 4]", "[12, 3]"]);
    let flat = floats(&square("lora_A.weight"), &[]);
    tensors_refused(&[flat, pair(3).remove(1)], &["shape []", "matrix"]);
    tensors_refused(&[kohya("diff", &[12, 11])], &["[12, 11]", "[12, 12]"]);
    tensors_refused(
        &[kohya("lokr_w1", &[5, 4]), kohya("lokr_w2", &[2, 3])],
        &["5 x 4", "does not divide", "12 x 12"],
    );
    tensors_refused(
        &[kohya("lokr_w1", &[0, 4]), kohya("lokr_w2", &[2, 3])],
        &["0 x 4"],
    );
    tensors_refused(&[kohya("dora_scale", &[1, 7])], &["[1, 7]", "12 numbers"]);
    tensors_refused(
        &[
            kohya("weight", &[12, 1]),
            of_values(&format!("{SQUARE_KOHYA}.on_input"), &[2], &[1.0; 2]),
        ],
        &["on_input", "one number"],
    );
}

#[test]
fn tensors_without_their_companions() {
    tensors_refused(
        &pair(3)[..1],
        &[&square("lora_A.weight"), "companion", ".lora_B.weight"],
    );
    tensors_refused(
        &pair(3)[1..],
        &[&square("lora_B.weight"), "companion", ".lora_A.weight"],
    );
    tensors_refused(&[kohya("weight", &[12, 1])], &["companion", ".on_input"]);
    tensors_refused(
        &[
            kohya("hada_w1_a", &[12, 2]),
            kohya("hada_w1_b", &[2, 12]),
            kohya("hada_w2_b", &[2, 12]),
        ],
        &["companion", ".hada_w2_a"],
    );
    tensors_refused(&[kohya("lokr_w1", &[3, 3])], &["companion", ".lokr_w2_b"]);
    tensors_refused(
        &[kohya("hada_w2_b", &[2, 12])],
        &["hada_w2_b", "lacks its companions"],
    );
    let mut both = pair(3);
    both.push(floats(&square("diff"), &[12, 12]));
    tensors_refused(&both, &[&square("diff"), "does not go with"]);
    let norm = "lora_unet_conv_norm_out.lora_down.weight";
    tensors_refused(&[floats(norm, &[2, 12])], &[norm, "GroupNorm"]);
}

#[test]
fn one_tensor_under_two_names() {
    let mut tensors = pair(3);
    tensors.push(kohya("lora_down.weight", &[3, 12]));
    tensors_refused(
        &tensors,
        &[&square("lora_A.weight"), "lora_down", "same tensor"],
    );
    let words = [
        floats("bundle_emb.sks.clip_l", &[10]),
        floats("bundle_emb.sks.emb_params", &[10]),
    ];
    tensors_refused(&words, &["bundle_emb.sks", "same tensor"]);
}

#[test]
fn nothing_that_belongs_here() {
    let other = floats("transformer.single_blocks.0.lora_A.weight", &[2, 10]);
    tensors_refused(
        &[other],
        &[
            "none of its 1 keys",
            "transformer.single_blocks.0",
            "model family",
        ],
    );
    tensors_refused(&[], &["none of its 0 keys"]);
    tensors_refused(&[kohya("alpha", &[])], &["none of its 1 keys"]);
    // A model's own weights are no adapter.
    let weight = floats(&square("weight"), &[12, 12]);
    tensors_refused(&[weight], &["none of its 1 keys"]);
}

#[test]
fn words_that_cannot_be() {
    tensors_refused(
        &[floats("emb_params", &[2, 10])],
        &["emb_params", "give one token, or 2"],
    );
    tensors_refused(
        &[floats("clip_l", &[2, 14])],
        &["clip_l", "[2, 14]", "[vectors, 10]"],
    );
    tensors_refused(
        &[floats("two words", &[2, 10])],
        &["none of its 1 keys", "two words"],
    );
    let bundled = floats("bundle_emb.a b.clip_l", &[10]);
    tensors_refused(&[bundled], &["a b", "not a word"]);
}

#[test]
fn metadata_that_cannot_be() {
    for (text, says) in [
        ("[1]", "not a JSON object"),
        (
            r#"{"unet.lora_alpha": "8"}"#,
            "`unet.lora_alpha` is \"8\" and must be a number",
        ),
        (r#"{"unet.lora_alpha": 1e300}"#, "no adapter needs more"),
        (r#"{"unet.use_rslora": 1}"#, "must be true or false"),
        (r#"{"unet.alpha_pattern": []}"#, "must be an object"),
        (
            r#"{"unet.alpha_pattern": {"(": 1}}"#,
            "pattern `(` is not usable",
        ),
        (
            r#"{"unet.alpha_pattern": {"(a{900}){900}": 1}}"#,
            "is not usable",
        ),
    ] {
        refused(
            pack(&pair(3), &[("lora_adapter_metadata", text)]),
            &["lora_adapter_metadata", says],
        );
    }
}

#[test]
fn numbered_places_of_another_model() {
    let place = |i: usize| {
        vec![
            floats(&format!("unet:{i}:down"), &[2, 12]),
            floats(&format!("unet:{i}:up"), &[12, 2]),
        ]
    };
    tensors_refused(
        &place(0),
        &["numbers 1 places of the unet", "this model has 36"],
    );
    tensors_refused(&place(usize::MAX), &["this model has 36"]);
    let classes = |text| pack(&place(0), &[("unet", text)]);
    refused(
        classes(r#"["ResnetBlock2D"]"#),
        &["the class `ResnetBlock2D`", "GEGLU"],
    );
    refused(classes("Attention"), &["not a list of class names"]);
}

#[test]
fn a_file_of_another_tiny_model_is_refused() {
    let error = parse(bytes("loha")).unwrap_err();
    assert!(matches!(error, AdapterError::Shape { .. }), "{error}");
}

#[test]
fn a_file_of_another_family_is_refused_by_both_names() {
    let path = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k";
    let site = Site {
        name: format!("unet.{path}").into(),
        kind: SiteKind::Linear,
        weight_shape: vec![640, 768],
        geometry: None,
    };
    let table = SiteTable::new(&[site]).unwrap();
    let underscored = path.replace('.', "_");
    for (down, up) in [
        (
            format!("unet.{path}.lora_A.weight"),
            format!("unet.{path}.lora_B.weight"),
        ),
        (
            format!("lora_unet_{underscored}.lora_down.weight"),
            format!("lora_unet_{underscored}.lora_up.weight"),
        ),
    ] {
        let file = |width| pack(&[floats(&down, &[1, width]), floats(&up, &[640, 1])], &[]);
        let parse = |width| Adapter::parse("x", file(width), &table, &ReadOptions::default());
        assert_eq!(parse(768).unwrap().family, Some(Family::Sd1));
        assert_eq!(
            parse(2048).unwrap_err().to_string(),
            "x: is for Stable Diffusion XL, and this model is Stable Diffusion 1.x"
        );
    }
}
