//! Weights with something wrong in them: every one is refused with an error that names the file and the
//! tensor.

use std::fs;

use candle_core::{DType, Device};
use serde_json::{Value, json};

use super::test_folder::{Fault, Folder, SECOND_SHARD, SHARDS, TEXT, UNET, VAE, check};

#[test]
fn weights_with_faults_are_refused_by_file_and_tensor() {
    let faults: &[Fault] = &[
        (
            "a missing tensor",
            &[UNET, "`conv_in.bias` is missing", "[12]"],
            |f| f.tensors(UNET, |t| drop(t.remove("conv_in.bias"))),
        ),
        (
            "a missing tensor of the text encoder",
            &[TEXT, "`final_layer_norm.weight` is missing"],
            |f| {
                f.tensors(TEXT, |t| {
                    drop(t.remove("text_model.final_layer_norm.weight"))
                })
            },
        ),
        (
            "a misshapen tensor",
            &[UNET, "`conv_in.bias` has shape [11]", "[12]"],
            |f| {
                f.tensors(UNET, |t| {
                    let short = t["conv_in.bias"].narrow(0, 0, 11).unwrap();
                    t.insert("conv_in.bias".into(), short);
                });
            },
        ),
        (
            "a tensor of another rank",
            &[VAE, "`decoder.conv_in.weight` has shape"],
            |f| {
                f.tensors(VAE, |t| {
                    let flat = t["decoder.conv_in.weight"].flatten_all().unwrap();
                    t.insert("decoder.conv_in.weight".into(), flat);
                });
            },
        ),
        (
            "a tensor of integers",
            &[UNET, "`conv_in.bias`", "dtype"],
            |f| f.entry(UNET, "conv_in.bias", "dtype", json!("I32")),
        ),
        (
            "a tensor of an unknown dtype",
            &[UNET, "`conv_in.bias`", "dtype"],
            |f| f.entry(UNET, "conv_in.bias", "dtype", json!("Q4")),
        ),
        (
            "a NaN",
            &[UNET, "`mid_block.resnets.0.conv1.bias`", "element 1 is NaN"],
            |f| f.value(UNET, "mid_block.resnets.0.conv1.bias", f32::NAN),
        ),
        (
            "an infinity",
            &[VAE, "`encoder.conv_in.bias`", "element 1 is inf"],
            |f| f.value(VAE, "encoder.conv_in.bias", f32::INFINITY),
        ),
        ("an empty file", &[UNET, "0 bytes are too few"], |f| {
            f.truncate(UNET, 0)
        }),
        (
            "an end in the length",
            &[UNET, "5 bytes are too few"],
            |f| f.truncate(UNET, 5),
        ),
        (
            "an end after the length",
            &[UNET, "the header claims"],
            |f| f.truncate(UNET, 8),
        ),
        ("an end in the header", &[UNET, "the header claims"], |f| {
            f.truncate(UNET, 1000)
        }),
        (
            "an end in the data",
            &[UNET, "tensor `", "truncated", "the file has 100000"],
            |f| f.truncate(UNET, 100_000),
        ),
        ("a byte too few", &[VAE, "tensor `", "truncated"], |f| {
            f.truncate(VAE, f.read(VAE).len() - 1);
        }),
        ("a byte too many", &[VAE, "the last tensor ends at"], |f| {
            f.write(VAE, [f.read(VAE), vec![0]].concat());
        }),
        (
            "a header of 2^63 bytes",
            &[UNET, "claims 9223372036854775808 bytes"],
            |f| {
                f.write(
                    UNET,
                    [&(1u64 << 63).to_le_bytes()[..], &f.read(UNET)[8..]].concat(),
                )
            },
        ),
        (
            "a header of 2^64 - 1 bytes",
            &[UNET, "claims 18446744073709551615 bytes"],
            |f| f.write(UNET, [&[255; 8], &f.read(UNET)[8..]].concat()),
        ),
        ("a header that is no JSON", &[UNET, "not JSON"], |f| {
            f.write(UNET, [&f.read(UNET)[..8], &[b'['; 30_000][..]].concat());
        }),
        ("a header that is a list", &[UNET, "not JSON"], |f| {
            f.write(UNET, b"\x02\0\0\0\0\0\0\0[]");
        }),
        (
            "offsets that run backwards",
            &[UNET, "`conv_in.bias`", "[48, 0] are not a range"],
            |f| f.entry(UNET, "conv_in.bias", "data_offsets", json!([48, 0])),
        ),
        (
            "offsets beyond 2^64",
            &[UNET, "`conv_in.bias`", "not a range"],
            |f| {
                f.entry(
                    UNET,
                    "conv_in.bias",
                    "data_offsets",
                    json!([u64::MAX - 47, u64::MAX]),
                )
            },
        ),
        (
            "offsets beyond the file",
            &[UNET, "`conv_in.bias` is truncated"],
            |f| {
                f.entry(
                    UNET,
                    "conv_in.bias",
                    "data_offsets",
                    json!([1u64 << 40, (1u64 << 40) + 48]),
                )
            },
        ),
        (
            "offsets that overlap",
            &[UNET, "tensor `", "starts at byte"],
            |f| f.entry(UNET, "conv_in.bias", "data_offsets", json!([48, 96])),
        ),
        (
            "bytes that no tensor has",
            &[UNET, "tensor `conv_in.weight`", "starts at byte"],
            |f| f.header(UNET, |header| drop(header.remove("conv_in.bias"))),
        ),
        (
            "offsets that do not fit the shape",
            &[UNET, "`conv_in.bias`", "does not fill its 48 bytes"],
            |f| f.entry(UNET, "conv_in.bias", "shape", json!([13])),
        ),
        (
            "a shape whose product overflows",
            &[UNET, "`conv_in.bias`", "does not fill"],
            |f| {
                f.entry(
                    UNET,
                    "conv_in.bias",
                    "shape",
                    json!([1u64 << 62, 1u64 << 62]),
                )
            },
        ),
        (
            "a shape of too many dimensions",
            &[UNET, "`conv_in.bias`", "9 dimensions"],
            |f| {
                f.entry(
                    UNET,
                    "conv_in.bias",
                    "shape",
                    json!([12, 1, 1, 1, 1, 1, 1, 1, 1]),
                )
            },
        ),
        (
            "a negative shape",
            &[UNET, "`conv_in.bias`", "bad header entry"],
            |f| f.entry(UNET, "conv_in.bias", "shape", json!([-12])),
        ),
        (
            "an entry that is no object",
            &[UNET, "`conv_in.bias`", "bad header entry"],
            |f| f.header(UNET, |header| header["conv_in.bias"] = json!(7)),
        ),
        (
            "an old and a new name for one tensor",
            &[TEXT, "`text_model.final_layer_norm.bias`", "twice"],
            |f| {
                f.tensors(TEXT, |t| {
                    let copy = t["text_model.final_layer_norm.bias"].clone();
                    t.insert("final_layer_norm.bias".into(), copy);
                });
            },
        ),
        (
            "a pickle file under a new name",
            &[UNET, "not a usable safetensors file"],
            |f| {
                f.write(
                    UNET,
                    b"PK\x03\x04\0\0\x08\x08\0\0\0\0\0\0archive/data.pkl\x80\x02}q\0.",
                )
            },
        ),
        (
            "pickle files alone",
            &[
                "unet/diffusion_pytorch_model.safetensors: missing",
                "pickle",
            ],
            |f| {
                let pickle = f.path("unet/diffusion_pytorch_model.bin");
                fs::rename(f.path(UNET), pickle).unwrap();
            },
        ),
    ];
    check("two-levels", DType::F32, faults);
}

