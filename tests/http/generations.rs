//! `POST /v1/images/generations`: what a client gets back.

use reqwest::{Client, Response, header};
use serde_json::{Value, json};

use crate::support::{file, ok, pixels, quick, refusal, shared};

async fn accepting(accept: &str, body: &Value) -> Response {
    let request = Client::new().post(shared().url("/v1/images/generations"));
    let request = request.header(header::ACCEPT, accept).json(body);
    request.send().await.unwrap()
}

/// The fields of `ImagesResponse` in OpenAI's Python client, and our own.
#[tokio::test]
async fn an_answer_is_openais_with_what_the_picture_was_made_from() {
    let body = ok(shared().generate(&quick(json!({}))).await).await;
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let created = body["created"].as_u64().unwrap();
    assert!(created.abs_diff(now) < 60);
    assert_eq!(body["data"].as_array().unwrap().len(), 1);
    assert_eq!(body["output_format"], "png");
    assert_eq!(body["background"], "opaque");
    assert_eq!(body["size"], "64x64");
    assert_eq!(body["model"], "demo");
    assert_eq!(body["steps"], 2);
    assert_eq!(body["guidance_scale"], 4.5, "the model's own default");
    let picture = &body["data"][0];
    assert_eq!(picture["seed"], 7);
    assert_eq!(picture.get("url"), None);
    assert_eq!(pixels(&file(picture)).dimensions(), (64, 64));
}

#[tokio::test]
async fn nothing_but_a_prompt_is_needed() {
    let body = ok(shared()
        .generate(&json!({"prompt": "a blue fish", "seed": null}))
        .await)
    .await;
    assert_eq!(body["size"], "128x128");
    assert_eq!(body["steps"], 20);
    let seed = body["data"][0]["seed"].as_u64().unwrap();
    assert!(seed <= u64::from(u32::MAX), "JavaScript can send it back");
}

#[tokio::test]
async fn the_same_seed_gives_the_same_bytes_and_another_seed_another_picture() {
    let paint = async |change| {
        let body = ok(shared().generate(&quick(change)).await).await;
        file(&body["data"][0])
    };
    let first = paint(json!({})).await;
    assert_eq!(paint(json!({})).await, first);
    assert_eq!(
        paint(json!({"seed": "7", "steps": "2"})).await,
        first,
        "numbers as text"
    );
    assert_ne!(pixels(&paint(json!({"seed": 8})).await), pixels(&first));
    assert_ne!(
        pixels(&paint(json!({"prompt": "a blue boat"})).await),
        pixels(&first)
    );
}

