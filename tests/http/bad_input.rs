//! What cannot be painted is refused with a 4xx that names the field, the limit and the way out,
//! and costs the server nothing.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::Arc,
    time::Duration,
};

use lorikeet::{
    api::{HttpSettings, openapi_document},
    engine::SubmitError,
};
use reqwest::{
    Client, StatusCode,
    multipart::{Form, Part},
};
use serde_json::{Value, json};

use crate::support::{Server, StandIn, ok, quick, refusal, shared};

/// Values of JSON fields: what is changed in a good request, the field that is named, and words
/// that the message must have.
#[tokio::test]
async fn a_value_that_cannot_be_used_is_named_with_its_limit_and_the_fix() {
    let long = "x".repeat(100_000);
    let table: &[(Value, &str, &[&str])] = &[
        (
            json!({"prompt": ""}),
            "prompt",
            &["empty", "say what to paint"],
        ),
        (json!({"prompt": " \n\t "}), "prompt", &["empty"]),
        (json!({"prompt": null}), "prompt", &["empty"]),
        (
            json!({"prompt": long}),
            "prompt",
            &["100000 bytes", "shorten it to 16384"],
        ),
        (
            json!({"negative_prompt": long}),
            "negative_prompt",
            &["shorten it to 16384"],
        ),
        (
            json!({"size": "0x64"}),
            "size",
            &["multiple of 8", "2048", "got 0", "try 8"],
        ),
        (
            json!({"size": "7x64"}),
            "size",
            &["width", "got 7", "try 8"],
        ),
        (
            json!({"size": "64x513"}),
            "size",
            &["height", "got 513", "try 512"],
        ),
        (
            json!({"size": "100000x100000"}),
            "size",
            &["2048", "got 100000", "try 2048"],
        ),
        (
            json!({"size": "-8x8"}),
            "size",
            &["WIDTHxHEIGHT", "512x512"],
        ),
        (json!({"size": "64"}), "size", &["WIDTHxHEIGHT"]),
        (json!({"size": "99999999999x8"}), "size", &["WIDTHxHEIGHT"]),
        (
            json!({"size": "64x64", "width": 72}),
            "size",
            &["contradicts", "one of the two"],
        ),
        (
            json!({"size": null, "width": 0}),
            "width",
            &["got 0", "try 8"],
        ),
        (
            json!({"size": null, "width": 7}),
            "width",
            &["got 7", "try 8"],
        ),
        (
            json!({"size": null, "height": 513}),
            "height",
            &["got 513", "try 512"],
        ),
        (
            json!({"size": null, "height": 100_000}),
            "height",
            &["2048", "try 2048"],
        ),
        (
            json!({"size": null, "width": 5_000_000_000u64}),
            "width",
            &["pixels", "5000000000"],
        ),
        (json!({"steps": 0}), "steps", &["from 1 to 200", "got 0"]),
        (
            json!({"steps": 1_000_000}),
            "steps",
            &["from 1 to 200", "got 1000000"],
        ),
        (json!({"steps": 2.5}), "steps", &["whole number", "got 2.5"]),
        (json!({"steps": -3}), "steps", &["whole number", "got -3"]),
        (
            json!({"guidance_scale": "NaN"}),
            "guidance_scale",
            &["0 to 100", "got NaN", "7.5"],
        ),
        (
            json!({"guidance_scale": "inf"}),
            "guidance_scale",
            &["0 to 100", "got inf"],
        ),
        (
            json!({"guidance_scale": -1}),
            "guidance_scale",
            &["0 to 100", "got -1"],
        ),
        (
            json!({"guidance_scale": 1e300}),
            "guidance_scale",
            &["0 to 100"],
        ),
        (
            json!({"scheduler": "pixie_dust"}),
            "scheduler",
            &["`pixie_dust`", "euler_a", "unipc"],
        ),
        (
            json!({"seed": -2}),
            "seed",
            &["0 to 2^64 - 1", "got -2", "-1 for a random"],
        ),
        (json!({"seed": 0.5}), "seed", &["0 to 2^64 - 1"]),
        (
            json!({"seed": "18446744073709551616"}),
            "seed",
            &["0 to 2^64 - 1"],
        ),
        (
            json!({"seed": u64::MAX, "n": 2}),
            "seed",
            &["send at most 18446744073709551614"],
        ),
        (json!({"n": 0}), "n", &["from 1 to 8", "got 0"]),
        (
            json!({"n": 1000}),
            "n",
            &["from 1 to 8", "got 1000", "several requests"],
        ),
        (
            json!({"clip_skip": 99}),
            "clip_skip",
            &["whole number from 0", "got 99"],
        ),
        (
            json!({"partial_images": 17, "stream": true}),
            "partial_images",
            &["0 to 16", "got 17"],
        ),
        (
            json!({"output_compression": 101}),
            "output_compression",
            &["0 to 100"],
        ),
        (
            json!({"output_format": "gif"}),
            "output_format",
            &["png, jpeg", "webp", "`gif`"],
        ),
        (
            json!({"response_format": "ftp"}),
            "response_format",
            &["b64_json, url", "`ftp`"],
        ),
        (json!({"strength": 0.5}), "strength", &["send `image` too"]),
        (json!({"image": "aGk="}), "image", &["/v1/images/edits"]),
        (json!({"mask": "aGk="}), "mask", &["/v1/images/edits"]),
    ];
    for (change, field, words) in table {
        let response = shared().generate(&quick(change.clone())).await;
        let (status, error) = refusal(response).await;
        let shown = format!("{change:.80}: {error}");
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{shown}");
        assert_eq!(error["param"], *field, "{shown}");
        assert_eq!(error["code"], "invalid_value", "{shown}");
        assert_eq!(error["type"], "invalid_request_error", "{shown}");
        let message = error["message"].as_str().unwrap();
        for word in *words {
            assert!(message.contains(word), "{shown} lacks {word:?}");
        }
        assert!(
            message.len() < 512,
            "no echo of what was sent: {}",
            message.len()
        );
    }
}

