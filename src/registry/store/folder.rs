//! A folder, by the system's own calls.
//!
//! `object_store` has a folder too. It follows symbolic links wherever they lead, waits for ever on
//! a named pipe, lists a vanished folder as an empty one and cannot compare and swap; each of these
//! is a promise of this room, so the calls are made here.

use std::{
    fs::{self, File, Metadata, OpenOptions},
    io::{self, ErrorKind, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use futures::stream;

use super::{Expect, Listing, Pieces, Seen, Staged, StoreFault};
use crate::storage::{aside, blocking};

/// Bytes per piece of a download.
const PIECE: usize = 256 * 1024;

#[derive(Debug)]
pub(super) struct Folder {
    root: PathBuf,
    staging: PathBuf,
}

impl Folder {
    pub fn open(root: &Path) -> Result<Self, StoreFault> {
        fs::create_dir_all(root).map_err(|e| at(root, &e))?;
        let root = std::path::absolute(root).map_err(|e| at(root, &e))?;
        let staging = root.join(".staging");
        // A read-only folder can be served; writing then says why it cannot.
        if aside::prepare(&staging).is_ok() {
            aside::sweep(&staging);
        }
        Ok(Self { root, staging })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn staging(&self) -> &Path {
        &self.staging
    }

    /// A missing file in a missing folder is no news about the file.
    fn there(&self) -> Result<(), StoreFault> {
        match fs::metadata(&self.root) {
            Ok(found) if found.is_dir() => Ok(()),
            Ok(_) => Err(StoreFault::Unavailable(format!(
                "{} is not a folder",
                self.root.display()
            ))),
            Err(error) => Err(at(&self.root, &error)),
        }
    }

    pub fn list(&self) -> Result<Listing, StoreFault> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(|e| at(&self.root, &e))? {
            let entry = entry.map_err(|e| at(&self.root, &e))?;
            // No name of ours is other than ASCII; one that is not gets its report below.
            let file = entry.file_name().to_string_lossy().into_owned();
            if super::split(&file).is_none() {
                continue;
            }
            match self.examine(&entry.path()) {
                Ok(Ok((_, found))) => files.push((file, Ok(seen(&found)))),
                Ok(Err(reason)) => files.push((file, Err(reason.into()))),
                // Gone since the folder was read.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => files.push((file, Err(error.to_string()))),
            }
        }
        self.there()?;
        Ok(Listing::of(files))
    }

    /// Where a path really leads and what is there, or why that is not served.
    fn examine(&self, path: &Path) -> io::Result<Result<(PathBuf, Metadata), &'static str>> {
        let mut path = path.to_owned();
        let mut found = fs::symlink_metadata(&path)?;
        if found.is_symlink() {
            // Within the folder links are fine: mounted volumes are made of them.
            path = fs::canonicalize(&path)?;
            if !path.starts_with(fs::canonicalize(&self.root)?) {
                return Ok(Err("a symbolic link out of the folder"));
            }
            found = fs::symlink_metadata(&path)?;
        }
        match found.is_file() {
            true => Ok(Ok((path, found))),
            false => Ok(Err("not a plain file")),
        }
    }

    pub fn head(&self, file: &str) -> Result<Option<Seen>, StoreFault> {
        match self.examine(&self.root.join(file)) {
            Ok(found) => Ok(found.ok().map(|(_, found)| seen(&found))),
            Err(error) if error.kind() == ErrorKind::NotFound => self.there().map(|()| None),
            Err(error) => Err(error.into()),
        }
    }

    pub fn open_file(&self, file: &str) -> Result<Option<(File, Seen)>, StoreFault> {
        let opened = self.examine(&self.root.join(file)).and_then(|found| {
            let Ok((path, _)) = found else {
                return Ok(None);
            };
            // Should the file have become a link or a pipe since, the first fails here and the
            // second does not wait.
            let opened = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(path)?;
            let found = opened.metadata()?;
            Ok(found.is_file().then(|| (opened, seen(&found))))
        });
        match opened {
            Ok(opened) => Ok(opened),
            Err(error) if error.kind() == ErrorKind::NotFound => self.there().map(|()| None),
            Err(error) => Err(error.into()),
        }
    }

    pub fn read(&self, file: &str, limit: u64) -> Result<Option<(Seen, Bytes)>, StoreFault> {
        let Some((opened, seen)) = self.open_file(file)? else {
            return Ok(None);
        };
        if seen.size > limit {
            return Err(StoreFault::TooLarge { limit });
        }
        // Read, not mapped: a map of a file that somebody truncates kills the process.
        let mut bytes = Vec::with_capacity(seen.size as usize);
        opened.take(seen.size).read_to_end(&mut bytes)?;
        Ok(Some((seen, bytes.into())))
    }

    pub fn write(&self, file: &str, bytes: &[u8], expect: &Expect) -> Result<Seen, StoreFault> {
        let (path, mut staged) = aside::create(&self.staging)?;
        let written = staged
            .write_all(bytes)
            .and_then(|()| aside::complete(&staged));
        let result = written
            .map_err(StoreFault::from)
            .and_then(|()| self.commit(file, &path, expect));
        // It is there still if it was linked, or if nothing came of it.
        let _ = fs::remove_file(&path);
        result
    }

    pub fn publish(&self, file: &str, staged: Staged, expect: &Expect) -> Result<Seen, StoreFault> {
        self.commit(file, staged.path(), expect)
    }

    /// Puts a whole, synced file in its place.
    fn commit(&self, file: &str, staged: &Path, expect: &Expect) -> Result<Seen, StoreFault> {
        let target = self.root.join(file);
        let _lock = self.lock()?;
        let found = self.head(file)?;
        if !expect.met_by(found.as_ref()) {
            return Err(StoreFault::Unmet);
        }
        if *expect == Expect::Nothing {
            // A link never replaces: a file dropped by hand this very moment is safe, too.
            match fs::hard_link(staged, &target) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    return Err(StoreFault::Unmet);
                }
                // Some network and FUSE file systems have no hard links.
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::Unsupported | ErrorKind::PermissionDenied
                    ) =>
                {
                    fs::rename(staged, &target)?;
                }
                Err(error) => return Err(error.into()),
            }
        } else {
            fs::rename(staged, &target)?;
        }
        self.sync()?;
        Ok(seen(&fs::symlink_metadata(&target)?))
    }

    pub fn delete(&self, file: &str, expect: &Expect) -> Result<bool, StoreFault> {
        let _lock = self.lock()?;
        let found = self.head(file)?;
        if !expect.met_by(found.as_ref()) {
            return Err(StoreFault::Unmet);
        }
        match fs::remove_file(self.root.join(file)) {
            Ok(()) => self.sync().map(|()| true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Between a look at a file and its replacement no other process of ours gets in.
    fn lock(&self) -> Result<File, StoreFault> {
        self.there()?;
        aside::prepare(&self.staging)?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.staging.join("lock"))?;
        match lock.lock() {
            // Without locks a single process is still safe by the registry's own.
            Err(error) if error.kind() != ErrorKind::Unsupported => Err(error.into()),
            _ => Ok(lock),
        }
    }

    /// The change of the folder itself on the disk.
    fn sync(&self) -> Result<(), StoreFault> {
        Ok(File::open(&self.root)?.sync_all()?)
    }
}

fn at(path: &Path, error: &io::Error) -> StoreFault {
    StoreFault::Unavailable(format!("{}: {error}", path.display()))
}

/// Inode, time and size: another file, or the same one written to, has another tag.
fn seen(found: &Metadata) -> Seen {
    let (seconds, nanos) = (found.mtime(), found.mtime_nsec());
    Seen {
        size: found.len(),
        tag: format!("{:x}-{seconds:x}.{nanos:x}-{:x}", found.ino(), found.len()),
        modified: seconds.try_into().unwrap_or(0),
    }
}

/// A file piece by piece, read where it may block.
pub(super) fn pieces(file: File) -> Pieces {
    Box::pin(stream::try_unfold(file, |mut file| {
        blocking(move || {
            let mut piece = vec![0; PIECE];
            let read = loop {
                match file.read(&mut piece) {
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    other => break other?,
                }
            };
            piece.truncate(read);
            Ok((read > 0).then(|| (Bytes::from(piece), file)))
        })
    }))
}
