//! Recurrent states: what layers without keys and values carry from one position to the next.
//!
//! A state is one buffer with a region per layer: the last inputs of a convolution, and a matrix in panels `(rows, 16)`.
//!
//! A short step leaves the state as it was and records its rows in a log, a few vectors each. The next step first applies the
//! rows that still count, in the same pass in which it reads the state. So the last tokens can be taken back without a
//! copy: rejected draft tokens, or an interrupted step. A long step computes a second buffer, which replaces the
//! state when the step has ended.

use std::sync::Arc;

use super::counted::Counted;
use crate::error::Result;
use crate::model::config::{Config, StateSizes};
use crate::model::pipeline::held::Held;
use crate::quant::packed::PANEL;

/// What a state is called where memory for it is missing.
const WHAT: &str = "the recurrent state";
/// The largest number of tokens of a step that is recorded in the log.
pub(in crate::model) const MAX_LOGGED: usize = 16;

/// The state after some token.
pub(super) type Snapshot = Arc<Counted<f32>>;

/// The region of one layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::model) struct LayerState {
    pub(in crate::model) sizes: StateSizes,
    /// Where it starts in a state.
    at: usize,
    /// The numbers of all layers before it in a row of the log.
    log_at: usize,
}

impl LayerState {
    /// Numbers of the convolution's earlier inputs.
    fn tail(&self) -> usize {
        self.sizes.tail * self.sizes.channels
    }

    /// Numbers in all.
    fn len(&self) -> usize {
        self.tail() + self.sizes.panels * self.sizes.rows * PANEL
    }

    /// Numbers in a row of the log.
    fn log_len(&self) -> usize {
        self.sizes.channels + self.sizes.vectors + self.sizes.panels * PANEL
    }
}

/// The states of a model's layers.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::model) struct StateShape {
    /// `(layers)`: empty regions for layers without a state.
    layers: Vec<LayerState>,
    /// Numbers of a state.
    len: usize,
    /// Numbers of a state that limits count: those of all stages in the driver of a pipeline, which has none itself.
    counted: usize,
    /// Numbers of a row of the log.
    log_len: usize,
}

impl StateShape {
    /// The states of the layers that are held. `None` when no layer of the model has one.
    pub(in crate::model) fn of(config: &Config, held: &Held) -> Option<StateShape> {
        let recurrent = config.recurrent.as_ref()?;
        let mut shape = StateShape::default();
        let mut all = 0;
        for (index, layer) in config.layers.iter().enumerate() {
            let sizes = recurrent.sizes(layer.kind.mixer, config.hidden);
            // A feed-forward layer with a state follows its mixer.
            for sizes in [Some(sizes), recurrent.ffn_sizes(layer.kind.ffn, config.hidden)].into_iter().flatten() {
                let mut own = LayerState { sizes, at: shape.len, log_at: shape.log_len };
                // Every layer starts at a cache line.
                all += own.len().next_multiple_of(PANEL);
                if held.layers.contains(&index) {
                    shape.len += own.len().next_multiple_of(PANEL);
                    shape.log_len += own.log_len();
                } else {
                    own.sizes = StateSizes::default();
                }
                shape.layers.push(own);
            }
        }
        shape.counted = if held.is_nothing() { all } else { shape.len };
        (all > 0).then_some(shape)
    }

    /// Bytes of a state.
    pub(in crate::model) fn bytes(&self) -> usize {
        self.counted * size_of::<f32>()
    }
}

/// Rows of a step that are recorded, layer by layer: for each layer the inputs of the convolution `(rows, channels)`, the
/// vectors `(rows, vectors)` and the numbers of the columns `(panels, rows, 16)`.
#[derive(Debug, Default, Clone)]
struct Log {
    rows: usize,
    values: Vec<f32>,
}

impl Log {
    /// Makes place for `rows` rows.
    fn start(&mut self, shape: &StateShape, rows: usize) {
        self.rows = rows;
        self.values.resize(rows * shape.log_len, 0.0);
    }

    fn layer(&self, layer: &LayerState) -> LogRows<'_> {
        let own = &self.values[layer.log_at * self.rows..][..layer.log_len() * self.rows];
        let (raw, rest) = own.split_at(self.rows * layer.sizes.channels);
        let (vectors, columns) = rest.split_at(self.rows * layer.sizes.vectors);
        LogRows { count: self.rows, rows: self.rows, raw, vectors, columns }
    }
}

/// The rows of one layer in a log.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) struct LogRows<'a> {
    /// Rows that count: the first of them.
    pub(in crate::model) count: usize,
    /// Rows in all.
    pub(in crate::model) rows: usize,
    /// `(rows, channels)`
    pub(in crate::model) raw: &'a [f32],
    /// `(rows, vectors)`
    pub(in crate::model) vectors: &'a [f32],
    /// `(panels, rows, 16)`
    pub(in crate::model) columns: &'a [f32],
}

