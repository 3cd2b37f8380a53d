//! The folder of the prefix cache on disk.
//!
//! ```text
//! DIR/                              chosen by the user
//!   nybble-0123456789abcdef/        of one model, cache type and version of nybble
//!     00042-<hash of prefix>.page   a page after 42 others
//!     00062-<hash of prefix>.state  a page with recurrent states
//! ```
//!
//! Names are all that a process must know of the files before it reads them. The time of the last change of a file is that of its last
//! use; all pages of a request get the same one, and of these the deepest are removed first, since they need those before them.
//! Everything else in the folder is left alone. Links are not followed.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, FileType, Metadata};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::error::{Error, Result};
use crate::format::atomic_file::{AtomicFile, remove_all_leftovers};
use crate::model::{distrust, distrust_owner, is_page_file};

/// The hash of a prefix.
pub(in crate::engine) type Prefix = [u8; 32];

/// The largest number of files.
pub(super) const MAX_FILES: usize = 1 << 17;
/// How long an empty folder of a model stays.
const UNUSED: Duration = Duration::from_secs(24 * 60 * 60);
/// The beginning of the names of folders of models, before 16 hexadecimal digits.
const FOLDER: &str = "nybble-";
const DIGITS: usize = 16;

/// A page on disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stored {
    /// Number of pages before it.
    pub(super) index: usize,
    /// Whether recurrent states are with it.
    pub(super) has_states: bool,
    pub(super) bytes: u64,
    /// Whether it may be read and replaced. Something else has its name otherwise.
    pub(super) is_usable: bool,
}

/// The files in the folder.
#[derive(Debug, Default)]
pub(super) struct Listed {
    /// Pages of the model.
    pub(super) own: HashMap<Prefix, Stored>,
    /// Bytes of the pages of all models.
    pub(super) bytes: u64,
}

/// The folder of a model's pages, among those of other models.
#[derive(Debug)]
pub(super) struct Folder {
    base: PathBuf,
    own: PathBuf,
}

/// A page of any model.
struct Page {
    path: PathBuf,
    used: SystemTime,
    index: usize,
    bytes: u64,
    /// Its prefix, in the model's own folder.
    own: Option<Prefix>,
}

impl Folder {
    /// The folder of the model whose first pages have this prefix, in the folder `base`. Both are made if they do not exist.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for something other than a folder, or one of the two that others may write to;
    /// [`Error::Io`].
    pub(super) fn open(base: &Path, first: &Prefix) -> Result<Folder> {
        let base = std::path::absolute(base).map_err(|source| Error::io(base, source))?;
        let own = base.join(format!("{FOLDER}{}", &hex(first)[..DIGITS]));
        let folder = Folder { base, own };
        if folder.base.exists() && !folder.base.is_dir() {
            return Err(Error::argument("cache_dir", folder.base.display(), "a folder, or a name for a new one"));
        }
        let check = || match folder.distrust() {
            Some(found) => Err(Error::argument("cache_dir", found, "a folder that only this user may write to")),
            None => Ok(()),
        };
        check()?;
        folder.make().map_err(|source| Error::io(&folder.own, source))?;
        check()?;
        folder.of_models().iter().for_each(|folder| remove_all_leftovers(folder));
        Ok(folder)
    }

    /// Makes both folders, for this user only, unless they exist.
    fn make(&self) -> std::io::Result<()> {
        let mut builder = DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        {
            use std::os::unix::fs::DirBuilderExt;
            builder.mode(0o700);
        }
        builder.create(&self.own)
    }

    /// The folder to which others may write by now, and why. `None` where there is no folder, either.
    pub(super) fn distrust(&self) -> Option<String> {
        // The user may have chosen a link, but nybble makes none.
        let base = self.base.metadata().ok().and_then(|base| distrust_base(&base));
        let own = self.own.symlink_metadata().ok().and_then(|own| distrust_pages(&own));
        let named = |folder: &Path, reason: String| format!("{}, {reason}", folder.display());
        base.map(|reason| named(&self.base, reason)).or_else(|| own.map(|reason| named(&self.own, reason)))
    }