#[tokio::test]
async fn picture_i_is_the_picture_of_seed_plus_i() {
    let three = ok(shared().generate(&quick(json!({"n": 3}))).await).await;
    let seeds: Vec<&Value> = three["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| &p["seed"])
        .collect();
    assert_eq!(seeds, [7, 8, 9]);
    let third = ok(shared().generate(&quick(json!({"seed": 9}))).await).await;
    assert_eq!(file(&three["data"][2]), file(&third["data"][0]));
}

#[tokio::test]
async fn a_url_is_a_data_url() {
    let change = json!({"response_format": "url", "output_format": "jpeg"});
    let body = ok(shared().generate(&quick(change)).await).await;
    let picture = &body["data"][0];
    assert_eq!(picture.get("b64_json"), None);
    let url = picture["url"].as_str().unwrap();
    let data = url.strip_prefix("data:image/jpeg;base64,").unwrap();
    let bytes = file(&json!({"b64_json": data}));
    assert_eq!(
        image::guess_format(&bytes).unwrap(),
        image::ImageFormat::Jpeg
    );
}

#[tokio::test]
async fn output_format_and_quality_are_kept() {
    use image::ImageFormat::{Jpeg, Png, WebP};
    let paint = async |change| {
        let body = ok(shared().generate(&quick(change)).await).await;
        file(&body["data"][0])
    };
    for (name, format) in [("png", Png), ("jpeg", Jpeg), ("jpg", Jpeg), ("webp", WebP)] {
        let bytes = paint(json!({"output_format": name})).await;
        assert_eq!(image::guess_format(&bytes).unwrap(), format);
    }
    let png = paint(json!({})).await;
    assert_eq!(
        pixels(&paint(json!({"output_format": "webp"})).await),
        pixels(&png)
    );
    let jpeg = async |quality: u32| {
        let change = json!({"output_format": "jpeg", "output_compression": quality});
        paint(change).await.len()
    };
    assert!(jpeg(10).await < jpeg(90).await);
}

#[tokio::test]
async fn accept_asks_for_the_bytes_of_one_picture() {
    let png = accepting("image/png", &quick(json!({}))).await;
    assert_eq!(png.status(), 200);
    assert_eq!(png.headers()["content-type"], "image/png");
    assert_eq!(png.headers()["x-seed"], "7");
    let png = png.bytes().await.unwrap();
    let body = ok(shared().generate(&quick(json!({}))).await).await;
    assert_eq!(png, file(&body["data"][0]), "the same file as in JSON");

    for (accept, kind) in [
        ("image/jpeg", "image/jpeg"),
        ("image/webp;q=0.9, application/json;q=0.1", "image/webp"),
        ("image/*", "image/png"),
        ("*/*", "application/json"),
        ("text/html", "application/json"),
    ] {
        let answer = accepting(accept, &quick(json!({}))).await;
        assert_eq!(answer.headers()["content-type"], kind, "{accept}");
    }

    let (status, error) = refusal(accepting("image/png", &quick(json!({"n": 2}))).await).await;
    assert_eq!(status, 422);
    assert_eq!(error["param"], "n");
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("application/json")
    );

    let warned = accepting("image/png", &quick(json!({"höhe": 1}))).await;
    let warning = warned.headers()["x-lorikeet-warnings"].to_str().unwrap();
    assert_eq!(warning, "unknown field `h\\u{f6}he` is ignored");
}

#[tokio::test]
async fn every_scheduler_paints_under_all_its_names() {
    let names = "ddim ddpm euler euler_a heun dpmpp_2m dpmpp_2m_karras dpmpp_2m_sde \
                 dpmpp_2m_sde_karras unipc lcm EulerAncestralDiscreteScheduler";
    let paint = async |name: &str| {
        let body = ok(shared()
            .generate(&quick(json!({"scheduler": name, "steps": 4})))
            .await)
        .await;
        file(&body["data"][0])
    };
    let mut pictures = Vec::new();
    for name in names.split_whitespace().chain(["DPM++ 2M Karras"]) {
        pictures.push((name, paint(name).await));
    }
    for (other, same) in [("euler_a", 11), ("dpmpp_2m_karras", 12)] {
        let (name, picture) = &pictures[same];
        let (_, twin) = pictures.iter().find(|(name, _)| *name == other).unwrap();
        assert!(picture == twin, "{name} is {other}");
    }
    pictures.truncate(11);
    for (i, (name, picture)) in pictures.iter().enumerate() {
        for (other, earlier) in &pictures[..i] {
            assert!(picture != earlier, "{name} painted what {other} painted");
        }
    }
}

#[tokio::test]
async fn requests_of_all_kinds_at_once_get_what_they_get_alone() {
    let requests: Vec<Value> = (0..8)
        .map(|i| {
            quick(json!({
                "prompt": (["a cat", "a duck on the beach", "a star"][i % 3]),
                "steps": 1 + i, "seed": i, "size": (["64x64", "48x80"][i % 2]),
                "scheduler": (["euler", "ddim", "euler_a", "unipc"][i % 4]),
                "guidance_scale": ([4.5, 1.0, 0.0][i % 3]),
            }))
        })
        .collect();
    let paint = async |body: &Value| file(&ok(shared().generate(body).await).await["data"][0]);
    let together = futures::future::join_all(requests.iter().map(paint)).await;
    for (request, picture) in requests.iter().zip(together) {
        assert!(paint(request).await == picture, "{request}");
    }
}
