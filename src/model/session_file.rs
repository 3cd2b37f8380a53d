//! Sessions on disk: the keys and values of a text, so that it need not be computed again.
//!
//! All numbers are little-endian:
//!
//! ```text
//!  0   8  magic, "NYBBLEKV"
//!  8   4  version, 1
//! 12   4  how keys and values are stored: 0 F32, 1 F16, 2 INT8
//! 16  32  hash of the model, its `fingerprint`
//! 48   8  tokens of the text
//! 56   8  tokens in the cache: the first so many of the text
//! 64   4  each token
//!         pages of 64 tokens, as they lie in memory; behind the last token there are zeros
//!     32  BLAKE3 hash of everything before it
//! ```
//!
//! A file is read into the memory of the session and nowhere else, and what it says is believed only as far as its length
//! bears it out, so a hostile one costs no more memory than it takes on the disk. The hash finds damage. It proves nothing about
//! who wrote the file: one that is made by hand with a right hash gives other texts, or [`Error::BadLogits`], and nothing worse.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;
use std::sync::Arc;

use blake3::Hasher;

use super::Model;
use super::kv_cache::{CacheType, Page, Session};
use crate::error::{Error, Place, Result};
use crate::kernels::PAGE;
use crate::system::memory;

const MAGIC: [u8; 8] = *b"NYBBLEKV";
const VERSION: u32 = 1;
const HEADER: usize = 64;
const HASH: usize = blake3::OUT_LEN;

// Pages are written as they lie in memory, which is how the format has them on every CPU that there are kernels for.
const _: () = assert!(cfg!(target_endian = "little"), "sessions on disk are little-endian");

impl CacheType {
    fn number(self) -> u32 {
        match self {
            CacheType::F32 => 0,
            CacheType::F16 => 1,
            CacheType::Int8 => 2,
        }
    }
}

impl Session {
    /// Writes the session to a file, which appears under its name when it is whole; an older one is replaced then. Only the
    /// user may read it, since it tells what was said.
    ///
    /// `tokens` are the text: those that the session has seen, and perhaps some that it has still to see.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses, [`Error::InvalidArgument`] for a session of another model or a text that is shorter
    /// than what the session has seen.
    pub fn save(&self, model: &Model, tokens: &[u32], path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        if self.model != model.id {
            return Err(Error::argument("session", "a session of another model", "a session of this model"));
        }
        if tokens.len() < self.len() {
            return Err(Error::argument("tokens", tokens.len(), format_args!("at least the {} seen", self.len())));
        }
        let replace = || {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            self.write(model, tokens, file.as_file_mut())?;
            file.persist(path).map(drop).map_err(|error| error.error)
        };
        replace().map_err(|error| Error::io(path, error))
    }

