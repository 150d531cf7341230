//! Adapters that cannot be taken, and clients that leave half-way: a clear refusal, and nothing
//! half-visible.

use std::fs;

use futures::{StreamExt as _, stream};
use lorikeet::{api::HttpSettings, registry::Settings};
use reqwest::{
    Client, StatusCode,
    multipart::{Form, Part},
};
use serde_json::{Value, json};

use crate::{
    adapter_files::{Place, SITE, create, lora, pack, pair, put, upload},
    support::{ok, quick, refusal, shared, until},
};

/// Files that are no adapters for the demo model, and what is said of each.
pub fn bad_files() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let good = lora(1.0);
    let mut huge = good.clone();
    huge[..8].copy_from_slice(&(1u64 << 63).to_le_bytes());
    let text = String::from_utf8_lossy(&good).into_owned();
    let mut overlapping = good.clone();
    let at = text.find("[384,768]").unwrap();
    overlapping[at..at + 9].copy_from_slice(b"[300,684]");
    let mut thin = pair(2, 1.0);
    thin[0] = (format!("{SITE}.lora_A.weight"), vec![2, 47], vec![1.0; 94]);
    let nothing = vec![("a.b".to_owned(), vec![1], vec![1.0])];
    vec![
        ("empty", Vec::new(), "too few"),
        ("truncated", good[..good.len() - 1].to_vec(), "truncated"),
        (
            "huge header",
            huge,
            "header claims 9223372036854775808 bytes",
        ),
        ("overlapping", overlapping, "the tensor before it ends"),
        ("NaN", pack(&pair(2, f32::NAN), Value::Null), "NaN"),
        (
            "infinite",
            pack(&pair(2, f32::INFINITY), Value::Null),
            "inf",
        ),
        ("rank 0", pack(&pair(0, 1.0), Value::Null), "rank 0"),
        (
            "rank 10^5",
            pack(&pair(100_000, 0.0), Value::Null),
            "rank 100000",
        ),
        ("wrong shape", pack(&thin, Value::Null), "[2, 47]"),
        (
            "half a pair",
            pack(&pair(2, 1.0)[..1], Value::Null),
            "companion",
        ),
        (
            "nothing of the model",
            pack(&nothing, Value::Null),
            "none of its 1 keys",
        ),
        ("pickle", b"\x80\x02}q\x00. and so on".to_vec(), "pickle"),
        ("zip", b"PK\x03\x04 and so on".to_vec(), "zip"),
        (
            "web page",
            b"<!DOCTYPE html><html></html>".to_vec(),
            "header claims",
        ),
    ]
}

#[tokio::test]
async fn a_bad_file_is_refused_with_its_fault_and_leaves_nothing() {
    let place = Place::new().await;
    create(&place.server, "kept", lora(7.0))
        .send()
        .await
        .unwrap();
    for (what, file, says) in bad_files() {
        for request in [
            create(&place.server, "bad", file.clone()),
            put(&place.server, "bad", file.clone()),
            put(&place.server, "kept", file),
        ] {
            let (status, error) = refusal(request.send().await.unwrap()).await;
            assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{what}: {error}");
            assert_eq!(error["code"], "invalid_adapter", "{what}");
            let message = error["message"].as_str().unwrap();
            assert!(message.contains(says), "{what}: {message}");
            assert!(!message.contains(place.folder.path().to_str().unwrap()));
        }
    }
    assert_eq!(place.files(), ["kept.json", "kept.safetensors"]);
    assert_eq!(place.staged(), 0);
    let kept = place.server.get("/v1/adapters/kept/file").await;
    assert_eq!(kept.bytes().await.unwrap(), lora(7.0));
}

#[tokio::test]
async fn a_bad_file_dropped_by_hand_fails_alone_and_the_server_paints_on() {
    let folder = shared().adapters().unwrap();
    for (what, file, says) in bad_files() {
        let name = what.replace([' ', '^'], "-");
        fs::write(folder.join(format!("{name}.safetensors")), file).unwrap();
        let response = shared()
            .post(&format!("/v1/adapters/{name}/pin"), &json!({}))
            .await;
        let (status, error) = refusal(response).await;
        assert_eq!(
            (status.as_u16(), &error["code"]),
            (422, &json!("invalid_adapter")),
            "{error}"
        );
        assert!(
            error["message"].as_str().unwrap().contains(says),
            "{what}: {error}"
        );
    }
    ok(shared().generate(&quick(json!({}))).await).await;
}

#[tokio::test]
async fn a_name_that_could_lead_elsewhere_is_none() {
    let place = Place::new().await;
    for name in [
        "../x",
        "a/b",
        ".hidden",
        "x.safetensors",
        "",
        "a b",
        "-rf",
        "\u{e4}",
    ] {
        let (status, error) =
            refusal(create(&place.server, name, lora(1.0)).send().await.unwrap()).await;
        assert_eq!(
            (status.as_u16(), &error["param"]),
            (422, &json!("name")),
            "{name}"
        );
        assert_eq!(error["code"], "invalid_adapter_name", "{name}");
    }
    for name in ["..%2fx", "%2e%2e%2fx", "a%00b", "%ff", ".x", "x.json"] {
        let (status, _) = refusal(put(&place.server, name, lora(1.0)).send().await.unwrap()).await;
        assert_eq!(status, 422, "{name}");
    }
    assert_eq!(place.files(), [""; 0]);
    assert!(
        !place
            .folder
            .path()
            .parent()
            .unwrap()
            .join("x.safetensors")
            .exists()
    );
}

