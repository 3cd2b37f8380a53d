//! From pairs to keys and values of the head's layer, and to draft tokens.

use super::head::Head;
use crate::error::{Error, Result};
use crate::model::adapter::rows::AdapterRows;
use crate::model::batch::{Input, Logits};
use crate::model::forward::Workspace;
use crate::model::mixers::{MixerContext, span_rows};
use crate::model::model::Model;
use crate::model::pass::{Pass, TASK_ROWS};
use crate::model::state::session::Session;
use crate::model::transformer::Transformer;

/// A session whose head drafts the token after `token`.
#[derive(Debug)]
pub(crate) struct HeadDraft<'a> {
    pub(crate) session: &'a mut Session,
    /// The session's next token, for the first draft token; then the latest draft token.
    pub(crate) token: u32,
    /// The number of draft tokens so far.
    pub(crate) round: usize,
}

impl Model {
    /// Lets the head follow a session, so that it can draft tokens of it.
    ///
    /// # Errors
    /// Those of [`Model::head`].
    pub(crate) fn follow(&self, session: &mut Session) -> Result<()> {
        let head = self.head()?;
        session.follow(|cache_type| head.cache_shape(cache_type), self.config().hidden);
        Ok(())
    }

    /// The logits `(tokens - 1, vocabulary)` of the head: row `i` predicts token `i + 2` from the model's state at token `i` and
    /// token `i + 1`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a model without a head; those of [`Model::forward`] and [`Model::load`].
    pub fn mtp_logits(&self, tokens: &[u32], interrupted: &(dyn Fn() -> bool + Sync)) -> Result<Vec<f32>> {
        let (mut session, mut logits) = (self.session(), Vec::new());
        self.follow(&mut session)?;
        for pair in tokens.windows(2) {
            self.forward(&mut [Input::new(&mut session, &pair[..1], Logits::None)], &mut Vec::new(), interrupted)?;
            self.check_token(pair[1])?;
            let draft = HeadDraft { session: &mut session, token: pair[1], round: 0 };
            self.draft(&mut [draft], &mut logits, interrupted)?;
            session.end_drafts(pair[1]);
        }
        Ok(logits)
    }

    /// Computes `tokens` in steps of `piece`, then lets the head draft `count` tokens in a row after `next`. Returns the logits
    /// `(count, vocabulary)` of the draft tokens.
    ///
    /// # Errors
    /// As for [`Model::mtp_logits`].
    #[doc(hidden)]
    pub fn mtp_drafts(&self, tokens: &[u32], piece: usize, next: u32, count: usize) -> Result<Vec<f32>> {
        let (mut session, mut logits) = (self.session(), Vec::new());
        self.follow(&mut session)?;
        for tokens in tokens.chunks(piece) {
            self.forward(&mut [Input::new(&mut session, tokens, Logits::None)], &mut Vec::new(), &|| false)?;
        }
        let mut token = next;
        for round in 0..count {
            let draft = HeadDraft { session: &mut session, token, round };
            self.draft(&mut [draft], &mut logits, &|| false)?;
            let last = &logits[round * self.vocabulary()..];
            let best = (0..last.len()).fold(0, |best, id| if last[id] > last[best] { id } else { best });
            token = best as u32;
        }
        Ok(logits)
    }

