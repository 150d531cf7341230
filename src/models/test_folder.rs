//! A tiny model's folder for tests to change: spoilt, it must be refused; with other weights, it is
//! another model.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value};
use tempfile::TempDir;

use super::{LoadError, Model, ModelSource};

pub(super) const UNET: &str = "unet/diffusion_pytorch_model.safetensors";
pub(super) const UNET_CONFIG: &str = "unet/config.json";
pub(super) const VAE: &str = "vae/diffusion_pytorch_model.safetensors";
pub(super) const TEXT: &str = "text_encoder/model.safetensors";
pub(super) const TEXT_CONFIG: &str = "text_encoder/config.json";
pub(super) const SHARDS: &str = "unet/diffusion_pytorch_model.safetensors.index.json";
pub(super) const SECOND_SHARD: &str = "unet/diffusion_pytorch_model-00002-of-00003.safetensors";

/// A copy of one of the tiny models, to be spoilt.
pub(super) struct Folder(TempDir);

impl Folder {
    pub(super) fn copy(model: &str) -> Self {
        fn copy(from: &Path, to: &Path) {
            fs::create_dir_all(to).unwrap();
            for entry in fs::read_dir(from).unwrap() {
                let (entry, to) = (entry.unwrap(), to.to_owned());
                let to = to.join(entry.file_name());
                match entry.file_type().unwrap().is_dir() {
                    true => copy(&entry.path(), &to),
                    false => drop(fs::copy(entry.path(), to).unwrap()),
                }
            }
        }
        let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
        let folder = tempfile::tempdir().unwrap();
        copy(&golden.join(model), folder.path());
        Self(folder)
    }

    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    pub(super) fn load(&self, dtype: DType) -> Result<Model, LoadError> {
        let source = ModelSource::Folder(self.0.path().to_owned());
        Model::load(&source, &Device::Cpu, dtype)
    }

    pub(super) fn remove(&self, file: &str) {
        fs::remove_file(self.path(file)).unwrap();
    }

    pub(super) fn write(&self, file: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(file), bytes).unwrap();
    }

    pub(super) fn read(&self, file: &str) -> Vec<u8> {
        fs::read(self.path(file)).unwrap()
    }

    pub(super) fn truncate(&self, file: &str, len: usize) {
        self.write(file, &self.read(file)[..len]);
    }

    /// Edits a JSON file's object.
    pub(super) fn json(&self, file: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let mut value: Value = serde_json::from_slice(&self.read(file)).unwrap();
        edit(value.as_object_mut().unwrap());
        self.write(file, value.to_string());
    }

    pub(super) fn set(&self, file: &str, key: &str, value: Value) {
        self.json(file, |map| drop(map.insert(key.into(), value)));
    }

    /// Edits the tensors of a file, and writes it well.
    pub(super) fn tensors(&self, file: &str, edit: impl FnOnce(&mut HashMap<String, Tensor>)) {
        let mut tensors = candle_core::safetensors::load(self.path(file), &Device::Cpu).unwrap();
        edit(&mut tensors);
        candle_core::safetensors::save(&tensors, self.path(file)).unwrap();
    }

    pub(super) fn value(&self, file: &str, tensor: &str, value: f32) {
        self.tensors(file, |tensors| {
            let old = &tensors[tensor];
            let mut values: Vec<f32> = old.flatten_all().unwrap().to_vec1().unwrap();
            values[1] = value;
            let new = Tensor::from_vec(values, old.dims(), &Device::Cpu).unwrap();
            tensors.insert(tensor.into(), new);
        });
    }

    /// Edits the header of a safetensors file and leaves its data as they are.
    pub(super) fn header(&self, file: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
        let bytes = self.read(file);
        let (len, rest) = bytes.split_first_chunk().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
        let mut header: Value = serde_json::from_slice(header).unwrap();
        edit(header.as_object_mut().unwrap());
        let header = header.to_string().into_bytes();
        let len = (header.len() as u64).to_le_bytes();
        self.write(file, [&len[..], &header, data].concat());
    }

    pub(super) fn entry(&self, file: &str, tensor: &str, key: &str, value: Value) {
        self.header(file, |header| header[tensor][key] = value);
    }
}

/// What is done to a folder, and what the error must say.
pub(super) type Fault = (&'static str, &'static [&'static str], fn(&Folder));

pub(super) fn check(model: &str, dtype: DType, faults: &[Fault]) {
    for (what, texts, spoil) in faults {
        let folder = Folder::copy(model);
        spoil(&folder);
        let error = match folder.load(dtype) {
            Ok(_) => panic!("{what}: was loaded"),
            Err(error) => error.to_string(),
        };
        for text in *texts {
            assert!(error.contains(text), "{what}: {error:?} lacks {text:?}");
        }
        assert!(error.len() < 1000, "{what}: {error}");
    }
}
