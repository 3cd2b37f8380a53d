//! Tokenizers: text to token ids and back.
//!
//! [`Tokenizer::load`] reads the tokenizer of a GGUF file or of a Hugging Face folder, and
//! [`Model::tokenizer`](crate::model::Model::tokenizer) that of a loaded model. SentencePiece vocabularies are encoded by
//! nybble itself. Byte-level BPE and `tokenizer.json` are encoded by the crate `tokenizers`, which the default feature
//! `tokenizers` adds. Decoding needs no feature.
//!
//! The same code describes the tokenizers of the Python package, so both languages give the same ids and strings.
//!
//! ```
//! use nybble::format::gguf::{Metadata, StringArray};
//! use nybble::tokenizer::Tokenizer;
//!
//! # fn main() -> nybble::Result<()> {
//! let mut metadata = Metadata::new();
//! metadata
//!     .set("tokenizer.ggml.model", "llama")
//!     .set("tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>", "\u{2581}", "a"].iter().collect::<StringArray>())
//!     .set("tokenizer.ggml.token_type", vec![2i32, 3, 3, 1, 1])
//!     .set("tokenizer.ggml.scores", vec![0f32; 5]);
//! let tokenizer = Tokenizer::from_metadata(&metadata, "model.gguf")?;
//! let ids = tokenizer.encode("a a")?;
//! assert_eq!(ids, [1, 3, 4, 3, 4]);
//! assert_eq!(tokenizer.decode(&ids)?, "a a");
//! assert_eq!(tokenizer.ends(), [2]);
//! # Ok(())
//! # }
//! ```

#[cfg(feature = "chat")]
mod chat;
pub(crate) mod description;
mod ends;
mod files;
mod folder;
mod gguf;
mod json;
mod keys;
pub(crate) mod older;
#[cfg(feature = "tokenizers")]
mod package;
mod pre_tokenizers;
#[doc(hidden)]
pub mod sentencepiece;
mod stream;
mod token_bytes;

use std::path::Path;

#[cfg(feature = "chat")]
pub use chat::{ChatOptions, Message};
pub(crate) use description::Limits;
use description::{Build, Description};
pub use stream::StreamDecoder;

use crate::error::{Error, Place, Result};
use crate::format::gguf::{Gguf, Metadata, OpenOptions};

/// Converts between text and the token ids of a model. Threads may share it.
#[derive(Debug)]
pub struct Tokenizer {
    description: Description,
    #[cfg(feature = "tokenizers")]
    package: Option<package::Package>,
}

/// How a text is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct EncodeOptions {
    /// Adds the model's start and end tokens if the model was trained with them. A text that begins with the start token
    /// receives no second one. Default: true.
    pub add_special: bool,
    /// Encodes special tokens that are spelled out in the text (`<|im_end|>`) as these tokens, which the output of a chat
    /// template needs. False encodes them as plain characters, which is safer for untrusted text. Default: true.
    pub parse_special: bool,
}

impl Default for EncodeOptions {
    fn default() -> EncodeOptions {
        EncodeOptions { add_special: true, parse_special: true }
    }
}

setters!(EncodeOptions { with_add_special(add_special: bool), with_parse_special(parse_special: bool) });

impl Tokenizer {
    /// Loads the tokenizer of a GGUF file, with or without weights, or of a Hugging Face folder with a `tokenizer.json`.
    ///
    /// # Errors
    /// Those of [`Gguf::open`]; [`Error::Missing`] for a folder without `tokenizer.json`; [`Error::Malformed`] with the key or
    /// part that is damaged or not supported; [`Error::Unsupported`] when the tokenizer needs the feature `tokenizers`, which
    /// this build does not have; [`Error::OutOfMemory`].
    pub fn load(path: impl AsRef<Path>) -> Result<Tokenizer> {
        let path = path.as_ref();
        if path.is_dir() {
            return Tokenizer::build(|build| describe_folder(path, build));
        }
        let file = Gguf::open_with(path, &OpenOptions::default())?;
        Tokenizer::from_metadata(file.metadata(), path)
    }

