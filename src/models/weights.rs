//! One part's weights: which files hold them, and tensors read out one by one.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Mutex,
};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::{
    LoadError,
    header::{Entry, FileDType, read_header},
    source::{Blob, Files},
};

/// Elements converted per task.
const CHUNK: usize = 1 << 16;

/// The tensors of one part (`unet`, `vae`, `text_encoder`), over one file or several.
#[derive(Debug)]
pub(super) struct Weights {
    blobs: Vec<Blob>,
    /// Which blob holds a tensor, and where; keyed by canonical name.
    entries: BTreeMap<String, (usize, Entry)>,
    /// Names nobody asked for yet.
    unused: Mutex<BTreeSet<String>>,
    device: Device,
    dtype: DType,
}

impl Weights {
    /// Finds and opens the files of `part`, whose name begins with `stem`.
    ///
    /// `canonical` maps the key in the file to the name it is asked for by: old and new spellings
    /// of one module meet there.
    pub fn open(
        files: &Files,
        part: &str,
        stem: &str,
        canonical: fn(&str) -> String,
        device: &Device,
        dtype: DType,
    ) -> Result<Self, LoadError> {
        let paths = weight_files(files, part, stem)?;
        let mut blobs = Vec::with_capacity(paths.len());
        let mut entries: BTreeMap<String, (usize, Entry)> = BTreeMap::new();
        for (index, path) in paths.iter().enumerate() {
            let blob = files.blob(path)?;
            for (key, entry) in read_header(&blob)?.entries {
                if entries.insert(canonical(&key), (index, entry)).is_some() {
                    return Err(LoadError::Tensor {
                        file: blob.label,
                        tensor: key,
                        reason: "is there twice (under an old and a new name, or in two shards)"
                            .into(),
                    });
                }
            }
            blobs.push(blob);
        }
        let unused = entries.keys().cloned().collect();
        Ok(Self {
            blobs,
            entries,
            unused: Mutex::new(unused),
            device: device.clone(),
            dtype,
        })
    }

    pub fn blobs(&self) -> &[Blob] {
        &self.blobs
    }

    /// The shape of a tensor in the file, if it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|(_, e)| e.shape.as_slice())
    }

    /// Reads a tensor that must have this shape and only finite values.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        let Some((index, entry)) = self.entries.get(name) else {
            return Err(LoadError::MissingTensor {
                file: self
                    .blobs
                    .first()
                    .map_or_else(String::new, |b| b.label.clone()),
                tensor: name.into(),
                expected: shape.into(),
            });
        };
        let blob = &self.blobs[*index];
        if entry.shape != shape {
            return Err(LoadError::Shape {
                file: blob.label.clone(),
                tensor: name.into(),
                expected: shape.into(),
                found: entry.shape.clone(),
            });
        }
        let fault = |reason: String| LoadError::Tensor {
            file: blob.label.clone(),
            tensor: name.into(),
            reason,
        };
        let bytes = blob.read_at(entry.start, entry.len)?;
        let values = to_f32(&bytes, entry.dtype, largest(self.dtype)).map_err(fault)?;
        drop(bytes);
        // As for the file: a poisoned lock cannot leave a set of names half changed.
        self.unused
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .remove(name);
        Tensor::from_vec(values, shape, &self.device)
            .and_then(|t| t.to_dtype(self.dtype))
            .map_err(|source| LoadError::Device {
                what: format!("{}: tensor `{name}`", blob.label),
                source,
            })
    }

    /// Names the tensors that nobody asked for in the log: nothing is dropped silently.
    pub fn warn_unused(&self) {
        let unused = self.unused.lock().unwrap_or_else(|e| e.into_inner());
        // transformers once saved this table of 0, 1, 2, …; it holds nothing learned.
        let names: Vec<&str> = unused
            .iter()
            .map(String::as_str)
            .filter(|name| !name.ends_with("position_ids"))
            .collect();
        if !names.is_empty() {
            let file = self.blobs.first().map_or("", |b| b.label.as_str());
            tracing::warn!(file, tensors = ?names, "the model does not use these tensors");
        }
    }
}

