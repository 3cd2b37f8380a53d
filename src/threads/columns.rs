//! Disjoint mutable parts of a buffer, for items that run at the same time.
#![allow(unsafe_code, reason = "the borrow checker cannot see that columns, or the chunks of two items, are disjoint")]

use std::marker::PhantomData;
use std::ops::Range;

/// The start of a buffer whose elements are lent to several threads, each to one of them at a time.
pub(super) struct Base<'a, T> {
    pointer: *mut T,
    buffer: PhantomData<&'a mut [T]>,
}

// SAFETY: a `Base` gives only `&mut [T]`, which may be sent where `T` may be, and `slice_mut` obliges its caller to ask
// for each element on one thread at a time.
unsafe impl<T: Send> Sync for Base<'_, T> {}

impl<'a, T> Base<'a, T> {
    pub(super) fn new(buffer: &'a mut [T]) -> Self {
        Base { pointer: buffer.as_mut_ptr(), buffer: PhantomData }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    ///
    /// `range` must lie inside the buffer, and no other slice that shares an element with it may be in use.
    #[allow(clippy::mut_from_ref, reason = "the caller promises that no two slices overlap")]
    pub(super) unsafe fn slice_mut(&self, range: Range<usize>) -> &mut [T] {
        // SAFETY: the caller's promise; the pointer was made from a slice that is borrowed for longer than `self`.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(range.start), range.len()) }
    }
}

/// A mutable view of a range of columns of a row-major matrix, over all rows: what one item of a matrix product writes.
///
/// ```
/// use nybble::threads::Columns;
///
/// let mut matrix = [0.0; 2 * 5]; // (rows, stride)
/// let mut all = Columns::whole(&mut matrix, 2, 5);
/// let mut part = all.narrow(1..3);
/// for row in 0..part.rows() {
///     part.row_mut(row).fill(1.0);
/// }
/// assert_eq!(matrix, [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]);
/// ```
pub struct Columns<'a> {
    base: Base<'a, f32>,
    rows: usize,
    stride: usize,
    range: Range<usize>,
}

impl<'a> Columns<'a> {
    /// All columns of `matrix`, `(rows, stride)`.
    ///
    /// # Panics
    ///
    /// If `matrix` does not have `rows * stride` elements.
    pub fn whole(matrix: &'a mut [f32], rows: usize, stride: usize) -> Self {
        assert_eq!(Some(matrix.len()), rows.checked_mul(stride), "a matrix of {rows} rows of {stride} columns");
        Columns { base: Base::new(matrix), rows, stride, range: 0..stride }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The columns in view, as columns of the whole matrix.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// The elements of `row` in the view's columns.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        let start = row * self.stride;
        // SAFETY: row < rows and range.end <= stride, so this lies inside the matrix; `self` is the only view of its
        // columns, and borrowed mutably for as long as the slice lives.
        unsafe { self.base.slice_mut(start + self.range.start..start + self.range.end) }
    }

    /// A view of some of the columns. `range` counts columns of the whole matrix.
    ///
    /// # Panics
    ///
    /// If `range` is not inside `self.range()`.
    pub fn narrow(&mut self, range: Range<usize>) -> Columns<'_> {
        // SAFETY: `self` is borrowed mutably for as long as the narrower view lives.
        unsafe { self.part(range) }
    }

    /// A view of some of the columns, while `self` and other parts of it exist. Panics as `narrow` does.
    ///
    /// # Safety
    ///
    /// Of views that share a column, at most one may be in use at a time.
    pub(super) unsafe fn part(&self, range: Range<usize>) -> Columns<'_> {
        assert!(
            self.range.start <= range.start && range.start <= range.end && range.end <= self.range.end,
            "columns {range:?} of {:?}",
            self.range
        );
        Columns {
            base: Base { pointer: self.base.pointer, buffer: PhantomData },
            rows: self.rows,
            stride: self.stride,
            range,
        }
    }
}

impl std::fmt::Debug for Columns<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Columns").field("rows", &self.rows).field("range", &self.range).finish_non_exhaustive()
    }
}
