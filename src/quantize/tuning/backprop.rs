//! Forward and backward pass of one plain decoder block, in single precision.
//!
//! A plain block is what Llama, Mistral and Qwen2 have in common: RMS norms before attention and before the feed-forward
//! network, rotary positions, a SiLU gate, and nothing else. The backward pass computes the activations of a block again from
//! its input instead of keeping them.

use crate::kernels::Activation;
use crate::quant::packed::Packed;
use crate::quantize::compute::{Compute, packed_of};

/// The names of the linear layers of a block in a file.
pub(super) const MATRICES: [&str; 7] = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
/// The names of the norms of a block in a file.
pub(super) const NORMS: [&str; 2] = ["attn_norm", "ffn_norm"];
/// Tokens per task.
const TASK_ROWS: usize = 16;

const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const OUT: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

/// The shape that all blocks of a model share, and the threads that compute.
#[derive(Debug)]
pub(super) struct Backprop<'a> {
    pub(super) compute: Compute<'a>,
    /// Width of the residual stream.
    pub(super) hidden: usize,
    /// Width of the feed-forward network.
    pub(super) width: usize,
    /// Query heads.
    pub(super) heads: usize,
    /// Key and value heads.
    pub(super) kv_heads: usize,
    /// Width of a head.
    pub(super) dim: usize,
    /// Added to the mean square in a norm.
    pub(super) eps: f32,
    /// Factor of attention scores.
    pub(super) scale: f32,
    /// Whether rotary pairs are adjacent; otherwise they are half a head apart.
    pub(super) adjacent: bool,
    /// Cosines and sines, `(positions, pairs)` each.
    pub(super) angles: (Vec<f32>, Vec<f32>),
    /// Rotary pairs per head.
    pub(super) pairs: usize,
}

/// The weights of a block.
#[derive(Debug)]
pub(super) struct BlockWeights {
    /// `(rows, columns)` each, in the order of [`MATRICES`].
    pub(super) matrices: [Vec<f32>; 7],
    /// Of query, key and value; empty if absent.
    pub(super) biases: [Vec<f32>; 3],
    /// `(hidden)` each, in the order of [`NORMS`].
    pub(super) norms: [Vec<f32>; 2],
    /// Positions that a query sees, including its own.
    pub(super) window: usize,
}

/// The activations of a block, `(tokens of all windows, width)` each.
struct Activations {
    attention_input: Vec<f32>,
    /// After rotation.
    queries: Vec<f32>,
    /// After rotation.
    keys: Vec<f32>,
    values: Vec<f32>,
    attended: Vec<f32>,
    /// The residual stream after attention.
    middle: Vec<f32>,
    network_input: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    inner: Vec<f32>,
}

