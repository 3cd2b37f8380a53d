//! The operands of attention: keys and values as the cache stores them, and partial softmax sums.

use std::ops::Range;

use half::f16;

use crate::quant::packed::{CacheLine, PANEL};

/// Positions in a page of the KV cache: four panels of 16 keys.
pub const PAGE: usize = 64;

/// Numbers of a key or value that share a scale in an INT8 cache.
pub const INT8_GROUP: usize = 32;

/// Stored keys or values as floats.
#[derive(Debug, Clone, Copy)]
pub enum KvSlice<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
}

impl KvSlice<'_> {
    /// The number at index `i`.
    pub(super) fn get(&self, i: usize) -> f32 {
        match self {
            KvSlice::F32(x) => x[i],
            KvSlice::F16(x) => x[i].to_f32(),
        }
    }
}

/// Queries and a page of keys, whose dot products are the scores.
#[derive(Debug, Clone, Copy)]
pub struct ScoreInputs<'a> {
    /// `(n, head_dim)`
    pub queries: &'a [f32],
    /// Numbers in a query or key.
    pub head_dim: usize,
    /// `(PAGE / 16, head_dim, 16)`
    pub keys: KvSlice<'a>,
    /// A factor of all scores.
    pub scale: f32,
}

/// Quantized queries. Groups are of [`INT8_GROUP`] numbers; the last one may be smaller.
#[derive(Debug, Clone, Copy)]
pub struct Int8Queries<'a> {
    /// Numbers in a query or key.
    pub head_dim: usize,
    /// `(head_dim / 4, stride)`, rounded up with zeros: the first `n` of each row are those of these queries.
    pub codes: &'a [[i8; 4]],
    /// Distance between four numbers of a query and the next four.
    pub stride: usize,
    /// `(n, groups)`
    pub scales: &'a [f32],
    /// `(n, groups)`: sums of the codes.
    pub sums: &'a [i32],
}

/// Quantized queries and a page of keys of an INT8 cache.
#[derive(Debug, Clone, Copy)]
pub struct Int8ScoreInputs<'a> {
    /// The queries.
    pub queries: Int8Queries<'a>,
    /// `(head_dim / 4, PAGE / 16)`, rounded up: codes as the same kernel packs them.
    pub keys: &'a [CacheLine],
    /// `(groups, PAGE)`: scales of the keys, times a factor of all scores.
    pub scales: &'a [f32],
}

/// A page of values, and each query's weights of its positions.
#[derive(Debug, Clone, Copy)]
pub struct WeightedValues<'a> {
    /// `(n, stride)`
    pub weights: &'a [f32],
    /// Distance between the weights of one query and the next.
    pub stride: usize,
    /// `(n)`: the positions that each query sees.
    pub ranges: &'a [Range<usize>],
    /// `(PAGE, width)`
    pub values: KvSlice<'a>,
    /// Numbers in a value, a multiple of 16.
    pub width: usize,
}

/// Weights of a page's positions, to be quantized together with the scales of an INT8 cache's values.
#[derive(Debug, Clone, Copy)]
pub struct Int8Weights<'a> {
    /// `(n, stride)`, none of them negative.
    pub weights: &'a [f32],
    /// Distance between the weights of one query and the next.
    pub stride: usize,
    /// `(n)`: the positions that each query sees.
    pub seen: &'a [Range<usize>],
    /// `(groups, PAGE)`: scales of the values.
    pub scales: &'a [f32],
}

/// A page of values of an INT8 cache, and each query's weights of its positions, which include the scales of the values.
#[derive(Debug, Clone, Copy)]
pub struct Int8WeightedValues<'a> {
    /// `(groups, n, PAGE)`: codes of the same kernel, with groups of [`INT8_GROUP`] numbers of a value.
    pub weights: &'a [u8],
    /// `(groups, n)`: the factors of the codes.
    pub scales: &'a [f32],
    /// `(width / 16, PAGE / 4 + 1)`: codes as the same kernel packs them.
    pub values: &'a [CacheLine],
    /// Numbers in a value, a multiple of 16.
    pub width: usize,
}

/// Softmax over some positions for `n` queries, not yet divided by its sum.
#[derive(Debug, Clone, Copy)]
pub struct Softmax<'a> {
    /// The largest score `(n)`; minus infinity for a query that sees no position.
    pub max: &'a [f32],
    /// Sum of `exp(score - max)` `(n)`.
    pub sum: &'a [f32],
    /// Sum of the values, weighted by `exp(score - max)` `(n, width)`.
    pub values: &'a [f32],
}

/// A mutable [`Softmax`].
#[derive(Debug)]
pub struct SoftmaxMut<'a> {
    /// `(n)`
    pub max: &'a mut [f32],
    /// `(n)`
    pub sum: &'a mut [f32],
    /// `(n, width)`
    pub values: &'a mut [f32],
}

/// How a step changes a panel `(n, 16)` of a recurrent state: `state = gate * state + key delta^T`.
#[derive(Debug, Clone, Copy)]
pub struct StateUpdate<'a> {
    /// `(n)`
    pub gate: &'a [f32],
    /// `(n)`
    pub key: &'a [f32],
    /// A number per column.
    pub delta: &'a [f32; PANEL],
}

impl StateUpdate<'static> {
    /// The vectors of no update.
    pub(super) const NONE: StateUpdate<'static> = StateUpdate { gate: &[], key: &[], delta: &[0.0; PANEL] };
}

/// A step of RWKV's mean of values on a panel `(3, 16)` of its state: a channel is a column.
#[derive(Debug, Clone, Copy)]
pub struct WkvStep<'a> {
    /// What the exponents of earlier keys lose, negative.
    pub decay: &'a [f32; PANEL],
    /// What the exponent of the current key gains for its own position.
    pub first: &'a [f32; PANEL],
    /// The exponents of the current values.
    pub key: &'a [f32; PANEL],
    /// The current values.
    pub value: &'a [f32; PANEL],
}

/// A step of Mamba's recurrence on a panel `(n, 16)` of its state: a channel is a column.
#[derive(Debug, Clone, Copy)]
pub struct SelectiveStep<'a> {
    /// `(n, 16)`: rates of decay, negative.
    pub rates: &'a [f32],
    /// The length of the step in each channel.
    pub time: &'a [f32; PANEL],
    /// The input of each channel, times `time`.
    pub delta: &'a [f32; PANEL],
    /// `(n)`: B.
    pub key: &'a [f32],
    /// `(n)`: C, or empty.
    pub read: &'a [f32],
}
