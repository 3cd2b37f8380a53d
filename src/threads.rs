//! stub
use std::ops::Range;
/// view
#[derive(Debug)]
pub struct Columns<'a> {
    data: &'a mut [f32],
    rows: usize,
    stride: usize,
    range: Range<usize>,
}
impl<'a> Columns<'a> {
    /// whole
    pub fn whole(data: &'a mut [f32], rows: usize, stride: usize) -> Self {
        Columns { data, rows, stride, range: 0..stride }
    }
    /// rows
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// row
    pub fn row_mut(&mut self, r: usize) -> &mut [f32] {
        &mut self.data[r * self.stride..][..self.stride][self.range.clone()]
    }
    /// narrow
    pub fn narrow(&mut self, range: Range<usize>) -> Columns<'_> {
        Columns {
            data: self.data,
            rows: self.rows,
            stride: self.stride,
            range: self.range.start + range.start..self.range.start + range.end,
        }
    }
}
