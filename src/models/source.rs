//! The files of a model, from a folder or from inside the binary.

use std::{
    borrow::Cow,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::Mutex,
};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{LoadError, ModelSource};

/// Configs and vocabularies are read whole; real ones stay under 4 MB.
const MAX_TEXT_FILE: u64 = 64 << 20;
/// Bytes hashed at a time.
const HASH_CHUNK: usize = 1 << 20;

/// Read access to the files of one model.
#[derive(Debug)]
pub(super) struct Files {
    /// `None` is the demo model.
    root: Option<PathBuf>,
}

/// One file that is read in pieces.
///
/// Weights are read with plain reads and not through a memory map: a map of a file that another
/// process truncates kills this process with SIGBUS, and needs `unsafe`; a read gives an error.
/// As tensors are converted one by one, the peak is the same: the weights and one tensor's bytes.
#[derive(Debug)]
pub(crate) struct Blob {
    /// The path as errors name it.
    pub label: String,
    pub len: u64,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    Static(&'static [u8]),
    Owned(bytes::Bytes),
    File(Mutex<File>),
}

impl Files {
    pub fn open(source: &ModelSource) -> Result<Self, LoadError> {
        match source {
            ModelSource::Demo if demo_files().is_empty() => Err(LoadError::NoDemoModel),
            ModelSource::Demo => Ok(Self { root: None }),
            ModelSource::Folder(path) if path.is_dir() => Ok(Self {
                root: Some(path.clone()),
            }),
            ModelSource::Folder(path) => Err(LoadError::MissingFile {
                file: path.display().to_string(),
                expected: "name a model folder in diffusers' layout (with model_index.json)".into(),
            }),
        }
    }

    /// How errors name a file of this model.
    pub fn label(&self, path: &str) -> String {
        match &self.root {
            Some(root) => root.join(path).display().to_string(),
            None => format!("demo model: {path}"),
        }
    }

    pub fn exists(&self, path: &str) -> bool {
        match &self.root {
            Some(root) => root.join(path).is_file(),
            None => demo_file(path).is_some(),
        }
    }

    /// Opens a file that must be there.
    pub fn blob(&self, path: &str) -> Result<Blob, LoadError> {
        let label = self.label(path);
        let missing = || LoadError::MissingFile {
            file: label.clone(),
            expected: "the model folder is incomplete".into(),
        };
        let (len, bytes) = match &self.root {
            None => {
                let bytes = demo_file(path).ok_or_else(missing)?;
                (bytes.len() as u64, Bytes::Static(bytes))
            }
            Some(root) => {
                let full = root.join(path);
                if !full.is_file() {
                    return Err(missing());
                }
                return Blob::open(label, &full);
            }
        };
        Ok(Blob { label, len, bytes })
    }

    /// A small file, whole.
    pub fn read(&self, path: &str) -> Result<Cow<'static, [u8]>, LoadError> {
        let blob = self.blob(path)?;
        if blob.len > MAX_TEXT_FILE {
            return Err(LoadError::Io {
                file: blob.label,
                source: std::io::Error::other(format!(
                    "{} bytes; such a file has at most {MAX_TEXT_FILE}",
                    blob.len
                )),
            });
        }
        match blob.bytes {
            Bytes::Static(bytes) => Ok(Cow::Borrowed(bytes)),
            _ => Ok(blob.read_at(0, blob.len as usize)?.into_owned().into()),
        }
    }

    pub fn text(&self, path: &str) -> Result<String, LoadError> {
        String::from_utf8(self.read(path)?.into_owned()).map_err(|error| LoadError::Io {
            file: self.label(path),
            source: std::io::Error::new(std::io::ErrorKind::InvalidData, error),
        })
    }

    pub fn json(&self, path: &str) -> Result<Value, LoadError> {
        let bytes = self.read(path)?;
        serde_json::from_slice(&bytes).map_err(|source| LoadError::Json {
            file: self.label(path),
            source,
        })
    }
}

impl Blob {
    /// A file on disk, under the name that errors give it.
    pub fn open(label: String, path: &Path) -> Result<Self, LoadError> {
        let io = |source| LoadError::Io {
            file: label.clone(),
            source,
        };
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        Ok(Self {
            label,
            len,
            bytes: Bytes::File(Mutex::new(file)),
        })
    }

    /// A file that is in memory already, or mapped there.
    pub fn owned(label: String, bytes: bytes::Bytes) -> Self {
        Self {
            label,
            len: bytes.len() as u64,
            bytes: Bytes::Owned(bytes),
        }
    }

    /// `len` bytes from `offset`, copied only from a file on disk.
    pub fn read_at(&self, offset: u64, len: usize) -> Result<Cow<'_, [u8]>, LoadError> {
        let io = |source| LoadError::Io {
            file: self.label.clone(),
            source,
        };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let range = start..start.saturating_add(len);
        let short = || io(std::io::ErrorKind::UnexpectedEof.into());
        match &self.bytes {
            Bytes::Static(bytes) => bytes.get(range).map(Cow::Borrowed).ok_or_else(short),
            Bytes::Owned(bytes) => bytes.get(range).map(Cow::Borrowed).ok_or_else(short),
            Bytes::File(file) => {
                // A poisoned lock only means that another reader panicked: the file is intact,
                // and every read seeks first.
                let mut file = file.lock().unwrap_or_else(|e| e.into_inner());
                let mut buffer = vec![0; len];
                file.seek(SeekFrom::Start(offset)).map_err(io)?;
                file.read_exact(&mut buffer).map_err(io)?;
                Ok(Cow::Owned(buffer))
            }
        }
    }
}

/// The SHA-256 over several files, one after the other, in lower-case hex.
pub(super) fn sha256_hex(blobs: &[Blob]) -> Result<String, LoadError> {
    let mut hasher = Sha256::new();
    for blob in blobs {
        let mut offset = 0;
        while offset < blob.len {
            let len = (blob.len - offset).min(HASH_CHUNK as u64) as usize;
            hasher.update(&blob.read_at(offset, len)?);
            offset += len as u64;
        }
    }
    Ok(hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

fn demo_file(path: &str) -> Option<&'static [u8]> {
    demo_files()
        .iter()
        .find(|(name, _)| *name == path)
        .map(|(_, bytes)| *bytes)
}

#[cfg(not(feature = "demo-model"))]
fn demo_files() -> &'static [(&'static str, &'static [u8])] {
    &[]
}

#[cfg(feature = "demo-model")]
fn demo_files() -> &'static [(&'static str, &'static [u8])] {
    macro_rules! files {
        ($($path:literal),* $(,)?) => {
            &[$((
                $path,
                include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo/", $path)),
            )),*]
        };
    }
    files![
        "lorikeet.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
}