impl Backprop<'_> {
    /// Passes the residual stream `x` of windows with `lengths` tokens through a block.
    pub(super) fn forward(&self, block: &BlockWeights, x: &mut [f32], lengths: &[usize]) {
        let activations = self.run(block, x, lengths);
        let out = self.apply(&activations.inner, &block.matrices[DOWN], DOWN);
        x.iter_mut().zip(activations.middle.iter().zip(out)).for_each(|(x, (middle, out))| *x = middle + out);
    }

    /// Turns the gradient at the block's output into that at its input `x`. `sink` gets the gradient of each matrix; the gradients
    /// of the norms' weights are returned.
    pub(super) fn backward(
        &self,
        block: &BlockWeights,
        x: &[f32],
        lengths: &[usize],
        gradient: &mut [f32],
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> [Vec<f32>; 2] {
        let activations = self.run(block, x, lengths);
        sink(DOWN, &self.outer(gradient, &activations.inner, DOWN));
        let inner = self.back(gradient, block, DOWN);
        let (gate, up) = self.gate_back(&activations, &inner);
        sink(GATE, &self.outer(&gate, &activations.network_input, GATE));
        sink(UP, &self.outer(&up, &activations.network_input, UP));
        let mut input = self.back(&gate, block, GATE);
        add(&mut input, &self.back(&up, block, UP));
        let network_norm = self.norm_back(&activations.middle, &block.norms[1], &input, gradient);

        sink(OUT, &self.outer(gradient, &activations.attended, OUT));
        let attended = self.back(gradient, block, OUT);
        let [mut queries, mut keys, values] = self.attention_back(&activations, &attended, lengths, block.window);
        self.rotate(&mut queries, self.heads, lengths, -1.0);
        self.rotate(&mut keys, self.kv_heads, lengths, -1.0);
        let mut input = vec![0.0; x.len()];
        for (part, gradient) in [(Q, queries), (K, keys), (V, values)] {
            sink(part, &self.outer(&gradient, &activations.attention_input, part));
            add(&mut input, &self.back(&gradient, block, part));
        }
        let attention_norm = self.norm_back(x, &block.norms[0], &input, gradient);
        [attention_norm, network_norm]
    }

    fn run(&self, block: &BlockWeights, x: &[f32], lengths: &[usize]) -> Activations {
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
        Activations { attention_input, queries, keys, values, attended, middle, network_input, gate, up, inner }
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

    /// The gradient at the input of a matrix: `gradient * w`.
    fn back(&self, gradient: &[f32], block: &BlockWeights, part: usize) -> Vec<f32> {
        let (rows, columns, w) = (self.rows(part), self.columns(part), &block.matrices[part]);
        let transposed = self.compute.pack_transposed(columns, rows, |row| &w[row * columns..][..columns]);
        let mut out = vec![0.0; gradient.len() / rows * columns];
        self.compute
            .for_each_product(gradient, &transposed, &mut out, columns, |product, out| out.copy_from_slice(product));
        out
    }

    /// The gradient of a matrix: `gradient^T * x`.
    fn outer(&self, gradient: &[f32], x: &[f32], part: usize) -> Vec<f32> {
        let (rows, columns) = (self.rows(part), self.columns(part));
        let tokens = x.len() / columns;
        let mut transposed = vec![0.0; gradient.len()];
        self.compute.for_each_chunk(&mut transposed, TASK_ROWS * tokens, |task, out| {
            for (token, gradient) in gradient.chunks(rows).enumerate() {
                for (row, gradient) in gradient[task * TASK_ROWS..].iter().take(out.len() / tokens).enumerate() {
                    out[row * tokens + token] = *gradient;
                }
            }
        });
        let inputs = self.compute.pack_transposed(columns, tokens, |token| &x[token * columns..][..columns]);
        let mut out = vec![0.0; rows * columns];
        self.compute
            .for_each_product(&transposed, &inputs, &mut out, columns, |product, out| out.copy_from_slice(product));
        out
    }

    /// RMS norm: each row divided by its root mean square and multiplied by `weight`.
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

    /// Adds the gradient at the input `x` of a norm to `sum` and returns that of its weights. `gradient` is that at its output.
    pub(super) fn norm_back(&self, x: &[f32], weight: &[f32], gradient: &[f32], sum: &mut [f32]) -> Vec<f32> {
        let hidden = self.hidden;
        let inverse = |x: &[f32]| {
            let squares: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            1.0 / (squares / hidden as f64 + f64::from(self.eps)).sqrt() as f32
        };
        self.compute.for_each_chunk(sum, TASK_ROWS * hidden, |task, sum| {
            let at = task * TASK_ROWS * hidden;
            let rows = x[at..].chunks(hidden).zip(gradient[at..].chunks(hidden));
            for (sum, (x, gradient)) in sum.chunks_mut(hidden).zip(rows) {
                let inverse = inverse(x);
                let along: f64 = x.iter().zip(gradient).zip(weight).map(|((x, s), w)| f64::from(x * s * w)).sum();
                let shared = inverse * inverse * inverse * (along / hidden as f64) as f32;
                for (sum, ((x, gradient), weight)) in sum.iter_mut().zip(x.iter().zip(gradient).zip(weight)) {
                    *sum += inverse * gradient * weight - shared * x;
                }
            }
        });
        let mut of_weight = vec![0.0; hidden];
        for (x, gradient) in x.chunks(hidden).zip(gradient.chunks(hidden)) {
            let inverse = inverse(x);
            of_weight
                .iter_mut()
                .zip(x.iter().zip(gradient))
                .for_each(|(sum, (x, gradient))| *sum += inverse * x * gradient);
        }
        of_weight
    }

    /// The gradients at gate and up, from that at `silu(gate) * up`.
    fn gate_back(&self, activations: &Activations, gradient: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (mut of_gate, mut of_up) = (vec![0.0; gradient.len()], vec![0.0; gradient.len()]);
        let size = TASK_ROWS * self.width;
        let mut tasks: Vec<_> = of_gate.chunks_mut(size).zip(of_up.chunks_mut(size)).collect();
        self.compute.for_each_chunk(&mut tasks, 1, |task, chunk| {
            for (of_gate, of_up) in chunk {
                let own = task * size..task * size + of_gate.len();
                // `exp_segment` returns the exponentials divided by the largest.
                let mut powers: Vec<f32> = activations.gate[own.clone()].iter().map(|gate| -gate.abs()).collect();
                let (most, _) = self.compute.kernel.exp_segment(&mut powers);
                let factor = libm::expf(most);
                let known = activations.gate[own.clone()]
                    .iter()
                    .zip(&activations.up[own.clone()])
                    .zip(&gradient[own])
                    .zip(&powers);
                for ((of_gate, of_up), (((gate, up), gradient), power)) in
                    of_gate.iter_mut().zip(of_up.iter_mut()).zip(known)
                {
                    let power = power * factor;
                    let sigmoid = if *gate >= 0.0 { 1.0 } else { power } / (1.0 + power);
                    *of_up = gradient * gate * sigmoid;
                    *of_gate = gradient * up * sigmoid * (1.0 + gate * (1.0 - sigmoid));
                }
            }
        });
        (of_gate, of_up)
    }

    /// Rotates the pairs of each head by the angle of their position; `direction` -1 rotates back.
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

    /// The output of attention `(tokens, heads * dim)`.
    fn attention(&self, [queries, keys, values]: [&[f32]; 3], lengths: &[usize], window: usize) -> Vec<f32> {
        let mut out = vec![0.0; queries.len()];
        let mut tasks = self.head_tasks(lengths);
        self.compute.for_each_chunk(&mut tasks, 1, |_, tasks| {
            for task in tasks {
                let own = |x: &[f32], head| self.gather(x, task, head);
                let (keys, values) = (own(keys, None), own(values, None));
                let keys = packed_of(task.length, self.dim, |row, column| keys[row * self.dim + column]);
                let values = packed_of(self.dim, task.length, |row, column| values[column * self.dim + row]);
                let of_head = |head| {
                    self.compute.multiply(&self.probabilities(&own(queries, Some(head)), &keys, window), &values)
                };
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

    /// The gradients at queries, keys and values, from that at the output of attention.
    fn attention_back(
        &self,
        activations: &Activations,
        gradient: &[f32],
        lengths: &[usize],
        window: usize,
    ) -> [Vec<f32>; 3] {
        let dim = self.dim;
        let mut tasks = self.head_tasks(lengths);
        self.compute.for_each_chunk(&mut tasks, 1, |_, tasks| {
            for task in tasks {
                let length = task.length;
                let own = |x: &[f32], head| self.gather(x, task, head);
                let (keys, values) = (own(&activations.keys, None), own(&activations.values, None));
                let by_rows = |x: &[f32]| packed_of(length, dim, |row, column| x[row * dim + column]);
                let by_columns = |x: &[f32]| packed_of(dim, length, |row, column| x[column * dim + row]);
                let (keys, keys_transposed, values) = (by_rows(&keys), by_columns(&keys), by_rows(&values));
                let (mut of_keys, mut of_values) = (vec![0.0; length * dim], vec![0.0; length * dim]);
                let mut out = Vec::new();
                for head in 0..self.heads / self.kv_heads {
                    let (queries, gradient) = (own(&activations.queries, Some(head)), own(gradient, Some(head)));
                    let probabilities = self.probabilities(&queries, &keys, window);
                    add(
                        &mut of_values,
                        &self.compute.multiply(&transposed(&probabilities, length), &by_columns(&gradient)),
                    );
                    let mut scores = self.compute.multiply(&gradient, &values);
                    for (scores, probabilities) in scores.chunks_mut(length).zip(probabilities.chunks(length)) {
                        let mean: f32 = scores
                            .iter()
                            .zip(probabilities)
                            .map(|(gradient, probability)| gradient * probability)
                            .sum();
                        for (gradient, probability) in scores.iter_mut().zip(probabilities) {
                            *gradient = probability * (*gradient - mean) * self.scale;
                        }
                    }
                    add(&mut of_keys, &self.compute.multiply(&transposed(&scores, length), &by_columns(&queries)));
                    out.push(self.compute.multiply(&scores, &keys_transposed));
                }
                out.extend([of_keys, of_values]);
                task.out = out;
            }
        });
        let mut gradients = [&activations.queries, &activations.keys, &activations.values].map(|x| vec![0.0; x.len()]);
        let group = self.heads / self.kv_heads;
        for task in &tasks {
            for (at, from) in task.out.iter().enumerate() {
                let (part, head) = if at < group { (Q, Some(at)) } else { (K + at - group, None) };
                self.scatter(from, task, head, &mut gradients[part]);
            }
        }
        gradients
    }

    /// The attention probabilities `(tokens, tokens)`, causal and limited to the window.
    fn probabilities(&self, queries: &[f32], keys: &Packed, window: usize) -> Vec<f32> {
        let mut probabilities = self.compute.multiply(queries, keys);
        for (position, row) in probabilities.chunks_mut(keys.rows()).enumerate() {
            let (row, later) = row.split_at_mut(position + 1);
            let (earlier, seen) = row.split_at_mut((position + 1).saturating_sub(window));
            seen.iter_mut().for_each(|score| *score *= self.scale);
            let (_, sum) = self.compute.kernel.exp_segment(seen);
            seen.iter_mut().for_each(|probability| *probability /= sum);
            earlier.fill(0.0);
            later.fill(0.0);
        }
        probabilities
    }

    fn head_tasks(&self, lengths: &[usize]) -> Vec<HeadTask> {
        let mut tasks = Vec::new();
        let mut first = 0;
        for length in lengths {
            let of = |head| HeadTask { first, length: *length, head, out: Vec::new() };
            tasks.extend((0..self.kv_heads).map(of));
            first += length;
        }
        tasks
    }

    /// The position of a task's head in rows of queries, where `head` is its number in the group, or in rows of keys and values:
    /// the width of the rows and the first column.
    fn position(&self, task: &HeadTask, head: Option<usize>) -> (usize, usize) {
        match head {
            Some(head) => (self.heads * self.dim, (task.head * (self.heads / self.kv_heads) + head) * self.dim),
            None => (self.kv_heads * self.dim, task.head * self.dim),
        }
    }

    fn gather(&self, x: &[f32], task: &HeadTask, head: Option<usize>) -> Vec<f32> {
        let (width, column) = self.position(task, head);
        let rows = x[task.first * width..].chunks(width).take(task.length);
        rows.flat_map(|row| &row[column..column + self.dim]).copied().collect()
    }

    fn scatter(&self, from: &[f32], task: &HeadTask, head: Option<usize>, to: &mut [f32]) {
        let (width, column) = self.position(task, head);
        for (to, from) in to[task.first * width..].chunks_mut(width).zip(from.chunks(self.dim)) {
            to[column..column + self.dim].copy_from_slice(from);
        }
    }
}

/// One key-value head of one window, and its results.
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
mod tests {
    use super::*;
    use crate::quantize::recipes::fixtures::{bell, with_threads};

    /// Widths that do not fill a panel, two windows, and heads that share keys.
    fn backprop<'a>(compute: &Compute<'a>, adjacent: bool) -> (Backprop<'a>, BlockWeights) {
        let (hidden, width, heads, kv_heads, dim, pairs) = (24, 40, 4, 2, 6, 2);
        let angle = |i: usize| (i as f32 * 0.37).sin_cos();
        let (sin, cos) = (0..9 * pairs).map(angle).unzip();
        let backprop = Backprop {
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
            let mut matrix = bell(backprop.rows(part) * backprop.columns(part), part as u32 + 1);
            matrix.iter_mut().for_each(|x| *x *= 0.3);
            matrix
        };
        let norm = |seed| bell(hidden, seed).iter().map(|x| 1.0 + 0.1 * x).collect();
        let bias = |part| bell(backprop.rows(part), 20 + part as u32);
        let block = BlockWeights {
            matrices: [Q, K, V, OUT, GATE, UP, DOWN].map(matrix),
            biases: [bias(Q), bias(K), Vec::new()],
            norms: [norm(31), norm(32)],
            window: if adjacent { 4 } else { usize::MAX },
        };
        (backprop, block)
    }

    const LENGTHS: [usize; 2] = [9, 5];

    #[test]
    fn gradients_agree_with_finite_differences() {
        with_threads(2, |compute| {
            for adjacent in [false, true] {
                let (backprop, mut block) = backprop(compute, adjacent);
                let x = bell(14 * backprop.hidden, 77);
                let wanted = bell(x.len(), 78);
                let loss = |block: &BlockWeights, x: &[f32]| {
                    let mut out = x.to_vec();
                    backprop.forward(block, &mut out, &LENGTHS);
                    out.iter().zip(&wanted).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>()
                };
                let mut gradient = wanted.clone();
                let mut found: Vec<Vec<f32>> = vec![Vec::new(); 7];
                let mut sink = |part: usize, gradient: &[f32]| found[part] = gradient.to_vec();
                let norms = backprop.backward(&block, &x, &LENGTHS, &mut gradient, &mut sink);

                let close = |name: &str, found: f32, up: f64, down: f64| {
                    let expected = (up - down) / 0.02;
                    let most = 0.03 * expected.abs().max(1.0);
                    assert!(
                        (f64::from(found) - expected).abs() < most,
                        "{name}: {found}, by finite differences {expected}"
                    );
                };
                for i in (0..x.len()).step_by(29) {
                    let at = |step: f32| {
                        let mut x = x.clone();
                        x[i] += step;
                        loss(&block, &x)
                    };
                    close("input", gradient[i], at(0.01), at(-0.01));
                }
                let mut check =
                    |name, gradient: &[f32], spacing, weight: &dyn Fn(&mut BlockWeights, usize) -> &mut f32| {
                        for i in (0..gradient.len()).step_by(spacing) {
                            let mut at = |step: f32| {
                                let before = *weight(&mut block, i);
                                *weight(&mut block, i) += step;
                                let loss = loss(&block, &x);
                                *weight(&mut block, i) = before;
                                loss
                            };
                            close(name, gradient[i], at(0.01), at(-0.01));
                        }
                    };
                for part in 0..7 {
                    check(MATRICES[part], &found[part], 97, &|block, i| &mut block.matrices[part][i]);
                }
                for (norm, found) in norms.iter().enumerate() {
                    check(NORMS[norm], found, 5, &|block, i| &mut block.norms[norm][i]);
                }
            }
        });
    }
}
