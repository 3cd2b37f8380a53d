//! Errors of the library as Python exceptions.

use std::ffi::OsString;
use std::io::ErrorKind;

use pyo3::exceptions::{PyMemoryError, PyOSError, PyValueError};
use pyo3::prelude::*;

use crate::Error;

mod imported {
    //! Exceptions that the package defines in Python.
    #![allow(missing_docs, reason = "the classes are described where they are defined")]
    pyo3::import_exception!(nybble.errors, ModelError);
    pyo3::import_exception!(nybble.errors, ContextFullError);
    pyo3::import_exception!(nybble.errors, InternalError);
}
use imported::ContextFullError;
pub(super) use imported::InternalError;
pub(super) use imported::ModelError;

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        let message = error.to_string();
        match error {
            Error::Io { source, .. } if source.kind() == ErrorKind::OutOfMemory => PyMemoryError::new_err(message),
            Error::Io { path, source } => os_error(&source, path.into_os_string()),
            Error::ContextFull { used, requested, context } => ContextFullError::new_err((used, requested, context)),
            Error::UnknownKernel { .. } | Error::InvalidArgument { .. } => PyValueError::new_err(message),
            Error::OutOfMemory { .. } => PyMemoryError::new_err(message),
            // The exception of a callable of Python, as it was raised.
            Error::LogitsProcessor(source) => match source.downcast::<PyErr>() {
                Ok(exception) => *exception,
                Err(_) => ModelError::new_err(message),
            },
            _ => ModelError::new_err(message),
        }
    }
}

/// By its number, an OSError becomes a FileNotFoundError, a PermissionError and so on.
fn os_error(error: &std::io::Error, path: OsString) -> PyErr {
    #[cfg(windows)]
    if let Some(code) = error.raw_os_error() {
        // Windows has numbers of its own, from which Python derives the first argument.
        return PyOSError::new_err((0, reason(error), path, code));
    }
    PyOSError::new_err((number(error), reason(error), path))
}

/// The system's error number, or the nearest one for an error of a library.
fn number(error: &std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(match error.kind() {
        ErrorKind::NotFound => 2,
        ErrorKind::PermissionDenied => 13,
        ErrorKind::AlreadyExists => 17,
        ErrorKind::NotADirectory => 20,
        ErrorKind::IsADirectory => 21,
        ErrorKind::InvalidInput => 22,
        ErrorKind::FileTooLarge => 27,
        ErrorKind::StorageFull => 28,
        ErrorKind::ReadOnlyFilesystem => 30,
        _ => 5, // An error of input or output.
    })
}

/// The system's message, without the number that Python adds itself.
fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split_once(" (os error").map_or(text.as_str(), |(reason, _)| reason).to_owned()
}
