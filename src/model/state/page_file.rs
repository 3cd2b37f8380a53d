//! Pages of the prefix cache on disk, a file for each.
//!
//! The file begins as that of a session. All numbers are little-endian:
//!
//! ```text
//!   0   8  magic, "NYBBLEKV"
//!   8   4  version: 514, or 515 with recurrent states
//!  12   4  how keys and values are stored, as in a session
//!  16  32  hash of the model, its `fingerprint`
//!  48   8  number of tokens: 64
//!  56   8  number of tokens before them
//!  64  32  hash of the adapter's weights, zeros without an adapter
//!  96  32  hash of the prefix: of all tokens up to the last of the page, and of everything else that the numbers depend on
//! 128   4  each token
//! 384      the page, as in memory
//!          version 515 only: the recurrent states after the page, as in memory
//!      32  BLAKE3 hash of everything before it
//! ```
//!
//! A reader knows the whole header before it opens the file, so it compares rather than interprets: nothing in the file decides
//! how much is read or allocated. As with sessions, the hash detects damage, but does not authenticate.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{ErrorKind, Read};
use std::path::Path;
use std::sync::{Arc, Weak};

use blake3::Hasher;

use super::cache::{CacheType, Page};
use super::counted::Counted;
use super::session_file::{HASH, Hashed, MAGIC, Owner, PARTS, STATES};
use super::shared_page::SharedPage;
use crate::error::{Error, Place};
use crate::kernels::PAGE;
use crate::model::model::Model;
use crate::system::memory;

/// The bit in the version of these files.
const FLAG: u32 = 1 << 9;
const HEADER: usize = 384;
/// The fields of a header after the magic and the version, and where they end.
const FIELDS: [(&str, usize); 7] = [
    ("cache_type", 16),
    ("model", 48),
    ("tokens", 56),
    ("tokens before the page", 64),
    ("adapter", 96),
    ("prefix", 128),
    ("tokens", HEADER),
];
/// Part of every prefix. Changes when the meaning of a byte in a page does.
const VERSION: &[u8] = b"nybble prefix 2";

impl Model {
    /// The prefix of a first page of sequences whose adapter has this hash. It hashes the weights on first use.
    pub(crate) fn first_prefix(&self, adapter: Option<[u8; 32]>) -> [u8; 32] {
        let cache_type = self.with_owner(|owner| owner.shape.cache_type);
        first_prefix(self.fingerprint(), cache_type, adapter)
    }

    /// The file of a page of the prefix cache as bytes. `None` where parts of the page are freed or memory is missing.
    pub(crate) fn page_file(&self, id: &PageId, page: &SharedPage) -> Option<Vec<u8>> {
        self.with_owner(|owner| encode(owner, id, page))
    }

    /// Reads a page of the prefix cache from the file at `path`.
    ///
    /// # Errors
    /// A [`PageFault`] unless the file is complete and holds the page with this id.
    pub(crate) fn read_page(&self, id: &PageId, path: &Path) -> Result<SharedPage, PageFault> {
        self.with_owner(|owner| read(owner, id, path))
    }

    /// Bytes of a page of the prefix cache in memory, with recurrent states.
    pub(crate) fn shared_page_bytes(&self) -> usize {
        self.with_owner(|owner| owner.shape.page_bytes().saturating_add(owner.shape.state_bytes()))
    }
}

/// What identifies a page of the prefix cache, in memory and on disk.
#[derive(Debug, Clone)]
pub(crate) struct PageId {
    /// The hash of the prefix that ends with the page.
    pub(crate) prefix: [u8; 32],
    /// Number of pages before it.
    pub(crate) index: usize,
    pub(crate) tokens: [u32; PAGE],
    /// The id of the adapter in this process, or 0.
    pub(crate) adapter: u64,
    /// The hash of the adapter's weights.
    pub(crate) adapter_hash: Option<[u8; 32]>,
}

/// The prefix of a first page: a hash of what keys and values depend on besides the tokens.
///
/// Another version of nybble may compute other bits, so it starts anew.
fn first_prefix(fingerprint: &[u8; 32], cache: CacheType, adapter: Option<[u8; 32]>) -> [u8; 32] {
    let mut hasher = Hasher::new();
    for part in [VERSION, env!("CARGO_PKG_VERSION").as_bytes(), cache.name().as_bytes(), fingerprint] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.update(&[u8::from(adapter.is_some())]);
    hasher.update(&adapter.unwrap_or_default());
    *hasher.finalize().as_bytes()
}

/// The prefix that ends with `tokens` after `prefix`.
pub(crate) fn next_prefix(prefix: &[u8; 32], tokens: &[u32; PAGE]) -> [u8; 32] {
    let mut hasher = Hasher::new();
    hasher.update(prefix);
    hasher.update(bytemuck::cast_slice(tokens));
    *hasher.finalize().as_bytes()
}