    /// The folders of all models that this user trusts.
    fn of_models(&self) -> Vec<PathBuf> {
        let entries = self.base.read_dir().into_iter().flatten().flatten();
        let is_model = |name: &str| {
            let digits = name.strip_prefix(FOLDER).map(str::as_bytes);
            digits.is_some_and(|digits| digits.len() == DIGITS && digits.iter().all(|d| nibble(*d).is_some()))
        };
        let named = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_model));
        let trusted = named.filter(|entry| entry.path().symlink_metadata().is_ok_and(|m| distrust_pages(&m).is_none()));
        trusted.map(|entry| entry.path()).collect()
    }

    /// The name of the folder, for messages.
    pub(super) fn name(&self) -> impl std::fmt::Display {
        self.own.display()
    }

    /// The file of a page.
    pub(super) fn path(&self, prefix: &Prefix, stored: &Stored) -> PathBuf {
        let kind = if stored.has_states { "state" } else { "page" };
        self.own.join(format!("{:05}-{}.{kind}", stored.index, hex(prefix)))
    }

    /// Lists the pages.
    pub(super) fn list(&self) -> Listed {
        self.listed().0
    }

    fn listed(&self) -> (Listed, Vec<Page>) {
        let (mut listed, mut pages) = (Listed::default(), Vec::new());
        for folder in self.of_models() {
            let is_own = folder == self.own;
            for entry in folder.read_dir().into_iter().flatten().flatten() {
                let Some((prefix, mut stored)) = entry.file_name().to_str().and_then(parse) else { continue };
                // Of a link, not of its target.
                let Ok(metadata) = entry.metadata() else { continue };
                stored.is_usable = metadata.is_file();
                if stored.is_usable {
                    stored.bytes = metadata.len();
                    listed.bytes += stored.bytes;
                    let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                    let (index, bytes, own) = (stored.index, stored.bytes, is_own.then_some(prefix));
                    pages.push(Page { path: entry.path(), used, index, bytes, own });
                }
                // Of two files for a page, the one with states is used.
                if is_own && listed.own.get(&prefix).is_none_or(|other| !other.has_states) {
                    listed.own.insert(prefix, stored);
                }
            }
        }
        (listed, pages)
    }

    /// Removes the least recently used pages until `limit` holds them and `more` bytes, with a tenth to spare if it does not hold
    /// them now. Returns those that are left.
    pub(super) fn evict(&self, limit: u64, more: u64) -> Listed {
        let (mut listed, mut pages) = self.listed();
        let mut count = pages.len();
        if listed.bytes.saturating_add(more) <= limit && count < MAX_FILES {
            return listed;
        }
        let (limit, most) = ((limit - limit / 10).saturating_sub(more), MAX_FILES - MAX_FILES / 10);
        pages.sort_unstable_by_key(|page| (page.used, Reverse(page.index)));
        for page in pages {
            if listed.bytes <= limit && count <= most {
                break;
            }
            // Another process may have removed it. Something else under its name is left alone.
            let is_gone = match is_page_file(&page.path).then(|| fs::remove_file(&page.path)) {
                Some(Ok(())) => true,
                Some(Err(error)) => error.kind() == ErrorKind::NotFound,
                None => !page.path.exists(),
            };
            if is_gone {
                listed.bytes -= page.bytes;
                count -= 1;
                page.own.map(|prefix| listed.own.remove(&prefix));
            }
        }
        // Folders of models that are not used any more. A folder with files stays, and one that was just made.
        let is_old = |folder: &PathBuf| {
            let changed = folder.metadata().and_then(|metadata| metadata.modified());
            changed.is_ok_and(|changed| changed.elapsed().is_ok_and(|age| age > UNUSED))
        };
        for folder in self.of_models().iter().filter(|folder| **folder != self.own && is_old(folder)) {
            let _ = fs::remove_dir(folder);
        }
        listed
    }

    /// Writes the file of a page, which appears under its name when it is complete.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(super) fn write(&self, prefix: &Prefix, stored: &Stored, bytes: &[u8], used: SystemTime) -> Result<()> {
        let path = self.path(prefix, stored);
        let io = |source| Error::io(&path, source);
        // Another process may have removed the folder of a model that it does not use.
        self.make().map_err(io)?;
        if let Some(found) = self.distrust() {
            return Err(io(std::io::Error::new(ErrorKind::PermissionDenied, found)));
        }
        let mut file = AtomicFile::create_only(&path, true)?;
        file.write_all(bytes).map_err(io)?;
        file.finish_name()?;
        mark_used(&path, used);
        Ok(())
    }

    /// Removes a page, unless something else has its name by now.
    pub(super) fn remove(&self, prefix: &Prefix, stored: &Stored) {
        let path = self.path(prefix, stored);
        if is_page_file(&path) {
            // What cannot be removed is refused again.
            let _ = fs::remove_file(&path);
        }
    }
}