    /// Computes a round of drafts: appends a row of logits per session to `logits`, from which the draft tokens are sampled.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] and [`Error::Interrupted`]. The sessions' own tokens are unchanged, also after an error.
    pub(crate) fn draft(
        &self,
        drafts: &mut [HeadDraft<'_>],
        logits: &mut Vec<f32>,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<()> {
        if interrupted() {
            return Err(Error::Interrupted);
        }
        let head = self.head()?;
        self.with_workspace(|w| self.transformer.draft(head, w.head.get_or_insert_default(), drafts, logits))
    }
}

impl Transformer {
    /// Hands the states of a batch, the residual stream `w.x`, to the sessions that their heads follow. Stores their pairs where
    /// there are many.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(in crate::model) fn follow(
        &self,
        head: &Head,
        pass: &Pass<'_>,
        w: &mut Workspace,
        inputs: &mut [Input<'_>],
    ) -> Result<()> {
        if !inputs.iter().any(|input| input.session.head.is_some()) {
            return Ok(());
        }
        let hidden = self.config.hidden;
        let norm = self.weights.output_norm.as_ref().filter(|_| head.input.normalized);
        pass.norm(&w.x, norm, &mut w.input);
        for (row, state) in w.batch.rows.iter().zip(w.input.values.chunks(hidden)) {
            if let Some(own) = &mut inputs[row.input].session.head {
                own.push(row.position, row.token, state);
            }
        }
        let own = w.head.get_or_insert_default();
        own.batch.clear();
        own.states.clear();
        for (i, input) in inputs.iter_mut().enumerate() {
            let Some(state) = input.session.head.as_mut().filter(|state| state.must_store()) else { continue };
            let positions = state.open();
            state.reserve(positions.end)?;
            own.add(i, positions.start, positions.map(|position| state.pair(position, None)), 0);
        }
        if !own.batch.rows.is_empty() {
            own.reserve_layers(&head.config, &head.widths, &self.positions)?;
            self.pairs(head, pass, own);
            self.in_head(head, pass, own, inputs, |context, w| {
                head.layer.mixer.store(context, &mut w.input, &mut w.mixers);
            });
            for row in &own.batch.rows {
                inputs[row.input].session.head.iter_mut().for_each(|head| head.advance(1));
            }
        }
        inputs.iter_mut().filter_map(|input| input.session.head.as_mut()).for_each(|head| head.drop_stored());
        Ok(())
    }

    fn draft(&self, head: &Head, w: &mut Workspace, drafts: &mut [HeadDraft<'_>], logits: &mut Vec<f32>) -> Result<()> {
        let (config, kernel, threads) = (&head.config, self.kernel, self.pool.threads());
        w.batch.clear();
        w.states.clear();
        let mut lengths = Vec::with_capacity(drafts.len());
        for (i, draft) in drafts.iter_mut().enumerate() {
            let len = draft.session.len();
            let Some(state) = &mut draft.session.head else { continue };
            if draft.round == 0 {
                let positions = state.begin_drafts(len);
                lengths.push(positions.len());
                state.reserve(positions.end)?;
                let longest = span_rows(config, threads, positions.len());
                let pairs = positions.clone().map(|position| state.pair(position, Some(draft.token)));
                w.add(i, positions.start, pairs, longest);
            } else {
                lengths.push(1);
                let position = len + draft.round;
                state.reserve(position + 1)?;
                w.add(i, position, [(draft.token, state.output())].into_iter(), 1);
            }
        }
        w.reserve_layers(config, &head.widths, &self.positions)?;
        let mut inputs: Vec<_> = drafts.iter_mut().map(|draft| Input::new(draft.session, &[], Logits::None)).collect();
        self.pool.run(|scope| {
            let pass = &Pass { config, kernel, scope, threads, adapters: AdapterRows::default() };
            self.pairs(head, pass, w);
            self.in_head(head, pass, w, &mut inputs, |context, w| {
                head.layer.mixer.forward(context, &mut w.input, &mut w.mixers, &mut w.branch);
            });
            self.finish(head, pass, w, &lengths, logits)
        })?;
        let outputs = if head.input.normalized { &w.input.values } else { &w.x };
        for ((input, count), output) in inputs.iter_mut().zip(lengths).zip(outputs.chunks(config.hidden)) {
            if let Some(state) = &mut input.session.head {
                state.advance(count);
                state.set_output(output);
            }
        }
        Ok(())
    }

    /// Projects the pairs of the batch, their tokens and `w.states`, to the residual stream `w.x (rows, hidden)` of the head, and
    /// normalizes it for the mixer.
    fn pairs(&self, head: &Head, pass: &Pass<'_>, w: &mut Workspace) {
        let (hidden, kernel, config) = (self.config.hidden, pass.kernel, &head.config);
        let embedding = &head.embedding.as_ref().unwrap_or(&self.weights.embedding).parts()[0];
        let Workspace { batch, states, input, branch, rows: buffers, x, .. } = w;
        let (rows, states) = (&batch.rows, &*states);
        input.resize(rows.len(), 2 * hidden);
        pass.scope.for_each_chunk_with(
            &mut input.values,
            TASK_ROWS * 2 * hidden,
            buffers,
            hidden,
            |i, chunk, buffer| {
                for (r, pair) in chunk.chunks_mut(2 * hidden).enumerate() {
                    let row = i * TASK_ROWS + r;
                    let (first, second) = pair.split_at_mut(hidden);
                    let (token, state) = if head.input.state_first { (second, first) } else { (first, second) };
                    embedding.decode_row(rows[row].token as usize, buffer);
                    if config.embedding_scale != 1.0 {
                        buffer.iter_mut().for_each(|x| *x *= config.embedding_scale);
                    }
                    head.embedding_norm.apply(config, kernel, buffer, token);
                    head.state_norm.apply(config, kernel, &states[row * hidden..][..hidden], state);
                }
            },
        );
        pass.linear(&head.projection, input, branch);
        x.resize(rows.len() * hidden);
        for (x, row) in x.chunks_mut(hidden).zip(branch.chunks(head.projection.width())) {
            x.copy_from_slice(&row[..hidden]);
        }
        pass.norm(x, head.layer.mixer_norms.input.as_ref(), input);
        w.mixers.prepare(&self.positions, &w.batch);
    }

    /// Runs `mixer` in the caches of the sessions' heads.
    fn in_head(
        &self,
        head: &Head,
        pass: &Pass<'_>,
        w: &mut Workspace,
        inputs: &mut [Input<'_>],
        mixer: impl FnOnce(&mut MixerContext<'_, '_>, &mut Workspace),
    ) {
        inputs.iter_mut().for_each(|input| input.session.swap_head());
        let batch = std::mem::take(&mut w.batch);
        let pass = &Pass { config: &head.config, ..*pass };
        let (positions, batch_of) = (&self.positions, &batch);
        mixer(&mut MixerContext { pass, positions, batch: batch_of, inputs, layer: 0 }, w);
        w.batch = batch;
        inputs.iter_mut().for_each(|input| input.session.swap_head());
    }

    /// From the mixer's output `w.branch` to logits: the rest of the layer, for the last of each input's rows, `lengths` each. The
    /// head's outputs are `w.x`, and normalized `w.input`.
    fn finish(
        &self,
        head: &Head,
        pass: &Pass<'_>,
        w: &mut Workspace,
        lengths: &[usize],
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let (hidden, layer) = (self.config.hidden, &head.layer);
        pass.norm_branch(&mut w.branch, layer.mixer_norms.output.as_ref(), &mut w.rows);
        pass.join(&mut w.x, &w.branch);
        let mut end = 0;
        for (i, length) in lengths.iter().enumerate() {
            end += length;
            w.x.copy_within((end - 1) * hidden..end * hidden, i * hidden);
        }
        w.x.resize(lengths.len() * hidden);
        pass.norm_stream(&mut w.x, layer.mixer_norms.stream.as_ref(), &mut w.input);
        pass.norm(&w.x, layer.ffn_norm(&head.config), &mut w.input);
        layer.ffn.forward(pass, &w.x, &mut w.input, &mut w.ffn, &mut w.branch)?;
        pass.norm_branch(&mut w.branch, layer.ffn_norms.output.as_ref(), &mut w.rows);
        pass.join(&mut w.x, &w.branch);
        pass.norm_stream(&mut w.x, layer.ffn_norms.stream.as_ref(), &mut w.input);
        if let Some(scale) = layer.scale {
            w.x.iter_mut().for_each(|x| *x *= scale);
        }
        pass.norm(&w.x, head.norm.as_ref().or(self.weights.output_norm.as_ref()), &mut w.input);
        let output = head.output.as_ref().unwrap_or_else(|| self.weights.output());
        self.project(pass, w, output, logits);
        Ok(())
    }
}
