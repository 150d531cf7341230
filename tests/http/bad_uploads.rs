//! Pictures and forms that cannot be used are refused by the name of their part.

use image::{GrayImage, RgbImage};
use reqwest::{
    Client, RequestBuilder, StatusCode,
    multipart::{Form, Part},
};
use serde_json::json;

use crate::support::{mask, png, quick, refusal, shared};

fn edit(form: Form) -> RequestBuilder {
    Client::new()
        .post(shared().url("/v1/images/edits"))
        .multipart(form)
}

fn upload(bytes: Vec<u8>) -> Part {
    Part::bytes(bytes).file_name("picture.png")
}

/// A PNG whose header claims more pixels than fit anywhere.
fn bomb() -> Vec<u8> {
    let mut bytes = png(GrayImage::new(1, 1));
    bytes[16..20].copy_from_slice(&60_000u32.to_be_bytes());
    bytes[20..24].copy_from_slice(&60_000u32.to_be_bytes());
    let sum = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// CRC-32 as PNG uses it (ISO 3309), bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 * (crc & 1))
        })
    })
}

#[tokio::test]
async fn a_form_that_cannot_be_used_is_refused_by_the_name_of_its_part() {
    let picture = || upload(png(RgbImage::new(64, 64)));
    let with = |name: &'static str, text: &'static str| {
        let form = Form::new().text("prompt", "x").part("image", picture());
        form.text(name, text)
    };
    let mut cut = png(RgbImage::new(64, 64));
    cut.truncate(60);
    let table: Vec<(Form, &str, &str)> = vec![
        (Form::new().text("prompt", "x"), "image", "missing"),
        (
            Form::new().part("image", picture()),
            "prompt",
            "say what to paint",
        ),
        (with("steps", "0"), "steps", "from 1 to 200"),
        (with("steps", "many"), "steps", "whole number"),
        (with("guidance_scale", "nan"), "guidance_scale", "0 to 100"),
        (with("n", "1000"), "n", "from 1 to 8"),
        (with("size", "7x7"), "size", "try 8"),
        (with("stream", "perhaps"), "stream", "true or false"),
        (with("strength", "0"), "strength", "above 0 and at most 1"),
        (with("strength", "1.5"), "strength", "above 0 and at most 1"),
        (with("prompt", "y"), "prompt", "more than once"),
        (with("cfg", "1").text("cfg", "2"), "cfg", "more than once"),
        (
            with("a", "1").part("image[]", picture()),
            "image",
            "more than once",
        ),
        (
            with("a", "1")
                .part("mask", picture())
                .part("mask", picture()),
            "mask",
            "more than once",
        ),
        (
            Form::new()
                .part("image", picture())
                .part("prompt", Part::bytes(vec![0xff, 0xfe])),
            "prompt",
            "UTF-8",
        ),
        (
            with("a", "1").part("mask", upload(mask(32, 64, |_, _| true))),
            "mask",
            "is 32x64 but the image is 64x64",
        ),
        (
            with("a", "1").part("mask", upload(mask(64, 64, |_, _| false))),
            "mask",
            "marks nothing",
        ),
        (
            with("a", "1").part("mask", upload(b"GIF89a".to_vec())),
            "mask",
            "PNG nor JPEG nor WebP",
        ),
        (
            with("a", "1").part("mask", upload(bomb())),
            "mask",
            "60000x60000",
        ),
    ];
    for (form, field, word) in table {
        let shown = format!("{form:?}");
        let (status, error) = refusal(edit(form).send().await.unwrap()).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{shown}: {error}");
        assert_eq!(error["param"], field, "{error}");
        assert!(
            error["message"].as_str().unwrap().contains(word),
            "{error} lacks {word:?}"
        );
    }
    let pictures: [(Vec<u8>, &str); 5] = [
        (Vec::new(), "PNG nor JPEG nor WebP"),
        (b"<svg/>".to_vec(), "PNG nor JPEG nor WebP"),
        (cut, "cannot be decoded"),
        (bomb(), "at most 8192 pixels per side"),
        (png(RgbImage::new(9000, 1)), "is 9000x1"),
    ];
    for (bytes, word) in pictures {
        let form = Form::new().text("prompt", "x").part("image", upload(bytes));
        let (status, error) = refusal(edit(form).send().await.unwrap()).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{error}");
        assert_eq!(error["param"], "image", "{error}");
        assert!(
            error["message"].as_str().unwrap().contains(word),
            "{error} lacks {word:?}"
        );
    }
}

#[tokio::test]
async fn pictures_in_json_are_refused_by_their_field() {
    let table = [
        (json!({}), "image", "missing"),
        (json!({"image": "!!!"}), "image", "not Base64"),
        (
            json!({"image": "https://example.org/a.png"}),
            "image",
            "fetches nothing",
        ),
        (json!({"image": "data:image/png,abc"}), "image", ";base64,"),
        (
            json!({"image": ["aGk=", "aGk="]}),
            "image",
            "more than once",
        ),
        (
            json!({"image": "aGk=", "images": "aGk="}),
            "image",
            "more than once",
        ),
        (
            json!({"image": {"file_id": "file-1"}}),
            "image",
            "image_url",
        ),
        (json!({"image": 7}), "image", "Base64"),
        (json!({"image": "aGk="}), "image", "PNG nor JPEG nor WebP"),
        (json!({"image": "aGk=", "mask": false}), "mask", "Base64"),
    ];
    for (change, field, word) in table {
        let response = shared()
            .post("/v1/images/edits", &quick(change.clone()))
            .await;
        let (status, error) = refusal(response).await;
        assert_eq!(
            status,
            StatusCode::UNPROCESSABLE_ENTITY,
            "{change}: {error}"
        );
        assert_eq!(error["param"], field, "{change}: {error}");
        assert!(
            error["message"].as_str().unwrap().contains(word),
            "{change}: {error}"
        );
    }
}