    fn write(&self, model: &Model, tokens: &[u32], file: &mut File) -> std::io::Result<()> {
        let mut out = Hashed { inner: BufWriter::with_capacity(1 << 20, file), hasher: Hasher::new() };
        out.write_all(&MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
        out.write_all(&self.shape.cache_type.number().to_le_bytes())?;
        out.write_all(model.fingerprint())?;
        out.write_all(&(tokens.len() as u64).to_le_bytes())?;
        out.write_all(&(self.len() as u64).to_le_bytes())?;
        for token in tokens {
            out.write_all(&token.to_le_bytes())?;
        }
        let (last, whole) = (self.len() % PAGE, self.len() / PAGE);
        for page in self.pages.iter().take(whole) {
            out.write_all(page.bytes())?;
        }
        if let Some(page) = self.pages.get(whole).filter(|_| last > 0) {
            // What was taken back must not be found in the file.
            let mut page = page.copy(&self.shape).map_err(|_| std::io::ErrorKind::OutOfMemory)?;
            page.clear_from(&self.shape, last);
            out.write_all(page.bytes())?;
        }
        let hash = out.hasher.finalize();
        out.inner.write_all(hash.as_bytes())?;
        out.inner.into_inner().map_err(|error| error.into_error())?.sync_all()
    }

    /// Reads a session that [`save`](Session::save) wrote, and the tokens of its text. It goes on with the bits that it would have
    /// gone on with, on any kernel and with any number of threads.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses; [`Error::Malformed`] with the field when the file is none of a session, is damaged, or
    /// belongs to another model, another way to store keys and values, or a larger context; [`Error::OutOfMemory`].
    pub fn load(model: &Model, path: impl AsRef<Path>) -> Result<(Session, Vec<u32>)> {
        let path = path.as_ref();
        let io = |source| Error::io(path, source);
        // Looked at before it is opened, for that waits where the path is a pipe.
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
        let Counts { tokens, seen } = check(model, path, &header, length)?;

        let out_of_memory = |_| Error::OutOfMemory { what: "the tokens of a session", bytes: 4 * tokens, left: None };
        let mut ids: Vec<u32> = Vec::new();
        ids.try_reserve_exact(tokens).map_err(out_of_memory)?;
        ids.resize(tokens, 0);
        file.read_exact(bytemuck::cast_slice_mut(&mut ids)).map_err(io)?;
        let mut pages = Vec::new();
        for _ in 0..seen.div_ceil(PAGE) {
            memory::check("a page of the key/value cache", model.shape.page_bytes())?;
            let mut page = Page::new(&model.shape)?;
            file.read_exact(page.bytes_mut()).map_err(io)?;
            pages.push(Arc::new(page));
        }
        let computed = file.hasher.finalize();
        let mut stored = [0; HASH];
        file.inner.read_exact(&mut stored).map_err(io)?;
        if computed != stored {
            let [found, expected] = [blake3::Hash::from(stored), computed].map(|hash| hash.to_hex());
            let expected = format!("{expected}, the hash of what the file holds");
            return Err(Error::malformed(path, Place::Key("checksum".to_owned()), found, expected));
        }
        if let Some(token) = ids.iter().find(|token| **token as usize >= model.vocabulary()) {
            let expected = format!("ids below {}", model.vocabulary());
            return Err(Error::malformed(path, Place::Key("tokens".to_owned()), token, expected));
        }
        let mut session = Session::new(model.shape, model.context, model.id);
        session.pages = pages;
        session.advance(seen);
        Ok((session, ids))
    }
}

/// How many tokens a file holds, and how many of them are in its cache.
struct Counts {
    tokens: usize,
    seen: usize,
}

/// Checks every field of a header against the model, and all of them against the length of the file.
fn check(model: &Model, path: &Path, header: &[u8; HEADER], length: u64) -> Result<Counts> {
    let fault = |field: &str, found: String, expected: String| {
        Err(Error::malformed(path, Place::Key(field.to_owned()), found, expected))
    };
    let mut rest = header.as_slice();
    let (magic, version) = (take(&mut rest), u32::from_le_bytes(take(&mut rest)));
    if magic != MAGIC {
        let found = format!("\"{}\"", magic.escape_ascii());
        return fault("magic", found, format!("\"{}\", the start of every session", MAGIC.escape_ascii()));
    }
    if version != VERSION {
        return fault("version", version.to_string(), VERSION.to_string());
    }
    let (cache_type, own) = (u32::from_le_bytes(take(&mut rest)), model.shape.cache_type);
    let hash = blake3::Hash::from(take::<HASH>(&mut rest));
    if hash != *model.hash() {
        let expected = format!("{}, the hash of the model {}", model.hash().to_hex(), model.path.display());
        return fault("model", format!("the hash {}", hash.to_hex()), expected);
    }
    if cache_type != own.number() {
        let known = [CacheType::F32, CacheType::F16, CacheType::Int8].into_iter().find(|t| t.number() == cache_type);
        let found = known.map_or_else(|| format!("type {cache_type}"), |known| known.name().to_owned());
        return fault("cache_type", found, format!("{}, that of the loaded model", own.name()));
    }
    let (tokens, seen) = (u64::from_le_bytes(take(&mut rest)), u64::from_le_bytes(take(&mut rest)));
    if seen > model.context as u64 {
        let expected = format!("at most {}, the context that the model was loaded with", model.context);
        return fault("tokens in the cache", seen.to_string(), expected);
    }
    if tokens < seen {
        return fault("tokens", tokens.to_string(), format!("at least the {seen} in the cache"));
    }
    let counts = usize::try_from(tokens).ok().zip(usize::try_from(seen).ok());
    let expected = counts.and_then(|(tokens, seen)| {
        let fixed = tokens.checked_mul(size_of::<u32>())?.checked_add(HEADER + HASH)?;
        fixed.checked_add(model.shape.bytes(seen)?)
    });
    match (counts, expected) {
        (Some((tokens, seen)), Some(expected)) if expected as u64 == length => Ok(Counts { tokens, seen }),
        (_, expected) => {
            let bytes = expected.map_or_else(|| "more bytes than can be counted".to_owned(), |n| format!("{n} bytes"));
            let expected = format!("{bytes} for {tokens} tokens, {seen} of them in the cache");
            Err(Error::malformed(path, Place::File, format_args!("{length} bytes"), expected))
        }
    }
}

/// The next `N` bytes of a header, which is long enough for all that is taken of it.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let mut taken = [0; N];
    let (first, others) = rest.split_at(N);
    taken.copy_from_slice(first);
    *rest = others;
    taken
}

/// Passes bytes through and hashes them.
struct Hashed<T> {
    inner: T,
    hasher: Hasher,
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
