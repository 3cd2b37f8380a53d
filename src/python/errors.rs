//! Errors of the library as Python exceptions.

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
            // By the error number, OSError becomes FileNotFoundError, PermissionError and so on.
            Error::Io { path, source } => PyOSError::new_err((number(&source), reason(&source), path.into_os_string())),
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
