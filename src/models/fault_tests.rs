//! Model folders with something wrong in them: every one is refused with an error that names the
//! file, and the tensor or key.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::{LoadError, Model, ModelSource};

pub(super) const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
const UNET_CONFIG: &str = "unet/config.json";
const VAE: &str = "vae/diffusion_pytorch_model.safetensors";
pub(super) const TEXT: &str = "text_encoder/model.safetensors";
const TEXT_CONFIG: &str = "text_encoder/config.json";
const SHARDS: &str = "unet/diffusion_pytorch_model.safetensors.index.json";
const SECOND_SHARD: &str = "unet/diffusion_pytorch_model-00002-of-00003.safetensors";

/// A copy of one of the tiny models, to be spoilt.
pub(super) struct Folder(TempDir);

impl Folder {
    pub(super) fn copy(model: &str) -> Self {
        fn copy(from: &Path, to: &Path) {
            fs::create_dir_all(to).unwrap();
            for entry in fs::read_dir(from).unwrap() {
                let (entry, to) = (entry.unwrap(), to.to_owned());
                let to = to.join(entry.file_name());
                match entry.file_type().unwrap().is_dir() {
                    true => copy(&entry.path(), &to),
                    false => drop(fs::copy(entry.path(), to).unwrap()),
                }
            }
        }
        let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
        let folder = tempfile::tempdir().unwrap();
        copy(&golden.join(model), folder.path());
        Self(folder)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    pub(super) fn load(&self, dtype: DType) -> Result<Model, LoadError> {
        let source = ModelSource::Folder(self.0.path().to_owned());
        Model::load(&source, &Device::Cpu, dtype)
    }

    fn remove(&self, file: &str) {
        fs::remove_file(self.path(file)).unwrap();
    }

    fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(file), bytes).unwrap();
    }

    fn read(&self, file: &str) -> Vec<u8> {
        fs::read(self.path(file)).unwrap()
    }

    fn truncate(&self, file: &str, len: usize) {
        self.write(file, &self.read(file)[..len]);
    }

    /// Edits a JSON file's object.
    fn json(&self, file: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let mut value: Value = serde_json::from_slice(&self.read(file)).unwrap();
        edit(value.as_object_mut().unwrap());
        self.write(file, value.to_string());
    }

    fn set(&self, file: &str, key: &str, value: Value) {
        self.json(file, |map| drop(map.insert(key.into(), value)));
    }

    /// Edits the tensors of a file, and writes it well.
    pub(super) fn tensors(&self, file: &str, edit: impl FnOnce(&mut HashMap<String, Tensor>)) {
        let mut tensors = candle_core::safetensors::load(self.path(file), &Device::Cpu).unwrap();
        edit(&mut tensors);
        candle_core::safetensors::save(&tensors, self.path(file)).unwrap();
    }

    fn value(&self, file: &str, tensor: &str, value: f32) {
        self.tensors(file, |tensors| {
            let old = &tensors[tensor];
            let mut values: Vec<f32> = old.flatten_all().unwrap().to_vec1().unwrap();
            values[1] = value;
            let new = Tensor::from_vec(values, old.dims(), &Device::Cpu).unwrap();
            tensors.insert(tensor.into(), new);
        });
    }

    /// Edits the header of a safetensors file and leaves its data as they are.
    fn header(&self, file: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let bytes = self.read(file);
        let (len, rest) = bytes.split_first_chunk().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
        let mut header: Value = serde_json::from_slice(header).unwrap();
        edit(header.as_object_mut().unwrap());
        let header = header.to_string().into_bytes();
        let len = (header.len() as u64).to_le_bytes();
        self.write(file, [&len[..], &header, data].concat());
    }

    fn entry(&self, file: &str, tensor: &str, key: &str, value: Value) {
        self.header(file, |header| header[tensor][key] = value);
    }
}

