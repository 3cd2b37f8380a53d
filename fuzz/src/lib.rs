//! Helpers for the fuzz targets.

use std::cell::OnceCell;
use std::path::PathBuf;

use nybble::model::{Input, Logits, Model};

thread_local! {
    static FOLDER: OnceCell<tempfile::TempDir> = const { OnceCell::new() };
}

/// Writes `bytes` to the file `name` in a folder that exists as long as the process, in memory where possible.
pub fn saved(name: &str, bytes: &[u8]) -> PathBuf {
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(|| {
            let made = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
            made.unwrap_or_else(|error| panic!("no folder to write to: {error}"))
        });
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        path
    })
}

/// Computes a step of two tokens and one of one token. Each yields one row of logits.
pub fn step(model: &Model) {
    if model.parameters() > 1 << 22 {
        return; // Valid, but slow.
    }
    let mut session = model.session();
    for tokens in [&[0, 0][..], &[0]] {
        let mut logits = Vec::new();
        let input = Input::new(&mut session, tokens, Logits::Last);
        if model.forward(&mut [input], &mut logits, &|| false).is_ok() {
            assert_eq!(logits.len(), model.vocabulary());
        }
    }
}
