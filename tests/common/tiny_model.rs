//! Tiny models with random weights, written as GGUF files.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

use std::path::{Path, PathBuf};

use nybble::format::gguf::{Metadata, NewTensor, Writer};
use nybble::quant::block::BlockType;

/// The shape of a llama model.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub vocabulary: usize,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    pub context: usize,
    pub tied: bool,
}

/// Odd sizes wherever the block types allow them.
pub const ODD: Shape = Shape {
    vocabulary: 101,
    hidden: 96,
    layers: 2,
    heads: 6,
    kv_heads: 3,
    head_dim: 22,
    ffn: 160,
    context: 700,
    tied: false,
};

/// Deterministic random numbers in -1..1.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1u64 << 24) as f32).mul_add(2.0, -1.0)
    }

    pub fn values(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.next() * scale).collect()
    }
}

/// Returns the metadata of a llama model.
pub fn metadata(shape: &Shape) -> Metadata {
    let mut metadata = Metadata::new();
    metadata
        .set("general.architecture", "llama")
        .set("llama.context_length", shape.context as u32)
        .set("llama.embedding_length", shape.hidden as u32)
        .set("llama.block_count", shape.layers as u32)
        .set("llama.feed_forward_length", shape.ffn as u32)
        .set("llama.attention.head_count", shape.heads as u32)
        .set("llama.attention.head_count_kv", shape.kv_heads as u32)
        .set("llama.attention.key_length", shape.head_dim as u32)
        .set("llama.attention.value_length", shape.head_dim as u32)
        .set("llama.rope.dimension_count", shape.head_dim as u32)
        .set("llama.attention.layer_norm_rms_epsilon", 1e-5f32);
    metadata
}

/// Returns name, dimensions (contiguous first) and whether it is a matrix, for every tensor.
pub fn tensors(shape: &Shape) -> Vec<(String, Vec<u64>)> {
    let (queries, keys) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let matrix = |name: String, columns: usize, rows: usize| (name, vec![columns as u64, rows as u64]);
    let mut all = vec![matrix("token_embd.weight".into(), shape.hidden, shape.vocabulary)];
    for layer in 0..shape.layers {
        let name = |suffix: &str| format!("blk.{layer}.{suffix}.weight");
        all.push((name("attn_norm"), vec![shape.hidden as u64]));
        all.push(matrix(name("attn_q"), shape.hidden, queries));
        all.push(matrix(name("attn_k"), shape.hidden, keys));
        all.push(matrix(name("attn_v"), shape.hidden, keys));
        all.push(matrix(name("attn_output"), queries, shape.hidden));
        all.push((name("ffn_norm"), vec![shape.hidden as u64]));
        all.push(matrix(name("ffn_gate"), shape.hidden, shape.ffn));
        all.push(matrix(name("ffn_up"), shape.hidden, shape.ffn));
        all.push(matrix(name("ffn_down"), shape.ffn, shape.hidden));
    }
    all.push(("output_norm.weight".into(), vec![shape.hidden as u64]));
    if !shape.tied {
        all.push(matrix("output.weight".into(), shape.hidden, shape.vocabulary));
    }
    all
}

/// Writes a model whose matrices have `matrix_type`, or F32 if their rows are not whole blocks.
pub fn write(path: &Path, metadata: &Metadata, tensors: &[(String, Vec<u64>)], matrix_type: BlockType) -> PathBuf {
    write_sparse(path, metadata, tensors, matrix_type, 0.0)
}

