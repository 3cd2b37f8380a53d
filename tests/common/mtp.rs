//! Trained heads for multi-token prediction with the drafts of transformers, see tests/data/README.md.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::path::{Path, PathBuf};

use nybble::model::convert;
use nybble::model::hf::HfFolder;
use nybble::quant::block::BlockType;
use safetensors::SafeTensors;

/// Tokens that are generated after each prompt.
pub(crate) const GENERATED: usize = 48;

/// A checkpoint with a head.
pub(crate) struct MtpGolden {
    pub(crate) name: String,
    pub(crate) folder: PathBuf,
    /// `(rows, 20)`
    pub(crate) input: Vec<Vec<u32>>,
    /// `(2, 19 * vocabulary)`: the head's logits for the first rows.
    pub(crate) logits: Vec<Vec<f32>>,
    /// `(rows, 48)`
    pub(crate) greedy: Vec<Vec<u32>>,
    /// `(rows, 47)`: the head's draft of the token after each of `greedy`.
    pub(crate) drafts: Vec<Vec<u32>>,
    /// `(rows, 3)`: drafts in a row after the first of `greedy`.
    pub(crate) chain: Vec<Vec<u32>>,
}

impl MtpGolden {
    /// How many draft tokens are accepted with one in a step, and how many are made.
    pub(crate) fn accepted(&self, row: usize) -> (usize, usize) {
        let (greedy, drafts) = (&self.greedy[row], &self.drafts[row]);
        let (mut at, mut accepted, mut made) = (0, 0, 0);
        // The last token is not computed, so it needs no draft.
        while at + 2 < GENERATED {
            made += 1;
            let is_right = drafts[at] == greedy[at + 1];
            accepted += usize::from(is_right);
            at += if is_right { 2 } else { 1 };
        }
        (accepted, made)
    }

    /// Writes the checkpoint to a GGUF file in `folder`, with matrices of `block_type`.
    pub(crate) fn convert(&self, folder: &Path, block_type: BlockType) -> PathBuf {
        let path = folder.join(format!("{}.gguf", self.name));
        let source = HfFolder::open(&self.folder).unwrap();
        convert::convert(&source, &Default::default(), &path, block_type, None).unwrap();
        path
    }
}

/// All checkpoints with heads.
pub(crate) fn mtp_goldens() -> Vec<MtpGolden> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/mtp");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(all).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    let read = |folder: PathBuf| {
        let bytes = std::fs::read(folder.join("golden.bin")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let ids = |name: &str| -> Vec<Vec<u32>> {
            let tensor = file.tensor(name).unwrap();
            let ids: Vec<u32> = bytemuck::pod_collect_to_vec(tensor.data());
            ids.chunks(tensor.shape()[1]).map(<[u32]>::to_vec).collect()
        };
        let tensor = file.tensor("mtp_logits").unwrap();
        let logits: Vec<f32> = bytemuck::pod_collect_to_vec(tensor.data());
        MtpGolden {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            input: ids("input_ids"),
            logits: logits.chunks(tensor.shape()[1] * tensor.shape()[2]).map(<[f32]>::to_vec).collect(),
            greedy: ids("greedy"),
            drafts: ids("drafts"),
            chain: ids("chain"),
            folder,
        }
    };
    let goldens: Vec<MtpGolden> = folders.into_iter().map(read).collect();
    assert_eq!(goldens.len(), 3);
    goldens
}
