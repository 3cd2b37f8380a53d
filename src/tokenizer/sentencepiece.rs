//! SentencePiece vocabularies: text to token ids by the scores of pieces.
//!
//! Such a vocabulary has no list of merges. The text starts as single characters. Of all adjacent pairs that form a piece of
//! the vocabulary, the one with the highest score is joined (the leftmost of equals), until no pair can be joined. Symbols
//! that are not pieces become byte tokens. Only pieces and scores are needed, so a vocabulary of 262,144 pieces is ready as
//! soon as it is hashed. Conversion to ranked merges takes seconds and cannot express ties, where the leftmost pair wins.
//!
//! The algorithm is that of [SentencePiece](https://github.com/google/sentencepiece).

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

/// The kind of a token. The numbers are those of GGUF's `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenKind {
    /// 1: a piece of text.
    Normal,
    /// 2: the token for characters that cannot be encoded otherwise.
    Unknown,
    /// 3: a special token, such as the start of a document or the end of a turn.
    Control,
    /// 4: text that is always one token.
    UserDefined,
    /// 5: an id that was never trained.
    Unused,
    /// 6: one byte, written as `<0x0A>`.
    Byte,
}

impl TokenKind {
    /// The kind with this number. Undefined numbers are normal text.
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

/// An entry of a vocabulary. Its id is its index in the list.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Piece<'a> {
    /// The text, with U+2581 for a space. `None` for bytes that are not UTF-8, which no text matches.
    pub text: Option<&'a str>,
    /// Pieces with a higher score are joined first. NaN is the lowest score.
    pub score: f32,
    /// The kind of the token.
    pub kind: TokenKind,
}

