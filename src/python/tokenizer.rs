//! `nybble._native.TokenizerDescription`: `crate::tokenizer` for Python.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pyo3::exceptions::PyFileNotFoundError;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyFloat, PyInt, PyList, PyString, PyTuple};

use super::constraint::Vocabulary;
use super::detach::guarded;
use super::errors::ModelError;
use super::gguf::text;
use crate::engine::constraint;
use crate::error::{Error, Place};
use crate::format::gguf::{Array, Gguf, Metadata, OpenOptions, StringArray, Value};
use crate::tokenizer;
use crate::tokenizer::description::{Build, Description};

/// The names of the rules by which byte-level vocabularies split a text into words.
#[pyfunction]
pub(super) fn pre_tokenizer_names() -> Vec<&'static str> {
    tokenizer::pre_tokenizer_names().collect()
}

/// What a file says about its tokenizer. SentencePiece vocabularies also encode; for others `build`, a function, gets the text
/// of a `tokenizer.json` and returns None, or the reason why it cannot use it.
#[pyclass(frozen, module = "nybble._native")]
pub(super) struct TokenizerDescription(Description);

#[pymethods]
impl TokenizerDescription {
    /// The description in a GGUF file.
    #[staticmethod]
    fn from_gguf(py: Python<'_>, path: PathBuf, mmap: bool, build: Py<PyAny>) -> PyResult<Self> {
        let file = guarded(py, || Gguf::open_with(&path, &OpenOptions { mmap }))?;
        described(py, &build, |build| tokenizer::describe_metadata(file.metadata(), &path, build))
    }

    /// The description in the keys and values of a GGUF file; `where` is the file, for errors.
    #[staticmethod]
    fn from_metadata(py: Python<'_>, metadata: &Bound<'_, PyAny>, r#where: String, build: Py<PyAny>) -> PyResult<Self> {
        let path = Path::new(&r#where);
        let metadata = from_python(metadata, path)?;
        described(py, &build, |build| tokenizer::describe_metadata(&metadata, path, build))
    }

    /// The description in a Hugging Face folder.
    #[staticmethod]
    fn from_folder(py: Python<'_>, path: PathBuf, build: Py<PyAny>) -> PyResult<Self> {
        described(py, &build, |build| tokenizer::describe_folder(&path, build))
    }

    /// Whether `encode` encodes. Otherwise the encoder is the one that `build` has made.
    #[getter]
    fn encodes(&self) -> bool {
        self.0.sentencepiece.is_some()
    }

    /// The token ids of `text` in a SentencePiece vocabulary, without start and end tokens. Special tokens in it are recognized
    /// if `parse_special`. Releases the GIL.
    fn encode(&self, py: Python<'_>, text: &str, parse_special: bool) -> PyResult<Vec<u32>> {
        let missing = || Error::argument("vocabulary", "byte-level BPE", "SentencePiece");
        let pieces = self.0.sentencepiece.as_ref().ok_or_else(missing)?;
        guarded(py, || Ok(pieces.encode(text, parse_special)))
    }

    /// `ids` with the tokens that the model expects around every text, without repeating those that are there already. Without
    /// `ends`, only those before it.
    fn framed(&self, ids: Vec<u32>, parse_special: bool, ends: bool) -> Vec<u32> {
        self.0.framed(ids, parse_special, ends)
    }

    /// Two strings as one, with the tokens that the model expects around and between them; and the index of the first token
    /// of the second text, or None where the model does not tell it from the first.
    fn framed_pair(&self, first: Vec<u32>, second: Vec<u32>) -> (Vec<u32>, Option<usize>) {
        self.0.framed_pair(first, second)
    }

    /// The spelling of a token. None for an id without a token.
    fn token_text<'py>(&self, py: Python<'py>, token: i64) -> PyResult<Option<Bound<'py, PyAny>>> {
        id(token).and_then(|id| self.0.token_text(id)).map(|bytes| text(py, bytes)).transpose()
    }

    /// The bytes that a token adds to a text. None for an id without a token.
    fn token_bytes<'py>(&self, py: Python<'py>, token: i64) -> Option<Bound<'py, PyBytes>> {
        Some(PyBytes::new(py, &self.0.token_bytes(id(token)?)?))
    }

    /// The id of the token with this spelling.
    fn id_of(&self, text: &Bound<'_, PyString>) -> PyResult<Option<u32>> {
        Ok(self.0.id_of(&bytes(text)?))
    }

    /// The vocabulary for grammars.
    fn grammar_vocabulary(&self, py: Python<'_>) -> PyResult<Vocabulary> {
        guarded(py, || constraint::Vocabulary::of_description(&self.0)).map(Vocabulary)
    }

    /// The ids below `count` without a token, as ranges (first, end) in ascending order.
    fn missing_ids(&self, count: usize) -> Vec<(u32, u32)> {
        self.0.missing_ids(count).into_iter().map(|ids| (ids.start, ids.end)).collect()
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.0.len()
    }

    #[getter]
    fn bos_id(&self) -> Option<u32> {
        self.0.bos
    }

    #[getter]
    fn eos_id(&self) -> Option<u32> {
        self.0.eos
    }

    /// Every token that ends a generation.
    #[getter]
    fn end_ids(&self) -> Vec<u32> {
        self.0.ends.clone()
    }

    /// All special tokens, which decode to no text.
    #[getter]
    fn special_ids(&self) -> Vec<u32> {
        self.0.special().to_vec()
    }

    /// Whether encoding puts a space before a text, which decoding removes.
    #[getter]
    fn adds_space(&self) -> bool {
        self.0.adds_space
    }

    /// The special tokens that templates know by name, such as bos_token.
    #[getter]
    fn special_spellings(&self) -> BTreeMap<String, String> {
        self.0.special_texts.clone()
    }

    /// The chat templates by name.
    #[getter]
    fn chat_templates(&self) -> BTreeMap<String, String> {
        self.0.chat_templates.clone()
    }

    /// What the file leaves unclear, and how it was understood.
    #[getter]
    fn warnings(&self) -> Vec<String> {
        self.0.warnings.clone()
    }
}

