//! Constants and limits of the format, for reading and for writing.

/// The first four bytes of every file.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";
/// The version that is written.
pub(super) const VERSION: u32 = 3;
/// The key that sets the alignment of tensors.
pub(super) const ALIGNMENT_KEY: &str = "general.alignment";
/// The default alignment of tensors, in bytes.
pub(super) const DEFAULT_ALIGNMENT: u32 = 32;
/// The largest alignment that is accepted, in bytes. ggml has no limit, but a huge alignment can only exhaust memory.
pub(super) const MAX_ALIGNMENT: u32 = 64 << 10;
/// The longest key, in bytes.
pub(super) const MAX_KEY: usize = 65_535;
/// The longest string and the longest array, in bytes and elements.
pub(super) const MAX_LENGTH: usize = 1 << 30;
/// The longest name of a tensor, in bytes.
pub(super) const MAX_NAME: usize = 63;
/// The largest number of dimensions of a tensor.
pub(super) const MAX_DIMS: usize = 4;

/// The fault of an invalid `key`; `None` for a valid one.
pub(super) fn key_fault(key: &[u8]) -> Option<&'static str> {
    if key.is_empty() {
        Some("an empty key")
    } else if key.len() > MAX_KEY {
        Some("a key of more than 65535 bytes")
    } else if !key.iter().all(|b| matches!(b, b' '..=b'~')) {
        Some("a key with bytes that are not printable ASCII")
    } else {
        None
    }
}

/// Whether tensors may have this alignment.
pub(super) fn alignment_is_valid(alignment: u32) -> bool {
    alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT
}

/// The fault of an invalid name of a tensor; `None` for a valid one.
pub(super) fn name_fault(name: &str) -> Option<&'static str> {
    if name.len() > MAX_NAME {
        Some("a name of more than 63 bytes")
    } else if name.contains('\0') {
        Some("a name with a NUL byte")
    } else {
        None
    }
}