impl<'a> Piece<'a> {
    /// A piece with this text, score and kind.
    pub fn new(text: impl Into<Option<&'a str>>, score: f32, kind: TokenKind) -> Piece<'a> {
        Piece { text: text.into(), score, kind }
    }
}

/// A SentencePiece vocabulary, ready to encode.
///
/// ```
/// use nybble::tokenizer::sentencepiece::{Piece, SentencePiece, TokenKind};
///
/// let pieces = ["a", "b", "ab", "\u{2581}"]
///     .map(|text| Piece::new(text, text.len() as f32, TokenKind::Normal));
/// let vocabulary = SentencePiece::new(pieces);
/// assert_eq!(vocabulary.encode("ab a", true), [2, 3, 0]);
/// ```
#[derive(Debug, Clone)]
pub struct SentencePiece {
    /// The pieces that joining may form, with id and score.
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
    /// A vocabulary of these pieces, without a space prefix. The first of equal pieces is used.
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
            // Special tokens are only found whole: joining must never form one from a user's words.
            TokenKind::Control | TokenKind::Unknown => {
                self.whole.insert(text.as_bytes(), WholeToken { id, is_special: true });
            }
            TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused => {
                if piece.kind == TokenKind::UserDefined {
                    self.whole.insert(text.as_bytes(), WholeToken { id, is_special: false });
                }
                // Adding zero turns -0 into 0, which `total_cmp` distinguishes.
                let score = if piece.score.is_nan() { f32::NEG_INFINITY } else { piece.score + 0.0 };
                self.longest = self.longest.max(text.len());
                self.pieces.entry(text.into()).or_insert((id, score));
            }
        }
    }

    /// Adds a space at the start of the text and after special tokens, as the Llama family was trained.
    pub fn with_space_prefix(mut self, add: bool) -> Self {
        self.add_space_prefix = add;
        self
    }

    /// Sets the token for characters without a piece or byte tokens. Without it, such characters are left out.
    pub fn with_unknown(mut self, id: Option<u32>) -> Self {
        self.unknown = id;
        self
    }

    /// Sets the special tokens after which white space is dropped, as Phi-3 was trained.
    pub fn with_space_dropped_after(mut self, ids: &[u32]) -> Self {
        self.whole.drops_space = ids.to_vec();
        self.whole.drops_space.sort_unstable();
        self
    }

    /// The token ids of `text`. With `parse_special`, special tokens in the text (`<s>`) become their ids; otherwise they are
    /// plain text. User-defined tokens are always recognized.
    pub fn encode(&self, text: &str, parse_special: bool) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        let mut rest = text;
        let mut at_start = true;
        while !rest.is_empty() {
            let (before, found, after) = self.whole.split(rest, parse_special);
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

    /// Encodes text without special or user-defined tokens.
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

    /// Splits `text` into pieces and single characters by joining adjacent symbols, the highest score first.
    fn join<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> + use<'t> {
        let mut symbols = Symbols::of(text);
        let first: Vec<Candidate> = (0..symbols.all.len()).filter_map(|left| self.candidate(&symbols, left)).collect();
        let mut queue = BinaryHeap::from(first);
        while let Some(best) = queue.pop() {
            // A candidate is stale when its left symbol was joined to another one, or one of the two has grown.
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

    /// The candidate of symbol `left` and the next one, if together they are a piece.
    fn candidate(&self, symbols: &Symbols<'_>, left: usize) -> Option<Candidate> {
        let len = symbols.len_with_next(left).filter(|&len| len <= self.longest)?;
        let start = symbols.all[left].start;
        let &(_, score) = self.pieces.get(&symbols.text[start..start + len])?;
        Some(Candidate { score, left, len })
    }
}

/// The byte of a byte token (`<0x0A>`).
fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if is_hex { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Two adjacent symbols that may be joined.
struct Candidate {
    score: f32,
    left: usize,
    /// Bytes of both symbols, which identify a stale candidate.
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

/// A part of the text. Its length is 0 after it was joined to the symbol before it.
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

/// The text as a linked list of symbols, with `NONE` at both ends.
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

    /// Bytes of a symbol and the next. `None` for the last symbol and one that was joined to another.
    fn len_with_next(&self, i: usize) -> Option<usize> {
        let len = self.all[i].len;
        if len == 0 { None } else { self.next(i).map(|next| len + self.all[next].len) }
    }

    fn join_with_next(&mut self, i: usize) {
        let Some(next) = self.next(i) else { return };
        let joined = std::mem::replace(&mut self.all[next], Symbol { start: 0, len: 0, before: NONE, next: NONE });
        self.all[i].len += joined.len;
        self.all[i].next = joined.next;
        if let Some(after) = self.next(i) {
            self.all[after].before = i;
        }
    }
}

/// Tokens that are found in the text as they are: special and user-defined ones.
#[derive(Debug, Clone, Default)]
struct WholeTokens {
    /// A trie: (node, byte) -> node. Node 0 is the root.
    edges: HashMap<(u32, u8), u32>,
    /// The token that ends at each node.
    ends: HashMap<u32, WholeToken>,
    nodes: u32,
    /// Whether a token starts with each byte, a quick test that rejects most positions.
    starts: Vec<bool>,
    /// Sorted ids of the tokens after which white space is dropped.
    drops_space: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
struct WholeToken {
    id: u32,
    is_special: bool,
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

    /// The longest token at the start of `text`, with its length.
    fn longest_at(&self, text: &[u8], parse_special: bool) -> Option<(u32, usize)> {
        let (mut node, mut found) = (0, None);
        for (i, &byte) in text.iter().enumerate() {
            let Some(&next) = self.edges.get(&(node, byte)) else { break };
            node = next;
            if let Some(token) = self.ends.get(&node).filter(|token| parse_special || !token.is_special) {
                found = Some((token.id, i + 1));
            }
        }
        found
    }

    /// Splits `text` at its first token, the longest of those that start there, into the text before it, the token, and the
    /// text after it.
    fn split<'t>(&self, text: &'t str, parse_special: bool) -> (&'t str, Option<u32>, &'t str) {
        let bytes = text.as_bytes();
        for (at, &byte) in bytes.iter().enumerate() {
            if !self.starts.get(usize::from(byte)).is_some_and(|&starts| starts) {
                continue;
            }
            if let Some((id, len)) = self.longest_at(&bytes[at..], parse_special) {
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
