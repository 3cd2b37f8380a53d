//! Attention over a page of an INT8 cache. Dot products of codes are exact in any order, so a set may use any instruction.
//!
//! Codes are packed for instructions that multiply four bytes of each lane: a line has, for 16 positions, four numbers of their
//! keys, or for 16 numbers, the values of four positions `i`, `16 + i`, `32 + i` and `48 + i`. In some sets, the first of two bytes
//! that are multiplied is unsigned: 128 is added to keys. In the others it is signed: 128 is taken from weights. Either flips a bit,
//! and the sums begin with what makes up for it.

use super::attention::{PANELS, Tiles, over_tiles};
use super::int8;
use super::vector::{Vector, rows};
use crate::kernels::kv::{INT8_GROUP, Int8ScoreInputs, Int8WeightedValues, Int8Weights, PAGE};
use crate::quant::packed::{CacheLine, PANEL};

/// Bytes that are multiplied together.
const QUAD: usize = 4;
/// The bit of a byte that makes it unsigned or signed.
const SIGN: u8 = 128;
/// Lines of a panel of values: those of its codes, and what sums begin with.
const VALUE_LINES: usize = PAGE / QUAD + 1;
/// Why parts of operands are there.
const WHOLE: &str = "operands are as large as their description says";

#[inline(always)]
pub(in crate::kernels) fn pack_keys<V: Vector>(_: V, keys: &[i8], head_dim: usize, out: &mut [CacheLine]) {
    let (keys, flip): (&[[i8; PANEL]], _) = (keys.as_chunks().0, if V::UNSIGNED { SIGN } else { 0 });
    for (panel, keys) in keys.chunks_exact(head_dim).enumerate() {
        let (whole, rest) = keys.as_chunks::<QUAD>();
        let mut lines = out[panel..].iter_mut().step_by(PANELS);
        for (quad, line) in whole.iter().zip(&mut lines) {
            interleave(quad.each_ref(), flip, line);
        }
        if let Some(line) = lines.next() {
            let padded: [_; QUAD] = std::array::from_fn(|i| rest.get(i).unwrap_or(&[0; PANEL]));
            interleave(padded, flip, line);
        }
    }
}

#[inline(always)]
pub(in crate::kernels) fn pack_values<V: Vector>(_: V, values: &[i8], width: usize, out: &mut [CacheLine]) {
    for (panel, lines) in out.as_chunks_mut::<VALUE_LINES>().0.iter_mut().enumerate() {
        let mut sums = [0i32; PANEL];
        for (i, line) in lines[..PAGE / QUAD].iter_mut().enumerate() {
            let row = |j: usize| values[(j * PANEL + i) * width + panel * PANEL..].first_chunk().expect(WHOLE);
            let rows: [&[i8; PANEL]; QUAD] = std::array::from_fn(row);
            interleave(rows, 0, line);
            if !V::UNSIGNED {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum += rows.iter().map(|row| i32::from(SIGN) * i32::from(row[i].max(-127))).sum::<i32>();
                }
            }
        }
        lines[PAGE / QUAD] = CacheLine(bytemuck::cast(sums));
    }
}

/// Puts the codes of four rows next to each other, lane by lane, each with the bits of `flip` flipped. A code of -128, which only
/// forged files have, counts as -127.
#[inline(always)]
fn interleave(rows: [&[i8; PANEL]; QUAD], flip: u8, line: &mut CacheLine) {
    let lanes: &mut [[u8; QUAD]; PANEL] = bytemuck::cast_mut(&mut line.0);
    for (i, lane) in lanes.iter_mut().enumerate() {
        *lane = std::array::from_fn(|j| rows[j][i].max(-127) as u8 ^ flip);
    }
}

#[inline(always)]
pub(in crate::kernels) fn scores_int8<V: Vector>(v: V, inputs: Int8ScoreInputs<'_>, scores: &mut [f32], stride: usize) {
    let n = inputs.queries.scales.len() / inputs.queries.head_dim.div_ceil(INT8_GROUP).max(1);
    over_tiles(&mut Scores { v, inputs, scores, stride }, n);
}

/// Dot products of queries and the keys of a page.
struct Scores<'a, V> {
    v: V,
    inputs: Int8ScoreInputs<'a>,
    /// `(n, stride)`
    scores: &'a mut [f32],
    stride: usize,
}

