//! The header of a safetensors file, read without trusting it.
//!
//! Layout: eight bytes little-endian header length, a JSON object from tensor name to
//! `{dtype, shape, data_offsets}`, then the data. See
//! <https://github.com/huggingface/safetensors#format>. The `safetensors` crate's reader wants the
//! whole file in memory and does not say which tensor a truncated file lacks.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{LoadError, source::Blob};

/// The limit of the reference reader.
const MAX_HEADER: u64 = 100_000_000;
/// Weights have at most four dimensions; a file may hold other things, but nothing absurd.
const MAX_RANK: usize = 8;

/// Element types that weights come in, and those that adapters keep single numbers in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileDType {
    F32,
    F16,
    Bf16,
    F64,
    I64,
    I32,
    U8,
    Bool,
    /// Anything else: harmless as long as nobody asks for the tensor.
    Other,
}

impl FileDType {
    /// The element type of this name, and its bytes where they are known.
    fn named(name: &str) -> (Self, Option<usize>) {
        match name {
            "F32" => (Self::F32, Some(4)),
            "F16" => (Self::F16, Some(2)),
            "BF16" => (Self::Bf16, Some(2)),
            "F64" => (Self::F64, Some(8)),
            "I64" => (Self::I64, Some(8)),
            "I32" => (Self::I32, Some(4)),
            "U8" => (Self::U8, Some(1)),
            "BOOL" => (Self::Bool, Some(1)),
            _ => (Self::Other, None),
        }
    }
}

/// Where a tensor lies in its file.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub dtype: FileDType,
    pub shape: Vec<usize>,
    /// From the beginning of the file.
    pub start: u64,
    pub len: usize,
}

/// What a header says.
#[derive(Debug)]
pub(crate) struct Header {
    /// The tensors by name; every one lies within the file and has the bytes its shape needs.
    pub entries: BTreeMap<String, Entry>,
    /// The free texts of `__metadata__`; what is not a text there is kept as its JSON.
    pub metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// Reads and checks the header of a file.
pub(crate) fn read_header(blob: &Blob) -> Result<Header, LoadError> {
    let bad = |reason: String| LoadError::Header {
        file: blob.label.clone(),
        reason,
    };
    if blob.len < 8 {
        return Err(bad(format!("{} bytes are too few for a header", blob.len)));
    }
    let mut prefix = [0; 8];
    prefix.copy_from_slice(&blob.read_at(0, 8)?);
    let header_len = u64::from_le_bytes(prefix);
    if header_len > MAX_HEADER || header_len > blob.len - 8 {
        return Err(bad(format!(
            "the header claims {header_len} bytes; the file has {} and the limit is {MAX_HEADER}",
            blob.len
        )));
    }
    let data_start = 8 + header_len;
    let header = blob.read_at(8, header_len as usize)?;
    let mut raw: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&header).map_err(|e| bad(format!("the header is not JSON: {e}")))?;
    let metadata = match raw.remove("__metadata__") {
        Some(serde_json::Value::Object(texts)) => texts
            .into_iter()
            .map(|(key, value)| match value {
                serde_json::Value::String(text) => (key, text),
                other => (key, other.to_string()),
            })
            .collect(),
        _ => BTreeMap::new(),
    };
    let entries = raw
        .into_iter()
        .map(|(name, value)| {
            let entry = check_entry(blob, data_start, &name, value)?;
            Ok((name, entry))
        })
        .collect::<Result<BTreeMap<_, _>, LoadError>>()?;
    check_layout(blob, data_start, &entries)?;
    Ok(Header { entries, metadata })
}

/// The tensors must follow one another to the end of the file, as the format demands: bytes that
/// belong to two tensors, or to none, mean that the header is not this file's.
fn check_layout(
    blob: &Blob,
    data_start: u64,
    entries: &BTreeMap<String, Entry>,
) -> Result<(), LoadError> {
    let mut in_order: Vec<(&String, &Entry)> = entries.iter().collect();
    // By the end too: an empty tensor stands before the one that starts where it does.
    in_order.sort_by_key(|(_, entry)| (entry.start, entry.len));
    let mut end = data_start;
    for (name, entry) in in_order {
        if entry.start != end {
            return Err(LoadError::Tensor {
                file: blob.label.clone(),
                tensor: name.clone(),
                reason: format!(
                    "starts at byte {} of the file; the tensor before it ends at {end}",
                    entry.start
                ),
            });
        }
        end += entry.len as u64;
    }
    if end != blob.len {
        return Err(LoadError::Header {
            file: blob.label.clone(),
            reason: format!(
                "the last tensor ends at byte {end}, the file at {}",
                blob.len
            ),
        });
    }
    Ok(())
}

fn check_entry(
    blob: &Blob,
    data_start: u64,
    name: &str,
    value: serde_json::Value,
) -> Result<Entry, LoadError> {
    let fault = |reason: String| LoadError::Tensor {
        file: blob.label.clone(),
        tensor: name.into(),
        reason,
    };
    let raw: RawEntry =
        serde_json::from_value(value).map_err(|e| fault(format!("bad header entry: {e}")))?;
    let [from, to] = raw.data_offsets;
    let (start, end) = match (data_start.checked_add(from), data_start.checked_add(to)) {
        (Some(start), Some(end)) if start <= end => (start, end),
        _ => {
            return Err(fault(format!(
                "data_offsets [{from}, {to}] are not a range"
            )));
        }
    };
    if end > blob.len {
        return Err(LoadError::Truncated {
            file: blob.label.clone(),
            tensor: name.into(),
            needed: end,
            found: blob.len,
        });
    }
    if raw.shape.len() > MAX_RANK {
        return Err(fault(format!(
            "has {} dimensions; at most {MAX_RANK} are read",
            raw.shape.len()
        )));
    }
    let (dtype, size) = FileDType::named(&raw.dtype);
    let len = usize::try_from(end - start)
        .map_err(|_| fault("is larger than this machine can address".into()))?;
    if let Some(size) = size {
        let needed = raw
            .shape
            .iter()
            .try_fold(size, |n: usize, dim| n.checked_mul(*dim));
        if needed != Some(len) {
            return Err(fault(format!(
                "shape {:?} of {} does not fill its {len} bytes",
                raw.shape, raw.dtype
            )));
        }
    }
    Ok(Entry {
        dtype,
        shape: raw.shape,
        start,
        len,
    })
}
