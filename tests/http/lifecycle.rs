//! Full queues, clients that leave, failures, and the way a server ends.

use std::{
    fs,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::StreamExt as _;
use lorikeet::{
    api::HttpSettings,
    engine::{EngineConfig, Job, JobError, Painter, Progress},
    pipeline::request::Limits,
};
use reqwest::Client;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    sync::{oneshot, watch},
    time,
};

use crate::{
    adapter_files::lora,
    process::Process,
    support::{PATIENCE, Server, StandIn, demo, file, ok, pixels, quick, refusal, until},
};

/// An engine that paints one picture at a time while one more waits, and steps without end.
fn narrow() -> Arc<dyn Painter> {
    let config = EngineConfig {
        queue: 1,
        max_rows: 2,
        max_running: 1,
        ..EngineConfig::default()
    };
    let limits = Limits {
        max_steps: 1000,
        ..Limits::default()
    };
    demo(config, limits)
}

/// A picture that takes much longer than a test may.
fn endless() -> Value {
    quick(json!({"steps": 1000, "size": "256x256"}))
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back_and_a_client_that_leaves_makes_room() {
    let painter = narrow();
    let server = Arc::new(Server::with(painter.clone()));
    let send = |body: Value| {
        let server = server.clone();
        tokio::spawn(async move { server.generate(&body).await })
    };
    let running = send(endless());
    until("the first picture runs", async || {
        painter.stats().running_rows == 2
    })
    .await;
    let waiting = send(endless());
    until("the second waits", async || painter.stats().queued == 1).await;

    let response = server.generate(&quick(json!({}))).await;
    let after = response.headers()["retry-after"]
        .to_str()
        .unwrap()
        .to_owned();
    assert!(
        (1..=120).contains(&after.parse::<u64>().unwrap()),
        "{after}"
    );
    let (status, error) = refusal(response).await;
    assert_eq!(status, 429);
    assert_eq!(error["type"], "rate_limit_error");
    assert_eq!(error["code"], "queue_full");
    assert!(
        error["message"].as_str().unwrap().contains("try again in"),
        "{error}"
    );

    // The one that waits leaves: its place is free, though the device is still busy.
    waiting.abort();
    let next = async || {
        let response = time::timeout(Duration::from_millis(300), server.generate(&endless())).await;
        // No answer in time is what an accepted request looks like.
        response.is_err()
    };
    until("the place in the queue is free again", next).await;

    // The one that runs leaves: its picture is dropped at the next step.
    running.abort();
    until("the device is free", async || {
        painter.stats().running_rows == 0
    })
    .await;
    let stats = painter.stats();
    assert!(stats.steps < 1000 && stats.pictures == 0, "{stats:?}");
    ok(server.generate(&quick(json!({}))).await).await;

    // The same for a stream that is left after its first event.
    let mut body = endless();
    body["stream"] = json!(true);
    body["steps"] = json!(200);
    body["partial_images"] = json!(16);
    let mut stream = server.generate(&body).await.bytes_stream();
    until("it streams", async || painter.stats().running_rows == 2).await;
    let event = b"event: image_generation.partial_image";
    until("a preview arrives", async || {
        // What comes before it keeps the connection open.
        stream.next().await.unwrap().unwrap().starts_with(event)
    })
    .await;
    drop(stream);
    until("the device is free", async || {
        painter.stats().running_rows == 0
    })
    .await;
    assert_eq!(painter.stats().pictures, 1);
}

/// A painter whose jobs end as `outcome` says.
fn ending(outcome: impl Fn() -> Result<(), JobError> + Send + Sync + 'static) -> StandIn {
    StandIn::new(move |_| {
        let (_progress, watching) = watch::channel(Progress::default());
        let (result, waiting) = oneshot::channel();
        if let Err(error) = outcome() {
            result.send(Err(error)).unwrap();
        }
        Ok(Job::new(watching, waiting))
    })
}

#[tokio::test]
async fn a_500_hides_its_cause_and_names_the_place_to_look() {
    let failed = || Err(JobError::Failed("secret: /var/lib/weights".into()));
    let gone = || Ok(());
    let panics = || -> Result<(), JobError> { panic!("secret: a bug") };
    for painter in [ending(failed), ending(gone), ending(panics)] {
        let server = Server::with(Arc::new(painter));
        let response = server.generate(&quick(json!({}))).await;
        assert!(response.headers().contains_key("x-request-id"));
        let (status, error) = refusal(response).await;
        assert_eq!(status, 500);
        assert_eq!(error["type"], "server_error");
        assert_eq!(error["code"], "internal_error");
        assert!(!error.to_string().contains("secret"), "{error}");
        assert!(
            error["message"].as_str().unwrap().contains("x-request-id"),
            "{error}"
        );
        assert_eq!(
            server.get("/livez").await.status(),
            200,
            "and the server lives on"
        );
    }
}

#[tokio::test]
async fn what_the_painter_refuses_is_the_clients_to_mend() {
    let invalid = || {
        Err(JobError::Invalid {
            field: "prompt",
            message: "has 99 chunks; shorten it to 16".into(),
        })
    };
    let server = Server::with(Arc::new(ending(invalid)));
    let (status, error) = refusal(server.generate(&quick(json!({}))).await).await;
    assert_eq!((status.as_u16(), &error["param"]), (422, &json!("prompt")));
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains("shorten it to 16")
    );
}

