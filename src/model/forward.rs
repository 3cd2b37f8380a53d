//! The forward pass: rows of tokens from any number of sessions in, logits out.

mod heads;
pub(crate) mod layerwise;
mod room;

use std::sync::PoisonError;

use super::Model;
use super::arch::NormKind;
use super::experts::Buffers;
use super::kv_cache::Session;
use super::linear::{Linear, Rows};
use super::weights::{Ffn, HeadNorm, Layer, Mlp, Norm};
use crate::error::{Error, Result};
use crate::kernels::Kernel;
use crate::quant::packed::PANEL;
use crate::threads::Scope;

pub(super) use room::Widths;

/// Rows that go through the layers together; longer prompts go in pieces, whose outputs stay in larger caches.
const MAX_ROWS: usize = 256;
/// Queries of one head that a task of attention takes together, as long as there are tasks for all threads: enough that
/// converting keys and values costs little, few enough that their scores stay in the second-level cache.
const ATTENTION_QUERIES: usize = 128;
/// Rows that a task of attention takes at most.
const ATTENTION_ROWS: usize = 64;
/// Tasks a thread, so that one that is held up does not hold up the others.
const TASKS: usize = 4;
/// Rows that a task of elementwise work takes together.
const TASK_ROWS: usize = 8;

/// Which logits a caller wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// None: the tokens only fill the cache.
    None,
    /// Those of the last token.
    Last,
    /// Those of every token.
    All,
    /// None, but every token's hidden state behind the last norm, a row of `hidden` numbers: what the output matrix would
    /// read.
    Hidden,
}

/// Tokens to be added to a session.
#[derive(Debug)]
pub struct Input<'a> {
    /// The session; each may occur once in a step.
    pub session: &'a mut Session,
    /// Token ids, at least one.
    pub tokens: &'a [u32],
    /// Which logits are wanted.
    pub logits: Logits,
}

/// One row of a pass.
#[derive(Debug, Clone, Copy)]
struct Row {
    input: usize,
    token: u32,
    position: usize,
    /// Index of the span that it belongs to.
    span: usize,
    wanted: bool,
}

/// Consecutive rows of one session: what a task of attention computes for one head.
#[derive(Debug, Clone, Copy)]
struct Span {
    input: usize,
    row: usize,
    position: usize,
    len: usize,
}

/// Buffers of a pass. They grow to the largest pass seen and are kept.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    rows: Vec<Row>,
    spans: Vec<Span>,
    /// `(rows, pairs)`
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// The residual stream `(rows, hidden)`.
    x: Vec<f32>,
    /// Input of the next linear layer `(rows, its columns)`.
    input: Rows,
    /// Query, key and value `(rows, width of qkv)`.
    qkv: Vec<f32>,
    /// Attention where a span has several rows `(spans, kv_heads, longest span, heads to a kv_head * head_dim)`.
    attended: Vec<f32>,
    /// Attention by segments of the cache `(spans, kv_heads, segments, sums)`.
    parts: Vec<f32>,
    /// Gate and up `(rows, width of ffn_up)`.
    ffn: Vec<f32>,
    /// What joins the residual stream `(rows, hidden rounded up to panels)`.
    joining: Vec<f32>,
    /// As `joining`, of attention where the feed-forward layer runs beside it.
    joining_later: Vec<f32>,
    expert: Buffers,
    logits: Vec<f32>,
    /// A row for each task of elementwise work, so that none allocates one.
    room: Vec<f32>,
    /// Tokens of each input that were taken so far, and tokens that its session held before.
    done: Vec<usize>,
    before: Vec<usize>,
}