#[tokio::test]
async fn every_field_refuses_a_value_of_another_kind_by_its_name() {
    let document: Value = serde_json::from_str(&openapi_document()).unwrap();
    let schema = &document["components"]["schemas"]["ImageParameters"]["properties"];
    let fields: Vec<&String> = schema.as_object().unwrap().keys().collect();
    assert!(fields.len() > 15);
    for field in fields {
        for value in [json!({"a": 1}), json!([[]])] {
            let response = shared().generate(&quick(json!({field: value}))).await;
            let (status, error) = refusal(response).await;
            assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{field}: {error}");
            // Of a list, the element at fault.
            let param = error["param"].as_str().unwrap();
            assert_eq!(param.split('[').next().unwrap(), field, "{error}");
        }
    }
}

#[tokio::test]
async fn an_unknown_model_is_not_found() {
    let response = shared().generate(&quick(json!({"model": "sd-99"}))).await;
    let (status, error) = refusal(response).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert_eq!(error["param"], "model");
    assert_eq!(error["code"], "model_not_found");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("`sd-99`") && message.contains("demo"),
        "{message}"
    );
}

/// Bodies that cannot be read: type, bytes, status, code, the field where one is at fault, a word.
#[tokio::test]
async fn a_body_that_cannot_be_read_is_refused() {
    type Row<'a> = (Option<&'a str>, &'a [u8], u16, &'a str, Value, &'a str);
    let json = Some("application/json");
    let form = Some("multipart/form-data; boundary=b");
    let deep = [&b"{\"seed\": "[..], &[b'['; 100_000]].concat();
    let null = Value::Null;
    let type_ = json!("Content-Type");
    let generations: &[Row] = &[
        (json, b"", 400, "invalid_json", null.clone(), "line 1"),
        (
            json,
            b"{\"prompt\": \"a",
            400,
            "invalid_json",
            json!("prompt"),
            "line 1",
        ),
        (
            json,
            b"{\"guidance_scale\": NaN}",
            400,
            "invalid_json",
            json!("guidance_scale"),
            "line 1",
        ),
        (
            json,
            b"{\"seed\": 1e999}",
            400,
            "invalid_json",
            json!("seed"),
            "out of range",
        ),
        (
            json,
            b"{\"prompt\": \"\xff\xfe\"}",
            400,
            "invalid_json",
            json!("prompt"),
            "unicode",
        ),
        (
            json,
            b"{\"n\": 1, \"n\": 2}",
            400,
            "invalid_json",
            json!("n"),
            "`n` is there twice",
        ),
        (json, &deep, 400, "invalid_json", json!("seed"), "recursion"),
        (json, b"[1]", 400, "invalid_json", null.clone(), "object"),
        (json, b"null", 400, "invalid_json", null.clone(), "object"),
        (
            json,
            b"{} {}",
            400,
            "invalid_json",
            null.clone(),
            "trailing",
        ),
        (
            None,
            b"{}",
            415,
            "unsupported_media_type",
            type_.clone(),
            "send application/json",
        ),
        (
            Some("text/plain"),
            b"{}",
            415,
            "unsupported_media_type",
            type_.clone(),
            "text/plain",
        ),
        (
            form,
            b"--b--\r\n",
            415,
            "unsupported_media_type",
            type_.clone(),
            "application/json",
        ),
    ];
    let edits: &[Row] = &[
        (json, b"{", 400, "invalid_json", null.clone(), "line 1"),
        (
            Some("image/png"),
            b"",
            415,
            "unsupported_media_type",
            type_,
            "multipart/form-data",
        ),
        (
            Some("multipart/form-data"),
            b"x",
            400,
            "invalid_multipart",
            null.clone(),
            "boundary",
        ),
        (
            form,
            b"no parts",
            400,
            "invalid_multipart",
            null.clone(),
            "multipart",
        ),
        (
            form,
            b"--b\r\nContent-Disposition: form-data; name=\"prompt\"\r\n\r\ncut",
            400,
            "invalid_multipart",
            null,
            "multipart",
        ),
    ];
    let routes = [
        ("/v1/images/generations", generations),
        ("/v1/images/edits", edits),
    ];
    for (route, rows) in routes {
        for (kind, bytes, status, code, field, word) in rows {
            let mut request = Client::new().post(shared().url(route)).body(bytes.to_vec());
            if let Some(kind) = kind {
                request = request.header("content-type", *kind);
            }
            let (got, error) = refusal(request.send().await.unwrap()).await;
            let shown = format!("{route} {:.40}: {error}", String::from_utf8_lossy(bytes));
            assert_eq!(got, *status, "{shown}");
            assert_eq!(error["code"], *code, "{shown}");
            assert_eq!(error["param"], *field, "{shown}");
            assert!(error["message"].as_str().unwrap().contains(word), "{shown}");
        }
    }
}

