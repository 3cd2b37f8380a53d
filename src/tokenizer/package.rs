//! The crate `tokenizers` as an encoder.

use std::str::FromStr;

use tokenizers::models::ModelWrapper;
use tokenizers::{AddedVocabulary, Model, OffsetType, PreTokenizer};

use crate::system::panics;

/// A tokenizer of the crate, with its own search for special tokens: the crate's switch for that affects all threads.
#[derive(Debug)]
pub(super) struct Package {
    inner: tokenizers::Tokenizer,
    /// The added tokens, without those that are special.
    literal: AddedVocabulary,
}

impl Package {
    /// Reads the content of a `tokenizer.json`. An error is the reason why it cannot be used.
    pub(super) fn new(text: &str) -> Result<Package, String> {
        let read = panics::catch(|| tokenizers::Tokenizer::from_str(text).map_err(|error| error.to_string()));
        let mut inner = read.and_then(|inner| inner)?;
        // Dropout skips random merges, which is for training.
        if let ModelWrapper::BPE(bpe) = inner.get_model()
            && bpe.dropout.is_some()
        {
            let mut bpe = bpe.clone();
            bpe.dropout = None;
            inner.with_model(bpe);
        }
        let mut literal = inner.get_added_vocabulary().clone();
        literal.set_encode_special_tokens(true);
        let package = Package { inner, literal };
        let tried = package.encode("a", true);
        tried.map_err(|reason| format!("it cannot encode the text 'a': {reason}"))?;
        Ok(package)
    }

    /// The ids of `text`, without start and end tokens. An error is the reason, which the crate may give by a panic.
    pub(super) fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>, String> {
        let added = if parse_special { self.inner.get_added_vocabulary() } else { &self.literal };
        let encode = || -> tokenizers::Result<Vec<u32>> {
            let mut words = added.extract_and_normalize(self.inner.get_normalizer(), text);
            if let Some(splitter) = self.inner.get_pre_tokenizer() {
                splitter.pre_tokenize(&mut words)?;
            }
            self.inner.get_model().tokenize_in_pretokenized(&mut words, None)?;
            Ok(words.into_encoding(None, 0, OffsetType::None)?.get_ids().to_vec())
        };
        panics::catch(encode)?.map_err(|error| error.to_string())
    }
}