/// A page that does not stay in memory for this reference.
#[derive(Debug)]
pub(crate) struct WeakPage {
    parts: Vec<Weak<Counted>>,
    snapshot: Option<Weak<Counted<f32>>>,
    model: u64,
    adapter: u64,
    is_recurrent: bool,
}

impl WeakPage {
    /// A reference to `page`, without what belongs to a head. `None` unless it has all parts.
    pub(crate) fn of(page: &SharedPage) -> Option<WeakPage> {
        let SharedPage { page, head: _, model, adapter, is_recurrent, mirror: _ } = page;
        page.is_whole().then(|| WeakPage {
            parts: page.parts().map(Arc::downgrade).collect(),
            snapshot: page.snapshot.as_ref().map(Arc::downgrade),
            model: *model,
            adapter: *adapter,
            is_recurrent: *is_recurrent,
        })
    }

    /// The page, if it is still in memory.
    pub(crate) fn upgrade(&self) -> Option<SharedPage> {
        let parts: Vec<_> = self.parts.iter().map(Weak::upgrade).collect::<Option<_>>()?;
        let snapshot = match &self.snapshot {
            Some(snapshot) => Some(snapshot.upgrade()?),
            None => None,
        };
        let (model, adapter, is_recurrent) = (self.model, self.adapter, self.is_recurrent);
        Some(SharedPage { page: Page::of(parts, snapshot), head: None, model, adapter, is_recurrent, mirror: None })
    }
}

/// Why a page cannot be read.
#[derive(Debug)]
pub(crate) enum PageFault {
    /// The file does not exist any more.
    Vanished,
    /// Something else, or a page of another version of the format.
    Foreign(String),
    /// A page that is damaged, or is not the one that its name promises.
    Damaged(Error),
    /// The system does not read it, or memory is missing.
    Failed(Error),
}

