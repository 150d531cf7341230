//! Painting with adapters: as a client names them, and what the answer says of them.

use image::RgbImage;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};

use crate::{
    adapter_files::{SITE, create, pack, put},
    metadata::texts,
    support::{Server, file, ok, pixels, quick, refusal, shared},
};

/// A low-rank adapter strong enough to be seen; another seed is another direction.
pub fn strong(seed: usize) -> Vec<u8> {
    let wave = |n: usize, step: f32| -> Vec<f32> {
        let value = |i: usize| ((i + seed) as f32 * step).sin() * 0.6;
        (0..n).map(value).collect()
    };
    let text = "text_encoder.text_model.encoder.layers.0.self_attn.v_proj";
    let mut tensors = Vec::new();
    for (site, width) in [(SITE, 48), (text, 128)] {
        tensors.push((
            format!("{site}.lora_A.weight"),
            vec![2, width],
            wave(2 * width, 0.7),
        ));
        tensors.push((
            format!("{site}.lora_B.weight"),
            vec![width, 2],
            wave(2 * width, 1.3),
        ));
    }
    pack(&tensors, Value::Null)
}

/// Puts an adapter into the shared server.
async fn have(name: &str, bytes: Vec<u8>) {
    let response = create(shared(), name, bytes).send().await.unwrap();
    let status = response.status();
    assert_eq!(
        status,
        StatusCode::CREATED,
        "{}",
        response.text().await.unwrap()
    );
}

async fn answer(change: Value) -> Value {
    ok(shared().generate(&quick(change)).await).await
}

async fn paint(change: Value) -> RgbImage {
    pixels(&file(&answer(change).await["data"][0]))
}

#[tokio::test]
async fn base_adapter_base_gives_the_same_bytes() {
    have("there-and-back", strong(1)).await;
    let base = file(&answer(json!({})).await["data"][0]);
    let with = json!({"adapters": ["there-and-back"]});
    let adapted = file(&answer(with.clone()).await["data"][0]);
    assert_ne!(pixels(&adapted), pixels(&base));
    assert_eq!(file(&answer(json!({})).await["data"][0]), base);
    assert_eq!(file(&answer(with).await["data"][0]), adapted);
    // At strength zero nothing is added.
    let none = json!({"adapters": [{"name": "there-and-back", "scale": 0}]});
    assert_eq!(paint(none).await, pixels(&base));
}

