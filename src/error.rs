//! The one error type of the crate.

use std::fmt;
use std::path::{Path, PathBuf};

/// What every fallible function of the crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Where in a file a fault was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// A byte offset from the start of the file.
    Offset(u64),
    /// A metadata key.
    Key(String),
    /// A tensor, by name.
    Tensor(String),
    /// The file as a whole.
    File,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Offset(at) => write!(f, "at byte {at}"),
            Place::Key(key) => write!(f, "key {key:?}"),
            Place::Tensor(name) => write!(f, "tensor {name:?}"),
            Place::File => f.write_str("the file"),
        }
    }
}

/// Everything that can go wrong, with the data a caller needs to act on it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to open, read, map, write or rename a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },

    /// A file breaks its format, or its parts contradict one another.
    #[error("{}: {place}: found {found}, expected {expected}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where in it.
        place: Place,
        /// What stands there.
        found: String,
        /// What should stand there.
        expected: String,
    },

    /// A tensor or a metadata key that the model needs is not in the file.
    #[error("{}: {place} is missing, expected {expected}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The key or tensor.
        place: Place,
        /// What it should hold.
        expected: String,
    },

    /// The file is well-formed but asks for something that nybble does not do.
    #[error("{}: {place}: {what} is not supported ({supported})", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Where in it.
        place: Place,
        /// What was asked for.
        what: String,
        /// What is supported instead.
        supported: String,
    },

    /// A kernel was asked for by a name that this CPU cannot run or that does not exist.
    #[error("kernel {name:?} is not available on this CPU (available: {})", available.join(", "))]
    UnknownKernel {
        /// The name asked for.
        name: String,
        /// The names that would work.
        available: Vec<&'static str>,
    },

    /// The tokens do not fit into the context any more.
    #[error("context is full: {used} tokens used and {requested} more requested, but the context holds {context}")]
    ContextFull {
        /// Tokens in the cache.
        used: usize,
        /// Tokens that were to be added.
        requested: usize,
        /// Tokens that fit.
        context: usize,
    },

    /// An argument is outside what the function accepts.
    #[error("{name}: found {found}, expected {expected}")]
    InvalidArgument {
        /// The argument.
        name: &'static str,
        /// Its value.
        found: String,
        /// What is accepted.
        expected: String,
    },

    /// There is no memory for what was asked. Nothing was changed.
    #[error("out of memory: {what} needs {bytes} bytes{}", but_left(*left))]
    OutOfMemory {
        /// What the memory is for.
        what: &'static str,
        /// How much of it.
        bytes: usize,
        /// What the limit of the process's control group leaves, where that is the reason.
        left: Option<usize>,
    },

    /// The caller asked to stop in the middle of a step. The session is as it was before the step.
    #[error("interrupted")]
    Interrupted,

    /// The model computed logits from which nothing can be sampled.
    #[error("the logits contain NaN or no finite value: the weights are damaged or overflow")]
    BadLogits,
}

/// The end of a message about memory.
fn but_left(left: Option<usize>) -> String {
    left.map(|left| format!(", and the cgroup leaves {left}")).unwrap_or_default()
}

impl Error {
    /// A fault at `place` of the file at `path`.
    pub fn malformed(
        path: impl AsRef<Path>,
        place: Place,
        found: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Self {
        Error::Malformed {
            path: path.as_ref().to_path_buf(),
            place,
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    /// An operating system's error with the file it is about.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// An argument outside what the function accepts.
    pub fn argument(name: &'static str, found: impl fmt::Display, expected: impl fmt::Display) -> Self {
        Error::InvalidArgument { name, found: found.to_string(), expected: expected.to_string() }
    }
}
