//! The names of the files that an interrupted run leaves next to its output.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The suffixes of all files, the log's first.
const SUFFIXES: [&str; 6] =
    [".resume", ".resume-state", ".resume-reference", ".resume-tuning", ".resume-new", ".bits.resume"];

/// The files of one run, named after its output or after another path in the same folder.
#[derive(Debug, Clone)]
pub(in crate::quantize) struct ResumeFiles {
    path: PathBuf,
}

impl ResumeFiles {
    pub(in crate::quantize) fn next_to(path: &Path) -> ResumeFiles {
        ResumeFiles { path: path.to_path_buf() }
    }

    /// The log of finished tensors.
    pub(in crate::quantize) fn log(&self) -> PathBuf {
        self.with_suffix(".resume")
    }

    /// The activations before the next layer.
    pub(in crate::quantize) fn state(&self) -> PathBuf {
        self.with_suffix(".resume-state")
    }

    /// The activations of the full-precision model that tuning compares with.
    pub(in crate::quantize) fn reference(&self) -> PathBuf {
        self.with_suffix(".resume-reference")
    }

    /// The factors that tuning has learned, with the state of the optimizer.
    pub(in crate::quantize) fn tuning(&self) -> PathBuf {
        self.with_suffix(".resume-tuning")
    }

    /// The log of measured sensitivities.
    pub(in crate::quantize) fn sensitivity(&self) -> PathBuf {
        self.with_suffix(".bits.resume")
    }

    /// The folder for temporary files.
    pub(in crate::quantize) fn folder(&self) -> &Path {
        match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        }
    }

    /// All paths. Some of the files exist.
    pub(in crate::quantize) fn all(&self) -> [PathBuf; SUFFIXES.len()] {
        SUFFIXES.map(|suffix| self.with_suffix(suffix))
    }

    /// Removes those files that exist.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(in crate::quantize) fn remove(&self) -> Result<()> {
        for file in self.all().iter().filter(|file| file.exists()) {
            std::fs::remove_file(file).map_err(|source| Error::io(file, source))?;
        }
        Ok(())
    }

    fn with_suffix(&self, suffix: &str) -> PathBuf {
        let mut name = self.path.file_name().unwrap_or_default().to_os_string();
        name.push(suffix);
        self.path.with_file_name(name)
    }
}