#[tokio::test]
async fn an_adapter_is_the_same_however_it_is_named() {
    have("named", strong(2)).await;
    let prompt = "a red mushroom";
    let whole = answer(json!({"adapters": [{"name": "named"}]})).await;
    let picture = pixels(&file(&whole["data"][0]));
    assert_eq!(whole["adapters"][0]["name"], "named");
    assert_eq!(whole["adapters"][0]["unet_scale"], 1.0);
    let hash = whole["adapters"][0]["sha256"].as_str().unwrap();
    let got = ok(shared().get("/v1/adapters/named").await).await;
    assert_eq!(got["sha256"], hash);
    for other in [
        json!({"adapters": ["named"]}),
        json!({"prompt": format!("{prompt} <lora:named>")}),
        json!({"prompt": format!("<lora:named:1>{prompt}")}),
        json!({"model": "named"}),
        json!({"model": "named", "adapters": ["named"]}),
        json!({"adapters": "[{\"name\": \"named\"}]"}),
        json!({"prompt": format!("{prompt} <lora:named:0.25>"), "adapters": [{"name": "named", "scale": 0.75}]}),
    ] {
        let same = paint(other.clone()).await;
        // Strengths in two halves are summed in another order.
        let near = |a: &RgbImage| {
            a.iter()
                .zip(picture.iter())
                .all(|(a, b)| a.abs_diff(*b) <= 1)
        };
        assert!(near(&same), "{other}");
    }
    for other in [
        json!({"adapters": [{"name": "named", "scale": -1}]}),
        json!({"adapters": [{"name": "named", "text_scale": 0}]}),
        json!({"adapters": [{"name": "named", "unet_scale": 0}]}),
        json!({"prompt": format!("{prompt} <lora:named:1:0>")}),
        json!({"adapters": [{"name": "named", "scale": 1.7}]}),
    ] {
        assert_ne!(paint(other.clone()).await, picture, "{other}");
    }
    let models = ok(shared().get("/v1/models").await).await;
    let ids: Vec<&str> = models["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|m| m["id"].as_str())
        .collect();
    assert!(ids.contains(&"named") && ids.contains(&"demo"), "{ids:?}");
}

#[tokio::test]
async fn a_picture_tells_how_to_paint_it_again() {
    have("told", strong(3)).await;
    let adapters = json!([{"name": "told", "unet_scale": 0.5, "text_scale": -0.25}]);
    let first = answer(json!({"adapters": adapters})).await;
    let bytes = file(&first["data"][0]);
    let (_, text, _) = texts(&bytes).remove(0);
    let prompt = text.lines().next().unwrap();
    assert_eq!(prompt, "a red mushroom <lora:told:unet=0.5:te=-0.25>");
    let hash = first["adapters"][0]["sha256"].as_str().unwrap();
    assert!(
        text.contains(&format!("Lora hashes: \"told: {}\"", &hash[..10])),
        "{text}"
    );
    assert_eq!(
        file(&answer(json!({"prompt": prompt})).await["data"][0]),
        bytes
    );
}

#[tokio::test]
async fn an_adapter_that_is_not_there_is_refused_or_said() {
    have("watercolour", strong(4)).await;
    let wanted = json!({"adapters": ["watercolor"]});
    let (status, error) = refusal(shared().generate(&quick(wanted)).await).await;
    assert_eq!(
        (status, &error["code"]),
        (StatusCode::NOT_FOUND, &json!("adapter_not_found"))
    );
    assert!(
        error["message"].as_str().unwrap().contains("`watercolour`"),
        "{error}"
    );

    let tagged =
        json!({"prompt": "a red mushroom <lora:nowhere:2>", "on_missing_adapter": "ignore"});
    let painted = answer(tagged).await;
    assert_eq!(painted["missing_adapters"], json!(["nowhere"]));
    assert!(
        painted["warnings"][0]
            .as_str()
            .unwrap()
            .contains("`nowhere`")
    );
    assert!(painted.get("adapters").is_none());
    assert_eq!(pixels(&file(&painted["data"][0])), paint(json!({})).await);

    for ignore in ["error", "ignore"] {
        let wanted = json!({"model": "nowhere", "on_missing_adapter": ignore});
        let (status, error) = refusal(shared().generate(&quick(wanted)).await).await;
        assert_eq!(
            (status, &error["code"]),
            (StatusCode::NOT_FOUND, &json!("model_not_found"))
        );
    }
}

#[tokio::test]
async fn what_cannot_be_painted_with_is_refused_with_its_field() {
    let many: Vec<Value> = (0..33).map(|i| json!(format!("a{i}"))).collect();
    for (change, param, part) in [
        (
            json!({"adapters": ["y", {"name": "x", "scale": 101}]}),
            "adapters[1].scale",
            "from -100 to 100",
        ),
        (json!({"adapters": many}), "adapters", "at most 32"),
        (json!({"adapters": [7]}), "adapters[0]", "must be a name"),
        (
            json!({"prompt": "a <lora:x:strong>"}),
            "prompt",
            "not a strength",
        ),
        (
            json!({"prompt": "a <hypernet:x>"}),
            "prompt",
            "hypernetwork",
        ),
        (
            json!({"negative_prompt": "<lora:x>"}),
            "negative_prompt",
            "move the tag",
        ),
        (
            json!({"on_missing_adapter": "cry"}),
            "on_missing_adapter",
            "error, ignore",
        ),
    ] {
        let (status, error) = refusal(shared().generate(&quick(change.clone())).await).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{change}");
        assert_eq!(error["param"], param, "{change}");
        assert!(error["message"].as_str().unwrap().contains(part), "{error}");
    }
    for name in ["../x", "a b", ".hidden", "x/y", ""] {
        let (status, error) =
            refusal(shared().generate(&quick(json!({"adapters": [name]}))).await).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{name}: {error}");
        assert_eq!(error["code"], "invalid_adapter_name");
        assert_eq!(error["param"], "adapters[0].name");
    }
}

#[tokio::test]
async fn an_adapter_that_cannot_be_used_is_refused_by_the_field_that_names_it() {
    have("usable", strong(5)).await;
    let folder = shared().adapters().unwrap();
    let torn = &strong(6)[..300];
    std::fs::write(folder.join("unusable.safetensors"), torn).unwrap();
    let good = json!("usable");
    for name in ["unusable", "nowhere-at-all"] {
        for (change, param) in [
            (json!({"adapters": [name]}), "adapters[0].name"),
            (
                json!({"adapters": [good, {"name": name}]}),
                "adapters[1].name",
            ),
            (
                json!({"model": "usable", "adapters": [name]}),
                "adapters[0].name",
            ),
            (
                json!({"model": name, "adapters": [good, name]}),
                if name == "unusable" {
                    "adapters[1].name"
                } else {
                    "model"
                },
            ),
            (json!({"model": name, "adapters": [good]}), "model"),
            (
                json!({"prompt": format!("a fox <lora:{name}>"), "adapters": [good]}),
                "prompt",
            ),
        ] {
            let (status, error) = refusal(shared().generate(&quick(change.clone())).await).await;
            let expected = if name == "unusable" { 422 } else { 404 };
            assert_eq!(status, expected, "{change}: {error}");
            assert_eq!(error["param"], param, "{change}");
        }
    }
}

#[tokio::test]
async fn an_adapter_for_another_family_is_refused_with_both_names() {
    let site = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k";
    let factor = |name: &str, shape: Vec<usize>| {
        let values = vec![0.5; shape.iter().product()];
        (format!("{site}.{name}.weight"), shape, values)
    };
    let tensors = [
        factor("lora_A", vec![2, 2048]),
        factor("lora_B", vec![640, 2]),
    ];
    let upload = create(shared(), "sdxl", pack(&tensors, Value::Null));
    let (status, error) = refusal(upload.send().await.unwrap()).await;
    assert_eq!(
        (status, &error["code"]),
        (StatusCode::CONFLICT, &json!("wrong_base_model"))
    );
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("Stable Diffusion XL"), "{message}");
    assert!(message.contains("`demo`"), "{message}");
}