/// What is done to a folder, and what the error must say.
type Fault = (&'static str, &'static [&'static str], fn(&Folder));

fn check(model: &str, dtype: DType, faults: &[Fault]) {
    for (what, texts, spoil) in faults {
        let folder = Folder::copy(model);
        spoil(&folder);
        let error = match folder.load(dtype) {
            Ok(_) => panic!("{what}: was loaded"),
            Err(error) => error.to_string(),
        };
        for text in *texts {
            assert!(error.contains(text), "{what}: {error:?} lacks {text:?}");
        }
        assert!(error.len() < 1000, "{what}: {error}");
    }
}

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

#[test]
fn files_and_configs_with_faults_are_refused_by_file_and_key() {
    let faults: &[Fault] = &[
        ("no index", &["model_index.json: missing"], |f| {
            f.remove("model_index.json")
        }),
        (
            "a folder for an index",
            &["model_index.json: missing"],
            |f| {
                f.remove("model_index.json");
                fs::create_dir(f.path("model_index.json")).unwrap();
            },
        ),
        (
            "an empty index",
            &["model_index.json: not valid JSON"],
            |f| {
                f.write("model_index.json", "");
            },
        ),
        (
            "a list for an index",
            &["model_index.json", "a list is not supported"],
            |f| {
                f.write("model_index.json", "[1]");
            },
        ),
        (
            "an index of brackets",
            &["model_index.json: not valid JSON"],
            |f| {
                f.write("model_index.json", "[".repeat(200_000));
            },
        ),
        (
            "an index of no text",
            &["model_index.json: not valid JSON"],
            |f| {
                f.write("model_index.json", b"{\"_class_name\": \"\xff\"}");
            },
        ),
        (
            "no class",
            &["model_index.json", "`_class_name` is missing"],
            |f| {
                f.json("model_index.json", |map| drop(map.remove("_class_name")));
            },
        ),
        (
            "another pipeline",
            &[
                "model_index.json",
                "`_class_name`",
                "StableDiffusion3Pipeline",
                "StableDiffusionPipeline",
            ],
            |f| {
                f.set(
                    "model_index.json",
                    "_class_name",
                    json!("StableDiffusion3Pipeline"),
                )
            },
        ),
        (
            "another unet",
            &["model_index.json", "`unet`", "UNet2DConditionModel"],
            |f| {
                f.set(
                    "model_index.json",
                    "unet",
                    json!(["diffusers", "UNetMotionModel"]),
                );
            },
        ),
        (
            "another vae",
            &["model_index.json", "`vae`", "AutoencoderKL"],
            |f| {
                f.set("model_index.json", "vae", json!(["diffusers", "VQModel"]));
            },
        ),
        (
            "a part that is off",
            &["model_index.json", "`text_encoder`"],
            |f| {
                f.set("model_index.json", "text_encoder", json!([null, null]));
            },
        ),
        (
            "no scheduler",
            &["scheduler/scheduler_config.json: missing"],
            |f| {
                f.remove("scheduler/scheduler_config.json");
            },
        ),
        ("no unet config", &["unet/config.json: missing"], |f| {
            f.remove(UNET_CONFIG)
        }),
        (
            "no text config",
            &["text_encoder/config.json: missing"],
            |f| f.remove(TEXT_CONFIG),
        ),
        ("no vae config", &["vae/config.json: missing"], |f| {
            f.remove("vae/config.json")
        }),
        (
            "no unet",
            &["unet/diffusion_pytorch_model.safetensors: missing"],
            |f| f.remove(UNET),
        ),
        (
            "no vae",
            &["vae/diffusion_pytorch_model.safetensors: missing"],
            |f| f.remove(VAE),
        ),
        (
            "no text encoder",
            &["text_encoder/model.safetensors: missing"],
            |f| f.remove(TEXT),
        ),
        (
            "a broken config",
            &["unet/config.json: not valid JSON"],
            |f| f.truncate(UNET_CONFIG, 99),
        ),
        (
            "a missing key",
            &["text_encoder/config.json", "`hidden_size` is missing"],
            |f| {
                f.json(TEXT_CONFIG, |map| drop(map.remove("hidden_size")));
            },
        ),
        (
            "a string for a number",
            &[TEXT_CONFIG, "`hidden_size`", "\"ten\""],
            |f| {
                f.set(TEXT_CONFIG, "hidden_size", json!("ten"));
            },
        ),
        (
            "zero layers",
            &[TEXT_CONFIG, "`num_hidden_layers`: 0"],
            |f| {
                f.set(TEXT_CONFIG, "num_hidden_layers", json!(0));
            },
        ),
        (
            "negative layers",
            &[TEXT_CONFIG, "`num_hidden_layers`: -1"],
            |f| {
                f.set(TEXT_CONFIG, "num_hidden_layers", json!(-1));
            },
        ),
        (
            "layers without end",
            &[TEXT_CONFIG, "`num_hidden_layers`"],
            |f| {
                f.set(TEXT_CONFIG, "num_hidden_layers", json!(u64::MAX));
            },
        ),
        (
            "more layers than weights",
            &[TEXT, "`encoder.layers.2.", "is missing"],
            |f| {
                f.set(TEXT_CONFIG, "num_hidden_layers", json!(1 << 20));
            },
        ),
        (
            "heads that do not divide",
            &[TEXT_CONFIG, "`num_attention_heads`: 3"],
            |f| {
                f.set(TEXT_CONFIG, "num_attention_heads", json!(3));
            },
        ),
        (
            "an unknown activation",
            &[TEXT_CONFIG, "`hidden_act`", "relu", "quick_gelu"],
            |f| {
                f.set(TEXT_CONFIG, "hidden_act", json!("relu"));
            },
        ),
        (
            "an epsilon of zero",
            &[TEXT_CONFIG, "`layer_norm_eps`"],
            |f| {
                f.set(TEXT_CONFIG, "layer_norm_eps", json!(0));
            },
        ),
        (
            "a vocabulary beyond the config's",
            &[TEXT_CONFIG, "`vocab_size`: 500", "ids"],
            |f| {
                f.set(TEXT_CONFIG, "vocab_size", json!(500));
            },
        ),
        (
            "a vocabulary beyond the embedding",
            &[
                TEXT,
                "`embeddings.token_embedding.weight` has shape",
                "[5000, 10]",
            ],
            |f| f.set(TEXT_CONFIG, "vocab_size", json!(5000)),
        ),
        (
            "a vocabulary with a new word",
            &[TEXT_CONFIG, "`vocab_size`", "5001 ids"],
            |f| {
                f.json("tokenizer/vocab.json", |map| {
                    drop(map.insert("zebra".into(), json!(5000)))
                });
            },
        ),
        (
            "another unet block",
            &[UNET_CONFIG, "`down_block_types`", "AttnDownBlock2D"],
            |f| {
                f.set(
                    UNET_CONFIG,
                    "down_block_types",
                    json!(["AttnDownBlock2D", "DownBlock2D"]),
                );
            },
        ),
        (
            "too few unet blocks",
            &[UNET_CONFIG, "`up_block_types`"],
            |f| {
                f.set(UNET_CONFIG, "up_block_types", json!(["UpBlock2D"]));
            },
        ),
        ("no levels", &[UNET_CONFIG, "`block_out_channels`"], |f| {
            f.set(UNET_CONFIG, "block_out_channels", json!([]));
        }),
        (
            "groups that do not divide",
            &[UNET_CONFIG, "`norm_num_groups`"],
            |f| {
                f.set(UNET_CONFIG, "norm_num_groups", json!(7));
            },
        ),
        (
            "a class embedding",
            &[UNET_CONFIG, "`class_embed_type`"],
            |f| {
                f.set(UNET_CONFIG, "class_embed_type", json!("timestep"));
            },
        ),
        (
            "an addition embedding",
            &[UNET_CONFIG, "`addition_embed_type`"],
            |f| {
                f.set(UNET_CONFIG, "addition_embed_type", json!("text_time"));
            },
        ),
        (
            "channels that do not fit",
            &[UNET_CONFIG, "`in_channels`: 9", "(4)"],
            |f| {
                f.set(UNET_CONFIG, "in_channels", json!(9));
            },
        ),
        (
            "a context that does not fit",
            &[UNET_CONFIG, "`cross_attention_dim`", "(10)"],
            |f| {
                f.set(UNET_CONFIG, "cross_attention_dim", json!(20));
            },
        ),
        (
            "another vae block",
            &["vae/config.json", "`up_block_types`"],
            |f| {
                f.set(
                    "vae/config.json",
                    "up_block_types",
                    json!(["UpDecoderBlock2D", "Up"]),
                );
            },
        ),
        (
            "a scaling factor of zero",
            &["vae/config.json", "`scaling_factor`"],
            |f| {
                f.set("vae/config.json", "scaling_factor", json!(0.0));
            },
        ),
        ("no vocabulary", &["tokenizer/vocab.json: missing"], |f| {
            f.remove("tokenizer/vocab.json")
        }),
        ("no merges", &["tokenizer/merges.txt: missing"], |f| {
            f.remove("tokenizer/merges.txt")
        }),
        (
            "a merge of one symbol",
            &["tokenizer/merges.txt", "line 2", "\"x\""],
            |f| {
                f.write("tokenizer/merges.txt", "#version: 0.2\nx\n");
            },
        ),
        (
            "a merge of unknown symbols",
            &["tokenizer/vocab.json", "zz"],
            |f| {
                f.write("tokenizer/merges.txt", "#version: 0.2\nzz yy\n");
            },
        ),
        (
            "merges of no text",
            &["tokenizer/merges.txt", "utf-8"],
            |f| {
                f.write("tokenizer/merges.txt", b"\xff \xfe");
            },
        ),
        ("a vocabulary of strings", &["tokenizer/vocab.json"], |f| {
            f.write("tokenizer/vocab.json", "{\"a\": \"b\"}");
        }),
        (
            "no end token",
            &["tokenizer/vocab.json", "`<|endoftext|>` is not in it"],
            |f| {
                f.json("tokenizer/vocab.json", |map| {
                    drop(map.remove("<|endoftext|>"))
                });
            },
        ),
        (
            "an unknown pad token",
            &["tokenizer/vocab.json", "`[PAD]` is not in it"],
            |f| {
                f.set(
                    "tokenizer/tokenizer_config.json",
                    "pad_token",
                    json!("[PAD]"),
                );
            },
        ),
        (
            "a broken tokenizer.json",
            &["tokenizer/tokenizer.json", "tokenizer"],
            |f| {
                f.write("tokenizer/tokenizer.json", "{\"version\": \"1.0\"}");
            },
        ),
        (
            "two tokens at most",
            &["tokenizer/", "model_max_length is 2"],
            |f| {
                f.set(
                    "tokenizer/tokenizer_config.json",
                    "model_max_length",
                    json!(2),
                );
            },
        ),
        ("an unknown hint", &["lorikeet.json", "stepz"], |f| {
            f.write("lorikeet.json", "{\"stepz\": 3}");
        }),
        (
            "a hint of the wrong type",
            &["lorikeet.json", "string"],
            |f| {
                f.write("lorikeet.json", "{\"steps\": \"many\"}");
            },
        ),
    ];
    check("two-levels", DType::F32, faults);
}

#[test]
fn what_is_no_model_folder_is_said_to_be_none() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.safetensors");
    fs::write(&file, "x").unwrap();
    for (path, text) in [
        (folder.path().to_owned(), "model_index.json: missing"),
        (file, "model_index.json"),
        (folder.path().join("nowhere"), "model_index.json"),
    ] {
        let source = ModelSource::Folder(path.clone());
        let error = Model::load(&source, &Device::Cpu, DType::F32)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(path.to_str().unwrap()) && error.contains(text),
            "{error}"
        );
    }
}

