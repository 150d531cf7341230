//! Adapter files for the demo model, good and bad, and servers that serve them.

use std::{
    path::Path,
    sync::{Arc, LazyLock},
};

use lorikeet::{
    api::{AppState, HttpSettings},
    engine::{AdapterLoader, AdapterRegistry, Mixer, SubmitError, Wardrobe},
    registry::{Keeper, Registry, Settings, Store},
    telemetry,
};
use reqwest::{
    Client, RequestBuilder,
    multipart::{Form, Part},
};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use crate::support::{Server, StandIn, demo_parts};

/// A square map of the demo model's UNet, 48 x 48.
pub const SITE: &str = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";

/// One tensor: key, shape, values.
pub type Tensor = (String, Vec<usize>, Vec<f32>);

/// A safetensors file.
pub fn pack(tensors: &[Tensor], metadata: Value) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    if metadata != Value::Null {
        header.insert("__metadata__".into(), metadata);
    }
    for (key, shape, values) in tensors {
        let begin = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]});
        header.insert(key.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.into_bytes());
    file.extend(data);
    file
}

/// The factors of one site, every value the same.
pub fn pair(rank: usize, value: f32) -> Vec<Tensor> {
    let values = || vec![value; 48 * rank];
    vec![
        (format!("{SITE}.lora_A.weight"), vec![rank, 48], values()),
        (format!("{SITE}.lora_B.weight"), vec![48, rank], values()),
    ]
}

/// A good adapter; another value is another file.
pub fn lora(value: f32) -> Vec<u8> {
    pack(&pair(2, value), Value::Null)
}

/// A server with adapters in a folder of its own, which paints nothing.
pub struct Place {
    pub folder: TempDir,
    pub registry: AdapterRegistry,
    pub server: Server,
    _keeper: Keeper,
}

impl Place {
    pub async fn new() -> Self {
        Self::with(Settings::default(), HttpSettings::default()).await
    }

    pub async fn with(settings: Settings, http: HttpSettings) -> Self {
        static PARTS: LazyLock<(AdapterLoader, Arc<Mixer>)> = LazyLock::new(demo_parts);
        let (loader, mixer) = PARTS.clone();
        let folder = TempDir::new().unwrap();
        let store = Store::folder(folder.path()).unwrap();
        let registry = Registry::open(store, loader, settings).await;
        let registry = registry.unwrap();
        let state = AppState::loading(http, telemetry::metrics().unwrap());
        state.set_wardrobe(Arc::new(Wardrobe::new(registry.clone(), mixer)));
        state.set_painter(Arc::new(StandIn::new(|_| Err(SubmitError::Broken))));
        Self {
            _keeper: registry.keep(),
            server: Server::start(state),
            folder,
            registry,
        }
    }

    /// The files that anyone can see.
    pub fn files(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.folder.path()).unwrap();
        let names = names.map(|file| file.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| !name.starts_with('.')).collect();
        names.sort();
        names
    }

    /// Uploads on their way.
    pub fn staged(&self) -> usize {
        let files = std::fs::read_dir(self.folder.path().join(".staging")).unwrap();
        let unfinished = |path: &Path| path.extension().is_some_and(|ending| ending == "tmp");
        files
            .filter(|file| unfinished(&file.as_ref().unwrap().path()))
            .count()
    }
}

/// `POST /v1/adapters` with the name before the file.
pub fn create(server: &Server, name: &str, file: Vec<u8>) -> RequestBuilder {
    let form = Form::new().text("name", name.to_owned());
    upload(
        server,
        form.part("file", Part::bytes(file).file_name("a.safetensors")),
    )
}

pub fn upload(server: &Server, form: Form) -> RequestBuilder {
    Client::new()
        .post(server.url("/v1/adapters"))
        .multipart(form)
}

/// `PUT /v1/adapters/{name}/file`.
pub fn put(server: &Server, name: &str, file: Vec<u8>) -> RequestBuilder {
    let url = server.url(&format!("/v1/adapters/{name}/file"));
    Client::new().put(url).body(file)
}
