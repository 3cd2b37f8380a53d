//! Sessions on disk: the keys and values of a sequence, so that they need not be computed again.
//!
//! All numbers are little-endian:
//!
//! ```text
//!  0   8  magic, "NYBBLEKV"
//!  8   4  version: 1, or 2 where layers differ in how far back their queries see; 3 with recurrent states; 256 more with an adapter;
//!         512 more in a page of the prefix cache, which `page_file` describes
//! 12   4  how keys and values are stored: 0 F32, 1 F16, 3 INT8; 2 INT8 with one scale per head, as earlier versions wrote it
//! 16  32  hash of the model, its `fingerprint`
//! 48   8  number of tokens
//! 56   8  number of tokens in the cache: the first of them
//!         with an adapter only: the 4-byte length of its name, the name, and the 32-byte hash of its weights
//!      8  versions 2 and 3 only: for each part of a page, the first page that has it
//!      4  each token
//!         pages of 64 tokens, as in memory; positions after the last token are zeros. In version 1 a page holds all layers in
//!         order. In versions 2 and 3 it consists of parts: layers in order, grouped by how far back their queries see, the groups in
//!         the order of their first layers. Pages before the first one that has a part are without it.
//!         version 3 only: the recurrent states after the tokens in the cache, as in memory, unless there are none
//!     32  BLAKE3 hash of everything before it
//! ```
//!
//! Counts are checked against the length of the file before anything is allocated, so loading takes no more memory than the
//! file takes on disk. The hash detects damage, but does not authenticate: a forged file with a correct hash gives other
//! tokens or [`Error::BadLogits`], and nothing worse.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

use blake3::Hasher;

use super::cache::{CacheShape, CacheType, Page};
use super::file_adapter::{self, FileAdapter};
use super::session::Session;
use super::whole_head_int8;
use crate::error::{Error, Place, Result};
use crate::format::atomic_file::AtomicFile;
use crate::format::output::Sources;
use crate::kernels::{Kernel, PAGE};
use crate::model::adapter::registry::Adapters;
use crate::system::memory;

pub(super) const MAGIC: [u8; 8] = *b"NYBBLEKV";
/// Pages hold all layers in order.
const WHOLE_PAGES: u32 = 1;
/// Pages consist of parts, which begin at different pages.
pub(super) const PARTS: u32 = 2;
/// As [`PARTS`], and recurrent states follow.
pub(super) const STATES: u32 = 3;
const HEADER: usize = 64;
pub(super) const HASH: usize = blake3::OUT_LEN;

// Pages are written as they are in memory, which is little-endian on every CPU that has a kernel.
const _: () = assert!(cfg!(target_endian = "little"), "sessions on disk are little-endian");

impl CacheType {
    pub(super) fn number(self) -> u32 {
        match self {
            CacheType::F32 => 0,
            CacheType::F16 => 1,
            CacheType::Int8 => 3,
        }
    }
}

/// The number of INT8 with one scale per head.
const WHOLE_HEAD_INT8: u32 = 2;

/// The model and limits with which a session file must agree.
pub(in crate::model) struct Owner<'a> {
    /// The model's `id`, which its sessions carry.
    pub(in crate::model) id: u64,
    /// The model's file, for messages.
    pub(in crate::model) path: &'a Path,
    /// The model's fingerprint. It takes time to compute, so the cheap checks come first.
    pub(in crate::model) fingerprint: &'a dyn Fn() -> blake3::Hash,
    pub(in crate::model) shape: CacheShape,
    pub(in crate::model) kernel: &'static Kernel,
    pub(in crate::model) context: usize,
    pub(in crate::model) vocabulary: usize,
    /// The adapters that a session may have.
    pub(in crate::model) adapters: &'a Adapters,
}

/// Writes `session`, whose recurrent states have no rows to be applied, and `tokens` to the file at `path`, which appears under its name when it is complete.
///
/// # Errors
/// [`Error::Io`]; [`Error::InvalidArgument`] when `session` belongs to another model or has seen more tokens than these, or
/// `path` is read as part of the model or is not a regular file; [`Error::CacheOverflow`].
pub(in crate::model) fn save(session: &Session, owner: &Owner<'_>, tokens: &[u32], path: &Path) -> Result<()> {
    if session.model != owner.id {
        return Err(Error::argument("session", "a session of another model", "a session of this model"));
    }
    session.check_cache()?;
    if tokens.len() < session.len() {
        return Err(Error::argument("tokens", tokens.len(), format_args!("at least the {} seen", session.len())));
    }
    Sources::new([owner.path]).check("path", path)?;
    let mut file = AtomicFile::create(path, true)?;
    write(session, owner, tokens, &mut file).map_err(|error| Error::io(path, error))?;
    file.finish()
}