fn id(token: i64) -> Option<u32> {
    u32::try_from(token).ok()
}

/// Runs `describe` without the GIL, with a [`Build`] that calls `build`. An exception of `build` is raised.
fn described(
    py: Python<'_>,
    build: &Py<PyAny>,
    describe: impl FnOnce(&mut Build<'_>) -> crate::Result<Description> + Send,
) -> PyResult<TokenizerDescription> {
    let mut raised = None;
    let described = guarded(py, || {
        let mut call = |text: &str| {
            Python::attach(|py| {
                let reason = build.call1(py, (text,)).and_then(|reason| reason.extract::<Option<String>>(py));
                match reason {
                    Ok(reason) => reason.map_or(Ok(()), Err),
                    Err(exception) => {
                        raised = Some(exception);
                        Err(String::new())
                    }
                }
            })
        };
        Ok(describe(&mut call))
    })?;
    match (raised, described) {
        (Some(exception), _) => Err(exception),
        (None, Ok(description)) => Ok(TokenizerDescription(description)),
        (None, Err(error)) => Err(failure(error)),
    }
}

/// The error number of a file that does not exist, on every system.
const ENOENT: i32 = 2;

/// The exception for an error, in the form of the package's other messages about tokenizers.
fn failure(error: Error) -> PyErr {
    match error {
        Error::Malformed { path, place, found, expected } => {
            let place = match place {
                Place::File => String::new(),
                Place::Key(key) => format!(": key '{key}'"),
                other => format!(": {other}"),
            };
            ModelError::new_err(format!("{}{place}: found {found}, expected {expected}", path.display()))
        }
        Error::Missing { path, .. } => {
            let (folder, name) = (path.parent().unwrap_or(Path::new("")), path.file_name().unwrap_or_default());
            let reason = format!("the folder has no {}", name.display());
            PyFileNotFoundError::new_err((ENOENT, reason, folder.display().to_string()))
        }
        Error::Io { ref source, .. } if source.raw_os_error().is_none() => ModelError::new_err(error.to_string()),
        other => other.into(),
    }
}

/// The bytes of a string. Lone surrogates stand for bytes that were not UTF-8.
fn bytes(text: &Bound<'_, PyString>) -> PyResult<Vec<u8>> {
    if let Ok(text) = text.to_str() {
        return Ok(text.as_bytes().to_vec());
    }
    let encode = |errors| text.call_method1("encode", ("utf-8", errors));
    encode("surrogateescape").or_else(|_| encode("surrogatepass"))?.extract()
}

/// The keys of a mapping that concern a tokenizer. None stands for a key that is missing.
fn from_python(mapping: &Bound<'_, PyAny>, path: &Path) -> PyResult<Metadata> {
    let mut metadata = Metadata::new();
    for item in mapping.call_method0("items")?.try_iter()? {
        let (key, value) = item?.extract::<(String, Bound<'_, PyAny>)>()?;
        if !value.is_none() && (key.starts_with("tokenizer.") || key == "general.name") {
            let converted = convert(&value)?
                .map_err(|(found, expected)| failure(Error::malformed(path, Place::Key(key.clone()), found, expected)));
            metadata.set(key, converted?);
        }
    }
    Ok(metadata)
}

/// What was found and what was expected in place of a value that no GGUF file has.
type Fault = (String, String);

fn convert(value: &Bound<'_, PyAny>) -> PyResult<Result<Value, Fault>> {
    let name = |value: &Bound<'_, PyAny>| value.get_type().name().map(|name| name.to_string());
    if let Ok(text) = value.cast::<PyString>() {
        return Ok(Ok(Value::String(bytes(text)?)));
    }
    if value.is_instance_of::<PyBool>() {
        return Ok(Ok(Value::Bool(value.extract()?)));
    }
    if value.is_instance_of::<PyInt>() {
        let number = value.extract::<i64>().map(Value::I64).or_else(|_| value.extract::<u64>().map(Value::U64));
        return Ok(number.map_err(|_| ("an integer of more than 64 bits".to_owned(), "a smaller one".to_owned())));
    }
    if value.is_instance_of::<PyFloat>() {
        return Ok(Ok(Value::F64(value.extract()?)));
    }
    if !value.is_instance_of::<PyList>() && !value.is_instance_of::<PyTuple>() {
        let found = format!("a value of type {}", name(value)?);
        return Ok(Err((found, "a string, a number, true or false, or an array".to_owned())));
    }
    let elements: Vec<Bound<'_, PyAny>> = value.try_iter()?.collect::<PyResult<_>>()?;
    let Some(first) = elements.first() else { return Ok(Ok(Value::Array(Array::U8(Vec::new())))) };
    let kind = first.get_type();
    if let Some(other) = elements.iter().find(|element| !element.get_type().is(&kind)) {
        let found = format!("an array that holds {}", name(other)?);
        return Ok(Err((found, format!("an array of {}", name(first)?))));
    }
    let array = if first.is_instance_of::<PyString>() {
        let mut strings = StringArray::new();
        for element in &elements {
            strings.push(bytes(element.cast()?)?);
        }
        Array::String(strings)
    } else if first.is_instance_of::<PyBool>() {
        Array::Bool(value.extract()?)
    } else if first.is_instance_of::<PyInt>() {
        match value.extract().map(Array::I64).or_else(|_| value.extract().map(Array::U64)) {
            Ok(array) => array,
            Err(_) => {
                let found = "an array of integers of more than 64 bits, or of both signs".to_owned();
                return Ok(Err((found, "smaller ones".to_owned())));
            }
        }
    } else if first.is_instance_of::<PyFloat>() {
        Array::F64(value.extract()?)
    } else {
        let found = format!("an array that holds {}", name(first)?);
        return Ok(Err((found, "strings, numbers, or true and false".to_owned())));
    };
    Ok(Ok(Value::Array(array)))
}
