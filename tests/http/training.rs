//! Training over HTTP, through the real binary: pictures in, an adapter out.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use futures::StreamExt as _;
use reqwest::{
    Client, Response, StatusCode,
    multipart::{Form, Part},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt as _, net::TcpListener, time};

use crate::{
    process::Process,
    support::{self, PATIENCE, file, ok, pixels, quick, refusal, until},
};

/// Adapters and jobs of servers that come and go.
pub struct Place {
    folder: TempDir,
}

impl Place {
    pub fn new() -> Self {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join("adapters")).unwrap();
        Self { folder }
    }

    pub fn adapters(&self) -> String {
        self.folder.path().join("adapters").display().to_string()
    }

    pub fn data(&self) -> String {
        self.folder.path().join("data").display().to_string()
    }

    pub fn serve(&self, options: &[&str]) -> Process {
        let (adapters, data) = (self.adapters(), self.data());
        let mut all = vec!["--adapters", &adapters, "--data", &data, "--threads", "1"];
        all.extend(["--job-lease", "2"]);
        all.extend(options);
        Process::serve(&all)
    }

    /// On a disk where no file may be larger than so many times 512 bytes.
    pub fn serve_on_a_full_disk(&self, blocks: u32, options: &[&str]) -> Process {
        let (adapters, data) = (self.adapters(), self.data());
        let mut all = vec!["--adapters", &adapters, "--data", &data];
        all.extend(options);
        Process::serve_on_a_full_disk(blocks, &all)
    }

    /// Jobs that left files.
    fn jobs_with_files(&self) -> usize {
        let jobs = fs::read_dir(Path::new(&self.data()).join("jobs")).unwrap();
        let names = jobs.map(|entry| entry.unwrap().file_name());
        names.filter(|name| name != ".staging").count()
    }
}

/// Pictures of the sample subject, and their names.
fn subject() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/training/subject");
    let mut pictures: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(path).unwrap())
        })
        .collect();
    pictures.sort();
    pictures
}

fn form(pictures: &[(String, Vec<u8>)], fields: &Value) -> Form {
    let mut form = Form::new();
    for (name, value) in fields.as_object().unwrap() {
        let text = value.as_str().map_or(value.to_string(), str::to_owned);
        form = form.text(name.clone(), text);
    }
    for (name, bytes) in pictures {
        form = form.part("images", Part::bytes(bytes.clone()).file_name(name.clone()));
    }
    form
}

/// A run that takes a second or two.
pub fn short(name: &str, steps: u32, change: Value) -> Value {
    let mut fields = json!({
        "name": name, "method": "dreambooth", "instance_prompt": "a zorp monster", "steps": steps,
        "seed": 5, "sample_every": 0,
        "options": {"batch_size": 1, "resolution": 64, "checkpoint_every": 1}
    });
    for (name, value) in change.as_object().unwrap() {
        match value.is_null() {
            true => drop(fields.as_object_mut().unwrap().remove(name)),
            false => fields[name] = value.clone(),
        }
    }
    fields
}

async fn send(url: &str, pictures: &[(String, Vec<u8>)], fields: &Value) -> Response {
    let request = Client::new().post(format!("{url}/v1/training/jobs"));
    let form = form(pictures, fields);
    request.multipart(form).send().await.unwrap()
}

/// Hands a job in; gives its path.
pub async fn submit(url: &str, fields: &Value) -> String {
    let response = send(url, &subject(), fields).await;
    let status = response.status();
    let place = response.headers().get("location").cloned();
    let text = response.text().await.unwrap();
    assert_eq!(status, StatusCode::ACCEPTED, "{text}");
    let place = place.unwrap().to_str().unwrap().to_owned();
    let job: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        place,
        format!("/v1/training/jobs/{}", job["id"].as_str().unwrap())
    );
    place
}

async fn get(url: &str, path: &str) -> Value {
    ok(reqwest::get(format!("{url}{path}")).await.unwrap()).await
}

async fn post(url: &str, path: &str, body: Option<Value>) -> Response {
    let mut request = Client::new().post(format!("{url}{path}"));
    if let Some(body) = body {
        request = request.json(&body);
    }
    request.send().await.unwrap()
}

/// Waits for a job to be over, and gives it.
pub async fn finished(url: &str, job: &str) -> Value {
    let mut last = Value::Null;
    until("the job is over", async || {
        last = get(url, job).await;
        !last["finished_at"].is_null()
    })
    .await;
    last
}