#[test]
fn an_end_anywhere_is_an_error_and_no_panic() {
    let folder = Folder::copy("two-levels");
    for file in [TEXT, UNET, VAE] {
        let whole = folder.read(file);
        for i in 0..24 {
            let len = whole.len() * i / 24;
            folder.truncate(file, len);
            let error = folder.load(DType::F32).unwrap_err().to_string();
            assert!(error.contains(file), "{len} bytes: {error}");
            folder.write(file, &whole);
        }
    }
    folder.load(DType::F32).unwrap();
}

/// The hub's cache keeps every file of a model as a link to a blob elsewhere. Links are made by
/// whoever owns the folder, and are followed; names come from files, and are not.
#[cfg(unix)]
#[test]
fn a_folder_of_links_as_in_the_hubs_cache_is_read() {
    let (folder, blobs) = (Folder::copy("four-levels"), tempfile::tempdir().unwrap());
    for (i, file) in [SECOND_SHARD, SHARDS, UNET_CONFIG].into_iter().enumerate() {
        let blob = blobs.path().join(i.to_string());
        fs::rename(folder.path(file), &blob).unwrap();
        std::os::unix::fs::symlink(blob, folder.path(file)).unwrap();
    }
    folder.load(DType::F32).unwrap();
    fs::remove_file(blobs.path().join("0")).unwrap();
    let error = folder.load(DType::F32).unwrap_err().to_string();
    assert!(
        error.contains(SECOND_SHARD) && error.contains("missing"),
        "{error}"
    );
}

#[test]
fn a_scheduler_config_as_python_writes_it_is_read() {
    let folder = Folder::copy("two-levels");
    let text = r#"{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity}"#;
    folder.write("scheduler/scheduler_config.json", text);
    assert_eq!(folder.load(DType::F32).unwrap().scheduler_config, text);
    folder.write("scheduler/scheduler_config.json", b"\xff");
    let error = folder.load(DType::F32).unwrap_err().to_string();
    assert!(error.contains("scheduler/scheduler_config.json"), "{error}");
}
