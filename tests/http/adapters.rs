//! Adapters over HTTP: up, seen, changed, down again.

use std::{fs, time::Duration};

use lorikeet::registry::Generation;
use reqwest::{Client, Method, Response, StatusCode, header, multipart::Form, multipart::Part};
use serde_json::{Value, json};
use tokio::time;

use crate::{
    adapter_files::{Place, create, lora, pack, pair, put, upload},
    support::{Server, ok, png, refusal, until},
};

/// The JSON of an answer with this status.
async fn with(status: StatusCode, response: Response) -> Value {
    let found = response.status();
    let text = response.text().await.unwrap();
    assert_eq!(found, status, "{text}");
    serde_json::from_str(&text).unwrap()
}

async fn send(server: &Server, method: Method, path: &str) -> Response {
    let request = Client::new().request(method, server.url(path));
    request.send().await.unwrap()
}

async fn patch(server: &Server, name: &str, body: Value) -> Response {
    let url = server.url(&format!("/v1/adapters/{name}"));
    Client::new().patch(url).json(&body).send().await.unwrap()
}

#[tokio::test]
async fn an_uploaded_form_is_read_described_and_found() {
    let place = Place::new().await;
    let mut tensors = pair(3, 0.5);
    tensors.push(("not.of.this.model".into(), vec![1], vec![0.0]));
    let file = pack(
        &tensors,
        json!({"modelspec.trigger_phrase": "red fox, snow"}),
    );
    // The file comes first: nothing about it is known while it arrives.
    let form = Form::new()
        .part("file", Part::bytes(file.clone()).file_name("x.safetensors"))
        .text("name", "fox")
        .text("description", "A fox")
        .text("tags", "animal, winter")
        .text("base_family", "sd1")
        .text("recipe", r#"{"steps": 500}"#)
        .text("colour", "red")
        .part("preview", Part::bytes(png(image::RgbImage::new(8, 8))));
    let response = upload(&place.server, form).send().await.unwrap();
    assert_eq!(response.headers()["location"], "/v1/adapters/fox");
    let made = with(StatusCode::CREATED, response).await;
    let sha256 = Generation::of(&file).to_string();
    let expected = json!({
        "name": "fox", "object": "adapter", "description": "A fox",
        "trigger_words": ["red fox", "snow"], "tags": ["animal", "winter"],
        "base": {"family": "sd1", "hash": null}, "method": "lora", "recipe": {"steps": 500},
        "pinned": false, "sha256": sha256, "bytes": file.len(), "created": made["created"],
        "preview": "/v1/adapters/fox/preview.png", "status": "stored", "owner": null,
        "found": {
            "dialect": "PEFT", "sites": {"unet": 1}, "ranks": [3], "words": [],
            "unmatched": ["not.of.this.model"], "unmatched_total": 1
        },
        "warnings": ["unknown fields, ignored: `colour`"]
    });
    assert_eq!(made, expected);
    let mut seen = expected;
    seen.as_object_mut()
        .unwrap()
        .retain(|key, _| key != "found" && key != "warnings");
    assert_eq!(ok(place.server.get("/v1/adapters/fox").await).await, seen);
    let list = ok(place.server.get("/v1/adapters").await).await;
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"], json!([seen]));
    assert_eq!(
        (&list["total"], &list["next_after"]),
        (&json!(1), &Value::Null)
    );

    let picture = place.server.get("/v1/adapters/fox/preview.png").await;
    assert_eq!(picture.headers()["content-type"], "image/png");
    let picture = picture.bytes().await.unwrap();
    assert_eq!(image::load_from_memory(&picture).unwrap().width(), 8);
}

#[tokio::test]
async fn a_file_goes_up_and_comes_down_unchanged() {
    let place = Place::new().await;
    let (one, two) = (lora(1.0), lora(2.0));
    let [first, second] = [&one, &two].map(|file| format!("\"{}\"", Generation::of(file)));
    let put = async |condition: Option<(&str, &str)>, file: &[u8]| {
        let request = put(&place.server, "fox", file.to_vec());
        let request = match condition {
            Some((name, value)) => request.header(name, value),
            None => request,
        };
        request.send().await.unwrap()
    };
    let refused = async |response| {
        let (status, error) = refusal(response).await;
        (status.as_u16(), error["code"].as_str().unwrap().to_owned())
    };
    let answered = |status, code: &str| (status, code.to_owned());

    let missing = put(Some(("if-match", "*")), &one).await;
    assert_eq!(refused(missing).await, answered(404, "adapter_not_found"));
    let made = with(
        StatusCode::CREATED,
        put(Some(("if-none-match", "*")), &one).await,
    )
    .await;
    assert_eq!(made["found"]["ranks"], json!([2]));
    let again = put(Some(("if-none-match", "*")), &two).await;
    assert_eq!(refused(again).await, answered(409, "adapter_exists"));
    let other = put(Some(("if-match", &second)), &two).await;
    assert_eq!(refused(other).await, answered(412, "adapter_changed"));
    let odd = put(Some(("if-match", "\"abc\"")), &two).await;
    assert_eq!(refused(odd).await, answered(422, "invalid_value"));
    let form = Client::new().put(place.server.url("/v1/adapters/fox/file"));
    let form = form
        .multipart(Form::new().text("a", "b"))
        .send()
        .await
        .unwrap();
    assert_eq!(refused(form).await, answered(415, "unsupported_media_type"));

    ok(patch(&place.server, "fox", json!({"description": "kept"})).await).await;
    let download = async |tag: Option<&str>| {
        let request = Client::new().get(place.server.url("/v1/adapters/fox/file"));
        let request = match tag {
            Some(tag) => request.header("if-none-match", tag),
            None => request,
        };
        request.send().await.unwrap()
    };
    let response = download(None).await;
    let headers = response.headers().clone();
    assert_eq!(headers[header::ETAG], first.as_str());
    assert_eq!(
        headers[header::CONTENT_LENGTH],
        one.len().to_string().as_str()
    );
    let disposition = "attachment; filename=\"fox.safetensors\"";
    assert_eq!(headers[header::CONTENT_DISPOSITION], disposition);
    assert_eq!(response.bytes().await.unwrap(), one);
    let unchanged = download(Some(&first)).await;
    assert_eq!(unchanged.status(), 304);
    assert_eq!(unchanged.headers()[header::ETAG], first.as_str());

    let replaced = ok(put(Some(("if-match", &first)), &two).await).await;
    assert_eq!(replaced["description"], "kept");
    let response = download(Some(&first)).await;
    assert_eq!(response.headers()[header::ETAG], second.as_str());
    assert_eq!(response.bytes().await.unwrap(), two);
    ok(put(None, &one).await).await;
    assert_eq!(download(None).await.bytes().await.unwrap(), one);
}

#[tokio::test]
async fn a_list_is_filtered_and_comes_in_pages() {
    let place = Place::new().await;
    for (name, tags) in [("a", "ink"), ("b", "ink"), ("c", "oil"), ("d", "ink,oil")] {
        let form = Form::new().text("name", name).text("tags", tags);
        let form = form.text("description", format!("The letter {name}"));
        let form = form.part("file", Part::bytes(lora(1.0)));
        let made = upload(&place.server, form).send().await.unwrap();
        assert_eq!(made.status(), 201);
    }
    let list = async |query: &str| {
        let list = ok(place.server.get(&format!("/v1/adapters{query}")).await).await;
        let names: Vec<_> = list["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|a| a["name"].clone())
            .collect();
        (
            Value::from(names),
            list["total"].clone(),
            list["next_after"].clone(),
        )
    };
    let page = |names, total: u64, next| (names, json!(total), next);
    assert_eq!(
        list("?tag=ink").await,
        page(json!(["a", "b", "d"]), 3, json!(null))
    );
    assert_eq!(
        list("?q=LETTER+C").await,
        page(json!(["c"]), 1, json!(null))
    );
    assert_eq!(
        list("?tag=ink&limit=2").await,
        page(json!(["a", "b"]), 3, json!("b"))
    );
    assert_eq!(
        list("?tag=ink&limit=2&after=b").await,
        page(json!(["d"]), 3, json!(null))
    );
    assert_eq!(list("?tag=none").await, page(json!([]), 0, json!(null)));
    for (query, field) in [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=x", "limit"),
        ("after=../x", "after"),
        ("tags=ink", "tags"),
        ("tag=a&tag=b", "tag"),
    ] {
        let (status, error) =
            refusal(place.server.get(&format!("/v1/adapters?{query}")).await).await;
        assert_eq!(
            (status.as_u16(), &error["param"]),
            (422, &json!(field)),
            "{error}"
        );
    }
}

#[tokio::test]
async fn an_adapter_is_changed_and_removed_under_its_hash() {
    let place = Place::new().await;
    let server = &place.server;
    let made = create(server, "fox", lora(1.0)).send().await.unwrap();
    let tag = with(StatusCode::CREATED, made).await["sha256"].clone();
    let changed = ok(patch(
        server,
        "fox",
        json!({"tags": ["x"], "trigger_words": [], "recipe": {"rank": 2}, "shade": 1}),
    )
    .await)
    .await;
    assert_eq!(changed["tags"], json!(["x"]));
    assert_eq!(changed["recipe"], json!({"rank": 2}));
    assert_eq!(changed["sha256"], tag);
    assert_eq!(
        changed["warnings"],
        json!(["unknown fields, ignored: `shade`"])
    );
    for (body, field) in [
        (json!({"pinned": true}), "pinned"),
        (json!({"tags": 7}), "tags"),
        (json!({"recipe": "{"}), "recipe"),
    ] {
        let (status, error) = refusal(patch(server, "fox", body).await).await;
        assert_eq!((status.as_u16(), &error["param"]), (422, &json!(field)));
    }
    let (status, error) = refusal(patch(server, "fux", json!({})).await).await;
    assert_eq!(
        (status.as_u16(), &error["code"]),
        (404, &json!("adapter_not_found"))
    );
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("nearest: `fox`"),
        "{error}"
    );

    let delete = |tag: String| {
        let request = Client::new().delete(server.url("/v1/adapters/fox"));
        request.header("if-match", format!("\"{tag}\"")).send()
    };
    let (status, _) = refusal(delete("0".repeat(64)).await.unwrap()).await;
    assert_eq!(status, 412);
    let gone = ok(delete(tag.as_str().unwrap().into()).await.unwrap()).await;
    assert_eq!(
        gone,
        json!({"name": "fox", "object": "adapter", "deleted": true})
    );
    assert_eq!(place.files(), [""; 0]);
    let (status, _) = refusal(send(server, Method::DELETE, "/v1/adapters/fox").await).await;
    assert_eq!(status, 404);
}

#[tokio::test]
async fn a_preview_is_a_png_that_can_be_decoded() {
    let place = Place::new().await;
    let put = |bytes: Vec<u8>, kind: &'static str| {
        let request = Client::new().put(place.server.url("/v1/adapters/fox/preview.png"));
        request.header("content-type", kind).body(bytes).send()
    };
    let picture = png(image::RgbImage::new(4, 4));
    let (status, _) = refusal(put(picture.clone(), "image/png").await.unwrap()).await;
    assert_eq!(status, 404);
    create(&place.server, "fox", lora(1.0))
        .send()
        .await
        .unwrap();
    let (status, error) = refusal(place.server.get("/v1/adapters/fox/preview.png").await).await;
    assert_eq!(
        (status.as_u16(), &error["code"]),
        (404, &json!("preview_not_found"))
    );
    for (bytes, kind, expected) in [
        (b"GIF89a".to_vec(), "image/png", 422),
        (picture[..40].to_vec(), "image/png", 422),
        (picture.clone(), "image/gif", 415),
        (vec![0; (8 << 20) + 1], "image/png", 413),
    ] {
        let (status, _) = refusal(put(bytes, kind).await.unwrap()).await;
        assert_eq!(status, expected);
    }
    assert_eq!(
        put(picture.clone(), "image/png").await.unwrap().status(),
        204
    );
    let seen = place.server.get("/v1/adapters/fox/preview.png").await;
    assert_eq!(seen.bytes().await.unwrap(), picture);
}

