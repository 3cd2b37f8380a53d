//! Buffers of a workspace, kept from one step to the next.

use std::ops::{Deref, DerefMut};

use crate::error::{Error, Result};
use crate::quant::packed::CacheLine;
use crate::system::aligned_buf::AlignedBuf;
use crate::system::memory;

/// F32 numbers in a cache line.
const LINE: usize = size_of::<CacheLine>() / size_of::<f32>();

/// F32 numbers that start at a cache line, so that no register is loaded from two lines.
///
/// A buffer that grows loses its contents: every step fills its workspaces anew.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    lines: Option<AlignedBuf>,
    len: usize,
}

impl Buffer {
    /// Allocates memory for `len` numbers, so that [`resize`](Buffer::resize) need not. Changes nothing where there is
    /// enough; otherwise the buffer is empty afterwards.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(super) fn reserve(&mut self, len: usize) -> Result<()> {
        if len <= self.capacity() {
            return Ok(());
        }
        let (what, bytes) = ("the buffers of a pass", len.saturating_mul(size_of::<f32>()));
        // The old memory goes first, so that the two are never allocated at the same time.
        (self.lines, self.len) = (None, 0);
        memory::check(what, bytes)?;
        let lines = AlignedBuf::try_zeroed(len.div_ceil(LINE));
        self.lines = Some(lines.ok_or(Error::OutOfMemory { what, bytes, left: None })?);
        Ok(())
    }

    /// Makes the buffer `len` numbers long. Their values are unspecified.
    pub(super) fn resize(&mut self, len: usize) {
        if len > self.capacity() {
            self.lines = Some(AlignedBuf::zeroed(len.div_ceil(LINE)));
        }
        self.len = len;
    }

    /// Makes the buffer a copy of `values`.
    pub(super) fn copy_from(&mut self, values: &[f32]) {
        self.resize(values.len());
        self.copy_from_slice(values);
    }

    /// The numbers that fit without an allocation.
    fn capacity(&self) -> usize {
        self.lines.as_ref().map_or(0, |lines| lines.len() * LINE)
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        self.lines.as_ref().map_or(&[], |lines| &bytemuck::cast_slice(lines)[..self.len])
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        self.lines.as_mut().map_or(&mut [], |lines| &mut bytemuck::cast_slice_mut(lines)[..self.len])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
