//! Keeps every writer from overwriting what is read, and from replacing what is not a regular file.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::gguf::shard_paths;
pub use super::replaceable::check_replaceable;
use crate::error::{Error, Result};

/// What a command reads: GGUF files with all their shards, folders with all their files, documents.
#[derive(Debug, Default)]
pub struct Sources {
    files: Vec<Source>,
    /// Folders in their canonical form.
    folders: Vec<PathBuf>,
    /// The same folders as they were given.
    trees: Vec<PathBuf>,
}

#[derive(Debug)]
struct Source {
    path: PathBuf,
    identity: Identity,
    /// What an error calls the file.
    what: String,
}

impl Sources {
    /// The files behind `paths`. Paths that do not exist are left to their readers.
    pub fn new<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Sources {
        let mut sources = Sources::default();
        for path in paths {
            sources.add(path.as_ref());
        }
        sources
    }

    fn add(&mut self, path: &Path) {
        if !path.is_dir() {
            self.add_file(path, "which is read".to_owned());
            for shard in shard_paths(path) {
                self.add_file(&shard, format!("which is read with {}", path.display()));
            }
            return;
        }
        self.folders.extend(path.canonicalize());
        for entry in path.read_dir().into_iter().flatten().flatten() {
            self.add_file(&entry.path(), in_folder(path));
        }
        self.trees.push(path.to_path_buf());
    }

    fn add_file(&mut self, path: &Path, what: String) {
        if let Some(identity) = identity(path) {
            self.files.push(Source { path: path.to_path_buf(), identity, what });
        }
    }

    /// Checks that the file at `path`, given as the argument `name`, may be created or replaced.
    ///
    /// Files are compared by their identity, so it makes no difference whether they are reached through another path, a
    /// symbolic link or a hard link.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the file is one of the sources or exists in a folder among them; those of
    /// [`check_replaceable`].
    pub fn check(&self, name: &'static str, path: &Path) -> Result<()> {
        if !check_replaceable(name, path)? {
            return Ok(());
        }
        self.check_identity(name, path, |_| true)?;
        let inside = |folder: &&PathBuf| path.canonicalize().is_ok_and(|path| path.starts_with(folder));
        if let Some(folder) = self.folders.iter().find(inside) {
            return refused(name, path, &in_folder(folder));
        }
        let Some(wanted) = identity(path) else { return Ok(()) };
        match self.trees.iter().find(|folder| contains(folder, &wanted)) {
            Some(folder) => refused(name, path, &in_folder(folder)),
            None => Ok(()),
        }
    }

    /// [`check`](Sources::check) for a file in which a run keeps unfinished work. In a folder that is read, it does not count as a source.
    ///
    /// # Errors
    /// Those of [`check`](Sources::check).
    pub(crate) fn check_working_file(&self, name: &'static str, path: &Path) -> Result<()> {
        if !check_replaceable(name, path)? {
            return Ok(());
        }
        let is_other = |source: &Source| source.what == "which is read" || source.path.file_name() != path.file_name();
        self.check_identity(name, path, is_other)
    }

    fn check_identity(&self, name: &'static str, path: &Path, counts: impl Fn(&Source) -> bool) -> Result<()> {
        let Some(found) = identity(path) else { return Ok(()) };
        match self.files.iter().find(|source| source.identity == found && counts(source)) {
            Some(source) => refused(name, path, &source.what),
            None => Ok(()),
        }
    }
}

/// Whether a file is in a folder, or in one below it, under any name.
fn contains(folder: &Path, wanted: &Identity) -> bool {
    let (mut folders, mut seen) = (vec![folder.to_path_buf()], HashSet::new());
    while let Some(folder) = folders.pop() {
        // Links may lead back to a folder that contains them.
        if !identity(&folder).is_some_and(|identity| seen.insert(identity)) {
            continue;
        }
        for path in folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                folders.push(path);
            } else if identity(&path).as_ref() == Some(wanted) {
                return true;
            }
        }
    }
    false
}

fn in_folder(folder: &Path) -> String {
    format!("which is a file of the folder {} that is read", folder.display())
}

fn refused(name: &'static str, path: &Path, what: &str) -> Result<()> {
    Err(Error::argument(name, format_args!("{}, {what}", path.display()), "another file"))
}

/// The device and the number of a file.
#[cfg(unix)]
type Identity = (u64, u64);

#[cfg(unix)]
fn identity(path: &Path) -> Option<Identity> {
    use std::os::unix::fs::MetadataExt;
    let metadata = path.metadata().ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// The canonical path of a file.
#[cfg(not(unix))]
type Identity = PathBuf;

#[cfg(not(unix))]
fn identity(path: &Path) -> Option<Identity> {
    path.canonicalize().ok()
}
