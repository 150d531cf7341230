//! Model folders with something wrong in their files and configs: every one is refused with an error
//! that names the file and the key.

use std::fs;

use candle_core::{DType, Device};
use serde_json::json;

use super::{
    Model, ModelSource,
    test_folder::{
        Fault, Folder, SECOND_SHARD, SHARDS, TEXT, TEXT_CONFIG, UNET, UNET_CONFIG, VAE, check,
    },
};

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
