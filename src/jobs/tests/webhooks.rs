//! Webhooks, against a server that notes what comes.

use std::sync::{Arc, Mutex};

use axum::{
    Router,
    body::Bytes,
    http::{HeaderMap, StatusCode, header::LOCATION},
    response::IntoResponse as _,
};

use super::*;

on_both!(
    the_end_is_told_signed_and_once,
    a_wrong_answer_is_tried_again_later,
    who_is_gone_is_told_no_more,
    after_a_day_of_failures_it_is_given_up,
    a_courier_that_dies_is_replaced,
    two_couriers_share_the_work,
);

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

type Noted = Arc<Mutex<Vec<(HeaderMap, String)>>>;

/// A receiver that gives these answers, and then 204.
async fn receiver(answers: &[StatusCode]) -> (String, Noted) {
    let noted = Noted::default();
    let (answers, notes) = (answers.to_vec(), noted.clone());
    let app = Router::new().fallback(async move |headers: HeaderMap, body: Bytes| {
        let mut notes = notes.lock().unwrap();
        let answer = answers
            .get(notes.len())
            .copied()
            .unwrap_or(StatusCode::NO_CONTENT);
        notes.push((headers, String::from_utf8(body.to_vec()).unwrap()));
        // To itself, so that a redirect that is followed would be noted.
        (answer, [(LOCATION, "/elsewhere")]).into_response()
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    (format!("http://{address}"), noted)
}

async fn open(ground: &Ground, receiver: &str) -> (Jobs, Courier) {
    let webhooks = AllowedHosts::new([receiver]).unwrap();
    let jobs = ground
        .jobs_with(JobSettings {
            webhooks,
            ..ground.settings()
        })
        .await;
    let courier = Courier::new(jobs.clone(), WebhookSecret::new(SECRET).unwrap()).unwrap();
    (jobs, courier)
}

/// A job that is over, and whose receiver is to be told.
async fn ended(jobs: &Jobs, receiver: &str) -> JobId {
    let webhook = Some(format!("{receiver}/hook?x=1"));
    jobs.submit(NewJob { webhook, ..job() }).await.unwrap();
    let lease = claim(jobs).await.unwrap();
    lease
        .succeed(&json!({ "adapter": "zorp" }))
        .await
        .unwrap()
        .id
}

fn text(headers: &HeaderMap, name: &str) -> String {
    headers[name].to_str().unwrap().to_owned()
}

async fn the_end_is_told_signed_and_once(ground: Ground) {
    let (url, noted) = receiver(&[]).await;
    let (jobs, courier) = open(&ground, &url).await;
    let waiting = submit(&jobs).await;
    assert!(!courier.deliver_one().await.unwrap());
    jobs.cancel(waiting).await.unwrap();
    let id = ended(&jobs, &url).await;
    assert!(courier.deliver_one().await.unwrap());
    ground.clock.advance(Duration::from_secs(24 * 3600));
    assert!(!courier.deliver_one().await.unwrap());

    let noted = noted.lock().unwrap();
    let [(headers, body)] = &noted[..] else {
        panic!("{noted:?}")
    };
    let view: serde_json::Value = serde_json::from_str(body).unwrap();
    assert_eq!(view["id"], json!(id));
    assert_eq!(
        (&view["state"], &view["kind"]),
        (&json!("succeeded"), &json!(KIND))
    );
    assert_eq!(view["result"], json!({ "adapter": "zorp" }));
    assert!(view.get("payload").is_none() && view.get("webhook").is_none());
    let timestamp = text(headers, "webhook-timestamp").parse().unwrap();
    assert_eq!(timestamp, BEGIN / 1000);
    let secret = WebhookSecret::new(SECRET).unwrap();
    let signature = secret.sign(&text(headers, "webhook-id"), timestamp, body);
    assert_eq!(text(headers, "webhook-signature"), signature);
    assert_eq!(text(headers, "content-type"), "application/json");
}

async fn a_wrong_answer_is_tried_again_later(ground: Ground) {
    let answers = [StatusCode::INTERNAL_SERVER_ERROR, StatusCode::FOUND];
    let (url, noted) = receiver(&answers).await;
    let (jobs, courier) = open(&ground, &url).await;
    let id = ended(&jobs, &url).await;
    for wait in [10, 20] {
        assert!(courier.deliver_one().await.unwrap());
        ground
            .clock
            .advance(Duration::from_secs(wait) - Duration::from_millis(1));
        assert!(!courier.deliver_one().await.unwrap(), "before {wait} s");
        ground.clock.advance(Duration::from_millis(1));
    }
    assert!(courier.deliver_one().await.unwrap());
    ground.clock.advance(Duration::from_secs(24 * 3600));
    assert!(!courier.deliver_one().await.unwrap());
    assert_eq!(log(&jobs, id).await, ["submitted", "started", "succeeded"]);
    let noted = noted.lock().unwrap();
    assert_eq!(noted.len(), 3, "the redirect was not followed");
    let same = |name: &str| {
        noted
            .iter()
            .all(|(headers, _)| headers[name] == noted[0].0[name])
    };
    assert!(same("webhook-id") && !same("webhook-timestamp") && !same("webhook-signature"));
}

async fn who_is_gone_is_told_no_more(ground: Ground) {
    let (url, noted) = receiver(&[StatusCode::GONE]).await;
    let (jobs, courier) = open(&ground, &url).await;
    let id = ended(&jobs, &url).await;
    assert!(courier.deliver_one().await.unwrap());
    ground.clock.advance(Duration::from_secs(24 * 3600));
    assert!(!courier.deliver_one().await.unwrap());
    assert_eq!(noted.lock().unwrap().len(), 1);
    assert_eq!(
        log(&jobs, id).await,
        ["submitted", "started", "succeeded", "webhook_failed"]
    );
    // The state is what it was.
    assert_eq!(state(&jobs, id).await, JobState::Succeeded);
}

async fn after_a_day_of_failures_it_is_given_up(ground: Ground) {
    // Nobody listens there.
    let (jobs, courier) = open(&ground, "http://127.0.0.1:1").await;
    let id = ended(&jobs, "http://127.0.0.1:1").await;
    let mut attempts = 0;
    for _ in 0..30 {
        attempts += u32::from(courier.deliver_one().await.unwrap());
        ground.clock.advance(Duration::from_secs(6 * 3600));
    }
    assert_eq!(attempts, 12);
    let last = jobs.events(id, 3, 9).await.unwrap();
    assert_eq!(
        (&*last[0].kind, &last[0].data["attempts"]),
        ("webhook_failed", &json!(12))
    );
    let reason = last[0].data["message"].as_str().unwrap();
    assert!(
        reason.contains("refused") && !reason.contains("hook?x=1"),
        "{reason}"
    );
}

async fn a_courier_that_dies_is_replaced(ground: Ground) {
    let (url, noted) = receiver(&[]).await;
    let (jobs, courier) = open(&ground, &url).await;
    ended(&jobs, &url).await;
    // Taken, and then nothing.
    let taken = crate::jobs::webhook::outbox::take(&jobs).await.unwrap();
    assert!(taken.is_some());
    assert!(!courier.deliver_one().await.unwrap());
    ground.clock.advance(Duration::from_secs(60));
    assert!(courier.deliver_one().await.unwrap());
    assert_eq!(noted.lock().unwrap().len(), 1);
}

async fn two_couriers_share_the_work(ground: Ground) {
    let (url, noted) = receiver(&[]).await;
    let (jobs, courier) = open(&ground, &url).await;
    let (_, other) = open(&ground, &url).await;
    for _ in 0..6 {
        ended(&jobs, &url).await;
    }
    let done = async || {
        while noted.lock().unwrap().len() < 6 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let both = async { tokio::join!(courier.run(done()), other.run(done())) };
    tokio::time::timeout(Duration::from_secs(60), both)
        .await
        .unwrap();
    let noted = noted.lock().unwrap();
    let ids: std::collections::HashSet<_> = noted
        .iter()
        .map(|(headers, _)| text(headers, "webhook-id"))
        .collect();
    assert_eq!((noted.len(), ids.len()), (6, 6));
}

#[tokio::test]
async fn a_host_that_is_not_allowed_is_refused_at_once() {
    let ground = Ground::sqlite();
    let (jobs, _) = open(&ground, "http://127.0.0.1:1").await;
    for url in [
        "https://example.org/",
        "http://127.0.0.1:2/",
        "http://169.254.169.254/",
    ] {
        let webhook = Some(url.to_owned());
        let refused = jobs.submit(NewJob { webhook, ..job() }).await.unwrap_err();
        let invalid = matches!(
            refused,
            JobError::Invalid {
                field: "webhook",
                ..
            }
        );
        assert!(invalid, "{url}: {refused:?}");
    }
}
