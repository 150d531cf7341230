//! A file that is seen whole or not at all.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Write as _},
    path::{Path, PathBuf},
};

use uuid::Uuid;

/// A whole file beside its place, under another name; it goes if it is not put there.
#[derive(Debug)]
pub(super) struct Staged {
    path: PathBuf,
    place: PathBuf,
}

impl Staged {
    /// Writes the bytes to the disk, in the folder where they will belong.
    pub fn write(place: &Path, bytes: &[u8]) -> io::Result<Self> {
        let name = place.file_name().ok_or(ErrorKind::IsADirectory)?;
        let path = format!(".{}.{}.tmp", name.to_string_lossy(), Uuid::now_v7());
        let staged = Self {
            path: place.with_file_name(path),
            place: place.into(),
        };
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .open(&staged.path)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        Ok(staged)
    }

    /// Where it is until then.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the file in its place; over another only if that may be.
    pub fn publish(self, replace: bool) -> io::Result<()> {
        if replace {
            return fs::rename(&self.path, &self.place);
        }
        // A link never replaces, not even a file that came this very moment.
        match fs::hard_link(&self.path, &self.place) {
            // Some network and FUSE file systems have no hard links.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::Unsupported | ErrorKind::PermissionDenied
                ) && !self.place.exists() =>
            {
                fs::rename(&self.path, &self.place)
            }
            result => result,
        }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Moved to its place, or nothing to be done about.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_files_are_seen_and_none_is_replaced_unasked() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("a.safetensors");
        let names = || fs::read_dir(&folder).unwrap().count();
        drop(Staged::write(&place, b"abandoned").unwrap());
        assert_eq!(names(), 0);

        let first = Staged::write(&place, b"first").unwrap();
        assert!(!place.exists());
        first.publish(false).unwrap();
        let error = Staged::write(&place, b"second")
            .unwrap()
            .publish(false)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&place).unwrap(), b"first");

        let third = Staged::write(&place, b"third").unwrap();
        third.publish(true).unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"third");
        assert_eq!(names(), 1);
    }
}
