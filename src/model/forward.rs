//! The forward pass: rows of tokens from any number of sessions in, logits out.

use super::adapter::rows;
use super::batch::{Batch, Input, Logits, Row};
use super::buffer::Buffer;
use super::config::Config;
use super::ffn::FeedForward;
use super::linear::{Linear, LinearInput};
use super::mixers::positions::Positions;
use super::mixers::{Mixer, MixerContext, span_rows};
use super::mtp::head::Head;
use super::pass::{Pass, TASK_ROWS};
use super::state::recurrent::{MAX_LOGGED, Recurrent};
use super::state::session::Session;
use super::streams::LayerStreams;
use super::transformer::{Layer, Transformer, Widths};
use super::{ffn, mixers, streams};
use crate::error::{Error, Result};
use crate::system::memory;

/// The workspace of a pass. Its buffers grow to the largest pass so far and are kept.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    pub(super) batch: Batch,
    /// `(rows, hidden)`: the residual stream.
    pub(super) x: Buffer,
    /// `(rows, its columns)`: the input of the next linear layer.
    pub(super) input: LinearInput,
    /// `(rows, hidden rounded up to panels)`: the output of a branch, or `(rows, width)` that of a projection.
    pub(super) branch: Buffer,
    /// As `branch`: the output of the mixer while the feed-forward layer of a parallel block computes.
    mixer_branch: Buffer,
    /// `(tasks, hidden)`: a row for each task of elementwise work.
    pub(super) rows: Vec<f32>,
    pub(super) mixers: mixers::Workspace,
    pub(super) ffn: ffn::Workspace,
    /// `(rows, layers * width)`: the vectors of the layers.
    pub(super) per_layer: Buffer,
    pub(super) streams: streams::Workspace,
    adapters: rows::Workspace,
    /// `(rows with logits, vocabulary rounded up to panels)`
    logits: Buffer,
    /// `(inputs)`: tokens that each session held before the step.
    lengths: Vec<usize>,
    /// `(rows, hidden)`: the states of the pairs that a head reads.
    pub(super) states: Vec<f32>,
    /// That of the head for multi-token prediction.
    pub(super) head: Option<Box<Workspace>>,
}

impl Workspace {
    /// Allocates memory for the rows of the batch, so that a lack of it is an error before anything is computed.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    fn reserve(&mut self, model: &Transformer, inputs: &[Input<'_>]) -> Result<()> {
        let (config, rows) = (&model.config, self.batch.rows.len());
        let has_logits = |row: &&Row| row.wanted && inputs[row.input].logits != Logits::Hidden;
        let wanted = self.batch.rows.iter().filter(has_logits).count();
        self.reserve_layers(config, &model.widths, &model.positions)?;
        let per_layer = model.weights.per_layer.as_ref().map_or(0, |per_layer| per_layer.width());
        self.per_layer.reserve(rows * per_layer)?;
        if let Some(streams) = config.streams {
            self.streams.reserve(rows, config.hidden, streams.count)?;
        }
        self.logits.reserve(wanted * model.weights.output().width())
    }

    /// Allocates memory for the rows of the batch in layers with rows of these widths.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(super) fn reserve_layers(&mut self, config: &Config, widths: &Widths, positions: &Positions) -> Result<()> {
        let rows = self.batch.rows.len();
        self.x.reserve(rows * config.hidden)?;
        self.input.reserve(rows, widths.input)?;
        self.branch.reserve(rows * widths.branch)?;
        self.mixer_branch.reserve(if config.parallel { rows * widths.branch } else { 0 })?;
        self.mixers.reserve(&widths.mixers, positions, &self.batch)?;
        self.ffn.reserve(&widths.ffn, rows, config.hidden)
    }

    /// Adds the pairs of one input, tokens and states, from `position` on to the batch of a head, in spans of up to `longest` rows.
    pub(super) fn add<'a>(
        &mut self,
        input: usize,
        position: usize,
        pairs: impl Iterator<Item = (u32, &'a [f32])>,
        longest: usize,
    ) {
        let states = &mut self.states;
        let tokens = pairs.map(|(token, state)| {
            states.extend_from_slice(state);
            token
        });
        self.batch.add(input, position, tokens, longest);
    }
}

