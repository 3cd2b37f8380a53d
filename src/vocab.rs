//! SentencePiece vocabularies: text -> token ids by the scores of the pieces.
//!
//! A vocabulary of this kind has no list of merges. The text starts as single characters, and of all neighbours that
//! would join into a piece of the vocabulary those with the highest score are joined first (the leftmost of equals),
//! until nothing can be joined. What is left and is no piece is written as byte tokens. The rule needs the pieces and
//! their scores alone, so a vocabulary of 262,144 pieces is ready as soon as it is hashed; turning it into ranked merges
//! first takes seconds and cannot express ties, where the leftmost pair has to win.
//!
//! [SentencePiece](https://github.com/google/sentencepiece) is the original of the rule.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

/// What the vocabulary says a token is. The numbers are those of GGUF's `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenKind {
    /// 1: a piece of text.
    Normal,
    /// 2: stands for what cannot be written otherwise.
    Unknown,
    /// 3: a mark that is no text: start of a text, end of a turn.
    Control,
    /// 4: text that is always one token, wherever it occurs.
    UserDefined,
    /// 5: a place that was never trained.
    Unused,
    /// 6: one byte, written as `<0x0A>`.
    Byte,
}

impl TokenKind {
    /// The kind with this number; a number that nobody has defined counts as normal text.
    pub fn from_id(id: i64) -> Self {
        match id {
            2 => TokenKind::Unknown,
            3 => TokenKind::Control,
            4 => TokenKind::UserDefined,
            5 => TokenKind::Unused,
            6 => TokenKind::Byte,
            _ => TokenKind::Normal,
        }
    }
}

/// One entry of a vocabulary. Its id is its place in the list.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    /// The text, with U+2581 for a space. None where a file holds bytes that are no UTF-8: no text can match those.
    pub text: Option<&'a str>,
    /// The higher, the earlier it is joined. NaN counts as the lowest.
    pub score: f32,
    /// What the token is.
    pub kind: TokenKind,
}

/// A SentencePiece vocabulary, ready to encode.
///
/// ```
/// use nybble::vocab::{Piece, SentencePiece, TokenKind};
///
/// let pieces = ["a", "b", "ab", "\u{2581}"]
///     .map(|text| Piece { text: Some(text), score: text.len() as f32, kind: TokenKind::Normal });
/// let vocabulary = SentencePiece::new(pieces);
/// assert_eq!(vocabulary.encode("ab a", true), [2, 3, 0]);
/// ```
#[derive(Debug, Clone)]
pub struct SentencePiece {
    /// What joining may make: every piece of text and its score.
    pieces: HashMap<Box<str>, (u32, f32)>,
    /// Bytes of the longest entry of `pieces`.
    longest: usize,
    /// The token of each byte.
    bytes: [Option<u32>; 256],
    unknown: Option<u32>,
    whole: WholeTokens,
    add_space_prefix: bool,
}