    /// The tokenizer of the metadata of a GGUF file. `path` is the file, for errors.
    ///
    /// # Errors
    /// As for [`Tokenizer::load`].
    pub fn from_metadata(metadata: &Metadata, path: impl AsRef<Path>) -> Result<Tokenizer> {
        let path = path.as_ref();
        Tokenizer::build(|build| gguf::describe(metadata, path, build))
    }

    #[cfg(feature = "tokenizers")]
    fn build(describe: impl FnOnce(&mut Build<'_>) -> Result<Description>) -> Result<Tokenizer> {
        let mut package = None;
        let description = describe(&mut |text| {
            package = Some(package::Package::new(text)?);
            Ok(())
        })?;
        Ok(Tokenizer { description, package })
    }

    #[cfg(not(feature = "tokenizers"))]
    fn build(describe: impl FnOnce(&mut Build<'_>) -> Result<Description>) -> Result<Tokenizer> {
        Ok(Tokenizer { description: describe(&mut |_| Ok(()))? })
    }

    /// The token ids of `text`, with the start and end tokens that the model was trained with. Special tokens that are spelled
    /// out in the text are recognized.
    ///
    /// # Errors
    /// [`Error::Malformed`] when the vocabulary cannot encode the text; [`Error::Unsupported`] when the vocabulary needs the
    /// feature `tokenizers`, which this build does not have.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, EncodeOptions::default())
    }

    /// As [`Tokenizer::encode`], with options.
    ///
    /// # Errors
    /// As for [`Tokenizer::encode`].
    pub fn encode_with(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
        self.encode_framed(text, options, true)
    }

    /// The token ids of a text that the model continues, such as a chat prompt: as [`Tokenizer::encode`], but without end tokens.
    /// Programs that fine-tune models leave the switch for them on, and after an end token the model begins another
    /// text.
    ///
    /// # Errors
    /// As for [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_framed(text, EncodeOptions::default(), false)
    }

    /// The token ids of two strings as one, such as a query and a document, with the tokens that the model expects around and
    /// between them; and the index of the first token of the second text, for models that tell it from the first.
    ///
    /// # Errors
    /// As for [`Tokenizer::encode`].
    pub fn encode_pair(&self, first: &str, second: &str) -> Result<(Vec<u32>, Option<usize>)> {
        let plain = EncodeOptions { add_special: false, parse_special: false };
        let (first, second) = (self.encode_with(first, plain)?, self.encode_with(second, plain)?);
        Ok(self.description.framed_pair(first, second))
    }

    fn encode_framed(&self, text: &str, options: EncodeOptions, ends: bool) -> Result<Vec<u32>> {
        let ids = match &self.description.sentencepiece {
            Some(pieces) => pieces.encode(text, options.parse_special),
            None => self.encode_by_package(text, options.parse_special)?,
        };
        Ok(if options.add_special { self.description.framed(ids, options.parse_special, ends) } else { ids })
    }

    #[cfg(feature = "tokenizers")]
    fn encode_by_package(&self, text: &str, parse_special: bool) -> Result<Vec<u32>> {
        let Some(package) = &self.package else { return Ok(Vec::new()) };
        package.encode(text, parse_special).map_err(|reason| {
            let start: String = text.chars().take(60).collect();
            let found = format!("tokens that cannot encode {start:?} ({reason})");
            Error::malformed(&self.description.path, Place::Part("vocabulary".to_owned()), found, "tokens for any text")
        })
    }

    #[cfg(not(feature = "tokenizers"))]
    fn encode_by_package(&self, _: &str, _: bool) -> Result<Vec<u32>> {
        Err(Error::Unsupported {
            path: self.description.path.clone(),
            place: Place::Part("vocabulary".to_owned()),
            what: "encoding by byte-level BPE or a tokenizer.json".to_owned(),
            supported: "this build has only SentencePiece: enable the feature `tokenizers` of nybble".to_owned(),
        })
    }

