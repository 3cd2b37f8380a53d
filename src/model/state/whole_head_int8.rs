//! INT8 pages of session files that earlier versions wrote: a scale per position for a whole head, and no rotation.

use super::cache::{CacheShape, Page};
use crate::error::Result;
use crate::kernels::{Kernel, PAGE};
use crate::quant::packed::PANEL;

/// Bytes of one head of one layer: codes of keys and of values, then an F32 per position for each of them.
fn head_bytes(shape: &CacheShape) -> usize {
    PAGE * (shape.head_dim + shape.width) + 2 * PAGE * size_of::<f32>()
}

/// Bytes of the pages of `tokens` tokens. `None` when the number overflows.
pub(super) fn bytes(shape: &CacheShape, tokens: usize) -> Option<usize> {
    head_bytes(shape).checked_mul(shape.heads())?.checked_mul(tokens.div_ceil(PAGE))
}

/// A page with the keys and values of `old`, the bytes of such a page.
///
/// # Errors
/// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
pub(super) fn convert(kernel: &Kernel, shape: &CacheShape, old: &[u8]) -> Result<Page> {
    let mut page = Page::new(shape)?;
    let (mut key, mut value) = (vec![0.0; shape.head_dim], vec![0.0; shape.head_dim]);
    for (at, head) in old.chunks_exact(head_bytes(shape)).enumerate() {
        let (keys, rest) = head.split_at(PAGE * shape.head_dim);
        let (values, scales) = rest.split_at(PAGE * shape.width);
        let scale = |index: usize| {
            let bytes = scales.as_chunks::<4>().0.get(index).copied().unwrap_or_default();
            f32::from_le_bytes(bytes)
        };
        for slot in 0..PAGE {
            for (d, (key, value)) in key.iter_mut().zip(&mut value).enumerate() {
                let code = keys[(slot / PANEL * shape.head_dim + d) * PANEL + slot % PANEL];
                *key = f32::from(code as i8) * scale(slot);
                *value = f32::from(values[slot * shape.width + d] as i8) * scale(PAGE + slot);
            }
            page.store(kernel, shape, at / shape.kv_heads(), at % shape.kv_heads(), slot, &key, &value);
        }
    }
    Ok(page)
}
