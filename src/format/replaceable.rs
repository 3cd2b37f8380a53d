//! Which files a writer may replace.

use std::fs::{FileType, Metadata};
use std::io::ErrorKind;
use std::path::Path;

use crate::error::{Error, Result};

/// Whether there is a file at `path`, given as the argument `name`, that a new one would replace.
///
/// # Errors
/// [`Error::InvalidArgument`] for a folder, a device, a named pipe, a socket, or a link that leads to none of them nor to a file.
pub fn check_replaceable(name: &'static str, path: &Path) -> Result<bool> {
    // Other errors are left to the writer, which names the file.
    let Ok(own) = path.symlink_metadata() else { return Ok(false) };
    let what = match path.metadata() {
        Ok(target) if target.is_file() => return Ok(true),
        Ok(target) => kind(&target).to_owned(),
        Err(error) if own.is_symlink() => unresolved_link(path, &error),
        Err(_) => return Ok(true),
    };
    Err(Error::argument(name, format_args!("{}, which is {what}", path.display()), "a regular file or a new name"))
}

/// What a link at `path` that cannot be followed is called.
pub(super) fn unresolved_link(path: &Path, error: &std::io::Error) -> String {
    match path.read_link() {
        Ok(target) if error.kind() == ErrorKind::NotFound => {
            format!("a link to {}, which does not exist", target.display())
        }
        Ok(_) if error.kind() != ErrorKind::PermissionDenied => "a loop of links".to_owned(),
        _ => "a link that cannot be followed".to_owned(),
    }
}

fn kind(metadata: &Metadata) -> &'static str {
    if metadata.is_dir() { "a folder" } else { special(metadata.file_type()) }
}

#[cfg(unix)]
fn special(kind: FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    match kind {
        _ if kind.is_fifo() => "a named pipe",
        _ if kind.is_socket() => "a socket",
        _ if kind.is_char_device() || kind.is_block_device() => "a device",
        _ => "not a regular file",
    }
}

#[cfg(not(unix))]
fn special(_: FileType) -> &'static str {
    "not a regular file"
}
