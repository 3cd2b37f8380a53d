//! The error type of the crate.

use std::fmt;
use std::path::{Path, PathBuf};

/// The result of every fallible function of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Where in a file an error is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// A byte offset from the start of the file.
    Offset(u64),
    /// A metadata key.
    Key(String),
    /// A tensor, by name.
    Tensor(String),
    /// A part of the file, in words, such as `added token '<eos>'`.
    Part(String),
    /// The file as a whole.
    File,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Offset(at) => write!(f, "at byte {at}"),
            Place::Key(key) => write!(f, "key {key:?}"),
            Place::Tensor(name) => write!(f, "tensor {name:?}"),
            Place::Part(part) => f.write_str(part),
            Place::File => f.write_str("the file"),
        }
    }
}

/// The errors of the crate, with the data that callers need to handle them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to open, read, map, write or rename a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error. It is part of the message, so [`source`](std::error::Error::source) does not return it again: the raw
        /// name tells `thiserror` so.
        r#source: std::io::Error,
    },

    /// A file breaks its format, or its parts contradict each other.
    #[error("{}: {place}: found {found}, expected {expected}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        place: Place,
        /// What is there.
        found: String,
        /// What should be there.
        expected: String,
    },

    /// A tensor, a metadata key or a file that the model needs does not exist.
    #[error("{}: {place} is missing, expected {expected}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The key, the tensor or the file.
        place: Place,
        /// What should be there.
        expected: String,
    },

    /// The file is well-formed but uses something that nybble does not support.
    #[error("{}: {place}: {what} is not supported ({supported})", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        place: Place,
        /// What the file uses.
        what: String,
        /// What is supported instead.
        supported: String,
    },

    /// The requested kernel does not exist, or this CPU cannot run it.
    #[error("kernel {name:?} is not available on this CPU (available: {})", available.join(", "))]
    UnknownKernel {
        /// The requested name.
        name: String,
        /// The kernels that this CPU can run.
        available: Vec<&'static str>,
    },

    /// The tokens do not fit into the context.
    #[error("context is full: {used} tokens used and {requested} more requested, but the context holds {context}")]
    ContextFull {
        /// Tokens in the cache.
        used: usize,
        /// Tokens to be added.
        requested: usize,
        /// Tokens that fit.
        context: usize,
    },

    /// An argument is outside what the function accepts.
    #[error("{name}: found {found}, expected {expected}")]
    InvalidArgument {
        /// The argument.
        name: &'static str,
        /// The value that was passed.
        found: String,
        /// What is accepted.
        expected: String,
    },

    /// An allocation failed, or would exceed the limit of the process's cgroup. Nothing was changed.
    #[error("out of memory: {what} needs {bytes} bytes{}", in_cgroup(*left))]
    OutOfMemory {
        /// What the memory is for.
        what: &'static str,
        /// The size of the allocation.
        bytes: usize,
        /// The bytes that the process's cgroup has left, where its limit is the reason.
        left: Option<usize>,
    },

    /// The caller interrupted a step. The session is as it was before the step.
    #[error("interrupted")]
    Interrupted,

    /// Keys or values of a token are beyond the range of the KV cache. The other sequences of the step are not affected.
    #[error(
        "the keys or values of token {position} exceed {largest}, the largest number of the KV cache's type {cache_type}: \
         load the model with cache_type f32 or int8"
    )]
    CacheOverflow {
        /// Position of the first such token.
        position: usize,
        /// How the cache stores numbers.
        cache_type: &'static str,
        /// The largest number that it holds.
        largest: f32,
    },

    /// A stage of a pipeline has ended, cannot be reached, or has other sessions than its driver. What it had computed is to be computed
    /// again.
    #[error("a stage of the pipeline is lost: {0}")]
    StageLost(String),

    /// A logits processor of the caller failed.
    #[error("a logits processor failed: {0}")]
    LogitsProcessor(Box<dyn std::error::Error + Send + Sync>),

    /// The model's hidden states are not numbers.
    #[error("the hidden states contain NaN or infinities: the weights are damaged or overflow")]
    BadHiddenStates,

    /// The model's logits cannot be sampled.
    #[error("the logits contain NaN or no finite value: the weights are damaged or overflow")]
    BadLogits,
}

/// The last part of the message of [`Error::OutOfMemory`].
fn in_cgroup(left: Option<usize>) -> String {
    left.map(|left| format!(", the cgroup has {left} left")).unwrap_or_default()
}

impl Error {
    /// [`Error::Malformed`] at `place` of the file at `path`.
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

    /// [`Error::Io`] for the file at `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// [`Error::InvalidArgument`] for the argument `name`.
    pub fn argument(name: &'static str, found: impl fmt::Display, expected: impl fmt::Display) -> Self {
        Error::InvalidArgument { name, found: found.to_string(), expected: expected.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn a_chain_of_errors_says_each_thing_once() {
        let failed = Error::io("model.gguf", std::io::Error::other("the disk is damaged"));
        let mut error: &dyn std::error::Error = &failed;
        let mut chain = error.to_string();
        while let Some(source) = error.source() {
            chain = format!("{chain}: {source}");
            error = source;
        }
        assert_eq!(chain, "model.gguf: the disk is damaged");
        assert!(Error::argument("context", 0, "at least 1").source().is_none());
    }
}
