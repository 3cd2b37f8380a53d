//! The storage type of each tensor: the format of linear layers, the type of the others, and overrides by name.

use super::format::{Format, GroupedFormat};
use crate::error::{Error, Result};
use crate::format::Checkpoint;
use crate::model::requantize::target;
use crate::quant::block::BlockType;

/// The formats and types of the tensors of a model.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TensorFormats {
    /// The format of linear layers.
    pub format: Format,
    /// Columns that share a scale: a multiple of 32, or 0 for whole rows. It is halved for rows that it does not divide.
    pub group: usize,
    /// The type of the embedding, the output and other matrices outside of the linear layers.
    pub output_type: BlockType,
    /// Types of single tensors, by pattern; the first match counts. `*` matches any characters, `?` one, and `.weight` at the
    /// end of a name is optional.
    pub overrides: Vec<(String, BlockType)>,
}

setters!(TensorFormats {
    with_format(format: Format),
    with_group(group: usize),
    with_output_type(output_type: BlockType),
    with_overrides(overrides: impl Into<Vec<(String, BlockType)>>),
});

/// How one tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stored {
    /// In codes that a recipe chooses.
    Solved(GroupedFormat),
    /// Encoded by the rule of the block type.
    Encoded(BlockType),
}

impl Stored {
    /// The block type in the file.
    pub fn block_type(self) -> BlockType {
        match self {
            Stored::Solved(grouped) => grouped.format.block_type(),
            Stored::Encoded(block_type) => block_type,
        }
    }
}

impl TensorFormats {
    /// Linear layers in `format` with a scale per 32 weights, other matrices in Q8_0.
    pub fn new(format: Format) -> TensorFormats {
        TensorFormats { format, group: 32, output_type: BlockType::Q8_0, overrides: Vec::new() }
    }

    /// Checks that all types can be written and that the group is a multiple of 32.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] that names `keep`, `output_type` or `group`.
    pub fn check(&self) -> Result<()> {
        let overridden = self.overrides.iter().map(|(_, block_type)| ("keep", *block_type));
        for (name, block_type) in overridden.chain([("output_type", self.output_type)]) {
            if !block_type.can_encode() && Format::of(block_type).is_none() {
                let known = BlockType::names(|known| known.can_encode() || Format::of(known).is_some());
                return Err(Error::argument(name, block_type, format_args!("one of {known}")));
            }
        }
        if !self.group.is_multiple_of(32) {
            return Err(Error::argument("group", self.group, "a multiple of 32, or 0 for whole rows"));
        }
        Ok(())
    }

    /// Checks that every pattern of the overrides matches a tensor.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]
    pub(super) fn check_names(&self, checkpoint: &dyn Checkpoint) -> Result<()> {
        let names = checkpoint.names();
        let is_match = |pattern: &str, name: &&str| matches(pattern, name) || matches(pattern, stem(name));
        match self.overrides.iter().find(|(pattern, _)| !names.iter().any(|name| is_match(pattern, name))) {
            None => Ok(()),
            Some((pattern, _)) => {
                let known = names.iter().find(|name| name.starts_with("blk.")).copied().unwrap_or("token_embd.weight");
                let expected = format!("the name of a tensor, such as {}, or a pattern with * and ?", stem(known));
                Err(Error::argument("keep", format_args!("{pattern:?}, which matches no tensor"), expected))
            }
        }
    }

    /// Whether an override sets the type of the tensor with this name.
    pub(super) fn is_overridden(&self, name: &str) -> bool {
        self.overrides.iter().any(|(pattern, _)| matches(pattern, name) || matches(pattern, stem(name)))
    }

    /// Why a tensor is stored in F16 although another type was asked for; `None` if it is stored as asked.
    pub(super) fn why_f16(&self, name: &str, dims: &[usize]) -> Option<String> {
        let columns = dims.first().copied().unwrap_or(0);
        let is_fallback = self.stored(name, dims) == Stored::Encoded(BlockType::F16)
            && !self.is_overridden(name)
            && !columns.is_multiple_of(super::format::BLOCK);
        is_fallback.then(|| format!("stored in F16: rows of {columns} weights do not fill blocks of 32"))
    }

    /// How the tensor with this name and these dimensions is stored.
    #[doc(hidden)]
    pub fn stored(&self, name: &str, dims: &[usize]) -> Stored {
        let columns = dims.first().copied().unwrap_or(0);
        let stem = stem(name);
        let overridden = self.overrides.iter().find(|(pattern, _)| matches(pattern, name) || matches(pattern, stem));
        let (wanted, group) = match overridden {
            // Vectors stay F32.
            Some((_, block_type)) if dims.len() > 1 => (*block_type, if is_linear(stem) { self.group } else { 32 }),
            _ if target(name, dims, self.output_type).is_none() => return Stored::Encoded(BlockType::F32),
            _ if is_linear(stem) => (self.format.block_type(), self.group),
            _ => (self.output_type, 32),
        };
        // Rows may fill blocks of 32 weights, but not of 64.
        let wanted = match wanted {
            BlockType::Q2_0 if !columns.is_multiple_of(wanted.block_len()) => BlockType::IQ4_NL,
            wanted => wanted,
        };
        match Format::of(wanted).filter(|format| *format != Format::Q8_0) {
            Some(format) => match GroupedFormat::fitting(format, group, columns) {
                Some(grouped) => Stored::Solved(grouped),
                None => Stored::Encoded(BlockType::F16),
            },
            None if columns.is_multiple_of(wanted.block_len()) => Stored::Encoded(wanted),
            None => Stored::Encoded(BlockType::F16),
        }
    }
}

