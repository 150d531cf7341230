//! Servers to talk to, and painters that do what a test needs.

use std::{
    io,
    path::Path,
    sync::{Arc, LazyLock},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use image::{RgbImage, RgbaImage};
use lorikeet::{
    api::{AppState, Drain, HttpSettings, serve},
    engine::{
        AdapterLoader, DeviceChoice, Drained, EngineConfig, EngineStats, Health, Job, Mixer,
        ModelInfo, Opened, Painter, Precision, SubmitError, Wardrobe, open,
    },
    models::ModelSource,
    pipeline::request::{ImageRequest, Limits, ModelDefaults},
    registry::{Registry, Settings, Store},
    schedulers::SchedulerKind,
    telemetry,
};
use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{net::TcpListener, runtime, sync::oneshot, sync::watch, time};

/// Longest wait for anything that must come.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A server on a port of its own, on a thread of its own.
pub struct Server {
    address: String,
    adapters: Option<TempDir>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Server {
    pub fn start(state: AppState) -> Self {
        let (stop, stopped) = oneshot::channel();
        let (ready, address) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await?;
                ready.send(listener.local_addr()?.to_string()).unwrap();
                let drain = Drain {
                    delay: Duration::ZERO,
                    timeout: PATIENCE,
                };
                // A server that is dropped and one that is stopped end alike.
                let shutdown = async { drop(stopped.await) };
                serve(listener, state, drain, shutdown).await
            })
        });
        Self {
            address: address.recv_timeout(PATIENCE).unwrap(),
            adapters: None,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// A server with this painter and default settings.
    pub fn with(painter: Arc<dyn Painter>) -> Self {
        Self::with_settings(painter, HttpSettings::default())
    }

    pub fn with_settings(painter: Arc<dyn Painter>, settings: HttpSettings) -> Self {
        let state = AppState::loading(settings, telemetry::metrics().unwrap());
        state.set_painter(painter);
        Self::start(state)
    }

    /// The folder of its adapters, if it was given one to keep.
    pub fn adapters(&self) -> Option<&Path> {
        self.adapters.as_ref().map(TempDir::path)
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub async fn get(&self, path: &str) -> Response {
        Client::new().get(self.url(path)).send().await.unwrap()
    }

    pub async fn post(&self, path: &str, body: &Value) -> Response {
        let request = Client::new().post(self.url(path)).json(body);
        request.send().await.unwrap()
    }

    /// Asks for pictures.
    pub async fn generate(&self, body: &Value) -> Response {
        self.post("/v1/images/generations", body).await
    }

    /// Drains and ends the server.
    pub fn stop(mut self) -> io::Result<()> {
        drop(self.stop.take());
        self.thread.take().unwrap().join().unwrap()
    }
}

/// The server that most tests share. It has a folder for adapters, which is not watched.
pub fn shared() -> &'static Server {
    static SHARED: LazyLock<Server> = LazyLock::new(|| {
        let opened = demo_model(Limits::default());
        let loader = opened.adapter_loader().unwrap();
        let mixer = opened.mixer(1 << 30);
        let folder = TempDir::new().unwrap();
        let store = Store::folder(folder.path()).unwrap();
        // The first test to come here is on a runtime already.
        let open = thread::spawn(|| {
            let runtime = runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(Registry::open(store, loader, Settings::default()))
        });
        let state = AppState::loading(HttpSettings::default(), telemetry::metrics().unwrap());
        let registry = open.join().unwrap().unwrap();
        state.set_wardrobe(Arc::new(Wardrobe::new(registry, mixer)));
        state.set_painter(Arc::new(opened.start(EngineConfig::default()).unwrap()));
        Server {
            adapters: Some(folder),
            ..Server::start(state)
        }
    });
    &SHARED
}

fn demo_model(limits: Limits) -> Opened {
    let (device, precision) = (DeviceChoice::Cpu, Precision::F32);
    open(&ModelSource::Demo, device, precision, limits).unwrap()
}