/// The header of a file.
fn header(owner: &Owner<'_>, id: &PageId, has_states: bool) -> [u8; HEADER] {
    let version = FLAG | if has_states { STATES } else { PARTS };
    let counts = [PAGE as u64, (id.index * PAGE) as u64];
    let fingerprint = (owner.fingerprint)();
    let parts: [&[u8]; 9] = [
        &MAGIC,
        &version.to_le_bytes(),
        &owner.shape.cache_type.number().to_le_bytes(),
        fingerprint.as_bytes(),
        &counts[0].to_le_bytes(),
        &counts[1].to_le_bytes(),
        &id.adapter_hash.unwrap_or_default(),
        &id.prefix,
        bytemuck::cast_slice(&id.tokens),
    ];
    let (mut header, mut at) = ([0; HEADER], 0);
    for part in parts {
        header[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
    debug_assert_eq!(at, HEADER);
    header
}

/// Bytes of a file.
fn file_bytes(owner: &Owner<'_>, has_states: bool) -> usize {
    let state = if has_states { owner.shape.state_bytes() } else { 0 };
    owner.shape.page_bytes().saturating_add(state).saturating_add(HEADER + HASH)
}

/// The file of `page` as bytes. `None` where parts of the page are freed or memory is missing.
fn encode(owner: &Owner<'_>, id: &PageId, page: &SharedPage) -> Option<Vec<u8>> {
    let snapshot = page.page.snapshot.as_deref();
    let len = file_bytes(owner, snapshot.is_some());
    let mut bytes = Vec::new();
    if !page.page.is_whole() || bytes.try_reserve_exact(len).is_err() {
        return None;
    }
    bytes.extend_from_slice(&header(owner, id, snapshot.is_some()));
    (0..owner.shape.parts().len()).for_each(|part| bytes.extend_from_slice(page.page.part_bytes(part)));
    snapshot.into_iter().for_each(|state| bytes.extend_from_slice(bytemuck::cast_slice(&state[..])));
    let hash = blake3::hash(&bytes);
    bytes.extend_from_slice(hash.as_bytes());
    debug_assert_eq!(bytes.len(), len);
    Some(bytes)
}

/// Whether the file at `path` begins as those that nybble writes. An empty or cut file does, too.
pub(crate) fn is_page_file(path: &Path) -> bool {
    let mut start = Vec::new();
    let read = open(path).and_then(|file| file.take(MAGIC.len() as u64).read_to_end(&mut start));
    read.is_ok() && MAGIC.starts_with(&start)
}

/// Reads the page with this id from the file at `path`.
///
/// # Errors
/// A [`PageFault`] unless the file is complete and holds the page.
fn read(owner: &Owner<'_>, id: &PageId, path: &Path) -> Result<SharedPage, PageFault> {
    let failed = |source| PageFault::Failed(Error::io(path, source));
    let file = open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => PageFault::Vanished,
        ErrorKind::InvalidInput => PageFault::Foreign(error.to_string()),
        _ => failed(error),
    })?;
    let length = file.metadata().map_err(failed)?.len();
    let mut file = Hashed { inner: file, hasher: Hasher::new() };
    let mut found = [0; HEADER];
    let start = (length.min(HEADER as u64)) as usize;
    file.read_exact(&mut found[..start]).map_err(failed)?;
    let magic = &found[..start.min(MAGIC.len())];
    if !MAGIC.starts_with(magic) {
        return Err(PageFault::Foreign(format!("it begins with \"{}\"", magic.escape_ascii())));
    }
    let damaged = |place, found: String, expected: String| {
        Err(PageFault::Damaged(Error::malformed(path, place, found, expected)))
    };
    let version = found[MAGIC.len()..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let has_states = match version.checked_sub(FLAG) {
        _ if start < HEADER => {
            return damaged(Place::File, format!("{length} bytes"), format!("at least {HEADER}"));
        }
        Some(PARTS) => false,
        Some(STATES) if owner.shape.state().is_some() => true,
        _ => return Err(PageFault::Foreign(format!("version {version}"))),
    };
    let (expected, mut from) = (header(owner, id, has_states), MAGIC.len() + size_of::<u32>());
    for (name, end) in FIELDS {
        let [found, expected] = [&found, &expected].map(|header| &header[from..end]);
        if found != expected {
            let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            return damaged(Place::Key(name.to_owned()), hex(found), hex(expected));
        }
        from = end;
    }
    let expected = file_bytes(owner, has_states);
    if length != expected as u64 {
        return damaged(Place::File, format!("{length} bytes"), format!("{expected} bytes"));
    }
    memory::check("a page of the KV cache", expected).map_err(PageFault::Failed)?;
    let mut page = Page::new(&owner.shape).map_err(PageFault::Failed)?;
    for part in 0..owner.shape.parts().len() {
        file.read_exact(page.part_bytes_mut(part)).map_err(failed)?;
    }
    if has_states {
        let len = owner.shape.state_bytes() / size_of::<f32>();
        let bytes = owner.shape.state_bytes();
        let mut state = Counted::try_zeroed(len, bytes, "the recurrent state").map_err(PageFault::Failed)?;
        file.read_exact(bytemuck::cast_slice_mut(&mut state)).map_err(failed)?;
        page.snapshot = Some(Arc::new(state));
    }
    let (computed, mut stored) = (file.hasher.finalize(), [0; HASH]);
    file.inner.read_exact(&mut stored).map_err(failed)?;
    if computed != stored {
        let [found, expected] = [blake3::Hash::from(stored), computed].map(|hash| hash.to_hex().to_string());
        let expected = format!("{expected}, the hash of the file's contents");
        return damaged(Place::Key("checksum".to_owned()), found, expected);
    }
    let is_recurrent = owner.shape.state().is_some();
    Ok(SharedPage { page, head: None, model: owner.id, adapter: id.adapter, is_recurrent, mirror: None })
}

/// Opens a regular file that others cannot have written, without following a link and without waiting for the other end of a pipe.
///
/// # Errors
/// Those of the system; [`ErrorKind::InvalidInput`] for any other file.
fn open(path: &Path) -> std::io::Result<File> {
    let special = || std::io::Error::new(ErrorKind::InvalidInput, "not a regular file");
    if !path.symlink_metadata()?.is_file() {
        return Err(special());
    }
    let mut options = OpenOptions::new();
    options.read(true);
    // Something else may be there by now.
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    }
    let file = options.open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(special());
    }
    match distrust(&metadata) {
        Some(reason) => Err(std::io::Error::new(ErrorKind::InvalidInput, format!("a file {reason}"))),
        None => Ok(file),
    }
}

/// Why others may have written a file or a folder. `None` if only this user and the system's administrator can write to it.
pub(crate) fn distrust(metadata: &Metadata) -> Option<String> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let mode = metadata.mode() & 0o7777;
        if mode & 0o022 != 0 {
            return Some(format!("to which others may write (mode {mode:o})"));
        }
    }
    distrust_owner(metadata)
}

/// Why a file or a folder is not this user's, or the system administrator's.
pub(crate) fn distrust_owner(metadata: &Metadata) -> Option<String> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let owner = metadata.uid();
        if owner != rustix::process::geteuid().as_raw() && owner != 0 {
            return Some(format!("which belongs to user {owner}"));
        }
    }
    #[cfg(not(unix))]
    let _ = metadata;
    None
}
