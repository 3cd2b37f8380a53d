//! Buffers of a workspace, kept from one step to the next.

use std::ops::{Deref, DerefMut};

use crate::error::Result;
use crate::system::aligned_buf::AlignedBuf;

/// The purpose of the memory, in errors.
const PURPOSE: &str = "the buffers of a pass";

/// F32 numbers that start at a cache line, so that no register is loaded from two lines.
///
/// A buffer that grows loses its contents: every step fills its workspaces anew.
#[derive(Debug, Default)]
pub(super) struct Buffer(AlignedBuf<f32>);

impl Buffer {
    /// Allocates memory for `len` numbers, so that [`resize`](Buffer::resize) need not. Changes nothing where there is
    /// enough; otherwise the buffer is empty afterwards.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub(super) fn reserve(&mut self, len: usize) -> Result<()> {
        if len <= self.0.capacity() {
            return Ok(());
        }
        // The old memory goes first, so that the two are never allocated at the same time.
        self.0 = AlignedBuf::default();
        self.0.try_resize(len, PURPOSE)?;
        self.0.try_resize(0, PURPOSE)
    }

    /// Makes the buffer `len` numbers long. Their values are unspecified.
    ///
    /// # Panics
    /// When there is no memory for a buffer that was not [reserved](Buffer::reserve).
    pub(super) fn resize(&mut self, len: usize) {
        self.0.try_resize(len, PURPOSE).unwrap_or_else(|error| panic!("{error}"));
    }

    /// Makes the buffer a copy of `values`.
    pub(super) fn copy_from(&mut self, values: &[f32]) {
        self.resize(values.len());
        self.copy_from_slice(values);
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::system::aligned_buf::CacheLine;

    #[test]
    fn a_buffer_has_the_length_asked_for_and_starts_at_a_cache_line() {
        let mut buffer = Buffer::default();
        assert!(buffer.is_empty());
        for len in [1, 16, 17, 100_000, 3] {
            buffer.resize(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr() as usize % size_of::<CacheLine>(), 0);
        }
        buffer.copy_from(&[1.0, 2.0]);
        assert_eq!(*buffer, [1.0, 2.0]);
    }

    #[test]
    fn a_reservation_that_fails_is_an_error_and_leaves_an_empty_buffer() {
        let mut buffer = Buffer::default();
        buffer.copy_from(&[1.0]);
        assert!(matches!(buffer.reserve(usize::MAX / 4), Err(Error::OutOfMemory { .. })));
        assert!(buffer.is_empty());
        buffer.reserve(10).unwrap();
        buffer.resize(10);
        assert_eq!(buffer.len(), 10);
    }
}
