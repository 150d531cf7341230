//! Zip archives from strangers: nothing is believed, and nothing is written to disk.

use std::io::{Cursor, Read as _};

use zip::ZipArchive;

use super::{DatasetError, files};

/// How every zip archive with a file in it begins, and an empty one.
const SIGNATURES: [&[u8]; 2] = [b"PK\x03\x04", b"PK\x05\x06"];
/// Files up to this size may be packed as tightly as they like: text is.
const ANY_RATIO: u64 = 1 << 20;

/// Bounds of what is read into memory.
#[derive(Debug, Clone)]
pub struct ArchiveLimits {
    pub files: usize,
    pub file_bytes: u64,
    /// Of all files together, unpacked.
    pub total_bytes: u64,
    /// A file's size over its size in the archive: pictures are packed already.
    pub ratio: u64,
}

impl Default for ArchiveLimits {
    fn default() -> Self {
        Self {
            files: 5000,
            file_bytes: 64 << 20,
            total_bytes: 1 << 30,
            ratio: 100,
        }
    }
}

impl ArchiveLimits {
    pub(super) fn too_many(&self, name: &str, found: usize) -> DatasetError {
        DatasetError::Limit {
            name: name.into(),
            what: format!("has {found} files"),
            limit: self.files.to_string(),
        }
    }

    /// `left` is what was left of the total when `name` was read.
    pub(super) fn too_large(&self, name: &str, left: u64) -> DatasetError {
        let (what, limit) = match left < self.file_bytes {
            true => ("with it the files are too large together", self.total_bytes),
            false => ("is too large", self.file_bytes),
        };
        DatasetError::Limit {
            name: name.into(),
            what: what.into(),
            limit: format!("{limit} bytes"),
        }
    }
}

pub(super) fn is_archive(bytes: &[u8]) -> bool {
    SIGNATURES.iter().any(|start| bytes.starts_with(start))
}

/// The files of an archive, of all its folders. An archive in it stays one.
pub(super) fn unpack(
    archive: &files::File,
    limits: &ArchiveLimits,
) -> Result<Vec<files::File>, DatasetError> {
    let broken = |error: String| DatasetError::Archive {
        name: archive.name.clone(),
        reason: error,
    };
    let mut zip = ZipArchive::new(Cursor::new(archive.bytes.as_slice()))
        .map_err(|error| broken(error.to_string()))?;
    if zip.len() > limits.files {
        return Err(limits.too_many(&archive.name, zip.len()));
    }
    let mut found = Vec::new();
    let mut left = limits.total_bytes;
    for index in 0..zip.len() {
        let entry = zip
            .by_index(index)
            .map_err(|error| broken(format!("file {}: {error}", index + 1)))?;
        let mut file = files::File::new(entry.name(), Vec::new());
        if entry.is_dir() || files::is_leftover(&file.name) {
            continue;
        }
        let by_ratio = entry.compressed_size().saturating_mul(limits.ratio);
        let by_ratio = by_ratio.max(ANY_RATIO);
        let most = limits.file_bytes.min(left);
        // Sizes in headers are claims: what counts is what comes out.
        let read = entry
            .take(most.min(by_ratio) + 1)
            .read_to_end(&mut file.bytes)
            .map_err(|error| broken(format!("`{}`: {error}", file.name)))?
            as u64;
        if read > most {
            return Err(limits.too_large(&file.name, left));
        }
        if read > by_ratio {
            return Err(DatasetError::Limit {
                name: file.name,
                what: format!(
                    "is packed more than {} times smaller than it is",
                    limits.ratio
                ),
                limit: format!("files of {ANY_RATIO} bytes packed so tightly"),
            });
        }
        left -= read;
        found.push(file);
    }
    Ok(found)
}