impl SentencePiece {
    /// A vocabulary of these pieces, without the space before a text. Of equal texts the first counts.
    pub fn new<'a>(pieces: impl IntoIterator<Item = Piece<'a>>) -> Self {
        let pieces = pieces.into_iter();
        let mut vocabulary = SentencePiece {
            pieces: HashMap::with_capacity(pieces.size_hint().0),
            longest: 0,
            bytes: [None; 256],
            unknown: None,
            whole: WholeTokens::default(),
            add_space_prefix: false,
        };
        for (id, piece) in (0..=u32::MAX).zip(pieces) {
            vocabulary.insert(id, piece);
        }
        vocabulary
    }

    fn insert(&mut self, id: u32, piece: Piece<'_>) {
        let Some(text) = piece.text.filter(|text| !text.is_empty()) else { return };
        match piece.kind {
            TokenKind::Byte => {
                if let Some(byte) = byte_of(text) {
                    self.bytes[usize::from(byte)].get_or_insert(id);
                }
            }
            // Marks are found in the text as a whole or not at all: joining must never make one out of a user's words.
            TokenKind::Control | TokenKind::Unknown => {
                self.whole.insert(text.as_bytes(), WholeToken { id, is_mark: true });
            }
            TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused => {
                if piece.kind == TokenKind::UserDefined {
                    self.whole.insert(text.as_bytes(), WholeToken { id, is_mark: false });
                }
                // Adding zero makes one zero of the two, which `total_cmp` tells apart.
                let score = if piece.score.is_nan() { f32::NEG_INFINITY } else { piece.score + 0.0 };
                self.longest = self.longest.max(text.len());
                self.pieces.entry(text.into()).or_insert((id, score));
            }
        }
    }

    /// Puts a space before a text and before what follows a mark, as the Llama family was trained.
    pub fn with_space_prefix(mut self, add: bool) -> Self {
        self.add_space_prefix = add;
        self
    }

    /// The token for what has neither a piece nor byte tokens. Without one, such characters are left out.
    pub fn with_unknown(mut self, id: Option<u32>) -> Self {
        self.unknown = id;
        self
    }

    /// Marks after which white space is dropped (Phi-3 was trained so).
    pub fn with_space_dropped_after(mut self, ids: &[u32]) -> Self {
        self.whole.drops_space = ids.to_vec();
        self.whole.drops_space.sort_unstable();
        self
    }

    /// The token ids of `text`. With `parse_marks`, marks that are spelled out in it (`<s>`) become their tokens;
    /// without, they are text like any other. User-defined tokens are found either way.
    pub fn encode(&self, text: &str, parse_marks: bool) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        let mut rest = text;
        let mut at_start = true;
        while !rest.is_empty() {
            let (before, found, after) = self.whole.split(rest, parse_marks);
            if !before.is_empty() {
                self.encode_plain(before, at_start, &mut ids);
            }
            if let Some(id) = found {
                ids.push(id);
                at_start = true;
            }
            rest = after;
        }
        ids
    }

    /// Encodes text that holds no whole tokens.
    fn encode_plain(&self, text: &str, at_start: bool, ids: &mut Vec<u32>) {
        const SPACE: &str = "\u{2581}";
        let prefix = if self.add_space_prefix && at_start { SPACE } else { "" };
        let text = [prefix, &text.replace(' ', SPACE)].concat();
        for symbol in self.join(&text) {
            if let Some(&(id, _)) = self.pieces.get(symbol) {
                ids.push(id);
            } else if symbol.bytes().all(|byte| self.bytes[usize::from(byte)].is_some()) {
                ids.extend(symbol.bytes().filter_map(|byte| self.bytes[usize::from(byte)]));
            } else {
                ids.extend(self.unknown);
            }
        }
    }

    /// Cuts `text` into pieces and single characters, by joining neighbours from the highest score down.
    fn join<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> + use<'t> {
        let mut symbols = Symbols::of(text);
        let first: Vec<Candidate> = (0..symbols.all.len()).filter_map(|left| self.candidate(&symbols, left)).collect();
        let mut queue = BinaryHeap::from(first);
        while let Some(best) = queue.pop() {
            // A candidate is stale when its left symbol has been swallowed or either has grown since.
            if symbols.len_with_next(best.left) != Some(best.len) {
                continue;
            }
            symbols.join_with_next(best.left);
            queue.extend(self.candidate(&symbols, best.left));
            if let Some(before) = symbols.before(best.left) {
                queue.extend(self.candidate(&symbols, before));
            }
        }
        symbols.all.into_iter().filter(|symbol| symbol.len > 0).map(move |symbol| &text[symbol.range()])
    }

    /// What joining the symbol `left` with the next would give, if that is a piece.
    fn candidate(&self, symbols: &Symbols<'_>, left: usize) -> Option<Candidate> {
        let len = symbols.len_with_next(left).filter(|&len| len <= self.longest)?;
        let start = symbols.all[left].start;
        let &(_, score) = self.pieces.get(&symbols.text[start..start + len])?;
        Some(Candidate { score, left, len })
    }
}