#[tokio::test]
async fn a_pinned_adapter_is_in_memory() {
    let place = Place::new().await;
    let server = &place.server;
    create(server, "fox", lora(1.0)).send().await.unwrap();
    let pinned = ok(send(server, Method::POST, "/v1/adapters/fox/pin").await).await;
    assert_eq!(
        (&pinned["pinned"], &pinned["status"]),
        (&json!(true), &json!("ready"))
    );
    assert_eq!(place.registry.usage().adapters, 1);
    let unpinned = ok(send(server, Method::POST, "/v1/adapters/fox/unpin").await).await;
    assert_eq!(unpinned["pinned"], false);
    let (status, _) = refusal(send(server, Method::POST, "/v1/adapters/wolf/pin").await).await;
    assert_eq!(status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_uploads_under_one_name_one_is_taken() {
    let place = Place::new().await;
    let uploads = (0..6).map(|n| {
        let request = create(&place.server, "fox", lora(n as f32 + 1.0));
        tokio::spawn(async move { request.send().await.unwrap().status().as_u16() })
    });
    let mut statuses = Vec::new();
    for upload in uploads.collect::<Vec<_>>() {
        statuses.push(upload.await.unwrap());
    }
    statuses.sort();
    assert_eq!(statuses, [201, 409, 409, 409, 409, 409]);
    assert_eq!(
        (place.files().len(), place.staged()),
        (2, 0),
        "{:?}",
        place.files()
    );
}

#[tokio::test]
async fn what_people_do_in_the_folder_is_seen() {
    let place = Place::new().await;
    fs::write(place.folder.path().join("dropped.safetensors"), lora(1.0)).unwrap();
    fs::write(place.folder.path().join("no name.safetensors"), lora(1.0)).unwrap();
    // A page, and not the adapter itself, which would be looked for.
    let names = async || {
        let list = ok(place.server.get("/v1/adapters").await).await;
        (
            list["data"][0]["name"].clone(),
            list["skipped"][0]["file"].clone(),
        )
    };
    until("both files are seen", async || {
        names().await == (json!("dropped"), json!("no name.safetensors"))
    })
    .await;
    let file = place.server.get("/v1/adapters/dropped/file").await;
    assert_eq!(file.headers()[header::ETAG].len(), 66);
    assert_eq!(file.bytes().await.unwrap(), lora(1.0));
    fs::remove_file(place.folder.path().join("dropped.safetensors")).unwrap();
    until("it is gone", async || names().await.0 == Value::Null).await;
}

#[tokio::test]
async fn adapters_are_models_too() {
    let place = Place::new().await;
    create(&place.server, "fox", lora(1.0))
        .send()
        .await
        .unwrap();
    // Its name is the model's: it cannot be told from it.
    create(&place.server, "stand-in", lora(1.0))
        .send()
        .await
        .unwrap();
    fs::write(
        place.folder.path().join("torn.safetensors"),
        &lora(1.0)[..60],
    )
    .unwrap();
    let (status, error) =
        refusal(send(&place.server, Method::POST, "/v1/adapters/torn/pin").await).await;
    assert_eq!(
        (status.as_u16(), &error["code"]),
        (422, &json!("invalid_adapter"))
    );
    let torn = ok(place.server.get("/v1/adapters/torn").await).await;
    assert_eq!(torn["status"], "failed");
    assert_eq!(torn["reason"], error["message"]);

    let list = ok(place.server.get("/v1/models").await).await;
    let ids: Vec<_> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["id"])
        .collect();
    assert_eq!(ids, ["stand-in", "fox"]);
    assert_eq!(list["data"][0]["parent"], Value::Null);
    let fox = &list["data"][1];
    assert_eq!(
        (&fox["object"], &fox["parent"]),
        (&json!("model"), &json!("stand-in"))
    );
    assert!(fox["created"].as_u64().unwrap() > 0 && fox["owned_by"].is_string());
    assert_eq!(&ok(place.server.get("/v1/models/fox").await).await, fox);
    let base = ok(place.server.get("/v1/models/stand-in").await).await;
    assert_eq!(base["parent"], Value::Null);
    let (status, error) = refusal(place.server.get("/v1/models/wolf").await).await;
    assert_eq!(
        (status.as_u16(), &error["code"]),
        (404, &json!("model_not_found"))
    );
}

#[tokio::test]
async fn the_registrys_figures_are_among_the_metrics() {
    let place = Place::new().await;
    create(&place.server, "fox", lora(1.0))
        .send()
        .await
        .unwrap();
    send(&place.server, Method::POST, "/v1/adapters/fox/pin").await;
    let text = place.server.get("/metrics").await.text().await.unwrap();
    for line in [
        "lorikeet_adapters ",
        "lorikeet_adapter_store_up 1",
        "lorikeet_adapter_resident_bytes{tier=\"host\"} ",
        "lorikeet_adapter_evictions_total{tier=\"host\"} ",
        "lorikeet_adapter_hits_total{tier=\"host\"} ",
        "lorikeet_adapter_misses_total{tier=\"host\"} ",
        "lorikeet_adapter_load_seconds_count{tier=\"store\"} ",
        "lorikeet_adapter_load_seconds_count{tier=\"host\"} ",
    ] {
        assert!(text.contains(&format!("\n{line}")), "there is no {line}");
    }
}

#[tokio::test]
async fn a_slow_upload_may_take_longer_than_a_bodys_time_as_long_as_it_moves() {
    let http = lorikeet::api::HttpSettings {
        body_timeout: Duration::from_millis(600),
        ..Default::default()
    };
    let place = Place::with(Default::default(), http).await;
    let file = lora(1.0);
    let dripping = |pause: u64| {
        let pieces: Vec<Vec<u8>> = file.chunks(file.len() / 5).map(<[u8]>::to_vec).collect();
        let pieces = futures::stream::unfold(pieces.into_iter(), move |mut pieces| async move {
            time::sleep(Duration::from_millis(pause)).await;
            Some((Ok::<_, std::io::Error>(pieces.next()?), pieces))
        });
        let url = place.server.url("/v1/adapters/slow/file");
        let request = Client::new()
            .put(url)
            .body(reqwest::Body::wrap_stream(pieces));
        request.send()
    };
    assert_eq!(dripping(200).await.unwrap().status(), 201);
    let (status, error) = refusal(dripping(1500).await.unwrap()).await;
    assert_eq!(
        (status.as_u16(), &error["code"]),
        (408, &json!("body_timeout"))
    );
}