pub async fn stepped(url: &str, job: &str, least: u64) {
    until("some steps are made", async || {
        get(url, job).await["progress"]["step"].as_u64() >= Some(least)
    })
    .await;
}

/// Server-sent events: id, name, data.
pub async fn events(url: &str, job: &str, after: Option<u64>) -> Vec<(u64, String, Value)> {
    let mut request = Client::new().get(format!("{url}{job}/events"));
    if let Some(after) = after {
        request = request.header("Last-Event-ID", after.to_string());
    }
    let response = request.send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut stream = response.bytes_stream();
    let mut text = Vec::new();
    let read = async {
        while let Some(piece) = stream.next().await {
            text.extend_from_slice(&piece.unwrap());
        }
    };
    time::timeout(PATIENCE, read).await.unwrap();
    let text = String::from_utf8(text).unwrap();
    let blocks = text.split("\n\n").filter(|block| block.contains("data: "));
    blocks
        .map(|block| {
            let line = |name: &str| {
                let lines = block.lines();
                let found = lines.filter_map(|line| line.strip_prefix(name)).next();
                found.unwrap_or_else(|| panic!("{block}")).to_owned()
            };
            let id = line("id: ").parse().unwrap();
            let data = serde_json::from_str(&line("data: ")).unwrap();
            (id, line("event: "), data)
        })
        .collect()
}

#[tokio::test]
async fn pictures_become_an_adapter_that_paints() {
    let place = Place::new();
    let server = place.serve(&[]);
    let url = &server.url;
    let change = json!({
        "sample_prompts": "a zorp monster", "sample_every": 2, "learning_rate": "0.01",
        "options": {"batch_size": 1, "resolution": 64, "checkpoint_every": 2}
    });
    let job = submit(url, &short("zorp", 4, change)).await;

    // The stream ends with the job.
    let told = events(url, &job, None).await;
    let ids: Vec<_> = told.iter().map(|(id, ..)| *id).collect();
    assert_eq!(ids, (1..=told.len() as u64).collect::<Vec<_>>());
    let mut kinds = BTreeMap::new();
    for (_, kind, data) in &told {
        assert_eq!(data["event"], kind.as_str());
        *kinds.entry(kind.as_str()).or_insert(0) += 1;
    }
    assert_eq!((kinds["step"], kinds["sample"]), (4, 2), "{kinds:?}");
    assert_eq!((kinds["submitted"], kinds["begun"]), (1, 1), "{kinds:?}");
    assert!(kinds["checkpoint"] >= 1, "{kinds:?}");
    assert_eq!(told.last().unwrap().1, "succeeded");
    let step = told.iter().find(|(_, kind, _)| kind == "step").unwrap();
    for field in ["loss", "smoothed_loss", "rates", "gradient_norm"] {
        assert!(!step.2["data"][field].is_null(), "{step:?}");
    }

    // Whoever was cut off misses nothing and hears nothing twice.
    for after in [0, 1, 3, told.len() as u64] {
        let rest = events(url, &job, Some(after)).await;
        assert_eq!(rest, told[after as usize..], "{after}");
    }
    let list = Client::new().get(format!("{url}{job}/events?after=2"));
    let list = list.header("Accept", "application/json").send().await;
    let list = ok(list.unwrap()).await;
    assert_eq!(list["data"].as_array().unwrap().len(), told.len() - 2);
    assert_eq!(list["data"][0], told[2].2);

    // Samples, by the log and by the list.
    let samples = get(url, &format!("{job}/samples")).await;
    let first = told.iter().find(|(_, kind, _)| kind == "sample").unwrap();
    assert_eq!(first.2["data"]["url"], samples["data"][0]["url"]);
    assert_eq!(samples["data"].as_array().unwrap().len(), 2);
    let sample = samples["data"][1]["url"].as_str().unwrap();
    let picture = reqwest::get(format!("{url}{sample}")).await.unwrap();
    assert_eq!(picture.headers()["content-type"], "image/png");
    let picture = pixels(&picture.bytes().await.unwrap());
    assert_eq!(picture.dimensions(), (64, 64));

    let done = get(url, &job).await;
    assert_eq!(done["state"], "succeeded", "{done}");
    assert_eq!(done["result"]["adapter"], "zorp");
    assert_eq!(done["files"], 8);
    let adapter = get(url, "/v1/adapters/zorp").await;
    assert_eq!(adapter["sha256"], done["result"]["sha256"]);
    assert_eq!(adapter["method"], "dreambooth");
    assert_eq!(adapter["recipe"], done["options"]);
    assert_eq!(adapter["trigger_words"], json!(["a zorp monster"]));
    let preview = adapter["preview"].as_str().unwrap();
    let preview = reqwest::get(format!("{url}{preview}")).await.unwrap();
    pixels(&preview.bytes().await.unwrap());

    let paint = async |change: Value| {
        let answer = post(url, "/v1/images/generations", Some(quick(change))).await;
        file(&ok(answer).await["data"][0])
    };
    let (without, with) = (
        paint(json!({})).await,
        paint(json!({"adapters": ["zorp"]})).await,
    );
    assert!(pixels(&without) != pixels(&with));

    let (status, error) = refusal(send(url, &subject(), &short("zorp", 1, json!({}))).await).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert_eq!(error["code"], "adapter_exists");
    let list = get(url, "/v1/training/jobs?state=succeeded&limit=1").await;
    assert_eq!(list["data"][0]["id"], done["id"]);
    let metrics = reqwest::get(format!("{url}/metrics")).await.unwrap();
    let metrics = metrics.text().await.unwrap();
    let line = "lorikeet_training_jobs{state=\"succeeded\"} 1";
    assert!(metrics.contains(line), "{metrics}");
}

