//! What attention reads of a page.

use crate::kernels::KvSlice;

/// The keys and values of one head of one layer in a page.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) enum PageHead<'a> {
    /// As floats.
    Floats {
        /// `(PAGE / 16, head_dim, 16)`, so that a register holds one dimension of 16 positions.
        keys: KvSlice<'a>,
        /// `(PAGE, width)`
        values: KvSlice<'a>,
    },
    /// As codes.
    Int8(Int8Page<'a>),
}

/// The keys and values of one head in a page of an INT8 cache.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) struct Int8Page<'a> {
    /// `(PAGE / 16, head_dim, 16)`
    pub(in crate::model) keys: &'a [i8],
    /// `(PAGE, width)`
    pub(in crate::model) values: &'a [i8],
    /// `(groups, PAGE)` in BF16.
    pub(in crate::model) key_scales: &'a [u16],
    /// `(groups, PAGE)` in BF16.
    pub(in crate::model) value_scales: &'a [u16],
}
