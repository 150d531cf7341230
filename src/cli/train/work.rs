//! Where a run that is not finished lies: its checkpoint, and what it painted on the way.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use crate::{cli::Failure, registry::AdapterName, storage::aside};

/// A folder of one run.
pub(super) struct Work {
    folder: PathBuf,
}

impl Work {
    /// `DATA/training/NAME`, made if it is not there.
    pub fn open(data: &Path, name: &AdapterName) -> Result<Self, Failure> {
        let folder = data.join("training").join(name.to_string());
        let made = fs::create_dir_all(folder.join("samples"));
        made.map_err(|error| failed(&folder, "make", &error))?;
        aside::sweep(&folder.join("incoming"));
        Ok(Self { folder })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn place(&self) -> PathBuf {
        self.folder.join("checkpoint.safetensors")
    }

    /// The bytes of the last checkpoint, if there is one.
    pub fn checkpoint(&self) -> Result<Option<Vec<u8>>, Failure> {
        match fs::read(self.place()) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(&self.place(), "read", &error)),
        }
    }

    /// Puts a checkpoint in the place of the last: after a crash at any moment one of the two is there,
    /// whole.
    pub fn keep(&self, checkpoint: &[u8]) -> Result<(), Failure> {
        let put = || -> io::Result<()> {
            aside::replace(&self.folder.join("incoming"), &self.place(), checkpoint)?;
            // The name is on the disk with its folder.
            File::open(&self.folder)?.sync_all()
        };
        put().map_err(|error| failed(&self.place(), "write", &error))
    }

    /// A picture painted on the way.
    pub fn sample(&self, step: u32, index: usize, png: &[u8]) -> Result<PathBuf, Failure> {
        let path = self.folder.join(format!("samples/{step:05}-{index}.png"));
        fs::write(&path, png).map_err(|error| failed(&path, "write", &error))?;
        Ok(path)
    }

    /// Removes the checkpoint: the run is done, or to begin anew.
    pub fn forget(&self) -> Result<(), Failure> {
        match fs::remove_file(self.place()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(failed(&self.place(), "remove", &error))
            }
            _ => Ok(()),
        }
    }
}

fn failed(path: &Path, what: &str, error: &io::Error) -> Failure {
    Failure::new(format!("cannot {what} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_checkpoint_is_kept_whole_until_it_is_forgotten() {
        let data = tempfile::tempdir().unwrap();
        let name: AdapterName = "fox".parse().unwrap();
        let work = Work::open(data.path(), &name).unwrap();
        assert_eq!(work.checkpoint().unwrap(), None);
        work.keep(b"one").unwrap();
        work.keep(b"another").unwrap();
        // As another process finds it.
        let work = Work::open(data.path(), &name).unwrap();
        assert_eq!(work.checkpoint().unwrap().as_deref(), Some(&b"another"[..]));
        assert_eq!(
            fs::read_dir(work.folder.join("incoming")).unwrap().count(),
            0
        );
        work.forget().unwrap();
        work.forget().unwrap();
        assert_eq!(work.checkpoint().unwrap(), None);
    }
}