/// As `write`, with this share of the weights of matrices set to zero, if the type has an encoder.
pub fn write_sparse(
    path: &Path,
    metadata: &Metadata,
    tensors: &[(String, Vec<u64>)],
    matrix_type: BlockType,
    zeros: f32,
) -> PathBuf {
    let block_type = |dims: &[u64]| match dims {
        [columns, _, ..] if columns.is_multiple_of(matrix_type.block_len() as u64) => matrix_type,
        _ => BlockType::F32,
    };
    let infos = tensors.iter().map(|(name, dims)| NewTensor::new(name.clone(), block_type(dims), dims.clone()));
    let mut writer = Writer::create(path, metadata, infos).unwrap();
    let mut random = Random(7);
    for (name, dims) in tensors {
        let count = dims.iter().product::<u64>() as usize;
        let mut values: Vec<f32> = match dims.len() {
            1 => random.values(count, 0.3).iter().map(|x| x + 1.0).collect(),
            _ => random.values(count, 2.0 / (dims[0] as f32).sqrt()),
        };
        if zeros > 0.0 && dims.len() > 1 {
            let mut which = Random(9);
            values.iter_mut().filter(|_| which.next() < 2.0 * zeros - 1.0).for_each(|value| *value = 0.0);
        }
        if block_type(dims).can_encode() {
            writer.write_values(name, &values).unwrap();
        } else {
            writer.write_tensor(name, &blocks(block_type(dims), count, &mut random)).unwrap();
        }
    }
    writer.finish().unwrap();
    path.to_path_buf()
}

/// Writes an adapter of all layers of a model of this shape.
pub fn adapter(path: &Path, shape: &Shape, rank: usize, seed: u64) -> PathBuf {
    let mut metadata = Metadata::new();
    metadata
        .set("general.type", "adapter")
        .set("general.architecture", "llama")
        .set("adapter.type", "lora")
        .set("adapter.lora.alpha", 2.0 * rank as f32);
    let layers = tensors(shape).into_iter().filter(|(name, dims)| name.starts_with("blk.") && dims.len() == 2);
    let pairs = layers.flat_map(|(name, dims)| {
        [(format!("{name}.lora_a"), vec![dims[0], rank as u64]), (format!("{name}.lora_b"), vec![rank as u64, dims[1]])]
    });
    let pairs: Vec<_> = pairs.collect();
    let infos = pairs.iter().map(|(name, dims)| NewTensor::new(name.clone(), BlockType::F32, dims.clone()));
    let mut writer = Writer::create(path, &metadata, infos).unwrap();
    let mut random = Random(seed);
    for (name, dims) in &pairs {
        let values = random.values((dims[0] * dims[1]) as usize, 0.3);
        writer.write_values(name, &values).unwrap();
    }
    writer.finish().unwrap();
    path.to_path_buf()
}

/// Returns random blocks of a type that has no encoder, with scales that keep weights small.
fn blocks(block_type: BlockType, count: usize, random: &mut Random) -> Vec<u8> {
    let halves: &[usize] = match block_type {
        BlockType::Q5_1 | BlockType::Q4_K | BlockType::Q5_K => &[0, 2],
        BlockType::Q2_K => &[80, 82],
        BlockType::Q3_K => &[108],
        BlockType::Q6_K => &[208],
        BlockType::TQ2_0 => &[64],
        BlockType::MXFP4 => &[],
        _ => &[0],
    };
    let scale = match block_type {
        // Their codes stand for numbers up to 2.
        BlockType::TQ2_0 | BlockType::Q2_0 | BlockType::PQ2_0 => 0.05,
        _ => 0.0005,
    };
    let mut bytes = Vec::new();
    for _ in 0..count / block_type.block_len() {
        let start = bytes.len();
        bytes.extend((0..block_type.block_bytes()).map(|_| (random.next() * 128.0) as i8 as u8));
        for at in halves {
            let scale = half::f16::from_f32(random.next().abs() * scale);
            bytes[start + at..][..2].copy_from_slice(&scale.to_le_bytes());
        }
        if block_type == BlockType::MXFP4 {
            bytes[start] = 118 + (random.next().abs() * 3.0) as u8;
        }
    }
    bytes
}

/// Writes a llama model into `folder` and returns its path.
pub fn llama(folder: &Path, shape: &Shape, matrix_type: BlockType) -> PathBuf {
    let path = folder.join(format!("{}.gguf", matrix_type.name()));
    write(&path, &metadata(shape), &tensors(shape), matrix_type)
}