#[tokio::test]
async fn words_of_textual_inversion_mean_what_their_file_says() {
    let vectors: Vec<f32> = (0..3 * 128)
        .map(|i| (i as f32 * 0.37).cos() * 0.2)
        .collect();
    have(
        "words",
        pack(&[("<zork>".into(), vec![3, 128], vectors)], Value::Null),
    )
    .await;
    let prompt = json!({"prompt": "a <Zork> in the snow"});
    let mut with = prompt.clone();
    with["adapters"] = json!(["words"]);
    let worded = paint(with.clone()).await;
    assert_ne!(paint(prompt).await, worded);
    assert_eq!(paint(with).await, worded);
    // Prompts without the word are what they were.
    assert_eq!(
        paint(json!({"adapters": ["words"]})).await,
        paint(json!({})).await
    );
    let negative = json!({"negative_prompt": "<zork>", "adapters": ["words"]});
    assert_ne!(
        paint(negative).await,
        paint(json!({"negative_prompt": "<zork>"})).await
    );
}

#[tokio::test]
async fn edits_take_adapters_as_a_form() {
    have("edited", strong(5)).await;
    let image = crate::support::png(RgbImage::from_pixel(64, 64, [90, 120, 40].into()));
    let edit = async |adapters: Option<&str>| {
        let part = reqwest::multipart::Part::bytes(image.clone()).file_name("a.png");
        let mut form = reqwest::multipart::Form::new().part("image", part);
        for (name, value) in [("prompt", "a red mushroom"), ("steps", "3"), ("seed", "7")] {
            form = form.text(name, value);
        }
        if let Some(adapters) = adapters {
            form = form.text("adapters", adapters.to_owned());
        }
        let url = shared().url("/v1/images/edits");
        let sent = Client::new()
            .post(url)
            .multipart(form)
            .send()
            .await
            .unwrap();
        pixels(&file(&ok(sent).await["data"][0]))
    };
    let adapted = edit(Some("[\"edited\"]")).await;
    assert_ne!(adapted, edit(None).await);
}

#[tokio::test]
async fn a_replaced_adapter_is_another_one_for_the_next_request() {
    have("replaced", strong(6)).await;
    let with = json!({"adapters": ["replaced"]});
    let first = answer(with.clone()).await;
    let status = put(shared(), "replaced", strong(9))
        .send()
        .await
        .unwrap()
        .status();
    assert_eq!(status, StatusCode::OK);
    let second = answer(with).await;
    assert_ne!(
        first["adapters"][0]["sha256"],
        second["adapters"][0]["sha256"]
    );
    assert_ne!(file(&first["data"][0]), file(&second["data"][0]));
}

async fn metrics(server: &Server) -> String {
    server.get("/metrics").await.text().await.unwrap()
}

#[tokio::test]
async fn the_metrics_tell_of_adapters() {
    have("counted", strong(7)).await;
    for _ in 0..2 {
        answer(json!({"adapters": ["counted"]})).await;
    }
    let text = metrics(shared()).await;
    for line in [
        "lorikeet_adapter_requests_total{adapter=\"counted\"} 2",
        "lorikeet_adapter_hits_total{tier=\"device\"}",
        "lorikeet_adapter_misses_total{tier=\"host\"}",
        "lorikeet_adapter_resident_bytes{tier=\"device\"}",
        "lorikeet_adapters_per_batch",
        "vllm:lora_requests_info{max_lora=\"8\",waiting_lora_adapters=\"\",running_lora_adapters=\"",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}
