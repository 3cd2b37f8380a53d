//! The wide form of a packed matrix: codes of 4 or 8 bits and groups of at most 128 columns.
//!
//! Fingerprints hash this form, so that a block type may get a smaller layout without changing the fingerprints of its models.

use half::f16;

use super::{BLOCK, Code, LONGEST_RUN, Layout, PANEL, Packed};
use crate::quant::blocks32::{IQ4_VALUES, MXFP4_VALUES};
use crate::system::aligned_buf::CacheLine;

/// The bytes of a line of a row: four codes.
type Word = u32;

/// The same byte in all bytes of a word.
const fn bytes(byte: u8) -> Word {
    0x0101_0101 * byte as Word
}

impl Packed {
    /// The layout of the wide form.
    pub(crate) fn wide_layout(&self) -> Layout {
        let Layout { code, group, min } = self.layout();
        let code = match code {
            Code::Int2 | Code::Int3 | Code::SparseInt4 => Code::Int4,
            Code::Int5 | Code::Int6 => Code::Int8,
            Code::Table4(table) if table != IQ4_VALUES && table != MXFP4_VALUES => Code::Int8,
            other => other,
        };
        Layout { code, group: group.min(LONGEST_RUN), min }
    }

    /// Calls `take` with the length in bytes and with all bytes, in pieces, of the codes, the scales and the minimums of the wide form,
    /// which are laid out as [`lines`](Self::lines).
    pub(crate) fn for_each_wide(&self, mut take: impl FnMut(usize, &mut dyn FnMut(&mut dyn FnMut(&[u8])))) {
        let wide = self.wide_layout();
        let [codes, scales, mins] = self.lines();
        if wide == self.layout() {
            for lines in [codes, scales, mins] {
                let bytes: &[u8] = bytemuck::cast_slice(lines);
                take(bytes.len(), &mut |update| update(bytes));
            }
            return;
        }
        let line = size_of::<CacheLine>();
        let blocks = self.panels() * self.blocks();
        take(blocks * wide.lines_per_block() * line, &mut |update| self.wide_codes(wide, update));
        for numbers in [scales, mins] {
            let groups = (self.blocks() * BLOCK).div_ceil(wide.group);
            let panels = if numbers.is_empty() { 0 } else { self.panels() };
            take(panels * groups.div_ceil(2) * line, &mut |update| {
                let of_panel = self.groups().next_multiple_of(2);
                let numbers: &[[f16; PANEL]] = bytemuck::cast_slice(numbers);
                for panel in numbers.chunks(of_panel.max(1)).take(panels) {
                    for group in 0..groups {
                        update(bytemuck::cast_slice(&panel[group * wide.group / self.layout().group]));
                    }
                    if groups % 2 == 1 {
                        update(&[0; 2 * PANEL]);
                    }
                }
            });
        }
    }

    /// The codes in the layout `wide`.
    fn wide_codes(&self, wide: Layout, update: &mut dyn FnMut(&[u8])) {
        if self.is_sparse() {
            for index in 0..self.panels() {
                self.for_each_int4_block(index, |block| update(bytemuck::cast_slice(block)));
            }
            return;
        }
        let code = self.layout().code;
        let [low, high] = code.planes();
        // What the wide form is higher by.
        let offset = match (code.zero(), self.layout().min) {
            (Some(zero), false) => wide.code.zero().unwrap_or(128) - zero,
            (Some(_), true) if wide.code == Code::Int8 => 128,
            _ => 0,
        };
        let offset = bytes(offset as u8);
        for index in 0..self.panels() {
            let lanes = PANEL.min(self.rows() - index * PANEL);
            for lines in self.panel(index).codes.chunks_exact(low + high) {
                let lines: &[[Word; PANEL]] = bytemuck::cast_slice(lines);
                let (lower, upper) = lines.split_at(low);
                let mut words = [[0; PANEL]; BLOCK / 4];
                for (j, words) in words.iter_mut().enumerate() {
                    for (lane, word) in words.iter_mut().enumerate().take(lanes) {
                        *word = plane(lower, low, j, lane);
                        if high > 0 {
                            *word |= plane(upper, high, j, lane) << low;
                        }
                        *word = match code {
                            Code::Table4(table) => {
                                let value = |code: u8| table[usize::from(code)] as u8 ^ 0x80;
                                Word::from_le_bytes(word.to_le_bytes().map(value))
                            }
                            // No byte overflows into the next one.
                            _ => *word + offset,
                        };
                    }
                }
                if wide.code == Code::Int4 {
                    for pair in words.as_chunks::<2>().0 {
                        let line: [Word; PANEL] = std::array::from_fn(|lane| pair[0][lane] | pair[1][lane] << 4);
                        update(bytemuck::cast_slice(&line));
                    }
                } else {
                    update(bytemuck::cast_slice(words.as_flattened()));
                }
            }
        }
    }
}