/// A zip archive whose one file unpacks to far more than it is.
fn bomb() -> Vec<u8> {
    use std::io::Write as _;
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    zip.start_file("a.png", zip::write::SimpleFileOptions::default())
        .unwrap();
    zip.write_all(&vec![0; 32 << 20]).unwrap();
    zip.finish().unwrap().into_inner()
}

/// A PNG that says it is this large, and is not.
fn claims(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    drop(png::Encoder::new(&mut bytes, width, height).write_header());
    bytes
}

#[tokio::test]
async fn what_cannot_be_trained_is_refused_by_its_name_and_leaves_nothing() {
    let place = Place::new();
    let server = place.serve(&["--role", "serve"]);
    let url = &server.url;
    let all = subject();
    let with = |name: &str, bytes: Vec<u8>| {
        let mut pictures = all.clone();
        pictures.push((name.to_owned(), bytes));
        pictures
    };
    let many: Vec<_> = (0..500)
        .map(|n| (format!("{n}.png"), all[0].1.clone()))
        .collect();
    let bad_pictures = [
        (Vec::new(), "are missing"),
        (all[..1].to_vec(), "there are 1 pictures"),
        (many, "there are 500 pictures"),
        (with("x.png", b"no picture at all".to_vec()), "x.png"),
        (
            with("dot.png", support::png(image::RgbImage::new(1, 1))),
            "dot.png: is 1x1",
        ),
        (with("vast.png", claims(20_000, 20_000)), "vast.png"),
        (with("bomb.zip", bomb()), "a.png"),
        (
            with("broken.zip", b"PK\x03\x04 and no more".to_vec()),
            "broken.zip",
        ),
    ];
    for (pictures, text) in bad_pictures {
        let (status, error) = refusal(send(url, &pictures, &short("a", 1, json!({}))).await).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{text}: {error}");
        assert_eq!(error["param"], "images", "{text}: {error}");
        assert!(
            error["message"].as_str().unwrap().contains(text),
            "{text}: {error}"
        );
    }
    let bad_fields = [
        (json!({"method": null}), "method"),
        (json!({"method": "painting"}), "method"),
        (json!({"name": null}), "name"),
        (json!({"name": "../x"}), "name"),
        (json!({"instance_prompt": null}), "instance_prompt"),
        (json!({"token": "blob"}), "instance_prompt"),
        (json!({"rank": 0}), "rank"),
        (json!({"rnak": 4}), "rnak"),
        (json!({"steps": 1_000_000}), "steps"),
        (json!({"options": "{"}), "options"),
        (json!({"priority": 11}), "priority"),
        (json!({"webhook": "https://example.org/"}), "webhook"),
        (json!({"method": "lora", "instance_prompt": null}), "images"),
        (
            json!({"method": "textual-inversion", "instance_prompt": null, "token": "<z>"}),
            "initializer",
        ),
    ];
    for (change, field) in bad_fields {
        let (status, error) = refusal(send(url, &all, &short("a", 1, change.clone())).await).await;
        assert_eq!(
            status,
            StatusCode::UNPROCESSABLE_ENTITY,
            "{change}: {error}"
        );
        assert_eq!(error["param"], field, "{change}: {error}");
    }
    let (status, _) = refusal(post(url, "/v1/training/jobs", Some(json!({}))).await).await;
    assert_eq!(status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let list = get(url, "/v1/training/jobs").await;
    assert_eq!(list["data"], json!([]));
    until("no files are left", async || place.jobs_with_files() == 0).await;

    // A name that another job will take, and eleven pictures: more than usual, which is said.
    let mut eleven = all.clone();
    eleven.extend((0..3).map(|n| (format!("more-{n}.png"), all[0].1.clone())));
    let response = send(url, &eleven, &short("a", 1, json!({}))).await;
    assert_eq!(response.status(), StatusCode::ACCEPTED);
    let job: Value = response.json().await.unwrap();
    let warning = job["warnings"][0].as_str().unwrap();
    assert!(warning.starts_with("11 pictures"), "{job}");
    assert_eq!(
        (&job["state"], &job["ahead"]),
        (&json!("queued"), &json!(0))
    );
    let (status, error) = refusal(send(url, &all, &short("a", 1, json!({}))).await).await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .contains(job["id"].as_str().unwrap()),
        "{error}"
    );

    for (path, status) in [
        ("/v1/training/jobs/7", StatusCode::UNPROCESSABLE_ENTITY),
        (
            "/v1/training/jobs/0199f3a0-7b1c-7e57-9d1e-0d6c4a3f5b21",
            StatusCode::NOT_FOUND,
        ),
        (
            "/v1/training/jobs?state=odd",
            StatusCode::UNPROCESSABLE_ENTITY,
        ),
        (
            "/v1/training/jobs?limit=0",
            StatusCode::UNPROCESSABLE_ENTITY,
        ),
    ] {
        let (found, error) = refusal(reqwest::get(format!("{url}{path}")).await.unwrap()).await;
        assert_eq!(found, status, "{path}: {error}");
    }
    let id = job["id"].as_str().unwrap();
    let sample = format!("{url}/v1/training/jobs/{id}/samples/..%2Finputs%2F00000");
    let (status, error) = refusal(reqwest::get(sample).await.unwrap()).await;
    assert_eq!(
        (status, &error["code"]),
        (StatusCode::NOT_FOUND, &json!("sample_not_found"))
    );
}