#[tokio::test]
async fn a_picture_that_takes_too_long_is_given_up() {
    let unfinished = Mutex::new(Vec::new());
    let endless = StandIn::new(move |_| {
        let (_progress, watching) = watch::channel(Progress::default());
        let (result, waiting) = oneshot::channel();
        unfinished.lock().unwrap().push(result);
        Ok(Job::new(watching, waiting))
    });
    let settings = HttpSettings {
        paint_timeout: Duration::from_millis(50),
        ..HttpSettings::default()
    };
    let server = Server::with_settings(Arc::new(endless), settings);
    let (status, error) = refusal(server.generate(&quick(json!({}))).await).await;
    assert_eq!(
        (status.as_u16(), &error["code"]),
        (504, &json!("paint_timeout"))
    );
}

#[tokio::test]
async fn a_server_that_is_told_to_stop_finishes_what_it_accepted() {
    let painter = narrow();
    let server = Server::with(painter.clone());
    let url = server.url("/v1/images/generations");
    let body = quick(json!({"steps": 40}));
    let send = || {
        let request = Client::new().post(&url).json(&body);
        tokio::spawn(async move { request.send().await.unwrap() })
    };
    let running = send();
    until("the picture runs", async || {
        painter.stats().running_rows == 2
    })
    .await;
    let waiting = send();
    until("the next one waits", async || painter.stats().queued == 1).await;
    let stopped = tokio::task::spawn_blocking(move || server.stop());
    for request in [running, waiting] {
        let body = ok(request.await.unwrap()).await;
        assert_eq!(pixels(&file(&body["data"][0])).dimensions(), (64, 64));
    }
    stopped.await.unwrap().unwrap();
    let late = Client::new().post(&url).json(&body).send().await;
    assert!(late.unwrap_err().is_connect(), "nobody listens any more");
}

#[tokio::test]
async fn the_process_serves_the_adapters_of_its_folder() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("fox.safetensors"), lora(1.0)).unwrap();
    let path = folder.path().to_str().unwrap();
    let options = [
        "--adapters",
        path,
        "--max-adapter-size",
        "1",
        "--allow-lora-loading",
    ];
    let process = Process::serve(&options);
    let client = Client::new();
    let get = async |path: &str| client.get(format!("{}{path}", process.url)).send().await;
    let list = ok(get("/v1/adapters").await.unwrap()).await;
    assert_eq!(list["data"][0]["name"], "fox");
    let load = client
        .post(format!("{}/v1/load_lora_adapter", process.url))
        .json(&json!({"lora_name": "fox", "lora_path": format!("{path}/fox.safetensors")}));
    assert_eq!(load.send().await.unwrap().status(), 200);
    let large = client
        .put(format!("{}/v1/adapters/large/file", process.url))
        .body(vec![0; (1 << 20) + 1]);
    assert_eq!(large.send().await.unwrap().status(), 413);
    // The keeper is at work.
    fs::write(folder.path().join("hen.safetensors"), lora(2.0)).unwrap();
    until("the new file is listed", async || {
        ok(get("/v1/adapters").await.unwrap()).await["total"] == 2
    })
    .await;
}

#[tokio::test]
async fn on_sigterm_the_process_turns_unready_finishes_and_exits_with_0() {
    let mut process = Process::serve(&["--drain-delay", "1", "--max-steps", "1000"]);
    let ready = format!("{}/readyz", process.url);
    let status = async || {
        reqwest::get(&ready)
            .await
            .map(|answer| answer.status().as_u16())
    };
    assert_eq!(status().await.unwrap(), 200);
    let send = |steps: u32| {
        let request = Client::new().post(format!("{}/v1/images/generations", process.url));
        let request = request.json(&quick(json!({"steps": steps, "size": "128x128"})));
        tokio::spawn(async move { request.send().await.unwrap() })
    };
    // Outlasts the second in which requests are still taken.
    let long = send(150);
    let metrics = format!("{}/metrics", process.url);
    until("the picture runs", async || {
        let text = reqwest::get(&metrics).await.unwrap().text().await.unwrap();
        text.contains("lorikeet_running_rows 2")
    })
    .await;
    process.signal("TERM");
    process.line("shutting down");
    let response = reqwest::get(&ready).await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(
        response.json::<Value>().await.unwrap()["status"],
        "draining"
    );
    // Load balancers have not noticed yet: it is still taken.
    ok(send(1).await.unwrap()).await;
    let body = ok(long.await.unwrap()).await;
    assert_eq!(pixels(&file(&body["data"][0])).dimensions(), (128, 128));
    process.line("all work is done");
    let exit = tokio::task::spawn_blocking(move || process.child.wait().unwrap());
    let exit = time::timeout(PATIENCE, exit).await.unwrap().unwrap();
    assert_eq!(exit.code(), Some(0));
}

#[tokio::test]
async fn work_that_outlasts_the_drain_timeout_and_a_second_signal_do_not_hold_the_process() {
    for (options, signals, code) in [
        (["--drain-timeout", "0.2"], 1, 0),
        (["--drain-timeout", "60"], 2, 1),
    ] {
        let mut process = Process::serve(&[&options[..], &["--max-steps", "1000"]].concat());
        let request = Client::new().post(format!("{}/v1/images/generations", process.url));
        let request = request.json(&endless());
        let answer = tokio::spawn(async move { request.send().await });
        let metrics = format!("{}/metrics", process.url);
        until("the picture runs", async || {
            let text = reqwest::get(&metrics).await.unwrap().text().await.unwrap();
            text.contains("lorikeet_running_rows 2")
        })
        .await;
        process.signal("TERM");
        process.line("shutting down");
        for _ in 1..signals {
            process.signal("INT");
        }
        let exit = tokio::task::spawn_blocking(move || process.child.wait().unwrap());
        let exit = time::timeout(PATIENCE / 2, exit).await.unwrap().unwrap();
        assert_eq!(exit.code(), Some(code));
        assert!(answer.await.unwrap().is_err(), "the connection is cut");
    }
}