#[tokio::test]
async fn unknown_fields_are_named_and_openais_own_are_passed_over() {
    let answer = |change| async move {
        let response = shared().generate(&quick(change)).await;
        let header = response.headers().get("x-lorikeet-warnings").cloned();
        (ok(response).await, header)
    };
    let own = json!({
        "model": "demo", "quality": "hd", "style": "vivid", "user": "u-1", "moderation": "low",
        "input_fidelity": "high", "background": "auto", "response_format": "b64_json"
    });
    let (body, header) = answer(own).await;
    assert_eq!(body.get("warnings"), None);
    assert_eq!(header, None);

    let (body, header) = answer(json!({"cfg": 7, "höhe": 1, "background": "plaid"})).await;
    let warnings = body["warnings"].to_string();
    for word in ["`cfg`", "`höhe`", "`background`"] {
        assert!(warnings.contains(word), "{warnings} lacks {word}");
    }
    assert!(header.unwrap().to_str().unwrap().contains("`cfg`"));

    let (body, _) = answer(json!({"model": "dall-e-3"})).await;
    assert_eq!(body["model"], "demo");
    assert!(body["warnings"][0].as_str().unwrap().contains("dall-e-3"));

    let (body, _) = answer(json!({"partial_images": 2})).await;
    assert!(body["warnings"][0].as_str().unwrap().contains("`stream`"));

    let mut many = json!({});
    for i in 0..1000 {
        many[format!("field{i}")] = json!(i);
    }
    let (body, _) = answer(many).await;
    let warnings = body["warnings"].as_array().unwrap();
    assert_eq!(warnings.len(), 17, "the rest is counted");
    assert!(warnings[16].as_str().unwrap().starts_with("984 more"));
}

/// A server that must not come to the point of painting.
fn unpainted(settings: HttpSettings) -> Server {
    let painter = StandIn::new(|_| Err(SubmitError::Broken));
    Server::with_settings(Arc::new(painter), settings)
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_and_the_answer_arrives() {
    let server = unpainted(HttpSettings {
        max_body: 64 << 10,
        ..HttpSettings::default()
    });
    // Much more than the sockets' buffers hold: the client is still sending when it is answered.
    let body = quick(json!({"prompt": "x".repeat(16 << 20)}));
    let (status, error) = refusal(server.generate(&body).await).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(error["code"], "body_too_large");
    let message = error["message"].as_str().unwrap();
    assert!(
        message.contains("65536 bytes") && message.contains("smaller"),
        "{message}"
    );

    let form = Form::new().part("image", Part::bytes(vec![0; 1 << 20]));
    let request = Client::new()
        .post(server.url("/v1/images/edits"))
        .multipart(form);
    let (status, _) = refusal(request.send().await.unwrap()).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[test]
fn a_body_that_does_not_arrive_is_given_up() {
    let server = unpainted(HttpSettings {
        body_timeout: Duration::from_millis(100),
        ..HttpSettings::default()
    });
    let mut stream = TcpStream::connect(server.address()).unwrap();
    let head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
                Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"prompt\":";
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.contains("body_timeout"), "{answer}");
}
