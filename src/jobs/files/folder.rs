//! The files of jobs in a folder: `ROOT/JOB/NAME`.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use super::{FileName, JobId, StoredFile};
use crate::storage::{StoreFault, aside};

#[derive(Debug)]
pub(super) struct Folder {
    root: PathBuf,
    staging: PathBuf,
}

impl Folder {
    pub fn open(root: &Path) -> Result<Self, StoreFault> {
        let at = |error: io::Error| StoreFault::Unavailable(format!("{}: {error}", root.display()));
        fs::create_dir_all(root).map_err(at)?;
        let root = std::path::absolute(root).map_err(at)?;
        // No job is called so.
        let staging = root.join(".staging");
        aside::prepare(&staging)?;
        aside::sweep(&staging);
        Ok(Self { root, staging })
    }

    fn of(&self, job: JobId) -> PathBuf {
        self.root.join(job.to_string())
    }

    /// Whole and on the disk, or not at all: written aside, synced, renamed; and then the folders, or
    /// the name could be lost with the power.
    pub fn put(&self, job: JobId, name: &FileName, bytes: &[u8]) -> Result<(), StoreFault> {
        let target = self.of(job).join(name.as_str());
        let folder = target.parent().unwrap_or(&self.root);
        // First: it fails where the root is gone, which the job's folder is not to bring back.
        aside::prepare(&self.staging)?;
        fs::create_dir_all(folder)?;
        aside::replace(&self.staging, &target, bytes)?;
        for above in folder.ancestors() {
            File::open(above)?.sync_all()?;
            if above == self.root {
                break;
            }
        }
        Ok(())
    }

    pub fn get(&self, job: JobId, name: &FileName) -> Result<Option<Vec<u8>>, StoreFault> {
        let opened = OpenOptions::new()
            .read(true)
            // Neither a link nor a pipe is ours.
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(self.of(job).join(name.as_str()));
        let mut file = match opened {
            Err(error) if is_missing(&error) => return self.there().map(|()| None),
            other => other?,
        };
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    pub fn list(&self, job: JobId) -> Result<Vec<StoredFile>, StoreFault> {
        let (root, mut found) = (self.of(job), Vec::new());
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            let entries = match fs::read_dir(&folder) {
                Err(error) if is_missing(&error) => continue,
                other => other?,
            };
            for entry in entries {
                let entry = entry?;
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    folders.push(entry.path());
                } else if kind.is_file() {
                    found.extend(stored(&root, &entry)?);
                }
            }
        }
        self.there()?;
        Ok(found)
    }

    pub fn jobs(&self) -> Result<Vec<JobId>, StoreFault> {
        self.there()?;
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            let name = entry?.file_name();
            found.extend(name.to_str().and_then(|name| name.parse::<JobId>().ok()));
        }
        Ok(found)
    }

    pub fn delete(&self, job: JobId, name: &FileName) -> Result<bool, StoreFault> {
        match fs::remove_file(self.of(job).join(name.as_str())) {
            Err(error) if is_missing(&error) => self.there().map(|()| false),
            other => Ok(other.map(|()| true)?),
        }
    }

    pub fn delete_all(&self, job: JobId) -> Result<(), StoreFault> {
        match fs::remove_dir_all(self.of(job)) {
            Err(error) if is_missing(&error) => self.there(),
            other => Ok(other?),
        }
    }

    /// A missing file in a missing folder is no news about the file.
    fn there(&self) -> Result<(), StoreFault> {
        match fs::metadata(&self.staging) {
            Ok(_) => Ok(()),
            Err(error) => {
                let reason = format!("{}: {error}", self.root.display());
                Err(StoreFault::Unavailable(reason))
            }
        }
    }
}

/// A file of ours: one whose name is.
fn stored(root: &Path, entry: &fs::DirEntry) -> io::Result<Option<StoredFile>> {
    let path = entry.path();
    let name = path.strip_prefix(root).ok().and_then(Path::to_str);
    let Some(name) = name.and_then(|name| FileName::new(name).ok()) else {
        return Ok(None);
    };
    match entry.metadata() {
        Ok(found) => Ok(Some(StoredFile {
            name,
            size: found.len(),
        })),
        // Gone since the folder was read.
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}
