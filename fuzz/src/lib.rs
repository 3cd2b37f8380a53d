//! What the fuzz targets share.

use std::cell::OnceCell;
use std::path::PathBuf;

use nybble::model::{Input, Logits, Model};

thread_local! {
    static FOLDER: OnceCell<tempfile::TempDir> = const { OnceCell::new() };
}

/// Writes `bytes` to the file `name` of a folder that lasts as long as the process, in memory where there is such a place.
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

/// Computes a step of two tokens and one of another. Whatever weights there are, there is one row of logits each.
pub fn step(model: &Model) {
    if model.parameters() > 1 << 22 {
        return; // Right, but slow: the fuzzer shall spend its time elsewhere.
    }
    let mut session = model.session();
    for tokens in [&[0, 0][..], &[0]] {
        let mut logits = Vec::new();
        let input = Input { session: &mut session, tokens, logits: Logits::Last };
        if model.forward(&mut [input], &mut logits, &|| false).is_ok() {
            assert_eq!(logits.len(), model.vocabulary());
        }
    }
}
