//! One plain decoder block forward and backward, in single precision: what tuning follows the slope of the loss through.
//!
//! Plain is what Llama, Mistral and Qwen2 have in common: RMS norms before attention and before the feed-forward network,
//! rotated queries and keys, a gate through SiLU, and nothing else. Gradients are those of a loss with respect to what its
//! name says, and go from the last block to the first; what stands between a block's input and its output is computed
//! anew rather than kept.

use super::compute::{Compute, packed_of};
use crate::kernels::Activation;
use crate::quant::packed::Packed;

/// The linear layers of a block, by their names in a file: query, key and value first, down last.
pub(super) const MATRICES: [&str; 7] = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
/// The norms of a block.
pub(super) const NORMS: [&str; 2] = ["attn_norm", "ffn_norm"];
/// Tokens that one thread takes together.
const TASK_ROWS: usize = 16;

const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const OUT: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

/// What all blocks of a model have in common.
#[derive(Debug)]
pub(super) struct Decoder<'a> {
    pub(super) compute: Compute<'a>,
    /// Width of the stream.
    pub(super) hidden: usize,
    /// Width between up and down.
    pub(super) width: usize,
    /// Query heads.
    pub(super) heads: usize,
    /// Key and value heads.
    pub(super) kv_heads: usize,
    /// Width of a head.
    pub(super) dim: usize,
    /// What stands under the root of a norm.
    pub(super) eps: f32,
    /// What scores are multiplied with.
    pub(super) scale: f32,
    /// Whether pairs that are rotated stand side by side, or half a head apart.
    pub(super) adjacent: bool,
    /// `(positions, pairs)` each.
    pub(super) angles: (Vec<f32>, Vec<f32>),
    /// Pairs of a head that are rotated.
    pub(super) pairs: usize,
}

/// The weights of a block.
#[derive(Debug)]
pub(super) struct Block {
    /// In the order of [`MATRICES`].
    pub(super) matrices: [Vec<f32>; 7],
    /// Of query, key and value; empty for none.
    pub(super) biases: [Vec<f32>; 3],
    /// In the order of [`NORMS`].
    pub(super) norms: [Vec<f32>; 2],
    /// Positions that a query sees, itself included.
    pub(super) window: usize,
}

/// What a block computes on the way, rows of all windows one after the other.
struct Seen {
    attention_input: Vec<f32>,
    /// Rotated.
    queries: Vec<f32>,
    /// Rotated.
    keys: Vec<f32>,
    values: Vec<f32>,
    attended: Vec<f32>,
    /// The stream with attention.
    middle: Vec<f32>,
    network_input: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    inner: Vec<f32>,
}