/// The rows of one layer in the log of the current step, to be written.
#[derive(Debug)]
pub(in crate::model) struct LogRowsMut<'a> {
    /// `(rows, channels)`
    pub(in crate::model) raw: &'a mut [f32],
    /// `(rows, vectors)`
    pub(in crate::model) vectors: &'a mut [f32],
    /// `(panels, rows, 16)`
    pub(in crate::model) columns: &'a mut [f32],
}

/// What a layer reads and writes in a step.
#[derive(Debug)]
pub(in crate::model) struct LayerStep<'a> {
    /// The earlier inputs of the convolution `(tail, channels)`, to be replaced by those after the rows in `pending` and, in
    /// a step that is not recorded, after those of the step.
    pub(in crate::model) tail: &'a mut [f32],
    /// The matrix `(panels, rows, 16)`, likewise.
    pub(in crate::model) matrix: &'a mut [f32],
    /// What both are before, where that is elsewhere.
    pub(in crate::model) source: Option<[&'a [f32]; 2]>,
    /// Rows of the step before, which are to be applied first.
    pub(in crate::model) pending: LogRows<'a>,
    /// Where the rows of this step are recorded. Otherwise they are applied.
    pub(in crate::model) log: Option<LogRowsMut<'a>>,
}

/// The recurrent state of a session.
#[derive(Debug)]
pub(in crate::model) struct Recurrent {
    shape: Arc<StateShape>,
    /// The state after `base_len` tokens. `None` before the first one: zeros.
    base: Option<Snapshot>,
    base_len: usize,
    /// The rows after `base_len`. The first `pending` count.
    log: Log,
    pending: usize,
    /// Layers below this one have applied the pending rows to their part of the base: a step was interrupted.
    applied: usize,
    /// The log of the current step, if it is recorded.
    next_log: Log,
    /// The state that the current step computes, if it is not.
    next: Option<Counted<f32>>,
    /// Whether a batch of the current step has gone through all layers.
    has_begun: bool,
}

impl Recurrent {
    pub(super) fn new(shape: Arc<StateShape>) -> Recurrent {
        Recurrent {
            shape,
            base: None,
            base_len: 0,
            log: Log::default(),
            pending: 0,
            applied: 0,
            next_log: Log::default(),
            next: None,
            has_begun: false,
        }
    }

    /// The same state, which is copied when one of the two continues.
    pub(super) fn fork(&self) -> Recurrent {
        Recurrent {
            shape: self.shape.clone(),
            base: self.base.clone(),
            log: self.log.clone(),
            next_log: Log::default(),
            next: None,
            ..*self
        }
    }

    /// Bytes that it takes, also those that it shares.
    pub(super) fn bytes(&self) -> usize {
        let base = self.base.as_ref().map_or(0, |_| self.shape.bytes());
        base + (self.log.values.len() + self.next_log.values.len()) * size_of::<f32>()
    }

    /// Bytes that a step of `tokens` tokens allocates at most.
    pub(super) fn bytes_for(&self, tokens: usize) -> usize {
        let log = tokens.min(MAX_LOGGED) * self.shape.log_len * size_of::<f32>();
        let state = if tokens > MAX_LOGGED || self.is_shared() || self.base.is_none() { self.shape.bytes() } else { 0 };
        state + log
    }

    fn is_shared(&self) -> bool {
        self.base.as_ref().is_some_and(|base| Arc::strong_count(base) > 1)
    }

    /// Whether the state after `len` tokens is known without a snapshot.
    pub(super) fn reaches(&self, len: usize) -> bool {
        let is_kept = len.checked_sub(self.base_len).is_some_and(|kept| kept <= self.pending);
        is_kept && (self.applied == 0 || len == self.len())
    }

    /// Whether rows are yet to be applied.
    pub(super) fn has_recorded_rows(&self) -> bool {
        self.pending > 0
    }

    /// The tokens that the state is after.
    pub(super) fn len(&self) -> usize {
        self.base_len + self.pending
    }