impl<V: Vector> Tiles for Scores<'_, V> {
    type Vector = V;

    #[inline(always)]
    fn tile<const Q: usize, const P: usize>(&mut self, first: usize) -> usize {
        let (v, Int8ScoreInputs { queries, keys, scales }) = (self.v, self.inputs);
        let (quads, groups) = (queries.head_dim.div_ceil(QUAD), queries.head_dim.div_ceil(INT8_GROUP));
        let factors: [&[f32]; Q] = rows(&queries.scales[first * groups..], groups, groups);
        let offsets: [&[i32]; Q] = rows(&queries.sums[first * groups..], groups, groups);
        let keys: &[[CacheLine; PANELS]] = &keys.as_chunks().0[..quads];
        for panel in (0..PANELS).step_by(P) {
            for g in 0..groups {
                let scales: &[[f32; PANEL]] = scales[g * PAGE..][..PAGE].as_chunks().0;
                let mut dots = [[v.integers(0); P]; Q];
                if V::UNSIGNED {
                    for q in 0..Q {
                        dots[q] = [v.integers(-i32::from(SIGN) * offsets[q][g]); P];
                    }
                }
                let of_group = g * (INT8_GROUP / QUAD)..((g + 1) * (INT8_GROUP / QUAD)).min(quads);
                let codes = queries.codes[of_group.start * queries.stride + first..].chunks(queries.stride);
                for (keys, codes) in keys[of_group].iter().zip(codes) {
                    let codes: &[[i8; QUAD]; Q] = codes.first_chunk().expect(WHOLE);
                    let keys: &[CacheLine; P] = keys[panel..].first_chunk().expect(WHOLE);
                    let mut loaded = [v.integers(0); P];
                    for p in 0..P {
                        for part in 0..V::PARTS {
                            loaded[p][part] = v.load_bytes(&keys[p], part);
                        }
                    }
                    for q in 0..Q {
                        let query = v.splat_bytes(codes[q]);
                        for p in 0..P {
                            for part in 0..V::PARTS {
                                dots[q][p][part] = v.add_dots(dots[q][p][part], loaded[p][part], query);
                            }
                        }
                    }
                }
                // As for floats, the scores wait in memory between groups.
                for q in 0..Q {
                    let factor = v.splat(factors[q][g]);
                    let scores = &mut self.scores[(first + q) * self.stride..][..PAGE];
                    let scores: &mut [[f32; PANEL]] = scores.as_chunks_mut().0;
                    for p in 0..P {
                        for part in 0..V::PARTS {
                            let dot = v.mul(v.to_floats(dots[q][p][part]), factor);
                            let scale = v.load(&scales[panel + p], part);
                            let score = match g {
                                0 => v.mul(dot, scale),
                                _ => v.mul_add(dot, scale, v.load(&scores[panel + p], part)),
                            };
                            v.store(score, &mut scores[panel + p], part);
                        }
                    }
                }
            }
        }
        Q
    }
}

#[inline(always)]
pub(in crate::kernels) fn quantize_weights<V: Vector>(
    _: V,
    inputs: Int8Weights<'_>,
    codes: &mut [u8],
    factors: &mut [f32],
) {
    let flip = if V::UNSIGNED { 0 } else { SIGN };
    int8::quantize_weights(inputs, codes, factors, flip);
}

#[inline(always)]
pub(in crate::kernels) fn weighted_sum_int8<V: Vector>(v: V, inputs: Int8WeightedValues<'_>, out: &mut [f32]) {
    let mut work = Sums { v, inputs, out };
    let n = inputs.scales.len() / inputs.width.div_ceil(INT8_GROUP).max(1);
    let many = V::CAPACITY >= 32;
    let mut i = 0;
    while i < n {
        i += match n - i {
            12.. if many => work.queries::<12>(i),
            6.. if many => work.queries::<6>(i),
            3.. => work.queries::<3>(i),
            2 => work.queries::<2>(i),
            _ => work.queries::<1>(i),
        };
    }
}

/// Sums of a page's values, weighted per query.
struct Sums<'a, V> {
    v: V,
    inputs: Int8WeightedValues<'a>,
    /// `(n, width)`
    out: &'a mut [f32],
}

impl<V: Vector> Sums<'_, V> {
    /// Adds all values for the `Q` queries from `first` on, and returns `Q`.
    #[inline(always)]
    fn queries<const Q: usize>(&mut self, first: usize) -> usize {
        let panels = self.inputs.width / PANEL;
        for panel in (0..panels).step_by(INT8_GROUP / PANEL) {
            // With few registers, the panels of a group one by one.
            match panels - panel {
                1 => self.panels::<Q, 1>(first, panel, panel),
                _ if V::CAPACITY >= 32 => self.panels::<Q, 2>(first, panel, panel),
                _ => {
                    self.panels::<Q, 1>(first, panel, panel);
                    self.panels::<Q, 1>(first, panel, panel + 1);
                }
            }
        }
        Q
    }

    /// Adds the `P` panels from `panel` on, with the weights of the group that begins at panel `start`.
    #[inline(always)]
    fn panels<const Q: usize, const P: usize>(&mut self, first: usize, start: usize, panel: usize) {
        const { assert!(P * PANEL <= INT8_GROUP) };
        let (v, Int8WeightedValues { weights, scales, values, width }) = (self.v, self.inputs);
        let weights: &[[[i8; QUAD]; PAGE / QUAD]] = bytemuck::cast_slice(weights);
        let at = start * PANEL / INT8_GROUP * (scales.len() / width.div_ceil(INT8_GROUP)) + first;
        let weights: &[_; Q] = weights[at..].first_chunk().expect(WHOLE);
        let values: &[[CacheLine; VALUE_LINES]] = values.as_chunks().0;
        let values: &[_; P] = values[panel..].first_chunk().expect(WHOLE);
        let mut start = [v.integers(0); P];
        if !V::UNSIGNED {
            for p in 0..P {
                for part in 0..V::PARTS {
                    start[p][part] = v.load_bytes(&values[p][PAGE / QUAD], part);
                }
            }
        }
        let mut dots = [start; Q];
        for positions in 0..PAGE / QUAD {
            let mut loaded = [v.integers(0); P];
            for p in 0..P {
                for part in 0..V::PARTS {
                    loaded[p][part] = v.load_bytes(&values[p][positions], part);
                }
            }
            for q in 0..Q {
                let weight = v.splat_bytes(weights[q][positions]);
                for p in 0..P {
                    for part in 0..V::PARTS {
                        dots[q][p][part] = v.add_dots(dots[q][p][part], weight, loaded[p][part]);
                    }
                }
            }
        }
        for q in 0..Q {
            let scale = v.splat(scales[at + q]);
            let out = &mut self.out[(first + q) * width + panel * PANEL..][..P * PANEL];
            let out: &mut [[f32; PANEL]] = out.as_chunks_mut().0;
            for p in 0..P {
                for part in 0..V::PARTS {
                    let sum = v.mul_add(v.to_floats(dots[q][p][part]), scale, v.load(&out[p], part));
                    v.store(sum, &mut out[p], part);
                }
            }
        }
    }
}
