//! `nybble._native.SentencePiece`: `crate::vocab` for Python.

use pyo3::prelude::*;
use pyo3::types::{PyList, PyString};

use crate::Error;
use crate::vocab::{self, Piece, TokenKind};

/// A SentencePiece vocabulary that turns text into token ids.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct SentencePiece(vocab::SentencePiece);

#[pymethods]
impl SentencePiece {
    /// `tokens`, `scores` and `kinds` are the arrays of a GGUF file. Elements beyond the shortest are ignored.
    #[new]
    #[pyo3(signature = (tokens, scores, kinds, *, add_space_prefix, unknown=None, drop_space_after=Vec::new()))]
    fn new(
        tokens: &Bound<'_, PyList>,
        scores: Vec<f32>,
        kinds: Vec<i64>,
        add_space_prefix: bool,
        unknown: Option<u32>,
        drop_space_after: Vec<u32>,
    ) -> PyResult<Self> {
        let tokens = tokens.iter().map(|token| token.cast_into::<PyString>()).collect::<Result<Vec<_>, _>>()?;
        // The pieces with their scores and ids in a hash map that is half empty.
        let bytes = tokens.iter().map(|token| token.to_str().map_or(0, str::len) + 64).sum();
        let reserved = Vec::<u8>::new().try_reserve_exact(bytes);
        reserved.map_err(|_| Error::OutOfMemory { what: "a vocabulary", bytes, left: None })?;
        let made = super::detach::caught(|| {
            let pieces = tokens.iter().zip(scores).zip(kinds).map(|((token, score), kind)| Piece {
                text: token.to_str().ok(), // Fails for invalid UTF-8, which comes as lone surrogates.
                score,
                kind: TokenKind::from_id(kind),
            });
            vocab::SentencePiece::new(pieces)
                .with_space_prefix(add_space_prefix)
                .with_unknown(unknown)
                .with_space_dropped_after(&drop_space_after)
        });
        made.map(SentencePiece)
    }

    /// The token ids of `text`. Special tokens in it are recognized if `parse_special`. Releases the GIL.
    fn encode(&self, py: Python<'_>, text: &str, parse_special: bool) -> PyResult<Vec<u32>> {
        super::detach::guarded(py, || Ok(self.0.encode(text, parse_special)))
    }
}