    /// Prepares for a step of `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub(super) fn reserve(&mut self, tokens: usize) -> Result<()> {
        self.abort();
        if tokens > MAX_LOGGED {
            self.next = Some(Counted::try_zeroed(self.shape.len, self.shape.bytes(), WHAT)?);
            return Ok(());
        }
        self.unshare()?;
        self.next_log.start(&self.shape, tokens);
        Ok(())
    }

    /// Allocates the state, or copies it where it is shared.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub(in crate::model) fn unshare(&mut self) -> Result<()> {
        if let Some(base) = &mut self.base
            && Arc::get_mut(base).is_some()
        {
            return Ok(());
        }
        let mut own = Counted::try_zeroed(self.shape.len, self.shape.bytes(), WHAT)?;
        if let Some(base) = &self.base {
            own.copy_from_slice(base);
        }
        self.base = Some(Arc::new(own));
        Ok(())
    }

    /// Forgets what an unfinished step has computed.
    fn abort(&mut self) {
        (self.next, self.has_begun) = (None, false);
    }

    /// Counts the rows of a batch as computed by all layers.
    pub(in crate::model) fn end_batch(&mut self) {
        self.has_begun = true;
    }

    /// Ends a step that was computed.
    pub(super) fn end_step(&mut self, len: usize) {
        if !self.has_begun {
            return;
        }
        match self.next.take() {
            Some(next) => {
                (self.base, self.base_len, self.pending) = (Some(Arc::new(next)), len, 0);
            }
            None => {
                self.base_len += self.pending;
                std::mem::swap(&mut self.log, &mut self.next_log);
                self.pending = self.log.rows;
            }
        }
        (self.applied, self.has_begun) = (0, false);
    }

    /// Ends the application of all rows that are recorded.
    pub(in crate::model) fn end_settling(&mut self) {
        (self.base_len, self.pending, self.applied) = (self.len(), 0, 0);
    }

    /// Goes back to `len` tokens if the last step is all that came after them. Otherwise returns false, and the state is as
    /// it was.
    pub(super) fn truncate(&mut self, len: usize) -> bool {
        self.abort();
        let is_known = self.reaches(len);
        if is_known {
            self.pending = len - self.base_len;
        }
        is_known
    }

    /// The state after `len` tokens is `snapshot`, or zeros.
    pub(super) fn restore(&mut self, snapshot: Option<Snapshot>, len: usize) {
        self.abort();
        (self.base, self.base_len, self.pending, self.applied) = (snapshot, len, 0, 0);
    }

    /// The state after all tokens, if no rows are pending.
    pub(super) fn snapshot(&self) -> Option<Snapshot> {
        self.base.clone().filter(|_| self.pending == 0)
    }

    /// The sizes of layer `index`.
    pub(in crate::model) fn layer(&self, index: usize) -> &LayerState {
        &self.shape.layers[index]
    }

    /// The input of layer `index`'s convolution `back` positions before the current rows, at least 1 and at most the length of
    /// the tail.
    pub(in crate::model) fn earlier(&self, index: usize, back: usize) -> Option<&[f32]> {
        let layer = &self.shape.layers[index];
        let channels = layer.sizes.channels;
        let of = |state: &[f32], back: usize| layer.at + (layer.sizes.tail - back) * channels..state.len();
        if let Some(next) = self.next.as_deref().filter(|_| self.has_begun) {
            return next.get(of(next, back)).map(|rest| &rest[..channels]);
        }
        let pending = if index < self.applied { 0 } else { self.pending };
        if back <= pending {
            return Some(&self.log.layer(layer).raw[(pending - back) * channels..][..channels]);
        }
        let base = self.base.as_deref()?;
        base.get(of(base, back - pending)).map(|rest| &rest[..channels])
    }

    /// What layer `index` reads and writes in this step. `None` where the layer has no state.
    pub(in crate::model) fn step(&mut self, index: usize) -> Option<LayerStep<'_>> {
        let layer = self.shape.layers[index];
        let region = |state: &Counted<f32>| {
            debug_assert!(layer.at + layer.len() <= state.len());
            layer.at..layer.at + layer.len()
        };
        let is_applied = index < self.applied || self.has_begun;
        let mut pending = self.log.layer(&layer);
        pending.count = if is_applied { 0 } else { self.pending };
        if let Some(next) = &mut self.next {
            let own = region(next);
            let (tail, matrix) = next[own.clone()].split_at_mut(layer.tail());
            let base = self.base.as_deref().filter(|_| !self.has_begun);
            let source = base.map(|base| base[own].split_at(layer.tail()).into());
            return Some(LayerStep { tail, matrix, source, pending, log: None });
        }
        let base = self.base.as_mut().and_then(Arc::get_mut)?;
        let own = region(base);
        let (tail, matrix) = base[own].split_at_mut(layer.tail());
        let rows = self.next_log.rows;
        let log = &mut self.next_log.values[layer.log_at * rows..][..layer.log_len() * rows];
        let (raw, rest) = log.split_at_mut(rows * layer.sizes.channels);
        let (vectors, columns) = rest.split_at_mut(rows * layer.sizes.vectors);
        Some(LayerStep { tail, matrix, source: None, pending, log: Some(LogRowsMut { raw, vectors, columns }) })
    }

    /// Records that layer `index` has applied the pending rows to the base.
    pub(in crate::model) fn end_layer(&mut self, index: usize) {
        if self.next.is_none() {
            self.applied = self.applied.max(index + 1);
        }
    }

    /// The state, to which all rows are applied, as bytes. Empty before the first token.
    pub(super) fn as_bytes(&self) -> &[u8] {
        debug_assert_eq!(self.pending, 0, "rows are to be applied first");
        self.base.as_deref().map_or(&[], |base| bytemuck::cast_slice(base))
    }

    /// Replaces the state by one after `len` tokens that `read` fills.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), and those of `read`.
    pub(super) fn read(&mut self, len: usize, read: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        let mut own = Counted::try_zeroed(self.shape.len, self.shape.bytes(), WHAT)?;
        read(bytemuck::cast_slice_mut(&mut own))?;
        self.restore(Some(Arc::new(own)), len);
        Ok(())
    }
}
