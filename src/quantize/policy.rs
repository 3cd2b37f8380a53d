//! Which tensor becomes what.

use super::problem::{Format, Grid};
use crate::error::{Error, Result};
use crate::format::Checkpoint;
use crate::model::requantize::target;
use crate::quant::block::BlockType;

/// What the tensors of a model become.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// The grid of linear layers.
    pub grid: Grid,
    /// Columns that share a scale: 32, 64, 128 and so on, 0 for whole rows. Rows that it does not divide get the next
    /// smaller half that does.
    pub group: usize,
    /// The type of the embedding, the output and other matrices that are no linear layers.
    pub output_type: BlockType,
    /// Types of tensors by name, the first pattern that fits counts: `*` stands for any text, `?` for any character, and
    /// `.weight` may be left away.
    pub keep: Vec<(String, BlockType)>,
}

/// What becomes of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// A recipe finds its codes.
    Solved(Format),
    /// It is encoded as the type defines it.
    Encoded(BlockType),
}

impl Stored {
    /// The type in the file.
    pub fn block_type(self) -> BlockType {
        match self {
            Stored::Solved(format) => format.grid.block_type(),
            Stored::Encoded(block_type) => block_type,
        }
    }
}

impl Policy {
    /// Checks that all types can be written.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]
    pub fn check(&self) -> Result<()> {
        let kept = self.keep.iter().map(|(_, block_type)| ("keep", *block_type));
        for (name, block_type) in kept.chain([("output_type", self.output_type)]) {
            if !block_type.can_encode() && Grid::of(block_type).is_none() {
                let known = BlockType::names(|known| known.can_encode() || Grid::of(known).is_some());
                return Err(Error::argument(name, block_type, format_args!("one of {known}")));
            }
        }
        if !self.group.is_multiple_of(32) {
            return Err(Error::argument("group", self.group, "a multiple of 32, or 0 for whole rows"));
        }
        Ok(())
    }

    /// Checks that every pattern describes something.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]
    pub(super) fn check_names(&self, checkpoint: &dyn Checkpoint) -> Result<()> {
        let names = checkpoint.names();
        let is_of = |pattern: &str, name: &&str| fits(pattern, name) || fits(pattern, stem(name));
        match self.keep.iter().find(|(pattern, _)| !names.iter().any(|name| is_of(pattern, name))) {
            None => Ok(()),
            Some((pattern, _)) => {
                let known = names.iter().find(|name| name.starts_with("blk.")).copied().unwrap_or("token_embd.weight");
                let expected =
                    format_args!("the name of a tensor, such as {}, * for any text", stem(known)).to_string();
                Err(Error::argument("keep", format_args!("{pattern:?}, which no tensor is called"), expected))
            }
        }
    }

    /// What becomes of the tensor called `name`.
    pub fn stored(&self, name: &str, dims: &[usize]) -> Stored {
        let columns = dims.first().copied().unwrap_or(0);
        let stem = stem(name);
        let kept = self.keep.iter().find(|(pattern, _)| fits(pattern, name) || fits(pattern, stem));
        let (wanted, group) = match kept {
            // Only matrices have rows of many blocks.
            Some((_, block_type)) if dims.len() > 1 => (*block_type, self.group),
            _ if target(name, dims, self.output_type).is_none() => return Stored::Encoded(BlockType::F32),
            _ if is_linear(stem) => (self.grid.block_type(), self.group),
            _ => (self.output_type, 32),
        };
        match Grid::of(wanted).filter(|grid| *grid != Grid::Q8_0) {
            Some(grid) => match Format::fitting(grid, group, columns) {
                Some(format) => Stored::Solved(format),
                None => Stored::Encoded(BlockType::F16),
            },
            None if columns.is_multiple_of(wanted.block_len()) => Stored::Encoded(wanted),
            None => Stored::Encoded(BlockType::F16),
        }
    }
}

/// A name without its `.weight`.
fn stem(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// Whether it is a matrix of a layer through which all activations go.
pub(super) fn is_linear(stem: &str) -> bool {
    let Some((_, part)) = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else { return false };
    let part = part.strip_suffix("_exps").or_else(|| part.strip_suffix("_shexp")).unwrap_or(part);
    matches!(part, "attn_qkv" | "attn_q" | "attn_k" | "attn_v" | "attn_output" | "ffn_gate" | "ffn_up" | "ffn_down")
}

/// Whether `pattern` describes all of `text`.
fn fits(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    // Whether the first characters of the pattern fit the first `i` of the text, for every `i`.
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
    fn patterns_fit_whole_names() {
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
            assert_eq!(fits(pattern, name), expected, "{pattern} and {name}");
        }
    }

    #[test]
    fn every_tensor_gets_its_type() {
        let keep = [("*.0.*", BlockType::Q8_0), ("blk.2.ffn_up.weight", BlockType::IQ4_NL), ("*norm*", BlockType::F16)];
        let policy = Policy {
            grid: Grid::Q4_0,
            group: 128,
            output_type: BlockType::Q8_0,
            keep: keep.map(|(pattern, block_type)| (pattern.to_owned(), block_type)).to_vec(),
        };
        policy.check().unwrap();
        let solved = |grid, group| Stored::Solved(Format { grid, group });
        let encoded = Stored::Encoded;
        for (name, dims, expected) in [
            ("token_embd.weight", vec![576, 1000], encoded(BlockType::Q8_0)),
            ("output.weight", vec![40, 1000], encoded(BlockType::F16)),
            ("output_norm.weight", vec![576], encoded(BlockType::F32)),
            ("position_embd.weight", vec![576, 100], encoded(BlockType::F32)),
            ("blk.0.attn_q.weight", vec![576, 576], encoded(BlockType::Q8_0)),
            ("blk.1.attn_q.weight", vec![576, 576], solved(Grid::Q4_0, 64)),
            ("blk.1.attn_q.bias", vec![576], encoded(BlockType::F32)),
            ("blk.1.attn_q_norm.weight", vec![64], encoded(BlockType::F32)),
            ("blk.1.ffn_down_exps.weight", vec![1536, 576, 4], solved(Grid::Q4_0, 128)),
            ("blk.1.ffn_gate_inp.weight", vec![576, 4], encoded(BlockType::F32)),
            ("blk.1.ffn_gate_inp_shexp.weight", vec![576, 1], encoded(BlockType::Q8_0)),
            ("blk.2.ffn_up.weight", vec![576, 1536], solved(Grid::Iq4Nl, 64)),
            ("blk.2.ffn_gate.weight", vec![40, 1536], encoded(BlockType::F16)),
        ] {
            assert_eq!(policy.stored(name, &dims), expected, "{name}");
        }
    }

    #[test]
    fn types_that_cannot_be_written_are_refused() {
        let policy = Policy { grid: Grid::Q4_0, group: 32, output_type: BlockType::Q6_K, keep: vec![] };
        assert!(policy.check().unwrap_err().to_string().starts_with("output_type: found Q6_K, expected one of F32"));
        let policy = Policy { output_type: BlockType::F16, group: 48, ..policy };
        assert!(policy.check().unwrap_err().to_string().starts_with("group: found 48"));
    }
}
