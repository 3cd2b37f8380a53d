//! The bytes that the tokens of a vocabulary stand for.

/// How the spelling of a token stands for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// Each character stands for a byte, by GPT-2's table.
    ByteLevel,
    /// Text in which U+2581 stands for a space, and byte tokens such as `<0x0A>`.
    Pieces,
    /// A word, or after `##` what continues one.
    Words,
}

impl Spelling {
    /// The bytes of the token that is spelled `text`.
    pub(super) fn bytes(self, text: &[u8]) -> Vec<u8> {
        match self {
            // A token with characters outside the table is taken literally.
            Spelling::ByteLevel => byte_level(text).unwrap_or_else(|| text.to_vec()),
            Spelling::Words => match text.strip_prefix(b"##") {
                Some(rest) if !rest.is_empty() => rest.to_vec(),
                _ => [b" ", text].concat(),
            },
            Spelling::Pieces => match byte_of(text) {
                Some(byte) => vec![byte],
                None => with_spaces(text),
            },
        }
    }
}

/// The byte of a byte token (`<0x0A>`).
pub(super) fn byte_of(text: &[u8]) -> Option<u8> {
    let digits = text.strip_prefix(b"<0x")?.strip_suffix(b">")?;
    let is_hex = digits.len() == 2 && digits.iter().all(u8::is_ascii_hexdigit);
    str::from_utf8(digits).ok().filter(|_| is_hex).and_then(|digits| u8::from_str_radix(digits, 16).ok())
}

fn byte_level(text: &[u8]) -> Option<Vec<u8>> {
    str::from_utf8(text).ok()?.chars().map(byte_of_character).collect()
}

/// GPT-2's table: printable characters stand for themselves, and 68 characters from U+0100 for the other bytes.
fn byte_of_character(c: char) -> Option<u8> {
    let code = u32::from(c);
    Some(match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => code as u8,
        0x100..=0x120 => (code - 0x100) as u8,
        0x121..=0x142 => (code - 0x121 + 0x7F) as u8,
        0x143 => 0xAD,
        _ => return None,
    })
}

fn with_spaces(text: &[u8]) -> Vec<u8> {
    const SPACE: &[u8] = "\u{2581}".as_bytes();
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(&first) = rest.first() {
        if let Some(after) = rest.strip_prefix(SPACE) {
            bytes.push(b' ');
            rest = after;
        } else {
            bytes.push(first);
            rest = &rest[1..];
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let mut seen = [false; 256];
        for c in (0..0x200).filter_map(char::from_u32) {
            if let Some(byte) = byte_of_character(c) {
                assert!(!std::mem::replace(&mut seen[usize::from(byte)], true), "{byte:#04x} twice");
            }
        }
        assert_eq!(seen, [true; 256]);
        assert_eq!(Spelling::ByteLevel.bytes("\u{120}a\u{10a}".as_bytes()), b" a\n");
        assert_eq!(Spelling::ByteLevel.bytes("中".as_bytes()), "中".as_bytes(), "not in the table");
    }

    #[test]
    fn pieces_are_text_with_spaces_or_one_byte() {
        assert_eq!(Spelling::Pieces.bytes("\u{2581}a\u{2581}".as_bytes()), b" a ");
        assert_eq!(Spelling::Pieces.bytes(b"<0xe2>"), [0xE2]);
        assert_eq!(Spelling::Pieces.bytes(b"<0x+1>"), b"<0x+1>");
        assert_eq!(Spelling::Pieces.bytes(b"\xff\xe2\x96\x81"), b"\xff ");
        assert_eq!(
            ["##ing", "walk", "##"].map(|text| Spelling::Words.bytes(text.as_bytes())),
            [&b"ing"[..], b" walk", b" ##"]
        );
    }
}