#[tokio::test]
async fn a_request_that_is_sent_twice_is_one_job() {
    let place = Place::new();
    let server = place.serve(&["--role", "serve"]);
    let url = &server.url;
    let send = async |key: &str, pictures: &[(String, Vec<u8>)], fields: &Value| {
        let request = Client::new().post(format!("{url}/v1/training/jobs"));
        let request = request.header("Idempotency-Key", key);
        let form = form(pictures, fields);
        request.multipart(form).send().await.unwrap()
    };
    let (all, fields) = (subject(), short("a", 1, json!({})));
    let first = send("one", &all, &fields).await;
    assert_eq!(first.status(), StatusCode::ACCEPTED);
    let first: Value = first.json().await.unwrap();
    let second = send("one", &all, &fields).await;
    assert_eq!(second.status(), StatusCode::OK);
    let second: Value = second.json().await.unwrap();
    assert_eq!(first["id"], second["id"]);
    for (pictures, fields) in [
        (&all[..7], &fields),
        (&all[..], &short("b", 1, json!({}))),
        (&all[..], &short("a", 2, json!({}))),
    ] {
        let (status, error) = refusal(send("one", pictures, fields).await).await;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
        assert_eq!(error["code"], "idempotency_key_reused", "{error}");
    }
    let list = get(url, "/v1/training/jobs").await;
    assert_eq!(list["data"].as_array().unwrap().len(), 1);
    until("one job has files", async || place.jobs_with_files() == 1).await;
}

