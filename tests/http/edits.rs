//! `POST /v1/images/edits`: as OpenAI's clients send it, as JSON, and what it does to a picture.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use image::RgbImage;
use reqwest::{
    Client,
    multipart::{Form, Part},
};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

use crate::support::{file, mask, ok, pixels, png, quick, shared};

/// A picture of the demo model to start from.
async fn original() -> &'static [u8] {
    static ORIGINAL: OnceCell<Vec<u8>> = OnceCell::const_new();
    ORIGINAL
        .get_or_init(async || {
            let change = json!({"prompt": "a blue house in the snow", "steps": 8, "size": "96x64"});
            let body = ok(shared().generate(&quick(change)).await).await;
            file(&body["data"][0])
        })
        .await
}

async fn edit(form: Form) -> Value {
    let request = Client::new().post(shared().url("/v1/images/edits"));
    ok(request.multipart(form).send().await.unwrap()).await
}

fn form(image: &str, bytes: &[u8]) -> Form {
    let part = Part::bytes(bytes.to_vec())
        .file_name("picture.png")
        .mime_str("image/png");
    Form::new()
        .part(image.to_owned(), part.unwrap())
        .text("prompt", "a red mushroom")
        .text("steps", "6")
        .text("seed", "3")
}

/// Mean difference per channel of two pictures, over the pixels that `counted` says.
fn difference(a: &RgbImage, b: &RgbImage, counted: impl Fn(u32, u32) -> bool) -> f64 {
    assert_eq!(a.dimensions(), b.dimensions());
    let pairs = a.enumerate_pixels().zip(b.pixels());
    let pairs = pairs.filter(|((x, y, _), _)| counted(*x, *y));
    let (mut sum, mut count) = (0.0, 0);
    for ((_, _, a), b) in pairs {
        for (a, b) in a.0.iter().zip(b.0) {
            sum += f64::from(a.abs_diff(b));
            count += 1;
        }
    }
    sum / f64::from(count)
}

fn everywhere(_: u32, _: u32) -> bool {
    true
}

#[tokio::test]
async fn the_size_follows_the_picture_and_strength_says_how_far_to_leave_it() {
    let start = pixels(original().await);
    let mut differences = Vec::new();
    for strength in ["0.2", "0.6", "1.0"] {
        let body = edit(form("image", original().await).text("strength", strength)).await;
        assert_eq!(body["size"], "96x64");
        assert_eq!(body["data"][0]["seed"], 3);
        let picture = pixels(&file(&body["data"][0]));
        differences.push(difference(&picture, &start, everywhere));
    }
    assert!(differences.is_sorted(), "{differences:?}");
    assert!(differences[0] < 0.5 * differences[2], "{differences:?}");
}

#[tokio::test]
async fn a_picture_is_brought_to_the_size_that_is_asked_for() {
    let body = edit(form("image", original().await).text("size", "64x64")).await;
    assert_eq!(pixels(&file(&body["data"][0])).dimensions(), (64, 64));
    // Not a multiple of the model's: rounded.
    let odd = png(RgbImage::from_pixel(61, 67, [200, 30, 30].into()));
    let body = edit(form("image", &odd)).await;
    assert_eq!(body["size"], "64x64");
}

#[tokio::test]
async fn openais_spellings_and_json_mean_the_same() {
    let bytes = original().await;
    let expected = file(&edit(form("image", bytes)).await["data"][0]);
    let listed = edit(form("image[]", bytes).text("model", "gpt-image-1")).await;
    assert!(
        file(&listed["data"][0]) == expected,
        "image[], as the Python client names a list"
    );
    let text = BASE64_STANDARD.encode(bytes);
    let url = format!("data:image/png;base64,{text}");
    for image in [
        json!({"image": text}),
        json!({"image": url}),
        json!({"image": [url]}),
        json!({"images": [{"image_url": url}]}),
    ] {
        let mut body = json!({"prompt": "a red mushroom", "steps": 6, "seed": 3});
        for (name, value) in image.as_object().unwrap() {
            body[name] = value.clone();
        }
        let answer = ok(shared().post("/v1/images/edits", &body).await).await;
        assert!(file(&answer["data"][0]) == expected, "{image:.60}");
    }
}

#[tokio::test]
async fn what_the_mask_does_not_mark_stays() {
    let start = pixels(original().await);
    let right = |x: u32, _: u32| x >= 48;
    // The VAE looks a few pixels around each: the seam belongs to neither side.
    let far_left = |x: u32, _: u32| x < 32;
    let by_transparency = mask(96, 64, right);
    let by_light = png(image::GrayImage::from_fn(96, 64, |x, y| {
        [if right(x, y) { 255 } else { 0 }].into()
    }));
    let paint = async |mask: &[u8], prompt: &'static str| {
        let part = Part::bytes(mask.to_vec()).file_name("mask.png");
        let form = form("image", original().await).part("mask", part);
        let body = edit(form.text("negative_prompt", prompt)).await;
        pixels(&file(&body["data"][0]))
    };
    let picture = paint(&by_transparency, "").await;
    assert!(
        picture == paint(&by_light, "").await,
        "white marks what transparency marks"
    );
    let (kept, painted) = (
        difference(&picture, &start, far_left),
        difference(&picture, &start, right),
    );
    assert!(kept < 12.0 && painted > 2.0 * kept, "{kept} and {painted}");
    let other = paint(&by_transparency, "a green tree at night").await;
    let (kept, painted) = (
        difference(&picture, &other, far_left),
        difference(&picture, &other, right),
    );
    assert!(kept < 4.0 && painted > 2.0 * kept, "{kept} and {painted}");
}