/// What reads and mixes adapters for the demo model.
pub fn demo_parts() -> (AdapterLoader, Arc<Mixer>) {
    let opened = demo_model(Limits::default());
    (opened.adapter_loader().unwrap(), opened.mixer(1 << 30))
}

/// The real engine on the demo model.
pub fn demo(config: EngineConfig, limits: Limits) -> Arc<dyn Painter> {
    Arc::new(demo_model(limits).start(config).unwrap())
}

/// A request that is painted at once, with `change` put over it.
pub fn quick(change: Value) -> Value {
    let mut body = json!({
        "prompt": "a red mushroom", "size": "64x64", "steps": 2, "scheduler": "euler", "seed": 7
    });
    for (name, value) in change.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

type Submit = dyn Fn(ImageRequest) -> Result<Job, SubmitError> + Send + Sync;

/// A painter that answers as it is told.
pub struct StandIn {
    info: ModelInfo,
    health: watch::Sender<Health>,
    submit: Box<Submit>,
}

impl StandIn {
    pub fn new(
        submit: impl Fn(ImageRequest) -> Result<Job, SubmitError> + Send + Sync + 'static,
    ) -> Self {
        let defaults = ModelDefaults {
            width: 64,
            height: 64,
            side_multiple: 8,
            steps: 2,
            guidance_scale: 4.5,
            scheduler: SchedulerKind::Euler,
            text_layers: 4,
        };
        Self {
            info: ModelInfo {
                name: "stand-in".into(),
                hash: "0123456789".into(),
                defaults,
                limits: Limits::default(),
                created: 1,
                device: "none".into(),
            },
            health: watch::Sender::new(Health::Healthy),
            submit: Box::new(submit),
        }
    }

    /// One whose device is broken.
    pub fn broken(self, cause: &str) -> Self {
        self.health.send_replace(Health::Broken(cause.into()));
        self
    }
}

impl Painter for StandIn {
    fn submit(&self, request: ImageRequest) -> Result<Job, SubmitError> {
        (self.submit)(request)
    }

    fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn stats(&self) -> EngineStats {
        EngineStats::default()
    }

    fn drain(&self) {}

    fn drained(&self) -> Drained<'_> {
        Box::pin(async {})
    }
}

/// The JSON of an answer that must be 200.
pub async fn ok(response: Response) -> Value {
    let status = response.status();
    let text = response.text().await.unwrap();
    assert_eq!(status, StatusCode::OK, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// The `error` of an answer that must be a refusal.
pub async fn refusal(response: Response) -> (StatusCode, Value) {
    let status = response.status();
    let text = response.text().await.unwrap();
    assert!(!status.is_success(), "{status}: {text:.200}");
    let body: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text} is no JSON"));
    let error = body["error"].clone();
    assert!(error["message"].is_string(), "{text}");
    assert!(error["type"].is_string(), "{text}");
    assert!(error["code"].is_string(), "{text}");
    (status, error)
}

/// The file in a picture's `b64_json`.
pub fn file(picture: &Value) -> Vec<u8> {
    let text = picture["b64_json"].as_str().unwrap();
    BASE64_STANDARD.decode(text).unwrap()
}

pub fn pixels(file: &[u8]) -> RgbImage {
    image::load_from_memory(file).unwrap().into_rgb8()
}

/// Waits until `done` says so.
pub async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !done().await {
        assert!(started.elapsed() < PATIENCE, "{what}: not in time");
        time::sleep(Duration::from_millis(10)).await;
    }
}

/// A PNG of these pixels.
pub fn png(image: impl Into<image::DynamicImage>) -> Vec<u8> {
    let mut bytes = io::Cursor::new(Vec::new());
    let image = image.into();
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// OpenAI's mask: transparent where `painted` says, opaque elsewhere.
pub fn mask(width: u32, height: u32, painted: impl Fn(u32, u32) -> bool) -> Vec<u8> {
    png(RgbaImage::from_fn(width, height, |x, y| {
        [0, 0, 0, if painted(x, y) { 0 } else { 255 }].into()
    }))
}