    /// The text of token ids, without special tokens. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// For ids that continue a text, use [`Tokenizer::decoder_after`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an id that is not in the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let mut decoder = self.decoder();
        let text: String = ids.iter().map(|id| decoder.push(*id)).collect::<Result<_>>()?;
        Ok(text + &decoder.finish())
    }

    /// A decoder of the ids of a new text, one at a time.
    pub fn decoder(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(&self.description, &[])
    }

    /// A decoder of ids that continue the text of the ids `before`, such as a prompt. If the vocabulary puts a space before
    /// each text, decoding removes it only at the start of a text: at the very beginning or after a special token.
    pub fn decoder_after(&self, before: &[u32]) -> StreamDecoder<'_> {
        StreamDecoder::new(&self.description, before)
    }

    /// The number of token ids.
    pub fn len(&self) -> usize {
        self.description.len()
    }

    /// Whether there are no tokens. False for every tokenizer that loads.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The token at the start of a text, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.description.bos
    }

    /// The token at the end of a text, if the model has one.
    pub fn eos(&self) -> Option<u32> {
        self.description.eos
    }

    /// All tokens that end a generation: at the end of a text, a turn, or a message to a tool. Sorted.
    pub fn ends(&self) -> &[u32] {
        &self.description.ends
    }

    /// Whether a token is special: it decodes to no text.
    pub fn is_special(&self, id: u32) -> bool {
        self.description.is_special(id)
    }

    /// The id of the token that is spelled `text`, such as `<|im_end|>`.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.description.id_of(text.as_bytes())
    }

    /// The bytes that a token adds to a text. Several tokens may form one character.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an id that is not in the vocabulary.
    pub fn token_bytes(&self, id: u32) -> Result<Vec<u8>> {
        self.description.token_bytes(id).ok_or_else(|| self.description.unknown(id))
    }

    /// The Jinja source of a chat template: that called `name`, or the default one for `None`.
    pub fn chat_template(&self, name: Option<&str>) -> Option<&str> {
        self.description.chat_templates.get(name.unwrap_or("default")).map(String::as_str)
    }

    /// The names of the chat templates, sorted.
    pub fn chat_template_names(&self) -> impl Iterator<Item = &str> {
        self.description.chat_templates.keys().map(String::as_str)
    }

    /// What the file leaves unclear, and how it was understood: an unknown pre-tokenizer, or merges of unknown tokens.
    pub fn warnings(&self) -> &[String] {
        &self.description.warnings
    }

    /// The description that it was built from.
    #[cfg(any(feature = "chat", feature = "grammar"))]
    pub(crate) fn description(&self) -> &Description {
        &self.description
    }
}

/// The names of the rules by which byte-level vocabularies split a text into words.
#[cfg(feature = "python")]
pub(crate) fn pre_tokenizer_names() -> impl Iterator<Item = &'static str> {
    pre_tokenizers::names()
}

/// Reads the description of the folder at `path`.
///
/// # Errors
/// As for [`Tokenizer::load`], and those of `build`.
pub(crate) fn describe_folder(path: &Path, build: &mut Build<'_>) -> Result<Description> {
    match folder::pieces(path)? {
        Some(pieces) => gguf::describe(&pieces, path, build),
        None => folder::describe(path, build),
    }
}

/// Reads the description in the metadata of the file at `path`.
///
/// # Errors
/// As for [`Tokenizer::load`], and those of `build`.
#[cfg(feature = "python")]
pub(crate) fn describe_metadata(metadata: &Metadata, path: &Path, build: &mut Build<'_>) -> Result<Description> {
    gguf::describe(metadata, path, build)
}

/// The limits of the model at `path` with these metadata and `rows` rows in its output matrix, without building a tokenizer.
/// Empty where the files name none.
///
/// # Errors
/// As for [`Tokenizer::load`].
pub(crate) fn limits(metadata: &Metadata, path: &Path, rows: usize) -> Result<Limits> {
    let limits = match path.is_dir() {
        false => gguf::limits(metadata, path, rows),
        true => match describe_folder(path, &mut |_| Ok(())) {
            Err(Error::Missing { .. }) => Ok(Limits { ends: folder::configured_ends(path)?, missing: Vec::new() }),
            described => described.map(|description| Limits::of(&description, rows)),
        },
    };
    // A tokenizer may have more tokens than the model.
    limits.map(|mut limits| {
        limits.ends.retain(|id| (*id as usize) < rows);
        limits
    })
}