impl Model {
    /// Computes a step: all tokens of all inputs, in batches, and appends the wanted logits to `logits`, one row of
    /// [`vocabulary`](Model::vocabulary) numbers a token, in the order of the inputs; of [`Logits::Hidden`] one of
    /// [`hidden`](super::config::Config::hidden) numbers. All inputs of a step want the one or the other.
    ///
    /// The result of a token has the same bits whatever else is in the step. `interrupted` is asked between layers; when
    /// it says yes the step ends.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an unknown token, no tokens, or a session of another model;
    /// [`Error::ContextFull`] when the tokens do not fit; [`Error::Interrupted`]. After an error all sessions hold the
    /// tokens they held before, and `logits` what it held.
    pub fn forward(
        &self,
        inputs: &mut [Input<'_>],
        logits: &mut Vec<f32>,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<()> {
        let hidden = inputs.first().is_some_and(|input| input.logits == Logits::Hidden);
        for input in inputs.iter() {
            if input.session.model != self.id {
                return Err(Error::argument("session", "a session of another model", "a session of this model"));
            }
            if (input.logits == Logits::Hidden) != hidden {
                return Err(Error::argument("logits", "both logits and hidden states", "one of them in a step"));
            }
            if input.tokens.is_empty() {
                return Err(Error::argument("tokens", "none", "at least one token"));
            }
            if let Some(token) = input.tokens.iter().find(|token| **token as usize >= self.vocabulary()) {
                return Err(Error::argument("token", token, format_args!("an id below {}", self.vocabulary())));
            }
        }
        // Each pass has buffers of its own, so that threads that share a model wait for each other's compute only.
        let take = || self.scratch.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut scratch = take().unwrap_or_default();
        scratch.before.clear();
        scratch.before.extend(inputs.iter().map(|input| input.session.len()));
        let rows = logits.len();
        let result = self.run(&mut scratch, inputs, logits, interrupted);
        if result.is_err() {
            logits.truncate(rows);
            for (input, len) in inputs.iter_mut().zip(&scratch.before) {
                input.session.truncate(*len);
            }
        }
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
        result
    }

    fn run(
        &self,
        scratch: &mut Scratch,
        inputs: &mut [Input<'_>],
        logits: &mut Vec<f32>,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<()> {
        for input in inputs.iter_mut() {
            input.session.reserve(input.tokens.len())?;
        }
        room::for_logits(inputs, self, logits)?;
        self.pool.run(|scope| {
            scratch.done.clear();
            scratch.done.resize(inputs.len(), 0);
            while scratch.gather(inputs, |rows| self.attention_rows(rows)) {
                scratch.reserve(self, inputs)?;
                Pass { model: self, kernel: self.kernel, scope }.step(scratch, inputs, logits, interrupted)?;
            }
            Ok(())
        })
    }
}

impl Scratch {
    /// Takes the next rows, up to [`MAX_ROWS`], from the inputs. False when there are none. `longest` tells how many rows a
    /// span of so many rows in all may have.
    fn gather(&mut self, inputs: &[Input<'_>], longest: impl Fn(usize) -> usize) -> bool {
        self.rows.clear();
        self.spans.clear();
        let rest = inputs.iter().zip(&self.done).map(|(input, done)| input.tokens.len() - done);
        let longest = longest(rest.fold(0, usize::saturating_add).min(MAX_ROWS));
        for (i, (input, done)) in inputs.iter().zip(&mut self.done).enumerate() {
            let take = (input.tokens.len() - *done).min(MAX_ROWS - self.rows.len());
            // A session counts its tokens as they are computed, so its length is the position of the first one.
            let position = input.session.len();
            let spans = self.spans.len();
            for n in (0..take).step_by(longest) {
                let len = longest.min(take - n);
                self.spans.push(Span { input: i, row: self.rows.len() + n, position: position + n, len });
            }
            for n in 0..take {
                let last = *done + n + 1 == input.tokens.len();
                let wanted = match input.logits {
                    Logits::None => false,
                    Logits::Last => last,
                    Logits::All | Logits::Hidden => true,
                };
                self.rows.push(Row {
                    input: i,
                    token: input.tokens[*done + n],
                    position: position + n,
                    span: spans + n / longest,
                    wanted,
                });
            }
            *done += take;
        }
        !self.rows.is_empty()
    }
}

/// One pass through the layers.
pub(super) struct Pass<'a> {
    pub(super) model: &'a Model,
    pub(super) kernel: &'static Kernel,
    scope: &'a Scope<'a>,
}

impl Pass<'_> {
    fn step(
        &self,
        s: &mut Scratch,
        inputs: &mut [Input<'_>],
        logits: &mut Vec<f32>,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<()> {
        let (config, weights) = (&self.model.config, &self.model.weights);

        // Token ids to the residual stream, and the angles of every position.
        self.embed(s);
        self.rotations(s);

        for (index, layer) in weights.layers.iter().enumerate() {
            if interrupted() {
                return Err(Error::Interrupted);
            }
            self.layer(s, layer, index, inputs);
        }
        for row in &s.rows {
            inputs[row.input].session.advance(1);
        }

        // The last norm and the output matrix, for the rows whose logits are wanted.
        let hidden = config.hidden;
        let mut wanted = 0;
        for r in 0..s.rows.len() {
            if s.rows[r].wanted {
                s.x.copy_within(r * hidden..(r + 1) * hidden, wanted * hidden);
                wanted += 1;
            }
        }
        if wanted > 0 {
            s.x.truncate(wanted * hidden);
            if inputs.iter().any(|input| input.logits == Logits::Hidden) {
                self.norm(&s.x, weights.output_norm.as_ref(), &mut s.input);
                logits.extend_from_slice(&s.input.values);
            } else {
                self.head(s, logits);
            }
        }
        Ok(())
    }

    /// The logits of all rows of `s.x`.
    fn head(&self, s: &mut Scratch, logits: &mut Vec<f32>) {
        let (config, weights) = (&self.model.config, &self.model.weights);
        self.norm(&s.x, weights.output_norm.as_ref(), &mut s.input);
        let output = weights.output();
        if let Some([_, outward]) = &weights.projections {
            self.linear(outward, &mut s.input, &mut s.joining);
            let columns = output.parts()[0].columns();
            s.input.resize(s.x.len() / config.hidden, columns);
            for (input, row) in s.input.values.chunks_mut(columns).zip(s.joining.chunks(outward.width())) {
                input.copy_from_slice(&row[..columns]);
            }
        }
        self.linear(output, &mut s.input, &mut s.logits);
        let vocabulary = self.model.vocabulary();
        for row in s.logits.chunks(output.width()) {
            let at = logits.len();
            logits.extend_from_slice(&row[..vocabulary]);
            let row = &mut logits[at..];
            if config.logit_scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= config.logit_scale);
            }
            if let Some(cap) = config.logit_cap {
                self.kernel.soft_cap(row, cap);
            }
        }
    }

    /// One transformer block: `s.x` to `s.x`.
    fn layer(&self, s: &mut Scratch, layer: &Layer, index: usize, inputs: &mut [Input<'_>]) {
        let config = &self.model.config;
        self.attention(s, layer, index, inputs);
        self.linear(&layer.attn_output, &mut s.input, &mut s.joining);
        self.post_norm(&mut s.joining, layer.attn_post_norm.as_ref(), &mut s.room);
        if config.parallel {
            // The feed-forward layer reads the stream as attention did, so attention joins it later.
            std::mem::swap(&mut s.joining, &mut s.joining_later);
        } else {
            self.join(&mut s.x, &s.joining);
            self.norm_stream(&mut s.x, layer.attn_joined_norm.as_ref(), &mut s.input);
        }

        // Feed-forward: norm, gate and up, activation, down.
        self.norm(&s.x, self.ffn_norm(layer), &mut s.input);
        match &layer.ffn {
            Ffn::Dense(mlp) => self.mlp(mlp, &mut s.input, &mut s.ffn, &mut s.joining),
            Ffn::Experts { router, experts, shared } => {
                let buffers = &mut s.expert;
                self.experts(router, experts, shared.as_ref(), &mut s.input, &mut s.ffn, buffers, &mut s.joining);
            }
        }
        self.post_norm(&mut s.joining, layer.ffn_post_norm.as_ref(), &mut s.room);
        if config.parallel {
            self.join(&mut s.x, &s.joining_later);
        }
        self.join(&mut s.x, &s.joining);
        self.norm_stream(&mut s.x, layer.ffn_joined_norm.as_ref(), &mut s.input);
    }

    /// Attention from `s.x` to the input of its output matrix: norm, query/key/value, rotation, into the cache, over it.
    fn attention(&self, s: &mut Scratch, layer: &Layer, index: usize, inputs: &mut [Input<'_>]) {
        self.norm(&s.x, layer.attn_norm.as_ref(), &mut s.input);
        self.linear(&layer.qkv, &mut s.input, &mut s.qkv);
        self.heads(s, layer, index);
        self.store(s, layer, index, inputs);
        self.attend(s, layer, index, inputs);
    }

    /// The norm before the feed-forward layer: its own, or, beside attention, that of attention.
    fn ffn_norm<'l>(&self, layer: &'l Layer) -> Option<&'l Norm> {
        layer.ffn_norm.as_ref().or(if self.model.config.parallel { layer.attn_norm.as_ref() } else { None })
    }

    fn embed(&self, s: &mut Scratch) {
        let (config, weights) = (&self.model.config, &self.model.weights);
        let (hidden, embedding) = (config.hidden, &weights.embedding.parts()[0]);
        s.x.resize(s.rows.len() * hidden, 0.0);
        let projected = weights.projections.as_ref().map(|[inward, _]| {
            let columns = embedding.columns();
            s.input.resize(s.rows.len(), columns);
            for (input, row) in s.input.values.chunks_mut(columns).zip(&s.rows) {
                embedding.decode_row(row.token as usize, input);
            }
            self.linear(inward, &mut s.input, &mut s.joining);
            inward.width()
        });
        let (rows, joining) = (&s.rows, &s.joining);
        let size = if weights.positions.is_some() { hidden } else { 0 };
        self.scope.for_each_chunk_with(&mut s.x, TASK_ROWS * hidden, &mut s.room, size, |i, chunk, learned| {
            for (r, x) in chunk.chunks_mut(hidden).enumerate() {
                let index = i * TASK_ROWS + r;
                let row = &rows[index];
                match projected {
                    Some(width) => x.copy_from_slice(&joining[index * width..][..hidden]),
                    None => embedding.decode_row(row.token as usize, x),
                }
                if config.embedding_scale != 1.0 {
                    x.iter_mut().for_each(|x| *x *= config.embedding_scale);
                }
                if let Some(positions) = &weights.positions {
                    positions.parts()[0].decode_row(row.position, learned);
                    self.kernel.add_scaled(x, learned, 1.0);
                }
            }
        });
        self.norm_stream(&mut s.x, weights.embedding_norm.as_ref(), &mut s.input);
    }

    /// `x = norm(x)`, where there is a norm.
    fn norm_stream(&self, x: &mut [f32], norm: Option<&Norm>, buffer: &mut Rows) {
        if norm.is_some() {
            self.norm(x, norm, buffer);
            x.copy_from_slice(&buffer.values);
        }
    }

    fn rotations(&self, s: &mut Scratch) {
        let ropes = &self.model.ropes;
        let pairs = ropes[0].pairs();
        s.cos.resize(2 * s.rows.len() * pairs, 0.0);
        s.sin.resize(2 * s.rows.len() * pairs, 0.0);
        if pairs == 0 {
            return;
        }
        let angles = s.cos.chunks_mut(pairs).zip(s.sin.chunks_mut(pairs));
        for (i, (cos, sin)) in angles.enumerate() {
            let (rope, row) = (i / s.rows.len(), i % s.rows.len());
            ropes[rope].angles(s.rows[row].position, cos, sin);
        }
    }

    /// `input = norm(x)`, row by row, or `x` where there is no norm.
    fn norm(&self, x: &[f32], norm: Option<&Norm>, input: &mut Rows) {
        let (model, hidden) = (self.model, self.model.config.hidden);
        input.resize(x.len() / hidden, hidden);
        self.scope.for_each_chunk(&mut input.values, TASK_ROWS * hidden, |i, out| {
            for (x, out) in x[i * TASK_ROWS * hidden..].chunks(hidden).zip(out.chunks_mut(hidden)) {
                match norm {
                    Some(norm) => model.norm_row(x, norm, out),
                    None => out.copy_from_slice(x),
                }
            }
        });
    }

    /// `joining = norm(joining)`, where there is a norm.
    fn post_norm(&self, joining: &mut [f32], norm: Option<&Norm>, room: &mut Vec<f32>) {
        let Some(norm) = norm else { return };
        let (model, hidden) = (self.model, self.model.config.hidden);
        let width = hidden.next_multiple_of(PANEL);
        self.scope.for_each_chunk_with(joining, TASK_ROWS * width, room, hidden, |_, chunk, out| {
            for row in chunk.chunks_mut(width) {
                model.norm_row(&row[..hidden], norm, out);
                row[..hidden].copy_from_slice(out);
            }
        });
    }

    pub(super) fn linear(&self, layer: &Linear, input: &mut Rows, out: &mut Vec<f32>) {
        let columns = layer.parts().first().map_or(1, |part| part.columns());
        input.prepare(self.scope, self.kernel, columns, layer);
        layer.apply(self.scope, self.model.threads(), self.kernel, input, out);
    }

    /// `out = down(activation(gate(input)) * up(input))`, or `down(activation(up(input)))` where there is no gate.
    pub(super) fn mlp(&self, mlp: &Mlp, input: &mut Rows, buffer: &mut Vec<f32>, out: &mut Vec<f32>) {
        self.mlp_inner(mlp, input, buffer);
        self.linear(&mlp.down, input, out);
    }

    /// `input = activation(gate(input)) * up(input)`, the input of `down`.
    fn mlp_inner(&self, mlp: &Mlp, input: &mut Rows, buffer: &mut Vec<f32>) {
        self.linear(&mlp.up, input, buffer);
        let (ffn, width, activation) = (mlp.width, mlp.up.width(), self.model.config.activation);
        let gated = mlp.up.parts().len() == 2;
        let source = &*buffer;
        input.resize(source.len() / width, ffn);
        self.scope.for_each_chunk(&mut input.values, TASK_ROWS * ffn, |i, chunk| {
            for (source, out) in source[i * TASK_ROWS * width..].chunks(width).zip(chunk.chunks_mut(ffn)) {
                out.copy_from_slice(&source[..ffn]);
                if gated {
                    self.kernel.gate(activation, out, &source[mlp.up.start(1)..][..ffn]);
                } else {
                    self.kernel.activate(activation, out);
                }
            }
        });
    }

    /// `x += scale * joining`.
    fn join(&self, x: &mut [f32], joining: &[f32]) {
        let (hidden, scale) = (self.model.config.hidden, self.model.config.residual_scale);
        let width = hidden.next_multiple_of(PANEL);
        self.scope.for_each_chunk(x, TASK_ROWS * hidden, |i, chunk| {
            for (x, joining) in chunk.chunks_mut(hidden).zip(joining[i * TASK_ROWS * width..].chunks(width)) {
                self.kernel.add_scaled(x, &joining[..hidden], scale);
            }
        });
    }
}

impl Model {
    /// Rows that a task of attention takes when there are `rows` in all.
    fn attention_rows(&self, rows: usize) -> usize {
        let config = &self.config;
        let enough = rows * config.kv_heads / (TASKS * self.pool.threads());
        (ATTENTION_QUERIES * config.kv_heads / config.heads).min(enough).clamp(1, ATTENTION_ROWS)
    }

    /// One row through a norm of the family's kind.
    fn norm_row(&self, x: &[f32], norm: &Norm, out: &mut [f32]) {
        let config = &self.config;
        match config.family.norm {
            NormKind::Rms => self.kernel.rms_norm(x, &norm.weight, config.norm_eps, out),
            NormKind::Layer => self.kernel.layer_norm(x, &norm.weight, &norm.bias, config.norm_eps, out),
        }
    }

    /// Normalizes queries or keys, head by head or all heads as one row. `room` has at least the norm's width.
    fn head_norm(&self, heads: &mut [f32], norm: &HeadNorm, room: &mut [f32]) {
        let (config, width) = (&self.config, norm.width);
        let (weight, bias) = (&norm.norm.weight, &norm.norm.bias);
        let out = &mut room[..width];
        for (i, head) in heads.chunks_exact_mut(width).enumerate() {
            let own = if weight.len() == width { 0..width } else { i * width..(i + 1) * width };
            match config.family.norm {
                NormKind::Rms => self.kernel.rms_norm(head, &weight[own], config.norm_eps, out),
                NormKind::Layer => {
                    let bias = bias.get(own.clone()).unwrap_or(&[]);
                    self.kernel.layer_norm(head, &weight[own], bias, config.norm_eps, out);
                }
            }
            head.copy_from_slice(out);
        }
    }
}