impl Decoder<'_> {
    /// Takes the stream `x` of windows with `lengths` tokens through a block.
    pub(super) fn forward(&self, block: &Block, x: &mut [f32], lengths: &[usize]) {
        let seen = self.run(block, x, lengths);
        let out = self.apply(&seen.inner, &block.matrices[DOWN], DOWN);
        x.iter_mut().zip(seen.middle.iter().zip(out)).for_each(|(x, (middle, out))| *x = middle + out);
    }

    /// Makes of the slope at the block's output the slope at its input, `x`. `sink` is given the slope of each matrix, and the
    /// slopes of the norms' weights are returned.
    pub(super) fn backward(
        &self,
        block: &Block,
        x: &[f32],
        lengths: &[usize],
        slope: &mut [f32],
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> [Vec<f32>; 2] {
        let seen = self.run(block, x, lengths);
        sink(DOWN, &self.outer(slope, &seen.inner, DOWN));
        let inner = self.back(slope, block, DOWN);
        let (gate, up) = self.gate_back(&seen, &inner);
        sink(GATE, &self.outer(&gate, &seen.network_input, GATE));
        sink(UP, &self.outer(&up, &seen.network_input, UP));
        let mut input = self.back(&gate, block, GATE);
        add(&mut input, &self.back(&up, block, UP));
        let network_norm = self.norm_back(&seen.middle, &block.norms[1], &input, slope);

        sink(OUT, &self.outer(slope, &seen.attended, OUT));
        let attended = self.back(slope, block, OUT);
        let [mut queries, mut keys, values] = self.attention_back(&seen, &attended, lengths, block.window);
        self.rotate(&mut queries, self.heads, lengths, -1.0);
        self.rotate(&mut keys, self.kv_heads, lengths, -1.0);
        let mut input = vec![0.0; x.len()];
        for (part, slope) in [(Q, queries), (K, keys), (V, values)] {
            sink(part, &self.outer(&slope, &seen.attention_input, part));
            add(&mut input, &self.back(&slope, block, part));
        }
        let attention_norm = self.norm_back(x, &block.norms[0], &input, slope);
        [attention_norm, network_norm]
    }

    fn run(&self, block: &Block, x: &[f32], lengths: &[usize]) -> Seen {
        let attention_input = self.norm(x, &block.norms[0]);
        let [mut queries, mut keys, values] = [Q, K, V].map(|part| {
            let mut out = self.apply(&attention_input, &block.matrices[part], part);
            if !block.biases[part].is_empty() {
                out.chunks_mut(block.biases[part].len()).for_each(|row| add(row, &block.biases[part]));
            }
            out
        });
        self.rotate(&mut queries, self.heads, lengths, 1.0);
        self.rotate(&mut keys, self.kv_heads, lengths, 1.0);
        let attended = self.attention([&queries, &keys, &values], lengths, block.window);
        let mut middle = self.apply(&attended, &block.matrices[OUT], OUT);
        add(&mut middle, x);
        let network_input = self.norm(&middle, &block.norms[1]);
        let gate = self.apply(&network_input, &block.matrices[GATE], GATE);
        let up = self.apply(&network_input, &block.matrices[UP], UP);
        let mut inner = gate.clone();
        let width = self.width;
        self.compute.for_each_chunk(&mut inner, TASK_ROWS * width, |task, inner| {
            self.compute.kernel.gate(Activation::Silu, inner, &up[task * TASK_ROWS * width..][..inner.len()]);
        });
        Seen { attention_input, queries, keys, values, attended, middle, network_input, gate, up, inner }
    }

    /// Columns of a matrix.
    pub(super) fn columns(&self, part: usize) -> usize {
        match part {
            OUT => self.heads * self.dim,
            DOWN => self.width,
            _ => self.hidden,
        }
    }

    /// Rows of a matrix.
    pub(super) fn rows(&self, part: usize) -> usize {
        match part {
            Q => self.heads * self.dim,
            K | V => self.kv_heads * self.dim,
            GATE | UP => self.width,
            _ => self.hidden,
        }
    }

    /// `x * w^T`
    fn apply(&self, x: &[f32], w: &[f32], part: usize) -> Vec<f32> {
        let (rows, columns) = (self.rows(part), self.columns(part));
        let mut out = vec![0.0; x.len() / columns * rows];
        self.compute.product(x, w, columns, &mut out);
        out
    }

    /// The slope at a matrix's input: `slope * w`.
    fn back(&self, slope: &[f32], block: &Block, part: usize) -> Vec<f32> {
        let (rows, columns, w) = (self.rows(part), self.columns(part), &block.matrices[part]);
        let transposed = self.compute.pack_transposed(columns, rows, |row| &w[row * columns..][..columns]);
        let mut out = vec![0.0; slope.len() / rows * columns];
        self.compute
            .for_each_product(slope, &transposed, &mut out, columns, |product, out| out.copy_from_slice(product));
        out
    }

    /// The slope at a matrix: `slope^T * x`.
    fn outer(&self, slope: &[f32], x: &[f32], part: usize) -> Vec<f32> {
        let (rows, columns) = (self.rows(part), self.columns(part));
        let tokens = x.len() / columns;
        let mut transposed = vec![0.0; slope.len()];
        self.compute.for_each_chunk(&mut transposed, TASK_ROWS * tokens, |task, out| {
            for (token, slope) in slope.chunks(rows).enumerate() {
                for (row, slope) in slope[task * TASK_ROWS..].iter().take(out.len() / tokens).enumerate() {
                    out[row * tokens + token] = *slope;
                }
            }
        });
        let inputs = self.compute.pack_transposed(columns, tokens, |token| &x[token * columns..][..columns]);
        let mut out = vec![0.0; rows * columns];
        self.compute
            .for_each_product(&transposed, &inputs, &mut out, columns, |product, out| out.copy_from_slice(product));
        out
    }

    /// Each row over its root mean square, times `weight`.
    pub(super) fn norm(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        let hidden = self.hidden;
        let mut out = vec![0.0; x.len()];
        self.compute.for_each_chunk(&mut out, TASK_ROWS * hidden, |task, out| {
            for (out, x) in out.chunks_mut(hidden).zip(x[task * TASK_ROWS * hidden..].chunks(hidden)) {
                self.compute.kernel.rms_norm(x, weight, self.eps, out);
            }
        });
        out
    }

    /// Adds to `sum` the slope at the input `x` of a norm whose output has the slope `slope`; returns that at its weights.
    pub(super) fn norm_back(&self, x: &[f32], weight: &[f32], slope: &[f32], sum: &mut [f32]) -> Vec<f32> {
        let hidden = self.hidden;
        let inverse = |x: &[f32]| {
            let squares: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            1.0 / (squares / hidden as f64 + f64::from(self.eps)).sqrt() as f32
        };
        self.compute.for_each_chunk(sum, TASK_ROWS * hidden, |task, sum| {
            let at = task * TASK_ROWS * hidden;
            let rows = x[at..].chunks(hidden).zip(slope[at..].chunks(hidden));
            for (sum, (x, slope)) in sum.chunks_mut(hidden).zip(rows) {
                let inverse = inverse(x);
                let along: f64 = x.iter().zip(slope).zip(weight).map(|((x, s), w)| f64::from(x * s * w)).sum();
                let shared = inverse * inverse * inverse * (along / hidden as f64) as f32;
                for (sum, ((x, slope), weight)) in sum.iter_mut().zip(x.iter().zip(slope).zip(weight)) {
                    *sum += inverse * slope * weight - shared * x;
                }
            }
        });
        let mut of_weight = vec![0.0; hidden];
        for (x, slope) in x.chunks(hidden).zip(slope.chunks(hidden)) {
            let inverse = inverse(x);
            of_weight.iter_mut().zip(x.iter().zip(slope)).for_each(|(sum, (x, slope))| *sum += inverse * x * slope);
        }
        of_weight
    }

    /// The slopes at gate and up, from that at `silu(gate) * up`.
    fn gate_back(&self, seen: &Seen, slope: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (mut of_gate, mut of_up) = (vec![0.0; slope.len()], vec![0.0; slope.len()]);
        let size = TASK_ROWS * self.width;
        let mut tasks: Vec<_> = of_gate.chunks_mut(size).zip(of_up.chunks_mut(size)).collect();
        self.compute.for_each_chunk(&mut tasks, 1, |task, chunk| {
            for (of_gate, of_up) in chunk {
                let own = task * size..task * size + of_gate.len();
                // The exponentials of what is negative, all at once.
                let mut powers: Vec<f32> = seen.gate[own.clone()].iter().map(|gate| -gate.abs()).collect();
                let (most, _) = self.compute.kernel.exp_segment(&mut powers);
                let factor = libm::expf(most);
                let known = seen.gate[own.clone()].iter().zip(&seen.up[own.clone()]).zip(&slope[own]).zip(&powers);
                for ((of_gate, of_up), (((gate, up), slope), power)) in
                    of_gate.iter_mut().zip(of_up.iter_mut()).zip(known)
                {
                    let power = power * factor;
                    let sigmoid = if *gate >= 0.0 { 1.0 } else { power } / (1.0 + power);
                    *of_up = slope * gate * sigmoid;
                    *of_gate = slope * up * sigmoid * (1.0 + gate * (1.0 - sigmoid));
                }
            }
        });
        (of_gate, of_up)
    }

    /// Turns the pairs of each head by the angle of its position, or back.
    fn rotate(&self, x: &mut [f32], heads: usize, lengths: &[usize], direction: f32) {
        let (cos, sin) = (&self.angles.0, &self.angles.1);
        let mut rows = x.chunks_mut(heads * self.dim);
        for (position, row) in lengths.iter().flat_map(|length| 0..*length).zip(&mut rows) {
            let at = position * self.pairs;
            for head in row.chunks_mut(self.dim) {
                for pair in 0..self.pairs {
                    let (a, b) = if self.adjacent { (2 * pair, 2 * pair + 1) } else { (pair, pair + self.pairs) };
                    let (cos, sin) = (cos[at + pair], direction * sin[at + pair]);
                    (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
                }
            }
        }
    }

    /// `(tokens, heads * dim)`
    fn attention(&self, [queries, keys, values]: [&[f32]; 3], lengths: &[usize], window: usize) -> Vec<f32> {
        let mut out = vec![0.0; queries.len()];
        let mut tasks = self.heads_of(lengths);
        self.compute.for_each_chunk(&mut tasks, 1, |_, tasks| {
            for task in tasks {
                let own = |x: &[f32], head| self.gather(x, task, head);
                let (keys, values) = (own(keys, None), own(values, None));
                let keys = packed_of(task.length, self.dim, |row, column| keys[row * self.dim + column]);
                let values = packed_of(self.dim, task.length, |row, column| values[column * self.dim + row]);
                let of_head =
                    |head| self.compute.multiply(&self.shares(&own(queries, Some(head)), &keys, window), &values);
                task.out = (0..self.heads / self.kv_heads).map(of_head).collect();
            }
        });
        for task in &tasks {
            for (head, from) in task.out.iter().enumerate() {
                self.scatter(from, task, Some(head), &mut out);
            }
        }
        out
    }

    /// The slopes at queries, keys and values, from that at the output of attention.
    fn attention_back(&self, seen: &Seen, slope: &[f32], lengths: &[usize], window: usize) -> [Vec<f32>; 3] {
        let dim = self.dim;
        let mut tasks = self.heads_of(lengths);
        self.compute.for_each_chunk(&mut tasks, 1, |_, tasks| {
            for task in tasks {
                let length = task.length;
                let own = |x: &[f32], head| self.gather(x, task, head);
                let (keys, values) = (own(&seen.keys, None), own(&seen.values, None));
                let by_rows = |x: &[f32]| packed_of(length, dim, |row, column| x[row * dim + column]);
                let by_columns = |x: &[f32]| packed_of(dim, length, |row, column| x[column * dim + row]);
                let (keys, keys_transposed, values) = (by_rows(&keys), by_columns(&keys), by_rows(&values));
                let (mut of_keys, mut of_values) = (vec![0.0; length * dim], vec![0.0; length * dim]);
                let mut out = Vec::new();
                for head in 0..self.heads / self.kv_heads {
                    let (queries, slope) = (own(&seen.queries, Some(head)), own(slope, Some(head)));
                    let shares = self.shares(&queries, &keys, window);
                    add(&mut of_values, &self.compute.multiply(&transposed(&shares, length), &by_columns(&slope)));
                    let mut scores = self.compute.multiply(&slope, &values);
                    for (scores, shares) in scores.chunks_mut(length).zip(shares.chunks(length)) {
                        let mean: f32 = scores.iter().zip(shares).map(|(slope, share)| slope * share).sum();
                        for (slope, share) in scores.iter_mut().zip(shares) {
                            *slope = share * (*slope - mean) * self.scale;
                        }
                    }
                    add(&mut of_keys, &self.compute.multiply(&transposed(&scores, length), &by_columns(&queries)));
                    out.push(self.compute.multiply(&scores, &keys_transposed));
                }
                out.extend([of_keys, of_values]);
                task.out = out;
            }
        });
        let mut slopes = [&seen.queries, &seen.keys, &seen.values].map(|x| vec![0.0; x.len()]);
        let group = self.heads / self.kv_heads;
        for task in &tasks {
            for (at, from) in task.out.iter().enumerate() {
                let (part, head) = if at < group { (Q, Some(at)) } else { (K + at - group, None) };
                self.scatter(from, task, head, &mut slopes[part]);
            }
        }
        slopes
    }

    /// What each query takes of each value `(tokens, tokens)`: those at its position and before, as far as the window goes.
    fn shares(&self, queries: &[f32], keys: &Packed, window: usize) -> Vec<f32> {
        let mut shares = self.compute.multiply(queries, keys);
        for (position, row) in shares.chunks_mut(keys.rows()).enumerate() {
            let (row, later) = row.split_at_mut(position + 1);
            let (earlier, seen) = row.split_at_mut((position + 1).saturating_sub(window));
            seen.iter_mut().for_each(|score| *score *= self.scale);
            let (_, sum) = self.compute.kernel.exp_segment(seen);
            seen.iter_mut().for_each(|share| *share /= sum);
            earlier.fill(0.0);
            later.fill(0.0);
        }
        shares
    }

    fn heads_of(&self, lengths: &[usize]) -> Vec<HeadTask> {
        let mut tasks = Vec::new();
        let mut first = 0;
        for length in lengths {
            let of = |head| HeadTask { first, length: *length, head, out: Vec::new() };
            tasks.extend((0..self.kv_heads).map(of));
            first += length;
        }
        tasks
    }

    /// Where a task's head lies in rows of queries (`head` is the number in its group) or of keys: width of the rows, and
    /// first column.
    fn place(&self, task: &HeadTask, head: Option<usize>) -> (usize, usize) {
        match head {
            Some(head) => (self.heads * self.dim, (task.head * (self.heads / self.kv_heads) + head) * self.dim),
            None => (self.kv_heads * self.dim, task.head * self.dim),
        }
    }

    fn gather(&self, x: &[f32], task: &HeadTask, head: Option<usize>) -> Vec<f32> {
        let (width, column) = self.place(task, head);
        let rows = x[task.first * width..].chunks(width).take(task.length);
        rows.flat_map(|row| &row[column..column + self.dim]).copied().collect()
    }

    fn scatter(&self, from: &[f32], task: &HeadTask, head: Option<usize>, to: &mut [f32]) {
        let (width, column) = self.place(task, head);
        for (to, from) in to[task.first * width..].chunks_mut(width).zip(from.chunks(self.dim)) {
            to[column..column + self.dim].copy_from_slice(from);
        }
    }
}

/// A head of keys and values in a window, and what is found for it.
struct HeadTask {
    first: usize,
    length: usize,
    head: usize,
    out: Vec<Vec<f32>>,
}

fn add(sum: &mut [f32], x: &[f32]) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
}

