//! What holds for every order and spelling of keys, and for every spoilt file.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{
    Adapter, ReadOptions, SiteTable,
    golden_tests::{Case, assert_same, base, bytes, cases, effects, read},
    packing::{pack, unpack},
};
use crate::models::{Site, SiteKind};

/// Other names of the same key, that some tool would write.
fn respellings(key: &str) -> Vec<String> {
    let mut names = vec![key.to_owned()];
    let mut swap = |from: &str, to: &str| {
        if let Some(rest) = key.strip_prefix(from) {
            names.push(format!("{to}{rest}"));
        }
    };
    if key.starts_with("text_encoder.text_model.") {
        swap("text_encoder.text_model.", "text_encoder.");
        swap("text_encoder.", "base_model.model.");
    } else {
        swap("text_encoder.", "text_encoder.text_model.");
    }
    if key.starts_with("lora_te_text_model_") {
        swap("lora_te_text_model_", "lora_te_");
        swap("lora_te_text_model_", "lora_te1_");
        swap("lora_te_", "lora_te1_");
    }
    swap("unet.", "");
    swap("unet.", "base_model.model.");
    swap(
        "lora_unet_mid_block_attentions_0_",
        "lora_unet_middle_block_1_",
    );
    names
}

fn parse(case: &Case, bytes: Vec<u8>) -> Adapter {
    let options = ReadOptions {
        tokens: case.tokens.clone(),
    };
    Adapter::parse(&case.name, bytes, &base(&case.model).table, &options)
        .unwrap_or_else(|error| panic!("{}: {error}", case.name))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn neither_order_nor_spelling_of_the_keys_matters(
        seed in any::<u64>(),
        choices in prop::collection::vec(any::<prop::sample::Index>(), 64),
    ) {
        for case in cases() {
            let base = base(&case.model);
            let expected = effects(&read(&case), base);
            let (mut tensors, metadata) = unpack(&bytes(&case.name));
            let mut state = seed | 1;
            tensors.sort_by_cached_key(|_| {
                // A linear congruence is random enough for an order.
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state >> 32
            });
            for (i, tensor) in tensors.iter_mut().enumerate() {
                let names = respellings(&tensor.key);
                tensor.key = choices[i % choices.len()].get(&names).clone();
            }
            let metadata: Vec<(&str, &str)> =
                metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            let adapter = parse(&case, pack(&tensors, &metadata));
            assert_same(&case.name, &effects(&adapter, base), &expected);
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Bytes turned, or a piece cut out: an answer of either kind, and never a panic.
    #[test]
    fn a_spoilt_file_is_answered(
        which in any::<prop::sample::Index>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
        header_only in any::<bool>(),
        keep in any::<bool>(),
    ) {
        let cases = cases();
        let case = which.get(&cases);
        let mut spoilt = bytes(&case.name);
        let header = u64::from_le_bytes(spoilt[..8].try_into().unwrap()) as usize + 8;
        let span = if header_only { header } else { spoilt.len() };
        for (at, byte) in flips {
            spoilt[at.index(span)] = byte;
        }
        if !keep {
            spoilt.truncate(cut.index(spoilt.len()));
        }
        let base = base(&case.model);
        if let Ok(adapter) = Adapter::parse("spoilt", spoilt, &base.table, &ReadOptions::default()) {
            for (site, delta) in &adapter.deltas {
                delta.weight(&base.kinds[&**site].1).unwrap();
            }
        }
    }
}

#[test]
fn every_key_of_every_file_has_a_place_or_is_listed() {
    for case in cases() {
        let adapter = read(&case);
        let (tensors, metadata) = unpack(&bytes(&case.name));
        let metadata: Vec<(&str, &str)> = metadata
            .iter()
            .map(|(k, v)| (k.as_str(), v.as_str()))
            .collect();
        // Without any one of its keys the file is refused, or does something else.
        for left_out in 0..tensors.len() {
            let key = &tensors[left_out].key;
            if adapter.unmatched.contains(key) || tensors.len() > 100 {
                continue;
            }
            let mut rest = tensors.clone();
            rest.remove(left_out);
            let options = ReadOptions {
                tokens: case.tokens.clone(),
            };
            let base = base(&case.model);
            let Ok(less) = Adapter::parse("less", pack(&rest, &metadata), &base.table, &options)
            else {
                continue;
            };
            let same = |a: &Adapter, b: &Adapter| {
                let (a, b) = (effects(a, base), effects(b, base));
                a.len() == b.len()
                    && a.iter().all(|(name, a)| {
                        b.get(name).is_some_and(|b| a.to_string() == b.to_string())
                    })
            };
            let zero = key.ends_with(".alpha");
            assert!(
                !same(&less, &adapter) || zero,
                "{}: `{key}` does nothing and is not listed",
                case.name
            );
        }
    }
}

/// Stability's numbers for SD 1.x, as its checkpoints have them.
#[test]
fn the_blocks_of_stable_diffusion_1_have_stabilitys_numbers() {
    let expected = BTreeMap::from([
        (
            "down_blocks.0.attentions.0.proj_in",
            "input_blocks_1_1_proj_in",
        ),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        ),
        (
            "down_blocks.2.attentions.1.proj_out",
            "input_blocks_8_1_proj_out",
        ),
        (
            "down_blocks.3.resnets.1.conv2",
            "input_blocks_11_0_out_layers_3",
        ),
        ("mid_block.resnets.1.conv1", "middle_block_2_in_layers_2"),
        (
            "up_blocks.0.resnets.2.conv1",
            "output_blocks_2_0_in_layers_2",
        ),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks_2_1_conv"),
        (
            "up_blocks.1.attentions.0.proj_in",
            "output_blocks_3_1_proj_in",
        ),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks_5_2_conv"),
        (
            "up_blocks.3.attentions.2.proj_in",
            "output_blocks_11_1_proj_in",
        ),
    ]);
    let mut paths: Vec<String> = expected.keys().map(|path| (*path).into()).collect();
    for level in 0..4 {
        for layer in 0..3 {
            if layer < 2 {
                paths.push(format!("down_blocks.{level}.resnets.{layer}.norm1"));
            }
            paths.push(format!("up_blocks.{level}.resnets.{layer}.norm1"));
            if level > 0 {
                paths.push(format!("up_blocks.{level}.attentions.{layer}.norm"));
            }
        }
    }
    let sites: Vec<Site> = paths
        .iter()
        .map(|path| Site {
            name: format!("unet.{path}").into(),
            kind: SiteKind::Conv2d,
            weight_shape: vec![8, 8, 1, 1],
            geometry: None,
        })
        .collect();
    let table = SiteTable::new(&sites).unwrap();
    for (path, name) in expected {
        let (site, ..) = table
            .find(&format!("lora_unet_{name}.lora_up.weight"))
            .unwrap();
        assert_eq!(&*site.name, format!("unet.{path}"));
    }
}

#[test]
fn a_model_with_two_sites_of_one_spelling_is_refused() {
    let site = |name: &str| Site {
        name: name.into(),
        kind: SiteKind::Linear,
        weight_shape: vec![8, 8],
        geometry: None,
    };
    let error = SiteTable::new(&[site("unet.a.b_c"), site("unet.a_b.c")]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the spelling `lora_unet_a_b_c` would mean both `unet.a.b_c` and `unet.a_b.c` of this model"
    );
}
