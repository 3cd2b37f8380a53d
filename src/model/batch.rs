//! The rows of a step: tokens from any number of sessions, a batch at a time.

use super::state::session::Session;

/// Rows that go through the layers together. Longer prompts go in pieces, so that their activations stay in the outer
/// caches.
const MAX_ROWS: usize = 256;

/// The logits that a caller requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Logits {
    /// None: the tokens only fill the cache.
    None,
    /// Those of the last token.
    Last,
    /// Those of every token.
    All,
    /// None, but every token's hidden state after the last norm, a row of `hidden` numbers: the input of the output
    /// matrix.
    Hidden,
}

/// Tokens to add to a session.
#[derive(Debug)]
#[non_exhaustive]
pub struct Input<'a> {
    /// The session; each may occur once per step.
    pub session: &'a mut Session,
    /// Token ids, at least one.
    pub tokens: &'a [u32],
    /// The logits to return.
    pub logits: Logits,
    /// Index of the first token of a second text, which models with token types tell from the first: a document after a
    /// query, for example.
    pub second_text: Option<usize>,
}

impl<'a> Input<'a> {
    /// Adds `tokens` to `session` and returns the logits that `logits` names.
    pub fn new(session: &'a mut Session, tokens: &'a [u32], logits: Logits) -> Input<'a> {
        Input { session, tokens, logits, second_text: None }
    }

    /// The input with a second text from token `index` on.
    #[must_use]
    pub fn with_second_text(self, index: impl Into<Option<usize>>) -> Input<'a> {
        Input { second_text: index.into(), ..self }
    }
}

/// One row of a batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    /// Index of the input that it comes from.
    pub(super) input: usize,
    pub(super) token: u32,
    pub(super) position: usize,
    /// Index of the span that it belongs to.
    pub(super) span: usize,
    /// Whether it belongs to a second text.
    pub(super) second: bool,
    /// Whether its logits, or its hidden state, are requested.
    pub(super) wanted: bool,
}

/// Consecutive rows of one session: what a task of attention computes for one head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub(super) input: usize,
    /// Index of the first row.
    pub(super) row: usize,
    /// Position of the first row.
    pub(super) position: usize,
    pub(super) len: usize,
    /// Positions of the session after this batch.
    pub(super) end: usize,
}

/// The rows that go through the layers together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) rows: Vec<Row>,
    pub(super) spans: Vec<Span>,
    /// `(inputs)`: tokens of each input that were taken so far.
    taken: Vec<usize>,
}

impl Batch {
    /// Prepares for the inputs of a new step, `inputs` of them.
    pub(super) fn start(&mut self, inputs: usize) {
        self.taken.clear();
        self.taken.resize(inputs, 0);
    }

    /// Takes the next rows from the inputs, up to [`MAX_ROWS`], but inputs of at most `whole` rows as a whole: those that fit,
    /// and at least one. Returns false when there are none left. `span_rows` is given the number of rows and returns how
    /// many of them a span may have.
    pub(super) fn gather(&mut self, inputs: &[Input<'_>], whole: usize, span_rows: impl Fn(usize) -> usize) -> bool {
        self.rows.clear();
        self.spans.clear();
        let left = inputs.iter().zip(&self.taken).map(|(input, taken)| input.tokens.len() - taken);
        let longest = span_rows(left.fold(0, usize::saturating_add).min(MAX_ROWS));
        for (i, (input, taken)) in inputs.iter().zip(&mut self.taken).enumerate() {
            let left = input.tokens.len() - *taken;
            let free = MAX_ROWS.saturating_sub(self.rows.len());
            let whole = input.tokens.len() <= whole;
            if whole && left > free && !self.rows.is_empty() {
                // The results are in the order of the inputs, so later ones wait, too.
                break;
            }
            let take = if whole { left } else { left.min(free) };
            // A session counts its tokens as they are computed, so its length is the position of the first one.
            let position = input.session.len();
            let spans = self.spans.len();
            for n in (0..take).step_by(longest) {
                let len = longest.min(take - n);
                let end = position + take;
                self.spans.push(Span { input: i, row: self.rows.len() + n, position: position + n, len, end });
            }
            for n in 0..take {
                let last = *taken + n + 1 == input.tokens.len();
                let wanted = match input.logits {
                    Logits::None => false,
                    Logits::Last => last,
                    Logits::All | Logits::Hidden => true,
                };
                self.rows.push(Row {
                    input: i,
                    token: input.tokens[*taken + n],
                    position: position + n,
                    span: spans + n / longest,
                    second: input.second_text.is_some_and(|second| *taken + n >= second),
                    wanted,
                });
            }
            *taken += take;
        }
        !self.rows.is_empty()
    }

    /// Rows of the longest span.
    pub(super) fn longest_span(&self) -> usize {
        self.spans.iter().map(|span| span.len).max().unwrap_or(0)
    }
}
