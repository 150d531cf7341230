//! Where files come from.

use std::{fs, io::Read as _, path::Path};

use super::{
    DatasetError,
    archive::{self, ArchiveLimits},
};

/// Names longer than this are cut: they go into answers and logs.
const LONGEST_NAME: usize = 255;
/// What operating systems leave in folders.
const LEFTOVERS: [&str; 3] = ["__MACOSX", "Thumbs.db", "desktop.ini"];

/// A file in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// With `/` between folders; never used as a path on this machine.
    pub name: String,
    pub bytes: Vec<u8>,
}

impl File {
    /// A file under the name that a client or an archive gave it.
    pub fn new(name: &str, bytes: Vec<u8>) -> Self {
        let clean = |c| match c {
            '\\' => '/',
            c if char::is_control(c) => char::REPLACEMENT_CHARACTER,
            c => c,
        };
        Self {
            name: name.chars().map(clean).take(LONGEST_NAME).collect(),
            bytes,
        }
    }

    /// The name without its folders.
    pub(super) fn base(&self) -> &str {
        self.name.rsplit('/').next().unwrap_or(&self.name)
    }
}

/// The files of a folder, but not of folders in it; or those of a zip archive.
pub fn from_path(path: &Path, limits: &ArchiveLimits) -> Result<Vec<File>, DatasetError> {
    let unreadable = |path: &Path, reason: String| DatasetError::Unreadable {
        path: path.display().to_string(),
        reason,
    };
    let failed = |error: std::io::Error| unreadable(path, error.to_string());
    let about = fs::metadata(path).map_err(failed)?;
    let mut paths = Vec::new();
    if about.is_file() {
        paths.push(path.to_path_buf());
    } else {
        for entry in fs::read_dir(path).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.is_file() {
                paths.push(path);
            }
        }
    }
    paths.sort();
    let mut files = Vec::with_capacity(paths.len());
    let mut left = limits.total_bytes;
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if is_leftover(&name) {
            continue;
        }
        let most = limits.file_bytes.min(left);
        let mut bytes = Vec::new();
        let read = fs::File::open(&path).and_then(|file| {
            // One more than is taken shows that there is more.
            file.take(most + 1).read_to_end(&mut bytes)
        });
        let read = read.map_err(|error| unreadable(&path, error.to_string()))? as u64;
        if read > most {
            return Err(limits.too_large(&name, left));
        }
        left -= read;
        files.push(File::new(&name, bytes));
    }
    from_upload(files, limits)
}

/// Files as they were sent, those of zip archives among them in their place; sorted by name, so that
/// the order in which they were sent changes nothing.
pub fn from_upload(files: Vec<File>, limits: &ArchiveLimits) -> Result<Vec<File>, DatasetError> {
    let mut all = Vec::with_capacity(files.len());
    for file in files {
        match archive::is_archive(&file.bytes) {
            true => all.extend(archive::unpack(&file, limits)?),
            false if is_leftover(&file.name) => {}
            false => all.push(file),
        }
    }
    if all.len() > limits.files {
        return Err(limits.too_many("all together", all.len()));
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

/// What nobody sent on purpose.
pub(super) fn is_leftover(name: &str) -> bool {
    let hidden = |part: &str| part.starts_with('.') && !matches!(part, "." | "..");
    let leftover = |part: &str| hidden(part) || LEFTOVERS.contains(&part);
    name.split('/').any(leftover)
}