#[test]
fn a_weight_beyond_the_chosen_dtype_is_refused() {
    let faults: &[Fault] = &[(
        "70000 in f16",
        &[
            TEXT,
            "`embeddings.token_embedding.weight`",
            "element 1 is 70000",
            "6.5504e4",
        ],
        |f| {
            f.value(
                TEXT,
                "text_model.embeddings.token_embedding.weight",
                70_000.0,
            )
        },
    )];
    check("two-levels", DType::F16, faults);
    let folder = Folder::copy("two-levels");
    folder.value(
        TEXT,
        "text_model.embeddings.token_embedding.weight",
        70_000.0,
    );
    folder.load(DType::F32).unwrap();
}

#[test]
fn shards_stay_in_their_folder() {
    const KEY: &str = "weight_map.conv_in.bias";
    let faults: &[Fault] = &[
        ("a missing shard", &[SECOND_SHARD, "missing"], |f| {
            f.remove(SECOND_SHARD)
        }),
        ("a truncated shard", &[SECOND_SHARD, "truncated"], |f| {
            f.truncate(SECOND_SHARD, 50_000)
        }),
        ("a way up", &[SHARDS, KEY, "../vae/"], |f| {
            shard(f, json!("../vae/x.safetensors"))
        }),
        ("a way down", &[SHARDS, KEY], |f| {
            shard(f, json!("below/x.safetensors"))
        }),
        ("a way up in Windows", &[SHARDS, KEY], |f| {
            shard(f, json!("..\\x.safetensors"))
        }),
        ("an absolute path", &[SHARDS, KEY], |f| {
            shard(f, json!("/etc/x.safetensors"))
        }),
        ("a drive", &[SHARDS, KEY], |f| {
            shard(f, json!("C:x.safetensors"))
        }),
        ("another kind of file", &[SHARDS, KEY], |f| {
            shard(f, json!("config.json"))
        }),
        ("a number", &[SHARDS, KEY], |f| shard(f, json!(1))),
        ("no map", &[SHARDS, "`weight_map` is missing"], |f| {
            f.json(SHARDS, |map| drop(map.remove("weight_map")));
        }),
        ("an empty map", &[SHARDS, "weight_map"], |f| {
            f.set(SHARDS, "weight_map", json!({}))
        }),
        ("a list for a map", &[SHARDS, "weight_map"], |f| {
            f.set(SHARDS, "weight_map", json!([]))
        }),
        ("a broken index", &[SHARDS, "not valid JSON"], |f| {
            f.truncate(SHARDS, 100)
        }),
        (
            "a tensor in two shards",
            &["-of-00003.safetensors", "`conv_in.bias`", "twice"],
            |f| {
                let first = f.path("unet/diffusion_pytorch_model-00001-of-00003.safetensors");
                let tensors = candle_core::safetensors::load(first, &Device::Cpu).unwrap();
                let bias = tensors["conv_in.bias"].clone();
                f.tensors(SECOND_SHARD, |t| {
                    drop(t.insert("conv_in.bias".into(), bias))
                });
            },
        ),
    ];
    check("four-levels", DType::F32, faults);
}

fn shard(folder: &Folder, name: Value) {
    folder.json(SHARDS, |index| index["weight_map"]["conv_in.bias"] = name);
}
