//! Files on their way in: written aside, hashed, counted, and only then seen.

use std::{
    fmt,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use memmap2::Mmap;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};

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
}
