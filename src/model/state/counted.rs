//! A buffer of a session, and the bytes that it counts as.

use std::ops::{Deref, DerefMut};

use bytemuck::Pod;

use crate::error::Result;
use crate::system::aligned_buf::{AlignedBuf, CacheLine};

/// A buffer, and the bytes that limits count for it. The driver of a pipeline counts the buffers of its stages and has no memory
/// for them itself.
#[derive(Debug)]
pub(in crate::model) struct Counted<T = CacheLine> {
    buffer: AlignedBuf<T>,
    bytes: usize,
}

impl<T: Pod> Counted<T> {
    /// `len` zeros that count as `bytes` bytes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) with `what`.
    pub(super) fn try_zeroed(len: usize, bytes: usize, what: &'static str) -> Result<Counted<T>> {
        Ok(Counted { buffer: AlignedBuf::try_zeroed(len, what)?, bytes })
    }

    /// The bytes that it counts as.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl<T> Deref for Counted<T> {
    type Target = AlignedBuf<T>;

    fn deref(&self) -> &AlignedBuf<T> {
        &self.buffer
    }
}

impl<T> DerefMut for Counted<T> {
    fn deref_mut(&mut self) -> &mut AlignedBuf<T> {
        &mut self.buffer
    }
}