/// The version of files with sessions of this shape.
fn version_of(shape: &CacheShape) -> u32 {
    match (shape.state(), shape.parts().len()) {
        (Some(_), _) => STATES,
        (None, 1) => WHOLE_PAGES,
        (None, _) => PARTS,
    }
}

fn write(session: &Session, owner: &Owner<'_>, tokens: &[u32], file: &mut AtomicFile) -> std::io::Result<()> {
    let mut out = Hashed { inner: BufWriter::with_capacity(1 << 20, file), hasher: Hasher::new() };
    out.write_all(&MAGIC)?;
    let parts = session.shape.parts().len();
    let version = version_of(&session.shape);
    let adapter = session.adapter().map(|adapter| FileAdapter::of(adapter));
    let flag = if adapter.is_some() { file_adapter::FLAG } else { 0 };
    out.write_all(&(version | flag).to_le_bytes())?;
    out.write_all(&session.shape.cache_type.number().to_le_bytes())?;
    out.write_all((owner.fingerprint)().as_bytes())?;
    out.write_all(&(tokens.len() as u64).to_le_bytes())?;
    out.write_all(&(session.len() as u64).to_le_bytes())?;
    if let Some(adapter) = &adapter {
        out.write_all(&adapter.bytes())?;
    }
    let pages = &session.pages[..session.len().div_ceil(PAGE)];
    let first = |part: usize| pages.iter().rposition(|page| !page.has(part)).map_or(0, |last| last + 1);
    let firsts: Vec<usize> = (0..parts).map(first).collect();
    if version != WHOLE_PAGES {
        firsts.iter().try_for_each(|first| out.write_all(&(*first as u64).to_le_bytes()))?;
    }
    for token in tokens {
        out.write_all(&token.to_le_bytes())?;
    }
    let (last, whole) = (session.len() % PAGE, session.len() / PAGE);
    let mut write = |index: usize, page: &Page| {
        let present = firsts.iter().enumerate().filter(|(_, first)| **first <= index);
        present.into_iter().try_for_each(|(part, _)| out.write_all(page.part_bytes(part)))
    };
    for (index, page) in pages.iter().enumerate() {
        if index < whole {
            write(index, page)?;
            continue;
        }
        // Tokens that were truncated must not be in the file.
        let mut page = page.clone();
        page.unshare(&session.shape).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
        page.clear_from(&session.shape, last);
        write(index, &page)?;
    }
    // A session that was truncated to nothing may still have memory for its states.
    if let Some(state) = session.state().filter(|_| !session.is_empty()) {
        out.write_all(state.as_bytes())?;
    }
    let hash = out.hasher.finalize();
    out.inner.write_all(hash.as_bytes())?;
    out.inner.flush()
}