#[tokio::test]
async fn a_form_that_cannot_be_used_is_refused_by_the_name_of_its_part() {
    let place = Place::new().await;
    let file = || Part::bytes(lora(1.0));
    let with = |name: &'static str, text: &'static str| {
        Form::new()
            .text("name", "a")
            .part("file", file())
            .text(name, text)
    };
    let table = [
        (Form::new().part("file", file()), "name"),
        (Form::new().text("name", "a"), "file"),
        (with("name", "b"), "name"),
        (with("tags", "x").text("tags", "y"), "tags"),
        (with("recipe", "{"), "recipe"),
        (with("pinned", "perhaps"), "pinned"),
        (with("a", "b").part("file", file()), "file"),
        (
            with("a", "b").part("preview", Part::bytes(b"GIF89a".to_vec())),
            "preview",
        ),
        (
            with("a", "b").part("method", Part::bytes(vec![0xff])),
            "method",
        ),
    ];
    for (form, field) in table {
        let (status, error) = refusal(upload(&place.server, form).send().await.unwrap()).await;
        assert_eq!(
            (status.as_u16(), &error["param"]),
            (422, &json!(field)),
            "{error}"
        );
    }
    let post = |kind: &'static str, body: &'static str| {
        let request = Client::new().post(place.server.url("/v1/adapters"));
        request.header("content-type", kind).body(body).send()
    };
    let cut = post("multipart/form-data; boundary=x", "--x\r\nContent-Dispo")
        .await
        .unwrap();
    assert_eq!(refusal(cut).await.0, 400);
    let json = post("application/json", "{}").await.unwrap();
    assert_eq!(refusal(json).await.0, 415);
    assert_eq!((place.files(), place.staged()), (Vec::new(), 0));
}

#[tokio::test]
async fn an_upload_is_as_large_as_the_operator_allows() {
    let settings = Settings {
        largest_weights: 2 << 20,
        ..Settings::default()
    };
    // A body of JSON may be smaller by far.
    let http = HttpSettings {
        max_body: 1024,
        ..HttpSettings::default()
    };
    let place = Place::with(settings, http).await;
    let large = pack(&pair(4000, 0.0), Value::Null);
    assert!((1 << 20..2 << 20).contains(&large.len()));
    let made = create(&place.server, "a", large.clone())
        .send()
        .await
        .unwrap();
    assert_eq!(made.status(), 201);
    let made = put(&place.server, "b", large.clone()).send().await.unwrap();
    assert_eq!(made.status(), 201);
    for request in [
        create(&place.server, "c", vec![0; 3 << 20]),
        put(&place.server, "c", vec![0; 3 << 20]),
    ] {
        let (status, error) = refusal(request.send().await.unwrap()).await;
        assert_eq!(
            (status.as_u16(), &error["code"]),
            (413, &json!("adapter_too_large"))
        );
        assert!(
            error["message"].as_str().unwrap().contains("2097152"),
            "{error}"
        );
    }
    // Texts are held in memory, and have a bound of their own.
    let texts = Form::new()
        .text("name", "c")
        .text("description", "x".repeat(12 << 20));
    let (status, error) = refusal(upload(&place.server, texts).send().await.unwrap()).await;
    assert_eq!(
        (status.as_u16(), &error["code"]),
        (413, &json!("body_too_large"))
    );
    assert_eq!(place.files().len(), 4);
    assert_eq!(place.staged(), 0);
}

#[tokio::test]
async fn a_client_that_leaves_half_way_leaves_nothing() {
    let place = Place::new().await;
    let file = lora(1.0);
    let half = file[..file.len() / 2].to_vec();
    let endless = || {
        let half = Ok::<_, std::io::Error>(half.clone());
        reqwest::Body::wrap_stream(stream::iter([half]).chain(stream::pending()))
    };
    let form = Form::new()
        .text("name", "a")
        .part("file", Part::stream(endless()));
    let requests = [
        upload(&place.server, form),
        Client::new()
            .put(place.server.url("/v1/adapters/a/file"))
            .body(endless()),
    ];
    for request in requests {
        let sending = tokio::spawn(request.send());
        until("the upload arrives", async || place.staged() == 1).await;
        assert_eq!(place.files(), [""; 0]);
        sending.abort();
        until("it is cleared away", async || place.staged() == 0).await;
    }
    assert_eq!(place.files(), [""; 0]);
    let made = create(&place.server, "a", file).send().await.unwrap();
    assert_eq!(made.status(), 201);
}

#[tokio::test]
async fn a_store_that_is_gone_is_no_empty_store() {
    let place = Place::new().await;
    create(&place.server, "fox", lora(1.0))
        .send()
        .await
        .unwrap();
    ok(place.server.post("/v1/adapters/fox/pin", &json!({})).await).await;
    let aside = place.folder.path().with_extension("aside");
    fs::rename(place.folder.path(), &aside).unwrap();
    until("it is noticed", async || {
        let list = ok(place.server.get("/v1/adapters").await).await;
        list["warnings"].is_array()
    })
    .await;
    let list = ok(place.server.get("/v1/adapters").await).await;
    assert_eq!(list["data"][0]["status"], "ready");
    let response = create(&place.server, "new", lora(1.0))
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["retry-after"], "5");
    let (status, error) = refusal(response).await;
    assert_eq!(
        (status.as_u16(), &error["code"]),
        (503, &json!("adapter_store_unavailable"))
    );
    assert!(!error["message"].as_str().unwrap().contains("/"), "{error}");
    fs::rename(&aside, place.folder.path()).unwrap();
    let made = create(&place.server, "new", lora(1.0))
        .send()
        .await
        .unwrap();
    assert_eq!(made.status(), 201);
}