fn transposed(square: &[f32], n: usize) -> Vec<f32> {
    (0..n).flat_map(|column| (0..n).map(move |row| square[row * n + column])).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::gptq::tests::with_threads;
    use super::super::rtn::tests::bell;
    use super::*;

    /// Widths that fill no panel, two windows, and heads that share keys.
    fn decoder<'a>(compute: &Compute<'a>, adjacent: bool) -> (Decoder<'a>, Block) {
        let (hidden, width, heads, kv_heads, dim, pairs) = (24, 40, 4, 2, 6, 2);
        let angle = |i: usize| (i as f32 * 0.37).sin_cos();
        let (sin, cos) = (0..9 * pairs).map(angle).unzip();
        let decoder = Decoder {
            compute: *compute,
            hidden,
            width,
            heads,
            kv_heads,
            dim,
            eps: 1e-5,
            scale: 0.4,
            adjacent,
            angles: (cos, sin),
            pairs,
        };
        let matrix = |part| {
            let mut matrix = bell(decoder.rows(part) * decoder.columns(part), part as u32 + 1);
            matrix.iter_mut().for_each(|x| *x *= 0.3);
            matrix
        };
        let norm = |seed| bell(hidden, seed).iter().map(|x| 1.0 + 0.1 * x).collect();
        let bias = |part| bell(decoder.rows(part), 20 + part as u32);
        let block = Block {
            matrices: [Q, K, V, OUT, GATE, UP, DOWN].map(matrix),
            biases: [bias(Q), bias(K), Vec::new()],
            norms: [norm(31), norm(32)],
            window: if adjacent { 4 } else { usize::MAX },
        };
        (decoder, block)
    }

    const LENGTHS: [usize; 2] = [9, 5];

    #[test]
    fn slopes_are_those_that_small_steps_find() {
        with_threads(2, |compute| {
            for adjacent in [false, true] {
                let (decoder, mut block) = decoder(compute, adjacent);
                let x = bell(14 * decoder.hidden, 77);
                let wanted = bell(x.len(), 78);
                let loss = |block: &Block, x: &[f32]| {
                    let mut out = x.to_vec();
                    decoder.forward(block, &mut out, &LENGTHS);
                    out.iter().zip(&wanted).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>()
                };
                let mut slope = wanted.clone();
                let mut found: Vec<Vec<f32>> = vec![Vec::new(); 7];
                let mut sink = |part: usize, slope: &[f32]| found[part] = slope.to_vec();
                let norms = decoder.backward(&block, &x, &LENGTHS, &mut slope, &mut sink);

                let close = |name: &str, found: f32, up: f64, down: f64| {
                    let expected = (up - down) / 0.02;
                    let most = 0.03 * expected.abs().max(1.0);
                    assert!((f64::from(found) - expected).abs() < most, "{name}: {found}, by steps {expected}");
                };
                for i in (0..x.len()).step_by(29) {
                    let at = |step: f32| {
                        let mut x = x.clone();
                        x[i] += step;
                        loss(&block, &x)
                    };
                    close("stream", slope[i], at(0.01), at(-0.01));
                }
                for part in 0..7 {
                    for i in (0..found[part].len()).step_by(97) {
                        let mut at = |step: f32| {
                            let before = block.matrices[part][i];
                            block.matrices[part][i] += step;
                            let loss = loss(&block, &x);
                            block.matrices[part][i] = before;
                            loss
                        };
                        close(MATRICES[part], found[part][i], at(0.01), at(-0.01));
                    }
                }
                for (norm, found) in norms.iter().enumerate() {
                    for i in (0..found.len()).step_by(5) {
                        let mut at = |step: f32| {
                            let before = block.norms[norm][i];
                            block.norms[norm][i] += step;
                            let loss = loss(&block, &x);
                            block.norms[norm][i] = before;
                            loss
                        };
                        close(NORMS[norm], found[i], at(0.01), at(-0.01));
                    }
                }
            }
        });
    }
}
