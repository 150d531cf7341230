//! Files on their way in: written aside, hashed, counted, and only then seen.

use std::{
    fmt,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use memmap2::Mmap;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use uuid::Uuid;

use super::{super::Generation, StoreFault};
use crate::storage::{aside, blocking};

/// A whole file nobody else knows of; it goes when this is dropped.
#[derive(Debug)]
pub struct Staged {
    path: Removed,
    pub size: u64,
    pub generation: Generation,
}

/// A path whose file goes with it.
#[derive(Debug)]
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // Moved to its place, or nothing to be done about.
        let _ = fs::remove_file(&self.0);
    }
}

impl Staged {
    pub(super) fn path(&self) -> &Path {
        &self.path.0
    }

    /// The content without a copy of it.
    pub fn map(&self) -> io::Result<Bytes> {
        if self.size == 0 {
            return Ok(Bytes::new());
        }
        // SAFETY: nobody else knows the file's name, and this process no longer writes to it.
        let map = unsafe { Mmap::map(&File::open(self.path())?)? };
        Ok(Bytes::from_owner(map))
    }
}

/// Why an upload was not taken.
#[derive(Debug)]
pub(in super::super) enum SpoolFault {
    Body(String),
    TooLarge,
    Store(StoreFault),
}

impl<E: Into<StoreFault>> From<E> for SpoolFault {
    fn from(error: E) -> Self {
        Self::Store(error.into())
    }
}

/// Writes a body of at most `limit` bytes aside.
pub(in super::super) async fn spool<E: fmt::Display>(
    folder: &Path,
    body: impl Stream<Item = Result<Bytes, E>>,
    limit: u64,
) -> Result<Staged, SpoolFault> {
    let folder = folder.to_owned();
    let (path, file) = blocking(move || Ok(aside::create(&folder)?)).await?;
    let path = Removed(path);
    let mut file = tokio::fs::File::from_std(file);
    let (size, generation) = drain(&mut file, body, limit).await?;
    let file = file.into_std().await;
    blocking(move || Ok(aside::complete(&file)?)).await?;
    Ok(Staged {
        path,
        size,
        generation,
    })
}

async fn drain<E: fmt::Display>(
    into: &mut (impl AsyncWrite + Unpin),
    body: impl Stream<Item = Result<Bytes, E>>,
    limit: u64,
) -> Result<(u64, Generation), SpoolFault> {
    let mut body = std::pin::pin!(body);
    let (mut size, mut hash) = (0u64, Sha256::new());
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|error| SpoolFault::Body(error.to_string()))?;
        size += piece.len() as u64;
        if size > limit {
            return Err(SpoolFault::TooLarge);
        }
        hash.update(&piece);
        into.write_all(&piece).await?;
    }
    into.flush().await?;
    Ok((size, Generation::finish(hash)))
}

/// How the folders of processes without one of their own begin.
const UPLOADS: &str = "lorikeet-uploads-";
/// What a living process holds in its folder.
const LOCK: &str = "lock";

/// A folder for uploads below `parent`, which nobody else can have made before. Those of processes that
/// are gone are removed.
pub fn fresh_staging(parent: &Path) -> PathBuf {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(UPLOADS) && is_abandoned(&entry.path()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    parent.join(format!("{UPLOADS}{}", Uuid::new_v4()))
}

/// Whether a folder is this user's and its process is gone. One without a lock may be in the making.
fn is_abandoned(folder: &Path) -> bool {
    // SAFETY: the call takes nothing and cannot fail.
    let us = unsafe { libc::geteuid() };
    let ours = fs::symlink_metadata(folder).is_ok_and(|f| f.is_dir() && f.uid() == us);
    ours && File::open(folder.join(LOCK)).is_ok_and(|lock| lock.try_lock().is_ok())
}

/// Says that the folder's process lives, as long as the file is open. `None` where the system has no
/// locks; nobody takes the folder for abandoned then.
pub(super) fn hold(folder: &Path) -> Option<File> {
    let made = folder.join("lock.new");
    let lock = File::create(&made).ok()?;
    // Locked before it has its name: nobody sees it open.
    let held = lock.try_lock().is_ok() && fs::rename(&made, folder.join(LOCK)).is_ok();
    held.then_some(lock)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::stream;

    use super::*;

    fn body(pieces: &[&'static [u8]]) -> impl Stream<Item = Result<Bytes, Infallible>> + use<> {
        stream::iter(
            pieces
                .iter()
                .map(|p| Ok(Bytes::from_static(p)))
                .collect::<Vec<_>>(),
        )
    }

    #[tokio::test]
    async fn a_full_disk_is_told_from_every_other_trouble() {
        // The kernel's own "no space left on device", at the first byte that reaches it.
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut full = tokio::fs::File::from_std(full);
        let fault = drain(&mut full, body(&[b"abc"]), 10).await.unwrap_err();
        assert!(
            matches!(fault, SpoolFault::Store(StoreFault::Full(_))),
            "{fault:?}"
        );
    }

    #[tokio::test]
    async fn an_upload_leaves_nothing_behind_but_what_was_asked() {
        let folder = tempfile::tempdir().unwrap();
        let left = || fs::read_dir(folder.path()).unwrap().count();
        let staged = spool(folder.path(), body(&[b"ab", b"c"]), 3).await.unwrap();
        assert_eq!(staged.generation, Generation::of(b"abc"));
        assert_eq!((&staged.map().unwrap()[..], left()), (&b"abc"[..], 1));
        drop(staged);
        assert_eq!(left(), 0);

        let fault = spool(folder.path(), body(&[b"ab", b"cd"]), 3)
            .await
            .unwrap_err();
        assert!(matches!(fault, SpoolFault::TooLarge));
        let broken = stream::iter([Ok(Bytes::from_static(b"ab")), Err("gone")]);
        let fault = spool(folder.path(), broken, 3).await.unwrap_err();
        assert!(matches!(fault, SpoolFault::Body(why) if why == "gone"));
        assert_eq!(left(), 0);
    }

    #[test]
    fn the_folder_of_a_process_that_is_gone_is_removed_and_a_living_ones_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let [mut gone, living, other] = [(); 3].map(|()| {
            let folder = fresh_staging(parent.path());
            aside::prepare(&folder).unwrap();
            aside::create(&folder).unwrap();
            (hold(&folder).unwrap(), folder)
        });
        let made = parent.path().join(format!("{UPLOADS}in-the-making"));
        fs::create_dir(&made).unwrap();
        // A lock goes with its process.
        gone.0 = File::open("/dev/null").unwrap();
        // Nothing of ours, whatever it is called.
        let elsewhere = tempfile::tempdir().unwrap();
        drop(other.0);
        fs::rename(&other.1, elsewhere.path().join("kept")).unwrap();
        std::os::unix::fs::symlink(elsewhere.path().join("kept"), &other.1).unwrap();
        fresh_staging(parent.path());
        assert!(!gone.1.exists() && living.1.exists() && made.exists());
        assert!(elsewhere.path().join("kept/lock").exists());
    }
}