/// The bits of codes `4 * j ..` of row `lane` in a plane of `bits` bits.
#[inline(always)]
fn plane(lines: &[[Word; PANEL]], bits: usize, j: usize, lane: usize) -> Word {
    let in_line = 8 / bits;
    lines[j / in_line][lane] >> (bits * (j % in_line)) & bytes(((1 << bits) - 1) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The matrix in the layout `layout` whose integers, scales and minimums are those of all tests.
    fn matrix(layout: Layout, scale_group: usize) -> Packed {
        let (rows, columns) = (37, 11 * BLOCK);
        let mut packed = Packed::zeroed(rows, columns, layout, 1.0);
        let groups = packed.groups();
        for (p, mut panel) in packed.panels_mut().into_iter().enumerate() {
            for lane in 0..PANEL.min(rows - p * PANEL) {
                for block in 0..columns / BLOCK {
                    // -1, 0, 1 or 2, or without the zero point 0 to 3.
                    let number = |i: usize| ((p * 5 + lane * 3 + block * 7 + i * i) % 4) as i8;
                    let zero = if layout.min { 0 } else { layout.code.zero().unwrap_or(0) - 1 };
                    let value = |i| match (layout.code, layout.min) {
                        (Code::Table4(table), _) => {
                            table.iter().position(|value| *value == number(i) - 1).unwrap_or(0) as i8
                        }
                        (Code::Int8, false) => number(i) - 1,
                        _ => number(i) + zero as i8,
                    };
                    panel.set_codes(layout.code, lane, block, &std::array::from_fn(value));
                }
                for group in 0..groups {
                    let of = group * layout.group / scale_group;
                    panel.scales[group][lane] = f16::from_f32((lane + of) as f32 - 7.0);
                    if layout.min {
                        panel.mins[group][lane] = f16::from_f32(lane as f32 - of as f32);
                    }
                }
            }
        }
        packed
    }

    /// Lengths and bytes of the wide form.
    fn wide(packed: &Packed) -> Vec<(usize, Vec<u8>)> {
        let mut parts = vec![];
        packed.for_each_wide(|length, each| {
            let mut all = vec![];
            each(&mut |bytes| all.extend_from_slice(bytes));
            assert_eq!(all.len(), length);
            parts.push((length, all));
        });
        parts
    }

    #[test]
    fn the_wide_form_is_what_the_wide_layout_holds() {
        let table = [1, 2, 0, -1, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9];
        let cases = [
            (Code::Int2, 256, false, Code::Int4, 128),
            (Code::Int2, 128, false, Code::Int4, 128),
            (Code::Int2, 64, false, Code::Int4, 64),
            (Code::Int2, 32, false, Code::Int4, 32),
            (Code::Int2, 16, true, Code::Int4, 16),
            (Code::Int3, 16, false, Code::Int4, 16),
            (Code::Int5, 32, false, Code::Int8, 32),
            (Code::Int5, 32, true, Code::Int8, 32),
            (Code::Int6, 16, false, Code::Int8, 16),
            (Code::Table4(table), 16, false, Code::Int8, 16),
            (Code::Int4, 32, true, Code::Int4, 32),
            (Code::Table4(IQ4_VALUES), 32, false, Code::Table4(IQ4_VALUES), 32),
            (Code::F16, 32, false, Code::F16, 32),
        ];
        for (code, group, min, wide_code, wide_group) in cases {
            let layout = Layout { code, group, min };
            if !layout.is_integer() {
                let packed = Packed::zeroed(3, 40, layout, 1.0);
                assert_eq!((packed.wide_layout(), wide(&packed)[0].0), (layout, packed.bytes()));
                continue;
            }
            let packed = matrix(layout, group);
            let wide_layout = Layout { code: wide_code, group: wide_group, min };
            assert_eq!(packed.wide_layout(), wide_layout);
            let expected = matrix(wide_layout, group);
            let lines = expected.lines().map(|lines| bytemuck::cast_slice::<_, u8>(lines).to_vec());
            let found = wide(&packed);
            assert_eq!(found.len(), 3);
            for ((length, found), expected) in found.iter().zip(&lines) {
                assert_eq!(*length, expected.len(), "{layout:?}");
                assert!(found == expected, "{layout:?}");
            }
        }
    }
}