/// The name without `.weight`.
fn stem(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// Whether a tensor is a linear layer inside of a block of the model. `stem` is its name without `.weight`.
pub(super) fn is_linear(stem: &str) -> bool {
    let Some((_, part)) = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else { return false };
    let part = part.strip_suffix("_exps").or_else(|| part.strip_suffix("_shexp")).unwrap_or(part);
    const PARTS: &[&str] =
        &["attn_qkv", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "nextn.eh_proj"];
    PARTS.contains(&part)
}

/// Whether `pattern` matches all of `text`.
fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    // `reached[i]`: whether the pattern so far matches the first `i` characters of the text.
    let mut reached = vec![false; text.len() + 1];
    reached[0] = true;
    for wanted in pattern {
        if wanted == '*' {
            (0..text.len()).for_each(|i| reached[i + 1] |= reached[i]);
        } else {
            (0..text.len()).rev().for_each(|i| reached[i + 1] = reached[i] && (wanted == '?' || wanted == text[i]));
            reached[0] = false;
        }
    }
    reached[text.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, name, expected) in [
            ("*", "", true),
            ("", "a", false),
            ("blk.*.ffn_down", "blk.17.ffn_down", true),
            ("blk.?.ffn_down", "blk.17.ffn_down", false),
            ("*down", "blk.17.ffn_down", true),
            ("*d*w*", "blk.17.ffn_down", true),
            ("down", "blk.17.ffn_down", false),
            ("*aab", "aaaab", true),
            ("*ab*ab", "abcab", true),
            ("*ab*ab", "ab", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} and {name}");
        }
    }

    #[test]
    fn every_tensor_is_stored_in_its_type() {
        let overrides = [
            ("*.0.*", BlockType::Q8_0),
            ("blk.2.ffn_up.weight", BlockType::IQ4_NL),
            ("*norm*", BlockType::F16),
            ("*.embed_tokens", BlockType::Q5_0),
        ];
        let formats = TensorFormats {
            format: Format::Q4_0,
            group: 128,
            output_type: BlockType::Q8_0,
            overrides: overrides.map(|(pattern, block_type)| (pattern.to_owned(), block_type)).to_vec(),
        };
        formats.check().unwrap();
        let solved = |format, group| Stored::Solved(GroupedFormat { format, group });
        let encoded = Stored::Encoded;
        for (name, dims, expected) in [
            ("token_embd.weight", vec![576, 1000], encoded(BlockType::Q8_0)),
            ("output.weight", vec![40, 1000], encoded(BlockType::F16)),
            ("output_norm.weight", vec![576], encoded(BlockType::F32)),
            ("position_embd.weight", vec![576, 100], encoded(BlockType::F32)),
            ("blk.0.attn_q.weight", vec![576, 576], encoded(BlockType::Q8_0)),
            ("blk.1.attn_q.weight", vec![576, 576], solved(Format::Q4_0, 64)),
            ("blk.1.attn_q.bias", vec![576], encoded(BlockType::F32)),
            ("blk.1.attn_q_norm.weight", vec![64], encoded(BlockType::F32)),
            ("blk.1.ffn_down_exps.weight", vec![1536, 576, 4], solved(Format::Q4_0, 128)),
            ("blk.1.ffn_gate_inp.weight", vec![576, 4], encoded(BlockType::F32)),
            ("blk.1.ffn_gate_inp_shexp.weight", vec![576, 1], encoded(BlockType::Q8_0)),
            ("blk.2.ffn_up.weight", vec![576, 1536], solved(Format::Iq4Nl, 64)),
            ("blk.2.ffn_gate.weight", vec![40, 1536], encoded(BlockType::F16)),
            ("blk.9.nextn.eh_proj.weight", vec![1152, 576], solved(Format::Q4_0, 128)),
            ("blk.9.nextn.embed_tokens.weight", vec![576, 1000], solved(Format::Q5_0, 32)),
            ("blk.9.nextn.enorm.weight", vec![576], encoded(BlockType::F32)),
        ] {
            assert_eq!(formats.stored(name, &dims), expected, "{name}");
        }
    }

    #[test]
    fn types_that_cannot_be_written_are_refused() {
        let formats =
            TensorFormats { format: Format::Q4_0, group: 32, output_type: BlockType::Q6_K, overrides: vec![] };
        assert!(formats.check().unwrap_err().to_string().starts_with("output_type: found Q6_K, expected one of F32"));
        let formats = TensorFormats { output_type: BlockType::F16, group: 48, ..formats };
        assert!(formats.check().unwrap_err().to_string().starts_with("group: found 48"));
    }
}
