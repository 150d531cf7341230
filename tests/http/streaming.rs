//! `"stream": true`: OpenAI's events, as its Python client reads them.

use std::sync::Arc;

use lorikeet::engine::{Job, JobError, Progress};
use reqwest::{Response, multipart};
use serde_json::{Value, json};
use tokio::sync::{oneshot, watch};

use crate::support::{Server, StandIn, file, ok, pixels, png, quick, refusal, shared};

/// Name and data of every event to the end of the stream.
async fn events(response: Response) -> Vec<(String, Value)> {
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = response.text().await.unwrap();
    let blocks = text.split("\n\n").filter(|block| !block.trim().is_empty());
    let event = |block: &str| {
        let field = |name: &str| {
            let mut lines = block.lines();
            lines
                .find_map(|line| line.strip_prefix(name))
                .map(str::trim)
        };
        Some((
            field("event:")?.to_owned(),
            serde_json::from_str(field("data:")?).unwrap(),
        ))
    };
    // A block without data is a comment that keeps the connection open.
    blocks.filter_map(event).collect()
}

/// Checks what OpenAI's client requires of an event.
fn check(name: &str, event: &Value, size: &str) {
    assert_eq!(event["type"], name);
    assert_eq!(event["size"], size);
    assert_eq!(event["output_format"], "png");
    assert_eq!(event["background"], "opaque");
    assert!(event["quality"].is_string() && event["created_at"].is_u64());
    let (width, height) = pixels(&file(event)).dimensions();
    assert_eq!(format!("{width}x{height}"), size);
    match name.ends_with("completed") {
        true => assert_eq!(event["usage"]["total_tokens"], 0),
        false => assert!(event["partial_image_index"].is_u64()),
    }
}

#[tokio::test]
async fn previews_come_in_order_and_then_the_picture() {
    let body = quick(json!({"stream": true, "partial_images": 2, "steps": 12}));
    let events = events(shared().generate(&body).await).await;
    let (last, previews) = events.split_last().unwrap();
    assert_eq!(last.0, "image_generation.completed");
    check(&last.0, &last.1, "64x64");
    assert_eq!(last.1["seed"], 7);
    // A reader that is late skips a preview; one at least comes before twelve steps are over.
    assert!((1..=2).contains(&previews.len()), "{}", previews.len());
    for (at, (name, event)) in previews.iter().enumerate() {
        assert_eq!(name, "image_generation.partial_image");
        check(name, event, "64x64");
        assert_eq!(event["partial_image_index"], at);
        assert_ne!(event["b64_json"], last.1["b64_json"]);
    }
    let alone = ok(shared().generate(&quick(json!({"steps": 12}))).await).await;
    assert_eq!(
        file(&last.1),
        file(&alone["data"][0]),
        "streaming changes no picture"
    );
}

#[tokio::test]
async fn several_pictures_are_several_completed_events() {
    let events = events(
        shared()
            .generate(&quick(json!({"stream": true, "n": 3})))
            .await,
    )
    .await;
    let seeds: Vec<&Value> = events.iter().map(|(_, event)| &event["seed"]).collect();
    assert_eq!(seeds, [7, 8, 9]);
    for (name, event) in &events {
        assert_eq!(name, "image_generation.completed");
        check(name, event, "64x64");
    }
}

#[tokio::test]
async fn an_edit_streams_under_its_own_names() {
    let picture = multipart::Part::bytes(png(image::RgbImage::new(64, 64)));
    let form = multipart::Form::new()
        .part("image", picture.file_name("a.png"))
        .text("prompt", "a red fish")
        .text("steps", "12")
        .text("partial_images", "1")
        .text("stream", "true");
    let request = reqwest::Client::new().post(shared().url("/v1/images/edits"));
    let events = events(request.multipart(form).send().await.unwrap()).await;
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["image_edit.partial_image", "image_edit.completed"]);
    for (name, event) in &events {
        check(name, event, "64x64");
    }
}

#[tokio::test]
async fn what_is_wrong_before_the_first_step_is_no_stream() {
    let (status, error) = refusal(
        shared()
            .generate(&quick(json!({"stream": true, "steps": 0})))
            .await,
    )
    .await;
    assert_eq!(status, 422);
    assert_eq!(error["param"], "steps");
}

#[tokio::test]
async fn a_failure_after_that_is_an_event_that_hides_its_cause() {
    let server = Server::with(Arc::new(StandIn::new(|_| {
        let (progress, watching) = watch::channel(Progress::default());
        let (result, waiting) = oneshot::channel();
        drop(progress);
        result
            .send(Err(JobError::Failed("secret at /var/lib".into())))
            .unwrap();
        Ok(Job::new(watching, waiting))
    })));
    let events = events(server.generate(&quick(json!({"stream": true}))).await).await;
    let [(name, event)] = &events[..] else {
        panic!("one event, not {events:?}");
    };
    assert_eq!(name, "error");
    assert_eq!(event["error"]["code"], "internal_error");
    assert!(!event.to_string().contains("secret"), "{event}");
}
