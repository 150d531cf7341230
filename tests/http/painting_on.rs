//! Whatever happens to the adapters' store, pictures with adapters in memory are painted, and are the
//! same to the last byte.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
};

use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::{
    adapter_files::lora,
    bad_adapters::bad_files,
    painting::strong,
    process::Process,
    support::{file, ok, quick, refusal, until},
};

/// The largest of the bad files fits, with its rank of 10^5: it is to be refused for what it is.
const BLOCKS: u32 = 80_000;

async fn paint(url: &str, change: &Value) -> Response {
    let request = Client::new().post(format!("{url}/v1/images/generations"));
    request.json(&quick(change.clone())).send().await.unwrap()
}

async fn picture(url: &str, change: &Value) -> Vec<u8> {
    file(&ok(paint(url, change).await).await["data"][0])
}

async fn put(url: &str, name: &str, file: Vec<u8>) -> Response {
    let request = Client::new().put(format!("{url}/v1/adapters/{name}/file"));
    request.body(file).send().await.unwrap()
}

/// A client that asks for the same pictures again and again, and looks at every byte.
struct Regular {
    rounds: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Regular {
    async fn of(url: &str) -> Self {
        let wishes = [
            json!({}),
            json!({"adapters": ["fox"]}),
            json!({"adapters": [{"name": "hen", "scale": -0.5}, "fox"]}),
        ];
        let mut expected = Vec::new();
        for wish in &wishes {
            expected.push(picture(url, wish).await);
        }
        assert!(expected[0] != expected[1] && expected[1] != expected[2]);
        let (rounds, stop) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let (url, counted, stopped) = (url.to_owned(), rounds.clone(), stop.clone());
        let task = tokio::spawn(async move {
            while !stopped.load(SeqCst) {
                for (wish, expected) in wishes.iter().zip(&expected) {
                    assert!(picture(&url, wish).await == *expected, "{wish}");
                }
                counted.fetch_add(1, SeqCst);
            }
        });
        Self { rounds, stop, task }
    }

    /// Until everything was painted once more from beginning to end.
    async fn once_more(&self) {
        let seen = self.rounds.load(SeqCst);
        until("all is painted again", async || {
            assert!(!self.task.is_finished(), "the client has failed");
            self.rounds.load(SeqCst) > seen + 1
        })
        .await;
    }

    async fn end(self) {
        self.stop.store(true, SeqCst);
        self.task.await.unwrap();
    }
}

/// What can be seen in the folder, and what was left of uploads.
fn files(folder: &Path) -> (Vec<String>, usize) {
    let names = |folder: &Path| -> Vec<String> {
        let files = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = files
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let mut seen = names(folder);
    seen.retain(|name| name.ends_with(".safetensors"));
    let staged = names(&folder.join(".staging"));
    let staged = staged.iter().filter(|name| name.ends_with(".tmp"));
    (seen, staged.count())
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_files_a_full_disk_and_a_store_that_is_gone_change_no_picture() {
    let place = TempDir::new().unwrap();
    let (folder, away) = (place.path().join("adapters"), place.path().join("away"));
    fs::create_dir(&folder).unwrap();
    let options = [
        "--adapters",
        folder.to_str().unwrap(),
        "--adapter-rescan",
        "0.2",
    ];
    let process = Process::serve_on_a_full_disk(BLOCKS, &options);
    let url = &process.url;
    for (name, file) in [("fox", strong(1)), ("hen", strong(2)), ("cow", lora(1.0))] {
        assert_eq!(put(url, name, file).await.status(), 201);
    }
    let client = Regular::of(url).await;
    let kept = (
        vec![
            "cow.safetensors".to_owned(),
            "fox.safetensors".into(),
            "hen.safetensors".into(),
        ],
        0,
    );

    for (what, file, _) in bad_files() {
        for name in ["bad", "fox"] {
            let (status, error) = refusal(put(url, name, file.clone()).await).await;
            assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{what}: {error}");
        }
    }
    client.once_more().await;
    assert_eq!(files(&folder), kept);

    let large = vec![0; BLOCKS as usize * 512 + 1];
    for name in ["large", "fox"] {
        let (status, error) = refusal(put(url, name, large.clone()).await).await;
        assert_eq!(
            (status, &error["code"]),
            (
                StatusCode::INSUFFICIENT_STORAGE,
                &json!("adapter_store_full")
            ),
            "{error}"
        );
    }
    client.once_more().await;
    assert_eq!(files(&folder), kept);

    fs::rename(&folder, &away).unwrap();
    let cow = json!({"adapters": ["cow"]});
    for response in [
        put(url, "pig", lora(1.0)).await,
        put(url, "fox", lora(1.0)).await,
        paint(url, &cow).await,
    ] {
        let (status, error) = refusal(response).await;
        assert_eq!(
            (status, &error["code"]),
            (
                StatusCode::SERVICE_UNAVAILABLE,
                &json!("adapter_store_unavailable")
            ),
            "{error}"
        );
    }
    client.once_more().await;
    assert!(
        !folder.exists(),
        "a store that is gone does not come back empty"
    );

    fs::rename(&away, &folder).unwrap();
    picture(url, &cow).await;
    assert_eq!(put(url, "pig", lora(1.0)).await.status(), 201);
    client.once_more().await;
    client.end().await;
}