/// Reads a session and its tokens from a file that [`save`] wrote.
///
/// # Errors
/// [`Error::Io`]; [`Error::Malformed`] with the field when the file is not a session, is damaged, or belongs to another model,
/// another adapter, another cache type or a larger context; [`Error::OutOfMemory`].
pub(in crate::model) fn load(owner: &Owner<'_>, path: &Path) -> Result<(Session, Vec<u32>)> {
    let io = |source| Error::io(path, source);
    // Checked before the file is opened, because opening a pipe would wait.
    let kind = std::fs::metadata(path).map_err(io)?;
    if kind.is_dir() {
        return Err(io(std::io::ErrorKind::IsADirectory.into()));
    }
    if !kind.is_file() {
        return Err(io(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")));
    }
    let file = File::open(path).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    if length < HEADER as u64 {
        let found = format!("a file of {length} bytes");
        return Err(Error::malformed(path, Place::File, found, format_args!("{HEADER} bytes for the header")));
    }
    let mut file = Hashed { inner: BufReader::with_capacity(1 << 16, file), hasher: Hasher::new() };
    let mut header = [0; HEADER];
    file.read_exact(&mut header).map_err(io)?;
    let stored = match header.starts_with(&MAGIC) && file_adapter::is_flagged(&header[MAGIC.len()..]) {
        true => Some(FileAdapter::read(&mut file, path, length - HEADER as u64)?),
        false => None,
    };
    let fixed = HEADER + HASH + stored.as_ref().map_or(0, |adapter| adapter.bytes().len());
    let Header { tokens, seen, format } = check(owner, path, &header, [length, fixed as u64])?;
    let adapter = FileAdapter::find(stored.as_ref(), owner.adapters, path)?;
    let pages_count = seen.div_ceil(PAGE);
    let firsts = match format {
        Format::Parts => first_pages(owner, path, &mut file, [tokens, seen], [length, fixed as u64])?,
        _ => vec![0; owner.shape.parts().len()],
    };

    let out_of_memory = |_| Error::OutOfMemory { what: "the tokens of a session", bytes: 4 * tokens, left: None };
    let mut ids: Vec<u32> = Vec::new();
    ids.try_reserve_exact(tokens).map_err(out_of_memory)?;
    ids.resize(tokens, 0);
    file.read_exact(bytemuck::cast_slice_mut(&mut ids)).map_err(io)?;
    let mut pages = Vec::new();
    for index in 0..pages_count {
        memory::check("a page of the KV cache", owner.shape.page_bytes())?;
        let page = match format {
            Format::WholeHeadInt8 => {
                let mut bytes = vec![0; whole_head_int8::bytes(&owner.shape, PAGE).unwrap_or_default()];
                file.read_exact(&mut bytes).map_err(io)?;
                whole_head_int8::convert(owner.kernel, &owner.shape, &bytes)?
            }
            Format::WholePages => {
                let mut page = Page::new(&owner.shape)?;
                let mut bytes = vec![0; owner.shape.page_bytes()];
                file.read_exact(&mut bytes).map_err(io)?;
                page.fill_in_layer_order(&owner.shape, &bytes);
                page
            }
            Format::Parts => {
                let mut page = Page::with_parts(&owner.shape, |part| firsts[part] <= index)?;
                for part in 0..firsts.len() {
                    file.read_exact(page.part_bytes_mut(part)).map_err(io)?;
                }
                page
            }
        };
        pages.push(page);
    }
    let mut session = Session::new(owner.shape.clone(), owner.context, owner.id).with_adapter(adapter);
    if let Some(state) = session.state_mut().filter(|_| seen > 0) {
        state.read(seen, |bytes| file.read_exact(bytes).map_err(io))?;
    }
    let computed = file.hasher.finalize();
    let mut stored = [0; HASH];
    file.inner.read_exact(&mut stored).map_err(io)?;
    if computed != stored {
        let [found, expected] = [blake3::Hash::from(stored), computed].map(|hash| hash.to_hex());
        let expected = format!("{expected}, the hash of the file's contents");
        return Err(Error::malformed(path, Place::Key("checksum".to_owned()), found, expected));
    }
    if let Some(token) = ids.iter().find(|token| **token as usize >= owner.vocabulary) {
        let expected = format!("ids below {}", owner.vocabulary);
        return Err(Error::malformed(path, Place::Key("tokens".to_owned()), token, expected));
    }
    session.pages = pages;
    session.advance(seen);
    session.free_unseen();
    Ok((session, ids))
}

/// How pages are stored.
#[derive(Clone, Copy)]
enum Format {
    /// INT8 with one scale per head, all layers in order.
    WholeHeadInt8,
    /// All layers in order.
    WholePages,
    /// The parts that a page has.
    Parts,
}

/// The header of a file.
struct Header {
    /// Number of tokens.
    tokens: usize,
    /// Tokens in the cache.
    seen: usize,
    format: Format,
}

/// Reads the first page of each part, and checks them against the tokens in the cache and the length of the file.
fn first_pages(
    owner: &Owner<'_>,
    path: &Path,
    file: &mut impl Read,
    [tokens, seen]: [usize; 2],
    [length, fixed]: [u64; 2],
) -> Result<Vec<usize>> {
    let parts = owner.shape.parts();
    let pages = seen.div_ceil(PAGE);
    let (mut firsts, mut expected) = (Vec::new(), fixed + (parts.len() * size_of::<u64>()) as u64);
    expected = expected.saturating_add((tokens as u64).saturating_mul(size_of::<u32>() as u64));
    for (index, part) in parts.iter().enumerate() {
        let mut bytes = [0; size_of::<u64>()];
        file.read_exact(&mut bytes).map_err(|error| Error::io(path, error))?;
        let (first, last) = (u64::from_le_bytes(bytes), part.first_seen(seen).min(pages));
        if first > last as u64 {
            let place = Place::Key(format!("first page of part {index}"));
            let expected = format!("at most {last}, which the token after {seen} sees");
            return Err(Error::malformed(path, place, first, expected));
        }
        firsts.push(first as usize);
        expected = expected.saturating_add((part.bytes() as u64).saturating_mul(pages as u64 - first));
    }
    if let Some(state) = owner.shape.state().filter(|_| seen > 0) {
        expected = expected.saturating_add(state.bytes() as u64);
    }
    if expected != length {
        let expected = format!("{expected} bytes for {tokens} tokens, {seen} of them in the cache");
        return Err(Error::malformed(path, Place::File, format_args!("{length} bytes"), expected));
    }
    Ok(firsts)
}

/// Checks every field of a header against the model, and all of them against the length of the file, where it follows from
/// them. `fixed` is the length of what every file has.
fn check(owner: &Owner<'_>, path: &Path, header: &[u8; HEADER], [length, fixed]: [u64; 2]) -> Result<Header> {
    let fault = |field: &str, found: String, expected: String| {
        Err(Error::malformed(path, Place::Key(field.to_owned()), found, expected))
    };
    let mut rest = header.as_slice();
    let (magic, version) = (take(&mut rest), u32::from_le_bytes(take(&mut rest)));
    if magic != MAGIC {
        let found = format!("\"{}\"", magic.escape_ascii());
        return fault("magic", found, format!("\"{}\", the start of every session", MAGIC.escape_ascii()));
    }
    let (newest, version) = (version_of(&owner.shape), version & !file_adapter::FLAG);
    if version != newest && (newest, version) != (PARTS, WHOLE_PAGES) {
        let expected = if newest == PARTS { "1 or 2".to_owned() } else { format!("{newest}, as this model has") };
        return fault("version", version.to_string(), expected);
    }
    let (cache_type, own) = (u32::from_le_bytes(take(&mut rest)), owner.shape.cache_type);
    let hash = blake3::Hash::from(take::<HASH>(&mut rest));
    let fingerprint = (owner.fingerprint)();
    if hash != fingerprint {
        let expected = format!("{}, the hash of the model {}", fingerprint.to_hex(), owner.path.display());
        return fault("model", format!("the hash {}", hash.to_hex()), expected);
    }
    let old = cache_type == WHOLE_HEAD_INT8 && own == CacheType::Int8;
    if cache_type != own.number() && !(old && version == WHOLE_PAGES) {
        let known = [CacheType::F32, CacheType::F16, CacheType::Int8].into_iter().find(|t| t.number() == cache_type);
        let known = known.or((cache_type == WHOLE_HEAD_INT8).then_some(CacheType::Int8));
        let found = known.map_or_else(|| format!("type {cache_type}"), |known| known.name().to_owned());
        return fault("cache_type", found, format!("{}, that of the loaded model", own.name()));
    }
    let (tokens, seen) = (u64::from_le_bytes(take(&mut rest)), u64::from_le_bytes(take(&mut rest)));
    if seen > owner.context as u64 {
        let expected = format!("at most {}, the context that the model was loaded with", owner.context);
        return fault("tokens in the cache", seen.to_string(), expected);
    }
    if tokens < seen {
        return fault("tokens", tokens.to_string(), format!("at least the {seen} in the cache"));
    }
    let format = match version {
        PARTS | STATES => Format::Parts,
        _ if old => Format::WholeHeadInt8,
        _ => Format::WholePages,
    };
    let counts = usize::try_from(tokens).ok().zip(usize::try_from(seen).ok());
    let expected = counts.and_then(|(tokens, seen)| {
        let fixed = tokens.checked_mul(size_of::<u32>())?.checked_add(usize::try_from(fixed).ok()?)?;
        fixed.checked_add(match format {
            Format::WholeHeadInt8 => whole_head_int8::bytes(&owner.shape, seen)?,
            Format::WholePages => owner.shape.bytes(seen)?,
            // What the first pages of parts say is checked with them.
            Format::Parts => owner.shape.parts().len() * size_of::<u64>(),
        })
    });
    match (counts, expected) {
        (Some((tokens, seen)), Some(expected))
            if expected as u64 == length || (matches!(format, Format::Parts) && expected as u64 <= length) =>
        {
            Ok(Header { tokens, seen, format })
        }
        (_, expected) => {
            let bytes = expected.map_or_else(|| "more bytes than fit into memory".to_owned(), |n| format!("{n} bytes"));
            let expected = format!("{bytes} for {tokens} tokens, {seen} of them in the cache");
            Err(Error::malformed(path, Place::File, format_args!("{length} bytes"), expected))
        }
    }
}

/// Takes the next `N` bytes of a header, which is long enough for all of its fields.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let mut taken = [0; N];
    let (first, others) = rest.split_at(N);
    taken.copy_from_slice(first);
    *rest = others;
    taken
}

/// A reader or writer that hashes the bytes that pass through it.
pub(super) struct Hashed<T> {
    pub(super) inner: T,
    pub(super) hasher: Hasher,
}

impl<T: Read> Read for Hashed<T> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

impl<T: Write> Write for Hashed<T> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}