/// The paths of a part's weight files: whole, sharded, and either as fp16 variant.
fn weight_files(files: &Files, part: &str, stem: &str) -> Result<Vec<String>, LoadError> {
    let names = [
        format!("{stem}.safetensors"),
        format!("{stem}.safetensors.index.json"),
        format!("{stem}.fp16.safetensors"),
        format!("{stem}.safetensors.index.fp16.json"),
    ];
    let Some(name) = names
        .iter()
        .find(|name| files.exists(&format!("{part}/{name}")))
    else {
        return Err(LoadError::MissingFile {
            file: files.label(&format!("{part}/{}", names[0])),
            expected: format!(
                "looked for {}; pickle files (.bin, .ckpt) are not read, convert them",
                names.join(", ")
            ),
        });
    };
    let path = format!("{part}/{name}");
    if !name.ends_with(".json") {
        return Ok(vec![path]);
    }
    let index = files.json(&path)?;
    let label = files.label(&path);
    let map = index
        .get("weight_map")
        .and_then(|map| map.as_object())
        .ok_or_else(|| LoadError::MissingKey {
            file: label.clone(),
            key: "weight_map".into(),
            expected: "an object from tensor names to files".into(),
        })?;
    let mut shards = BTreeSet::new();
    for (tensor, shard) in map {
        // The name comes from a file: it must not lead out of the part's folder.
        let shard = shard
            .as_str()
            .filter(|s| s.ends_with(".safetensors") && !s.contains(['/', '\\', ':']))
            .ok_or_else(|| LoadError::Config {
                file: label.clone(),
                key: format!("weight_map.{tensor}"),
                found: shard.to_string(),
                expected: "the name of a .safetensors file in the same folder".into(),
            })?;
        shards.insert(format!("{part}/{shard}"));
    }
    if shards.is_empty() {
        return Err(LoadError::Config {
            file: label,
            key: "weight_map".into(),
            found: "{}".into(),
            expected: "at least one tensor".into(),
        });
    }
    Ok(shards.into_iter().collect())
}

/// The largest magnitude a dtype can hold: a weight beyond it would become infinite.
fn largest(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => half::f16::MAX.to_f32(),
        DType::BF16 => half::bf16::MAX.to_f32(),
        _ => f32::MAX,
    }
}

/// Little-endian floats of the file as f32, or why not.
pub(crate) fn to_f32(bytes: &[u8], dtype: FileDType, largest: f32) -> Result<Vec<f32>, String> {
    fn convert<const N: usize>(
        bytes: &[u8],
        largest: f32,
        one: impl Fn([u8; N]) -> f32 + Sync,
    ) -> Result<Vec<f32>, String> {
        let (values, _) = bytes.as_chunks::<N>();
        let mut out = vec![0f32; values.len()];
        let fine = out
            .par_chunks_mut(CHUNK)
            .zip(values.par_chunks(CHUNK))
            .map(|(out, values)| {
                let mut fine = true;
                for (out, value) in out.iter_mut().zip(values) {
                    *out = one(*value);
                    // False for NaN too.
                    fine &= out.abs() <= largest;
                }
                fine
            })
            .reduce(|| true, |a, b| a & b);
        if fine {
            return Ok(out);
        }
        let at = out
            .iter()
            .position(|v| !v.is_finite() || v.abs() > largest)
            .unwrap_or_default();
        Err(format!(
            "element {at} is {}; every value must be finite and at most {largest:e} in the chosen dtype",
            out[at]
        ))
    }
    match dtype {
        FileDType::F32 => convert(bytes, largest, f32::from_le_bytes),
        FileDType::F16 => convert(bytes, largest, |b| half::f16::from_le_bytes(b).to_f32()),
        FileDType::Bf16 => convert(bytes, largest, |b| half::bf16::from_le_bytes(b).to_f32()),
        _ => Err("is not of dtype F16, BF16 or F32".into()),
    }
}