/// Records when a file was used. In a folder that cannot be written to, nothing is removed either.
pub(super) fn mark_used(path: &Path, used: SystemTime) {
    let _ = File::open(path).and_then(|file| file.set_modified(used));
}

/// Why files in a folder of pages may be those of others. `None` if only this user, or the system's administrator, may write to it.
fn distrust_pages(folder: &Metadata) -> Option<String> {
    let kind: FileType = folder.file_type();
    if !kind.is_dir() {
        return Some(if kind.is_symlink() { "a link".to_owned() } else { "not a folder".to_owned() });
    }
    distrust(folder)
}

/// Why others may replace a folder of pages in this folder. With the sticky bit, they cannot replace what belongs to somebody else.
fn distrust_base(folder: &Metadata) -> Option<String> {
    if is_sticky(folder) { distrust_owner(folder) } else { distrust(folder) }
}

#[cfg(unix)]
fn is_sticky(folder: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    folder.mode() & 0o1000 != 0
}

#[cfg(not(unix))]
fn is_sticky(_: &Metadata) -> bool {
    false
}

fn hex(prefix: &Prefix) -> String {
    blake3::Hash::from(*prefix).to_hex().to_string()
}

/// The value of a lower-case hexadecimal digit.
fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

/// What the name of a file says. `None` for names that are not those of pages.
fn parse(name: &str) -> Option<(Prefix, Stored)> {
    let (stem, kind) = name.rsplit_once('.')?;
    let has_states = match kind {
        "page" => false,
        "state" => true,
        _ => return None,
    };
    let (index, digits) = stem.split_once('-')?;
    let (number, digits) = (index.parse().ok()?, digits.as_bytes());
    if format!("{number:05}") != index || digits.len() != 2 * size_of::<Prefix>() {
        return None;
    }
    let mut prefix = Prefix::default();
    for (byte, pair) in prefix.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some((prefix, Stored { index: number, has_states, bytes: 0, is_usable: true }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_pages_are_read() {
        let folder = Folder { base: PathBuf::from("/base"), own: PathBuf::from("/base/own") };
        let prefix: Prefix = std::array::from_fn(|i| (i * 37) as u8);
        for (index, has_states) in [(0, false), (62, true), (123_456, false)] {
            let stored = Stored { index, has_states, bytes: 0, is_usable: true };
            let path = folder.path(&prefix, &stored);
            let (found, read) = parse(path.file_name().unwrap().to_str().unwrap()).unwrap();
            assert_eq!((found, read.index, read.has_states), (prefix, index, has_states));
        }
        let digits = hex(&prefix);
        for name in [
            format!("0-{digits}.page"),
            format!("000000-{digits}.page"),
            format!("+0000-{digits}.page"),
            format!("00000-{digits}.pages"),
            format!("00000-{}.page", digits.to_uppercase()),
            format!("00000-{}.page", &digits[1..]),
            format!("00000-{digits}0.page"),
            format!("00000{digits}.page"),
            format!("00000-{}é.page", &digits[2..]),
            "00000-.page".to_owned(),
            String::new(),
        ] {
            assert!(parse(&name).is_none(), "{name}");
        }
    }
}