impl Transformer {
    /// Computes a step: all tokens of all inputs, in batches, and appends the wanted logits to `logits`.
    ///
    /// A stage of a pipeline is given the rows `received (tokens, row_width)` that the stage before it has appended to its
    /// `logits`; the first stage, and a whole model, none.
    ///
    /// # Errors
    /// [`Error::ContextFull`], [`Error::OutOfMemory`], [`Error::Interrupted`]. After an error all sessions hold the tokens
    /// that they held before, and `logits` is as it was.
    pub(super) fn step(
        &self,
        w: &mut Workspace,
        inputs: &mut [Input<'_>],
        mut received: &[f32],
        logits: &mut Vec<f32>,
        head: Option<&Head>,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<()> {
        for input in inputs.iter_mut() {
            let (len, first) = (input.session.len(), input.tokens.first().copied());
            if let (Some(head), Some(first)) = (&mut input.session.head, first) {
                head.begin_step(len, first);
            }
        }
        w.lengths.clear();
        w.lengths.extend(inputs.iter().map(|input| input.session.len()));
        let before = logits.len();
        let (config, kernel, threads) = (&self.config, self.kernel, self.pool.threads());
        let mut adapters = std::mem::take(&mut w.adapters);
        adapters.start(inputs.iter().map(|input| input.session.adapter()));
        let result = self.reserve(inputs, logits).and_then(|()| {
            self.pool.run(|scope| {
                w.batch.start(inputs.len());
                // Few tokens of a recurrent model are computed together.
                let whole = match (config.causal, config.recurrent) {
                    (false, _) => usize::MAX,
                    (true, Some(_)) => MAX_LOGGED,
                    (true, None) => 0,
                };
                while w.batch.gather(inputs, whole, |rows| span_rows(config, threads, rows)) {
                    w.reserve(self, inputs)?;
                    adapters.plan(w.batch.rows.iter().map(|row| (row.input, row.wanted)))?;
                    let pass = Pass { config, kernel, scope, threads, adapters: adapters.rows() };
                    let (first, rows) = (self.held.layers.start, w.batch.rows.len());
                    if !self.held.embedding
                        && let Some(rows) = received.split_off(..rows * self.handover.width(first))
                    {
                        let buffers = [&mut w.x, &mut w.streams.all, &mut w.per_layer];
                        self.handover.receive(first, rows, buffers);
                    }
                    self.batch(&pass, w, inputs, logits, head, interrupted)?;
                }
                Ok(())
            })
        });
        adapters.end();
        w.adapters = adapters;
        if result.is_err() {
            logits.truncate(before);
            for (input, len) in inputs.iter_mut().zip(&w.lengths) {
                input.session.truncate(*len);
            }
        } else {
            if self.held.head {
                self.invalidate_overflowed(inputs, &mut logits[before..]);
            }
            for input in inputs.iter_mut() {
                input.session.end_step();
                if input.session.wants_snapshot() {
                    match self.settle(input.session) {
                        Ok(()) => input.session.take_snapshot(),
                        // Without memory for a snapshot, there is none. But the other stages of a pipeline have it.
                        Err(error) if !self.held.is_whole() => return Err(error),
                        Err(_) => {}
                    }
                }
            }
        }
        result
    }

    /// Counts the tokens of all inputs as computed, for sessions without memory.
    ///
    /// # Errors
    /// [`Error::ContextFull`], and nothing is counted then.
    pub(super) fn count(&self, inputs: &mut [Input<'_>]) -> Result<()> {
        for at in 0..inputs.len() {
            let tokens = inputs[at].tokens.len();
            if let Err(error) = inputs[at].session.reserve(tokens) {
                for input in &mut inputs[..=at] {
                    input.session.truncate(input.session.len());
                }
                return Err(error);
            }
        }
        for input in inputs {
            input.session.advance(input.tokens.len());
            if let Some(state) = input.session.state_mut() {
                state.end_batch();
            }
            input.session.end_step();
            if input.session.wants_snapshot() {
                self.settle(input.session)?;
                input.session.take_snapshot();
            }
        }
        Ok(())
    }

    /// Applies all rows that are recorded to the recurrent states of a session.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(super) fn settle(&self, session: &mut Session) -> Result<()> {
        let Some(state) = session.state_mut() else { return Ok(()) };
        state.unshare()?;
        for index in self.held.layers.clone() {
            self.weights.layers[index].mixer.settle(self.kernel, state, index);
        }
        state.end_settling();
        Ok(())
    }

    /// Numbers of logits, or of hidden states, that an input asks for, saturating.
    pub(super) fn result_len(&self, input: &Input<'_>) -> usize {
        let vocabulary = self.weights.vocabulary();
        match input.logits {
            Logits::None => 0,
            Logits::Last => vocabulary,
            Logits::All => input.tokens.len().saturating_mul(vocabulary),
            Logits::Hidden => input.tokens.len().saturating_mul(self.config.hidden),
        }
    }

    /// Makes the results of inputs whose keys or values the cache does not hold NaN: where attention skips a key that is
    /// minus infinity, they would look valid.
    pub(super) fn invalidate_overflowed(&self, inputs: &[Input<'_>], mut results: &mut [f32]) {
        for input in inputs {
            let own = results.split_off_mut(..self.result_len(input)).unwrap_or_default();
            if input.session.check_cache().is_err() {
                own.fill(f32::NAN);
            }
        }
    }

    /// Allocates memory for the keys and values of all inputs, and for the logits or hidden states that they ask for.
    ///
    /// # Errors
    /// [`Error::ContextFull`], [`Error::OutOfMemory`]
    fn reserve(&self, inputs: &mut [Input<'_>], logits: &mut Vec<f32>) -> Result<()> {
        for input in inputs.iter_mut() {
            input.session.reserve(input.tokens.len())?;
        }
        let passed_on = self.handover.width(self.held.layers.end);
        let wanted = inputs.iter().map(|input| match self.held.head {
            true => self.result_len(input),
            false => input.tokens.len().saturating_mul(passed_on),
        });
        let count = wanted.fold(0, usize::saturating_add);
        let bytes = count.saturating_mul(size_of::<f32>());
        if count > logits.capacity() {
            memory::check_allocation("logits", bytes)?;
        }
        logits.try_reserve_exact(count).map_err(|_| Error::OutOfMemory { what: "logits", bytes, left: None })
    }

    /// Takes the rows of one batch through the model.
    fn batch(
        &self,
        pass: &Pass<'_>,
        w: &mut Workspace,
        inputs: &mut [Input<'_>],
        logits: &mut Vec<f32>,
        head: Option<&Head>,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<()> {
        // What depends on positions alone, and token ids to the residual stream.
        w.mixers.prepare(&self.positions, &w.batch);
        if self.held.embedding {
            self.begin(pass, w);
        }

        // The layers.
        for index in self.held.layers.clone() {
            let layer = &self.weights.layers[index];
            if interrupted() {
                return Err(Error::Interrupted);
            }
            match &layer.streams {
                Some(streams) => self.layer_of_streams(pass, layer, streams, index, w, inputs)?,
                None => self.layer(pass, layer, index, w, inputs)?,
            }
        }
        if let Some(streams) = self.weights.streams.as_ref().filter(|_| self.held.head) {
            streams.end(pass, &mut w.x, &mut w.input, &mut w.branch, &mut w.streams);
        }
        if let Some(head) = head {
            // The head drafts for the base; the model verifies its drafts.
            self.follow(head, &pass.without_adapters(), w, inputs)?;
        }
        for row in &w.batch.rows {
            let session = &mut *inputs[row.input].session;
            session.advance(1);
            // Sessions whose rows are in later batches have not begun.
            session.state_mut().into_iter().for_each(Recurrent::end_batch);
        }
        if !self.held.head {
            let rows = [&*w.x, &*w.streams.all, &*w.per_layer];
            self.handover.pass_on(self.held.layers.end, rows, w.batch.rows.len(), logits);
            return Ok(());
        }

        // The rows whose logits, or hidden states, are wanted.
        let hidden = self.config.hidden;
        let mut wanted = 0;
        for (r, _) in w.batch.rows.iter().enumerate().filter(|(_, row)| row.wanted) {
            w.x.copy_within(r * hidden..(r + 1) * hidden, wanted * hidden);
            wanted += 1;
        }
        w.x.resize(wanted * hidden);
        if wanted > 0 && inputs.iter().any(|input| input.logits == Logits::Hidden) {
            // The last norm.
            pass.norm(&w.x, self.weights.output_norm.as_ref(), &mut w.input);
            logits.extend_from_slice(&w.input.values);
        } else if wanted > 0 {
            // The last norm and the output matrix.
            self.head(&Pass { adapters: pass.adapters.wanted(), ..*pass }, w, logits);
        }
        Ok(())
    }

    /// Token ids to the residual stream, or streams, and to the vectors of the layers.
    fn begin(&self, pass: &Pass<'_>, w: &mut Workspace) {
        self.embed(pass, w);
        if let Some(per_layer) = &self.weights.per_layer {
            let Workspace { batch, x, input, branch, rows, per_layer: out, .. } = w;
            per_layer.compute(pass, &batch.rows, x, input, branch, rows, out);
        }
        if let Some(streams) = &self.weights.streams {
            streams.begin(pass, &w.x, &mut w.input, &mut w.branch, &mut w.streams);
        }
    }

    /// One layer: norm, mixer, join, norm, feed-forward, join. Replaces the residual stream `w.x`.
    fn layer(
        &self,
        pass: &Pass<'_>,
        layer: &Layer,
        index: usize,
        w: &mut Workspace,
        inputs: &mut [Input<'_>],
    ) -> Result<()> {
        let (config, Layer { mixer_norms, mixer, ffn_norms, ffn, .. }) = (&self.config, layer);

        if !matches!(mixer, Mixer::None) {
            // Norm of the mixer's input.
            pass.norm(&w.x, mixer_norms.input.as_ref(), &mut w.input);

            // Mixer, and the norm of its output.
            let mut context = MixerContext { pass, positions: &self.positions, batch: &w.batch, inputs, layer: index };
            mixer.forward(&mut context, &mut w.input, &mut w.mixers, &mut w.branch);
            pass.norm_branch(&mut w.branch, mixer_norms.output.as_ref(), &mut w.rows);

            // Join. The feed-forward layer of a parallel block reads the stream that the mixer read, so the mixer joins
            // later.
            if config.parallel {
                std::mem::swap(&mut w.branch, &mut w.mixer_branch);
            } else {
                pass.join(&mut w.x, &w.branch);
                pass.norm_stream(&mut w.x, mixer_norms.stream.as_ref(), &mut w.input);
            }
        }

        if !matches!(ffn, FeedForward::None) {
            // Norm of the feed-forward layer's input.
            pass.norm(&w.x, layer.ffn_norm(config), &mut w.input);

            // Feed-forward layer, and the norm of its output.
            if let FeedForward::ChannelMix(mix) = ffn {
                let mut context =
                    MixerContext { pass, positions: &self.positions, batch: &w.batch, inputs, layer: index };
                w.mixers.channel_mix(mix, &mut context, &mut w.input, &mut w.branch);
            } else {
                ffn.forward(pass, &w.x, &mut w.input, &mut w.ffn, &mut w.branch)?;
            }
            pass.norm_branch(&mut w.branch, ffn_norms.output.as_ref(), &mut w.rows);

            // Join.
            if config.parallel {
                pass.join(&mut w.x, &w.mixer_branch);
            }
            pass.join(&mut w.x, &w.branch);
            pass.norm_stream(&mut w.x, ffn_norms.stream.as_ref(), &mut w.input);
        }

        // What the layer adds of its own vector, and its factor.
        if let Some(per_layer) = &layer.per_layer {
            per_layer.compute(pass, index, &w.x, &mut w.input, &w.per_layer, &mut w.branch, &mut w.rows);
            pass.join(&mut w.x, &w.branch);
        }
        if let Some(scale) = layer.scale {
            w.x.iter_mut().for_each(|x| *x *= scale);
        }
        Ok(())
    }

    /// One layer of several streams: predicts all, computes the active one, and corrects the others by it.
    fn layer_of_streams(
        &self,
        pass: &Pass<'_>,
        layer: &Layer,
        own: &LayerStreams,
        index: usize,
        w: &mut Workspace,
        inputs: &mut [Input<'_>],
    ) -> Result<()> {
        let Layer { mixer_norms, mixer, ffn_norms, ffn, per_layer, .. } = layer;
        let active = pass.config.streams.map_or(0, |streams| streams.active);
        let (size, hidden) = (w.x.len(), pass.config.hidden);
        own.predict(pass, &mut w.streams, active, size);
        w.x.copy_from_slice(&w.streams.predicted[active * size..][..size]);

        // The low-rank branch, which reads the mixer's input.
        pass.norm(&w.x, mixer_norms.input.as_ref(), &mut w.input);
        w.streams.low_rank.copy_from(&w.input.values);
        pass.linear(&own.left, &mut w.input, &mut w.branch);
        let (rank, stride) = (own.right.columns(), own.left.width());
        w.input.resize(size / hidden, rank);
        for (out, row) in w.input.values.chunks_exact_mut(rank).zip(w.branch.chunks(stride)) {
            out.copy_from_slice(&row[..rank]);
        }
        pass.linear(&own.right, &mut w.input, &mut w.branch);
        pass.norm_branch(&mut w.branch, own.low_rank_norm.as_ref(), &mut w.rows);
        pass.join(&mut w.streams.low_rank, &w.branch);

        // Mixer, and the mean of the two branches, as large as one of them.
        pass.norm(&w.x, mixer_norms.input.as_ref(), &mut w.input);
        let mut context = MixerContext { pass, positions: &self.positions, batch: &w.batch, inputs, layer: index };
        mixer.forward(&mut context, &mut w.input, &mut w.mixers, &mut w.branch);
        pass.norm_branch(&mut w.branch, mixer_norms.output.as_ref(), &mut w.rows);
        pass.join(&mut w.x, &w.branch);
        let half = std::f32::consts::FRAC_1_SQRT_2;
        w.x.iter_mut().zip(&*w.streams.low_rank).for_each(|(x, other)| *x = (*x + other) * half);

        // Feed-forward layer.
        pass.norm(&w.x, ffn_norms.input.as_ref(), &mut w.input);
        ffn.forward(pass, &w.x, &mut w.input, &mut w.ffn, &mut w.branch)?;
        pass.norm_branch(&mut w.branch, ffn_norms.output.as_ref(), &mut w.rows);
        pass.join(&mut w.x, &w.branch);

        // Correction, and what the layer adds of its own vector to all streams but the first.
        own.correct(pass, &mut w.streams, active, &w.x);
        let Some(per_layer) = per_layer else { return Ok(()) };
        w.x.copy_from_slice(&w.streams.all[active * size..][..size]);
        for row in w.x.chunks_exact_mut(hidden) {
            pass.kernel.multiply(row, &own.correct_scale);
        }
        per_layer.compute(pass, index, &w.x, &mut w.input, &w.per_layer, &mut w.branch, &mut w.rows);
        for stream in w.streams.all.chunks_exact_mut(size).skip(1) {
            pass.join(stream, &w.branch);
        }
        Ok(())
    }

    /// Writes the embeddings of the batch's tokens to the residual stream `w.x`.
    pub(super) fn embed(&self, pass: &Pass<'_>, w: &mut Workspace) {
        let (config, weights) = (&self.config, &self.weights);
        let (hidden, embedding, rows) = (config.hidden, &weights.embedding.parts()[0], &w.batch.rows);
        // An embedding of another width than the stream is projected.
        let projected = weights.projections.as_ref().map(|projections| {
            let columns = embedding.columns();
            w.input.resize(rows.len(), columns);
            for (index, (input, row)) in w.input.values.chunks_mut(columns).zip(rows).enumerate() {
                embedding.decode_row(row.token as usize, input);
                pass.adapters.embed(pass.kernel, index, row.token as usize, input);
            }
            pass.linear(&projections.in_proj, &mut w.input, &mut w.branch);
            projections.in_proj.width()
        });
        let (branch, kernel, adapters) = (&w.branch, pass.kernel, pass.adapters);
        let size = if weights.positions.is_some() || weights.token_types.is_some() { hidden } else { 0 };
        w.x.resize(rows.len() * hidden);
        pass.scope.for_each_chunk_with(&mut w.x, TASK_ROWS * hidden, &mut w.rows, size, |i, chunk, learned| {
            for (r, x) in chunk.chunks_mut(hidden).enumerate() {
                let index = i * TASK_ROWS + r;
                let row = &rows[index];
                match projected {
                    Some(width) => x.copy_from_slice(&branch[index * width..][..hidden]),
                    None => {
                        embedding.decode_row(row.token as usize, x);
                        adapters.embed(kernel, index, row.token as usize, x);
                    }
                }
                if config.embedding_scale != 1.0 {
                    x.iter_mut().for_each(|x| *x *= config.embedding_scale);
                }
                if let Some(types) = &weights.token_types {
                    let kind = usize::from(row.second).min(types.parts()[0].rows() - 1);
                    types.parts()[0].decode_row(kind, learned);
                    kernel.add_scaled(x, learned, 1.0);
                }
                if let Some(positions) = &weights.positions {
                    positions.parts()[0].decode_row(row.position, learned);
                    kernel.add_scaled(x, learned, 1.0);
                }
            }
        });
        pass.norm_stream(&mut w.x, weights.embedding_norm.as_ref(), &mut w.input);
    }

    /// Appends the logits of all rows of the residual stream `w.x` to `logits`.
    pub(super) fn head(&self, pass: &Pass<'_>, w: &mut Workspace, logits: &mut Vec<f32>) {
        self.output_input(pass, w);
        self.project(pass, w, self.weights.output(), logits);
    }

    /// Sets `w.input` to what the output matrix is multiplied by, for all rows of the residual stream `w.x`.
    pub(super) fn output_input(&self, pass: &Pass<'_>, w: &mut Workspace) {
        let (config, weights) = (&self.config, &self.weights);
        pass.norm(&w.x, weights.output_norm.as_ref(), &mut w.input);
        if let Some(projections) = &weights.projections {
            let (out_proj, columns) = (&projections.out_proj, weights.output().columns());
            pass.linear(out_proj, &mut w.input, &mut w.branch);
            w.input.resize(w.x.len() / config.hidden, columns);
            for (input, row) in w.input.values.chunks_mut(columns).zip(w.branch.chunks(out_proj.width())) {
                input.copy_from_slice(&row[..columns]);
            }
        }
    }

    /// Appends the logits of all rows of `w.input`, which are normalized, to `logits`.
    pub(super) fn project(&self, pass: &Pass<'_>, w: &mut Workspace, output: &Linear, logits: &mut Vec<f32>) {
        let (config, weights) = (&self.config, &self.weights);
        pass.linear(output, &mut w.input, &mut w.logits);
        let vocabulary = weights.vocabulary();
        for row in w.logits.chunks(output.width()) {
            let at = logits.len();
            logits.extend_from_slice(&row[..vocabulary]);
            let row = &mut logits[at..];
            if config.logit_scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= config.logit_scale);
            }
            if let Some(cap) = config.logit_cap {
                pass.kernel.soft_cap(row, cap);
            }
        }
    }
}
