//! Files on their way in are written aside, so that each is seen whole or not at all.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use uuid::Uuid;

/// After this nobody is still uploading: the process that began is gone.
const STALE: Duration = Duration::from_secs(24 * 3600);

/// A new file that was not there before.
pub(crate) fn create(folder: &Path) -> io::Result<(PathBuf, File)> {
    prepare(folder)?;
    let path = folder.join(format!("{}.tmp", Uuid::now_v7()));
    let file = File::options().write(true).create_new(true).open(&path)?;
    Ok((path, file))
}

/// To the disk, with a time to the nanosecond. The system's own is that of its last tick, and inodes
/// are used again: without this, two files a moment apart could have one mark.
pub(crate) fn complete(file: &File) -> io::Result<()> {
    file.set_modified(SystemTime::now())?;
    file.sync_all()
}

/// Puts a file in its place, over another: written in `staging` and synced, then renamed. The folder is the
/// caller's to sync: until then the name can be lost with the power.
pub(crate) fn replace(staging: &Path, target: &Path, bytes: &[u8]) -> io::Result<()> {
    let (path, mut file) = create(staging)?;
    let put = file
        .write_all(bytes)
        .and_then(|()| complete(&file))
        .and_then(|()| fs::rename(&path, target));
    if put.is_err() {
        // What is left of it is only in the way.
        let _ = fs::remove_file(&path);
    }
    put
}

/// Makes the staging folder, but none above it: a store that is gone is not to come back empty.
pub(crate) fn prepare(folder: &Path) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Removes what a process left behind that was killed while writing.
pub(crate) fn sweep(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let age = entry.metadata().and_then(|found| found.modified());
        let stale = age.is_ok_and(|time| {
            SystemTime::now()
                .duration_since(time)
                .is_ok_and(|age| age > STALE)
        });
        if stale && entry.path().extension().is_some_and(|e| e == "tmp") {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_dead_process_left_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let (old, file) = create(folder.path()).unwrap();
        file.set_modified(SystemTime::now() - 2 * STALE).unwrap();
        let (young, _) = create(folder.path()).unwrap();
        sweep(folder.path());
        assert_eq!((old.exists(), young.exists()), (false, true));
    }
}