/// The byte that a byte token (`<0x0A>`) stands for.
fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if is_hex { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Two neighbours that may be joined.
struct Candidate {
    score: f32,
    left: usize,
    /// Bytes of both together, by which a candidate that is out of date is known.
    len: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

/// A stretch of the text; of length 0 once its left neighbour has swallowed it.
#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    len: usize,
    before: usize,
    next: usize,
}

impl Symbol {
    fn range(&self) -> std::ops::Range<usize> {
        self.start..self.start + self.len
    }
}

/// The text as a chain of symbols. `NONE` ends the chain on both sides.
struct Symbols<'t> {
    text: &'t str,
    all: Vec<Symbol>,
}

const NONE: usize = usize::MAX;

impl<'t> Symbols<'t> {
    fn of(text: &'t str) -> Self {
        let mut all: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol { start, len: c.len_utf8(), before: i.wrapping_sub(1), next: i + 1 })
            .collect();
        if let Some(last) = all.last_mut() {
            last.next = NONE;
        }
        Symbols { text, all }
    }

    fn before(&self, i: usize) -> Option<usize> {
        Some(self.all[i].before).filter(|&before| before != NONE)
    }

    fn next(&self, i: usize) -> Option<usize> {
        Some(self.all[i].next).filter(|&next| next != NONE)
    }

    /// Bytes of a symbol and the next together; None if it was swallowed or is the last.
    fn len_with_next(&self, i: usize) -> Option<usize> {
        let len = self.all[i].len;
        if len == 0 { None } else { self.next(i).map(|next| len + self.all[next].len) }
    }

    fn join_with_next(&mut self, i: usize) {
        let Some(next) = self.next(i) else { return };
        let swallowed = std::mem::replace(&mut self.all[next], Symbol { start: 0, len: 0, before: NONE, next: NONE });
        self.all[i].len += swallowed.len;
        self.all[i].next = swallowed.next;
        if let Some(after) = self.next(i) {
            self.all[after].before = i;
        }
    }
}

/// Tokens that are found in a text as they are written: marks, and what a vocabulary calls user-defined.
#[derive(Debug, Clone, Default)]
struct WholeTokens {
    /// A trie: (node, byte) -> node. Node 0 is the root.
    edges: HashMap<(u32, u8), u32>,
    /// What ends at each node.
    ends: HashMap<u32, WholeToken>,
    nodes: u32,
    /// Bytes that a token starts with: nearly all places of a text are passed by one look here.
    starts: Vec<bool>,
    /// Sorted ids of the marks after which white space is dropped.
    drops_space: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
struct WholeToken {
    id: u32,
    is_mark: bool,
}

impl WholeTokens {
    fn insert(&mut self, text: &[u8], token: WholeToken) {
        let Some(&first) = text.first() else { return };
        self.starts.resize(256, false);
        self.starts[usize::from(first)] = true;
        let mut node = 0;
        for &byte in text {
            node = *self.edges.entry((node, byte)).or_insert_with(|| {
                self.nodes += 1;
                self.nodes
            });
        }
        self.ends.entry(node).or_insert(token);
    }

    /// The longest token that `text` starts with, and its length.
    fn longest_at(&self, text: &[u8], parse_marks: bool) -> Option<(u32, usize)> {
        let (mut node, mut found) = (0, None);
        for (i, &byte) in text.iter().enumerate() {
            let Some(&next) = self.edges.get(&(node, byte)) else { break };
            node = next;
            if let Some(token) = self.ends.get(&node).filter(|token| parse_marks || !token.is_mark) {
                found = Some((token.id, i + 1));
            }
        }
        found
    }

    /// Cuts `text` at the first whole token in it, the longest of those that start there: what comes before, the
    /// token, what comes after.
    fn split<'t>(&self, text: &'t str, parse_marks: bool) -> (&'t str, Option<u32>, &'t str) {
        let bytes = text.as_bytes();
        for (at, &byte) in bytes.iter().enumerate() {
            if !self.starts.get(usize::from(byte)).is_some_and(|&starts| starts) {
                continue;
            }
            if let Some((id, len)) = self.longest_at(&bytes[at..], parse_marks) {
                let mut after = &text[at + len..];
                if self.drops_space.binary_search(&id).is_ok() {
                    after = after.trim_start_matches([' ', '\t', '\n', '\u{b}', '\u{c}', '\r']);
                }
                return (&text[..at], Some(id), after);
            }
        }
        (text, None, "")
    }
}
