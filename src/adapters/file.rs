//! The file of one adapter, which is never believed.

use std::borrow::Cow;

use super::AdapterError;
use crate::models::{
    header::{Entry, FileDType, Header, read_header},
    source::Blob,
    weights::to_f32,
};

/// The largest file: a whole SD 1.x UNet's difference in f32 has 3.4 GB.
const MAX_BYTES: u64 = 4 << 30;
/// A full LyCORIS file of SDXL has about 10,000.
const MAX_TENSORS: u64 = 1 << 16;
/// Products of so large numbers, six of which a Tucker LoHa multiplies, are still finite in f32.
pub(super) const MAX_VALUE: f32 = 1e6;

/// A file whose header was checked.
#[derive(Debug)]
pub(super) struct AdapterFile {
    blob: Blob,
    pub header: Header,
}

impl AdapterFile {
    pub fn open(blob: Blob) -> Result<Self, AdapterError> {
        let limit = |what, found, limit| match found > limit {
            true => Err(AdapterError::Limit {
                file: blob.label.clone(),
                what,
                found,
                limit,
            }),
            false => Ok(()),
        };
        limit("bytes", blob.len, MAX_BYTES)?;
        if let Some(found) = foreign(&blob)? {
            return Err(AdapterError::Pickle {
                file: blob.label,
                found,
            });
        }
        let header = read_header(&blob)?;
        limit("tensors", header.entries.len() as u64, MAX_TENSORS)?;
        Ok(Self { blob, header })
    }

    /// How errors name the file.
    pub fn label(&self) -> String {
        self.blob.label.clone()
    }

    pub fn fault(&self, key: &str, reason: impl Into<String>) -> AdapterError {
        AdapterError::Key {
            file: self.label(),
            key: key.into(),
            reason: reason.into(),
        }
    }

    /// The bytes of a tensor.
    pub fn bytes(&self, entry: &Entry) -> Result<Cow<'_, [u8]>, AdapterError> {
        Ok(self.blob.read_at(entry.start, entry.len)?)
    }

    /// A single number of any type.
    pub fn number(&self, key: &str, entry: &Entry) -> Result<f64, AdapterError> {
        if entry.shape.iter().any(|dim| *dim != 1) {
            let reason = format!("has shape {:?} and must be one number", entry.shape);
            return Err(self.fault(key, reason));
        }
        let bytes = self.bytes(entry)?;
        let number = match (entry.dtype, &*bytes) {
            (FileDType::F64, [a, b, c, d, e, f, g, h]) => {
                f64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h])
            }
            (FileDType::I64, [a, b, c, d, e, f, g, h]) => {
                i64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]) as f64
            }
            (FileDType::I32, [a, b, c, d]) => i32::from_le_bytes([*a, *b, *c, *d]).into(),
            (FileDType::U8 | FileDType::Bool, [byte]) => (*byte).into(),
            _ => {
                let values =
                    to_f32(&bytes, entry.dtype, f32::MAX).map_err(|r| self.fault(key, r))?;
                values.first().copied().unwrap_or(f32::NAN).into()
            }
        };
        check_number(number).map_err(|reason| self.fault(key, reason))
    }
}

/// An alpha or a flag, within the bounds of every other value.
pub(super) fn check_number(number: f64) -> Result<f64, String> {
    // False for NaN too.
    if number.abs() <= MAX_VALUE.into() {
        return Ok(number);
    }
    Err(format!(
        "is {number:e}; no adapter needs more than {MAX_VALUE:e}"
    ))
}

/// What a file is whose first bytes are those of something else that people upload.
fn foreign(blob: &Blob) -> Result<Option<&'static str>, AdapterError> {
    let start = blob.read_at(0, blob.len.min(9) as usize)?;
    Ok(match *start {
        // A header's length may have any bytes; what follows it then is the header.
        [_, _, _, _, _, _, _, _, b'{'] => None,
        [b'P', b'K', 3, 4, ..] | [b'P', b'K', 5, 6, ..] => {
            Some("a zip archive (a PyTorch pickle: .pt, .bin, .ckpt)")
        }
        // The opcode PROTO and a version.
        [0x80, 2..=5, ..] => Some("a Python pickle (.pt, .bin, .ckpt)"),
        _ => None,
    })
}
