//! INT8 pages of session files that earlier versions wrote: a scale per position for a whole head, and no rotation.

use super::cache::{CacheShape, LayerShape, Page};
use crate::error::Result;
use crate::kernels::{Kernel, PAGE};
use crate::quant::packed::PANEL;

/// Bytes of one head of a layer: codes of keys and of values, then an F32 per position for each of them.
fn head_bytes(layer: &LayerShape) -> usize {
    PAGE * (layer.head_dim + layer.width) + 2 * PAGE * size_of::<f32>()
}

/// Bytes of the pages of `tokens` tokens. `None` when the number overflows.
pub(super) fn bytes(shape: &CacheShape, tokens: usize) -> Option<usize> {
    let layers = shape.layers().iter().map(|layer| head_bytes(layer).checked_mul(layer.kv_heads));
    let page = layers.into_iter().try_fold(0usize, |sum, layer| sum.checked_add(layer?))?;
    page.checked_mul(tokens.div_ceil(PAGE))
}

/// A page with the keys and values of `old`, the bytes of such a page.
///
/// # Errors
/// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
pub(super) fn convert(kernel: &Kernel, shape: &CacheShape, mut old: &[u8]) -> Result<Page> {
    let mut page = Page::new(shape)?;
    for layer in shape.layers() {
        let (mut key, mut value) = (vec![0.0; layer.head_dim], vec![0.0; layer.value_dim]);
        for head in 0..layer.kv_heads {
            let Some((own, rest)) = old.split_at_checked(head_bytes(layer)) else { return Ok(page) };
            old = rest;
            let (keys, rest) = own.split_at(PAGE * layer.head_dim);
            let (values, scales) = rest.split_at(PAGE * layer.width);
            let scale = |index: usize| {
                let bytes = scales.as_chunks::<4>().0.get(index).copied().unwrap_or_default();
                f32::from_le_bytes(bytes)
            };
            for slot in 0..PAGE {
                for (d, key) in key.iter_mut().enumerate() {
                    let code = keys[(slot / PANEL * layer.head_dim + d) * PANEL + slot % PANEL];
                    *key = f32::from(code as i8) * scale(slot);
                }
                for (d, value) in value.iter_mut().enumerate() {
                    *value = f32::from(values[slot * layer.width + d] as i8) * scale(PAGE + slot);
                }
                page.layer_mut(layer).store(kernel, head, slot, &key, &value);
            }
        }
    }
    Ok(page)
}
