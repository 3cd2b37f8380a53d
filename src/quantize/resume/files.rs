//! The names of the files that an interrupted run leaves next to its output.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::error::{Error, Result};

/// The suffixes of all files, the log's first and that of [`ResumeFiles::mark_done`] last.
const SUFFIXES: [&str; 7] =
    [".resume", ".resume-state", ".resume-reference", ".resume-tuning", ".resume-new", ".bits.resume", ".resume-done"];

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

    /// Notes that `made` is the complete output, which only has to be renamed. What is left of the run after that is of no use.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(in crate::quantize) fn mark_done(&self, made: &Path) -> Result<()> {
        let mark = self.with_suffix(".resume-done");
        let failed = |source| Error::io(&mark, source);
        std::fs::write(&mark, stamp(made).map_err(failed)?).map_err(failed)
    }

    /// Whether the file at `path` is the complete output of the run.
    fn is_done(&self, path: &Path) -> bool {
        let mark = std::fs::read_to_string(self.with_suffix(".resume-done"));
        mark.is_ok_and(|mark| stamp(path).is_ok_and(|found| found == mark))
    }

    /// Removes these files, and those of the candidates of a search, if the run was killed when its output was complete.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(in crate::quantize) fn remove_if_done(&self) -> Result<()> {
        if !self.is_done(&self.path) {
            return Ok(());
        }
        let candidate = candidate_path(&self.path, "");
        let candidate = candidate.file_name().unwrap_or_default().as_encoded_bytes();
        let prefix = candidate.strip_suffix(CANDIDATE).unwrap_or(candidate);
        for entry in self.folder().read_dir().into_iter().flatten().flatten() {
            let name = entry.file_name();
            let rest = name.as_encoded_bytes().strip_prefix(prefix);
            let is_candidate = rest.is_some_and(|rest| rest.windows(CANDIDATE.len()).any(|part| part == CANDIDATE));
            if is_candidate && entry.file_type().is_ok_and(|kind| kind.is_file()) {
                std::fs::remove_file(entry.path()).map_err(|source| Error::io(entry.path(), source))?;
            }
        }
        self.remove()
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

/// The end of the names of the files of candidates.
const CANDIDATE: &[u8] = b".gguf";

/// Where a search for a recipe keeps the file of a candidate while it is measured.
pub(in crate::quantize) fn candidate_path(out: &Path, recipe: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(out.file_name().unwrap_or_default());
    name.push(format!(".{recipe}.gguf"));
    out.with_file_name(name)
}

/// The length of a file and the time of its last change, which stay the same when it is renamed.
fn stamp(path: &Path) -> std::io::Result<String> {
    let metadata = path.metadata()?;
    let changed = metadata.modified()?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(format!("{} {}", metadata.len(), changed.as_nanos()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_finished_run_are_removed_and_those_of_another_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let files = ResumeFiles::next_to(&at("model.gguf"));
        let left = ["model.gguf.resume", ".model.gguf.gptq.gguf", ".model.gguf.rtn.gguf.bits.resume"].map(at);
        let others = [".model.gguf", ".other.gguf.rtn.gguf", "model.gguf.txt"].map(at);
        left.iter().chain(&others).for_each(|path| std::fs::write(path, "x").unwrap());
        std::fs::write(at("model.gguf"), "an older output").unwrap();
        std::fs::write(at("made"), "the output").unwrap();
        files.mark_done(&at("made")).unwrap();
        files.remove_if_done().unwrap();
        assert!(left.iter().chain(&others).all(|path| path.exists()), "it was killed before it was renamed");
        std::fs::rename(at("made"), at("model.gguf")).unwrap();
        files.remove_if_done().unwrap();
        assert!(!left.iter().any(|path| path.exists()) && others.iter().all(|path| path.exists()));
        assert!(at("model.gguf").exists() && !at("model.gguf.resume-done").exists());
    }
}