#[tokio::test]
async fn a_job_is_paused_resumed_and_cancelled_and_what_it_learned_is_kept() {
    let place = Place::new();
    let server = place.serve(&[]);
    let url = &server.url;
    let job = submit(url, &short("long", 5000, json!({}))).await;
    let (status, error) = refusal(post(url, &format!("{job}/resume"), None).await).await;
    assert_eq!(
        (status, &error["code"]),
        (StatusCode::CONFLICT, &json!("job_state"))
    );
    stepped(url, &job, 2).await;

    let wished = ok(post(url, &format!("{job}/pause"), None).await).await;
    assert!(
        wished["wish"] == "pause" || wished["state"] == "paused",
        "{wished}"
    );
    until("it is paused", async || {
        get(url, &job).await["state"] == "paused"
    })
    .await;
    let paused = get(url, &job).await;
    let at = paused["progress"]["step"].as_u64().unwrap();
    ok(post(url, &format!("{job}/resume"), None).await).await;
    stepped(url, &job, at + 2).await;
    ok(post(url, &format!("{job}/cancel"), None).await).await;
    let over = finished(url, &job).await;
    assert_eq!(over["state"], "cancelled");
    for wish in ["cancel", "pause", "resume"] {
        let (status, _) = refusal(post(url, &format!("{job}/{wish}"), None).await).await;
        assert_eq!(status, StatusCode::CONFLICT, "{wish}");
    }

    // What it has learned by then is an adapter like any other.
    let response = post(
        url,
        &format!("{job}/adapter"),
        Some(json!({"name": "half"})),
    )
    .await;
    assert_eq!(response.status(), StatusCode::CREATED);
    assert_eq!(response.headers()["location"], "/v1/adapters/half");
    let half = get(url, "/v1/adapters/half").await;
    assert!(
        half["recipe"]["stopped_after"].as_u64().unwrap() >= at + 2,
        "{half}"
    );
    let painted = quick(json!({"adapters": ["half"]}));
    ok(post(url, "/v1/images/generations", Some(painted)).await).await;
    let by_default: Value = post(url, &format!("{job}/adapter"), None)
        .await
        .json()
        .await
        .unwrap();
    let name = format!("long-{}", half["recipe"]["stopped_after"]);
    assert_eq!(by_default["adapter"], name.as_str());
    let again = post(
        url,
        &format!("{job}/adapter"),
        Some(json!({"name": "half"})),
    )
    .await;
    assert_eq!(
        again.status(),
        StatusCode::CREATED,
        "the same bytes are no conflict"
    );
    let (status, _) =
        refusal(post(url, &format!("{job}/adapter"), Some(json!({"nmae": "x"}))).await).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
}

#[tokio::test]
async fn the_end_of_a_job_is_told_to_its_webhook() {
    let receiver = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = format!("http://{}", receiver.local_addr().unwrap());
    let place = Place::new();
    let secret = "not-to-be-guessed-by-anyone";
    let server = place.serve(&["--webhook-hosts", &host, "--webhook-secret", secret]);
    let webhook = json!({"webhook": format!("{host}/done")});
    let job = submit(&server.url, &short("a", 1, webhook)).await;
    let heard = async {
        let (mut stream, _) = receiver.accept().await.unwrap();
        let (mut text, mut piece) = (Vec::new(), [0; 4096]);
        while !String::from_utf8_lossy(&text).contains("succeeded") {
            let read = stream.read(&mut piece).await.unwrap();
            assert!(read > 0, "{}", String::from_utf8_lossy(&text));
            text.extend_from_slice(&piece[..read]);
        }
        String::from_utf8(text).unwrap()
    };
    let heard = time::timeout(PATIENCE, heard).await.unwrap();
    assert!(heard.starts_with("POST /done "), "{heard}");
    assert!(heard.contains("webhook-signature: v1,"), "{heard}");
    assert!(heard.contains(job.rsplit('/').next().unwrap()), "{heard}");
}

#[tokio::test]
async fn one_process_paints_and_another_trains() {
    let place = Place::new();
    let painting = place.serve(&["--role", "serve"]);
    let job = submit(&painting.url, &short("a", 2, json!({}))).await;
    time::sleep(Duration::from_millis(300)).await;
    assert_eq!(get(&painting.url, &job).await["state"], "queued");
    let training = place.serve(&["--role", "train"]);
    let body = Some(quick(json!({})));
    let response = post(&training.url, "/v1/images/generations", body).await;
    assert!(response.headers().contains_key("retry-after"));
    let (status, error) = refusal(response).await;
    assert_eq!(
        (status, &error["code"]),
        (StatusCode::SERVICE_UNAVAILABLE, &json!("trains_only"))
    );
    let done = finished(&painting.url, &job).await;
    assert_eq!(done["state"], "succeeded", "{done}");
    // The one that paints notices what the other has published.
    until("the adapter is there", async || {
        let found = reqwest::get(format!("{}/v1/adapters/a", painting.url)).await;
        found.unwrap().status() == StatusCode::OK
    })
    .await;
    let body = Some(quick(json!({"adapters": ["a"]})));
    ok(post(&painting.url, "/v1/images/generations", body).await).await;
}

#[tokio::test]
async fn a_server_without_a_place_for_jobs_says_so() {
    let place = Place::new();
    let data = format!("{}/file/data", place.adapters());
    fs::write(format!("{}/file", place.adapters()), "").unwrap();
    let adapters = place.adapters();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lorikeet"));
    command.args(["serve", "--adapters", &adapters, "--data", &data]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("--data"), "{text}");
}
