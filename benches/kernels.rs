//! Measures the kernels of this CPU on one thread: `cargo bench`, or `cargo bench -- 'int4 2048x5632'` for some cases.
//!
//! Decoding multiplies one row per token and is bound by the bytes of the weights, so one row is reported in GB/s. Prompts
//! and batches multiply many rows and are bound by arithmetic, so they are reported in operations: a multiplication and an
//! addition are two, and `Gelem/s` is GOPS. Matrices that fit into a cache are read from it, as with small models. The
//! limits of the memory and the instruction set are printed first.
//!
//! Every product is compared with the scalar kernel before it is timed. `cargo test --benches` only compares, on small
//! matrices.

use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use nybble::kernels::{
    self, Activation, Activations, INT8_GROUP, Int8Queries, Int8ScoreInputs, Int8WeightedValues, Int8Weights,
};
use nybble::kernels::{Kernel, KvSlice, PAGE, ScoreInputs, WeightedValues};
use nybble::quant::packed::{CacheLine, Code, Layout, PANEL, Packed};
use nybble::threads::{Columns, ThreadPool};

/// The layouts of Q4_0, of Q4_0 with half of the weights zero, of Q4_K, IQ4_NL, Q8_0, TQ2_0, Q2_K, Q3_K, Q5_0, Q5_K, Q6_K and F16, and whether each is measured in all
/// shapes. `int8 by 16` is for comparison with `int6`.
const LAYOUTS: [(&str, Layout, bool); 13] = [
    ("int4", Layout { code: Code::Int4, group: 32, min: false }, true),
    ("sparse int4", Layout { code: Code::SparseInt4, group: 32, min: false }, true),
    ("int4+min", Layout { code: Code::Int4, group: 32, min: true }, false),
    ("table4", Layout { code: Code::Table4(IQ4_NL), group: 32, min: false }, false),
    ("int8", Layout { code: Code::Int8, group: 32, min: false }, true),
    ("int8 by 16", Layout { code: Code::Int8, group: 16, min: false }, false),
    ("int2", Layout { code: Code::Int2, group: 256, min: false }, true),
    ("int2+min", Layout { code: Code::Int2, group: 16, min: true }, false),
    ("int3", Layout { code: Code::Int3, group: 16, min: false }, false),
    ("int5", Layout { code: Code::Int5, group: 32, min: false }, false),
    ("int5+min", Layout { code: Code::Int5, group: 32, min: true }, false),
    ("int6", Layout { code: Code::Int6, group: 16, min: false }, false),
    ("f16", Layout::float(Code::F16), false),
];
const IQ4_NL: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Output and input features: feed-forward layers of models with 135 million and 1.1 billion parameters, and the
/// projections of one with 7 billion. The second shape is measured in all layouts.
const SHAPES: [(usize, usize); 3] = [(1536, 576), (5632, 2048), (4096, 4096)];
const EVERY_LAYOUT: (usize, usize) = SHAPES[1];

/// Whether this is `cargo bench` rather than `cargo test`.
fn measured() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

fn scalar() -> &'static Kernel {
    kernels::by_name("scalar").expect("it is always available")
}

/// All kernels, without the scalar one if speed is measured and there are others.
fn compared() -> Vec<&'static Kernel> {
    let mut compared = kernels::available();
    if measured() && compared.len() > 1 {
        compared.pop();
    }
    compared
}

/// Pseudo-random numbers, the same in every run.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 16
}

fn matrix((rows, columns): (usize, usize), layout: Layout) -> Packed {
    if layout.code == Code::SparseInt4 {
        return sparse_matrix((rows, columns), layout);
    }
    let (mut w, mut state) = (Packed::zeroed(rows, columns, layout, 1.0), 1);
    for panel in w.panels_mut() {
        for number in bytemuck::cast_slice_mut::<CacheLine, u16>(panel.codes) {
            let bits = random(&mut state) as u16;
            // F16 numbers get an exponent that keeps them between 1/8 and 1/4.
            *number = if layout.is_integer() { bits } else { bits & 0x83ff | 0x3000 };
        }
        for scale in panel.scales.iter_mut().chain(panel.mins.iter_mut()).flatten() {
            *scale = f16::from_f32((random(&mut state) % 2001) as f32 * 1e-5 - 0.01);
        }
    }
    w
}

/// A matrix of 4-bit codes. Half of them are zero.
fn sparse_matrix(shape: (usize, usize), layout: Layout) -> Packed {
    let (mut w, mut state) = (matrix(shape, Layout { code: Code::Int4, ..layout }), 3);
    for panel in w.panels_mut() {
        for byte in bytemuck::cast_slice_mut::<CacheLine, u8>(panel.codes) {
            // Zeros are half of the nibbles, besides those that are zero by chance.
            let [low, high] =
                [0, 4].map(|shift| if random(&mut state).is_multiple_of(2) { 8 } else { *byte >> shift & 15 });
            *byte = low | high << 4;
        }
    }
    let pool = ThreadPool::new(1).expect("one thread is always available");
    let sparse = pool.run(|scope| w.try_sparse(scope)).expect("there is memory for a small matrix");
    sparse.expect("half of the weights are zero")
}

fn values(n: usize) -> Vec<f32> {
    let mut state = 2;
    (0..n).map(|_| (random(&mut state) % 2001) as f32 * 1e-3 - 1.0).collect()
}

/// Activations for both kinds of product.
struct Input {
    x: Vec<f32>,
    quantized: Activations,
    columns: usize,
}

impl Input {
    fn new(x: &[f32], columns: usize) -> Self {
        let mut quantized = Activations::default();
        quantized.quantize(scalar(), x, columns);
        Input { x: x.to_vec(), quantized, columns }
    }

    fn times(&self, kernel: &Kernel, w: &Packed, panels: std::ops::Range<usize>, out: &mut [f32]) {
        let rows = self.x.len() / self.columns;
        let mut out = Columns::whole(out, rows, out.len() / rows);
        if w.layout().is_integer() {
            kernel.product(w, panels, &self.quantized, &mut out);
        } else {
            kernel.product_float(w, panels, &self.x, self.columns, &mut out);
        }
    }
}

/// Compares some rows and panels of a product with the scalar kernel's. All of them would take minutes.
fn check(w: &Packed, input: &Input, out: &[f32], what: &str) {
    let rows = input.x.len() / input.columns;
    for row in [0, rows / 2, rows - 1] {
        let alone = Input::new(&input.x[row * input.columns..][..input.columns], input.columns);
        for panel in [0, w.panels() / 2, w.panels() - 1] {
            let mut expected = [f32::NAN; PANEL];
            alone.times(scalar(), w, panel..panel + 1, &mut expected);
            let found = &out[row * w.rows() + panel * PANEL..][..PANEL];
            let same = found.iter().zip(&expected).all(|(f, e)| f.to_bits() == e.to_bits());
            assert!(same, "{what}: row {row}, panel {panel}: {found:?}, expected {expected:?}");
        }
    }
}

/// An operation of a kernel on a row.
type Operation<'a> = &'a dyn Fn(&Kernel, &mut Activations, &mut [f32]);

fn settings(group: &mut BenchmarkGroup<'_, WallTime>) {
    group.sample_size(10).warm_up_time(Duration::from_millis(50)).measurement_time(Duration::from_millis(300));
}

fn products(criterion: &mut Criterion) {
    if measured() {
        let pool = ThreadPool::new(1).expect("one thread is always available");
        for kernel in compared() {
            let limits = kernels::limits(&pool, kernel);
            println!("{}: memory {:.1} GB/s, {:.0} GOPS", kernel.name(), limits.bandwidth_gb_s, limits.int8_gops);
        }
    }
    for (name, layout, every_shape) in LAYOUTS {
        for shape in SHAPES {
            if !every_shape && shape != EVERY_LAYOUT {
                continue;
            }
            let mut group = criterion.benchmark_group(format!("{name} {}x{}", shape.1, shape.0));
            settings(&mut group);
            // A test only checks that it runs, for which a few rows and panels suffice.
            let (shape, rows): (_, &[usize]) =
                if measured() { (shape, &[1, 8, 64, 512]) } else { ((shape.0 / 32, shape.1 / 8), &[1, 8, 19]) };
            let w = matrix(shape, layout);
            for &rows in rows {
                let input = Input::new(&values(rows * w.columns()), w.columns());
                let mut out = vec![f32::NAN; rows * w.rows()];
                group.throughput(match rows {
                    1 => Throughput::BytesDecimal(w.bytes() as u64),
                    _ => Throughput::Elements(2 * (rows * w.rows() * w.columns()) as u64),
                });
                for kernel in compared() {
                    let id = BenchmarkId::new(kernel.name(), rows);
                    input.times(kernel, &w, 0..w.panels(), &mut out);
                    check(&w, &input, &out, &format!("{name} {}x{}, {}", w.columns(), w.rows(), kernel.name()));
                    group.bench_function(id, |b| b.iter(|| input.times(kernel, &w, 0..w.panels(), &mut out)));
                }
            }
            group.finish();
        }
    }
}

/// A page of the cache with heads of 64 values. The queries of one token read it as it is stored; those of a prompt read it
/// in F32, into which a task converts it once.
fn attention(criterion: &mut Criterion) {
    const HEAD: usize = 64;
    let wide = values(PAGE * HEAD);
    let half: Vec<f16> = wide.iter().copied().map(f16::from_f32).collect();
    let cases = [
        ("3 queries, f16", 3, KvSlice::F16(&half)),
        ("8 queries, f32", 8, KvSlice::F32(&wide)),
        ("128 queries, f32", 128, KvSlice::F32(&wide)),
    ];
    for (name, queries, page) in cases {
        let (q, ranges) = (values(queries * HEAD), vec![0..PAGE; queries]);
        let mut group = criterion.benchmark_group(format!("attention of {name}"));
        settings(&mut group);
        group.throughput(Throughput::Elements(2 * (queries * HEAD * PAGE) as u64));
        let inputs = ScoreInputs { queries: &q, head_dim: HEAD, keys: page, scale: 0.125 };
        let (mut weights, mut expected) = (vec![f32::NAN; queries * PAGE], vec![0.0; queries * HEAD]);
        scalar().scores(inputs, &mut weights, PAGE);
        let weighted = WeightedValues { weights: &weights, stride: PAGE, ranges: &ranges, values: page, width: HEAD };
        scalar().weighted_sum(weighted, &mut expected);
        for kernel in compared() {
            let (mut scores, mut sums) = (vec![f32::NAN; queries * PAGE], vec![0.0; queries * HEAD]);
            kernel.scores(inputs, &mut scores, PAGE);
            kernel.weighted_sum(weighted, &mut sums);
            assert_eq!((&scores, &sums), (&weights, &expected), "{}", kernel.name());
            let name = kernel.name();
            group.bench_function(BenchmarkId::new(name, "scores"), |b| {
                b.iter(|| kernel.scores(inputs, &mut scores, PAGE));
            });
            group.bench_function(BenchmarkId::new(name, "weighted sum"), |b| {
                b.iter(|| kernel.weighted_sum(weighted, &mut sums));
            });
        }
        group.finish();
    }
}

/// A page of an INT8 cache with heads of 64 values: packing it, and the queries of one token and of a prompt.
fn attention_int8(criterion: &mut Criterion) {
    const HEAD: usize = 64;
    const GROUPS: usize = HEAD / INT8_GROUP;
    let codes: Vec<i8> = values(PAGE * HEAD).iter().map(|x| (x * 127.0) as i8).collect();
    let scales = [0.125; GROUPS * PAGE];
    for queries in [3, 128] {
        let mut group = criterion.benchmark_group(format!("attention of {queries} queries, int8"));
        settings(&mut group);
        group.throughput(Throughput::Elements(2 * (queries * HEAD * PAGE) as u64));
        let (q, raw) = (values(queries * HEAD), values(queries * PAGE).iter().map(|x| x.abs()).collect::<Vec<_>>());
        let compute = |kernel: &Kernel| {
            let mut query_codes = vec![[0; 4]; queries * HEAD / 4];
            let (mut factors, mut sums) = (vec![0.0; queries * GROUPS], vec![0; queries * GROUPS]);
            let of_groups = factors.chunks_mut(GROUPS).zip(sums.chunks_mut(GROUPS));
            for (i, (q, (factors, sums))) in q.chunks(HEAD).zip(of_groups).enumerate() {
                let mut codes = [[0; 4]; HEAD / 4];
                let groups = codes.as_flattened_mut().chunks_mut(INT8_GROUP).zip(factors.iter_mut().zip(sums));
                for (x, (codes, (factor, sum))) in q.chunks(INT8_GROUP).zip(groups) {
                    *factor = kernel.to_int8(x, codes);
                    *sum = codes.iter().map(|code| i32::from(*code)).sum();
                }
                codes.iter().enumerate().for_each(|(d, code)| query_codes[d * queries + i] = *code);
            }
            let (mut keys, mut packed) =
                ([CacheLine([0; 64]); PAGE * HEAD / 64], [CacheLine([0; 64]); HEAD / PANEL * (PAGE / 4 + 1)]);
            kernel.pack_keys(&codes, HEAD, &mut keys);
            kernel.pack_values(&codes, HEAD, &mut packed);
            (query_codes, factors, sums, keys, packed)
        };
        let mut expected = None;
        for kernel in std::iter::once(scalar()).chain(compared()) {
            let (query_codes, factors, sums, mut keys, mut packed) = compute(kernel);
            let own =
                Int8Queries { head_dim: HEAD, codes: &query_codes, stride: queries, scales: &factors, sums: &sums };
            let (mut scores, mut out) = (vec![f32::NAN; queries * PAGE], vec![0.0; queries * HEAD]);
            kernel.scores_int8(Int8ScoreInputs { queries: own, keys: &keys, scales: &scales }, &mut scores, PAGE);
            let (mut weights, mut of_weights) = (vec![0; queries * GROUPS * PAGE], vec![0.0; queries * GROUPS]);
            let seen = vec![0..PAGE; queries];
            let mut quantize = || {
                let (codes, factors) = (&mut weights, &mut of_weights);
                let inputs = Int8Weights { weights: &raw, stride: PAGE, seen: &seen, scales: &scales };
                kernel.quantize_weights(inputs, codes, factors);
            };
            quantize();
            let name = kernel.name();
            let is_timed = expected.is_some();
            if is_timed {
                group.bench_function(BenchmarkId::new(name, "weights to codes"), |b| b.iter(&mut quantize));
            }
            let weighted = Int8WeightedValues { weights: &weights, scales: &of_weights, values: &packed, width: HEAD };
            kernel.weighted_sum_int8(weighted, &mut out);
            let found = (scores.clone(), out.clone());
            assert_eq!(&found, expected.get_or_insert_with(|| found.clone()), "{name}");
            if !is_timed {
                continue;
            }
            let inputs = Int8ScoreInputs { queries: own, keys: &keys, scales: &scales };
            group.bench_function(BenchmarkId::new(name, "scores"), |b| {
                b.iter(|| kernel.scores_int8(inputs, &mut scores, PAGE));
            });
            group.bench_function(BenchmarkId::new(name, "weighted sum"), |b| {
                b.iter(|| kernel.weighted_sum_int8(weighted, &mut out));
            });
            group.bench_function(BenchmarkId::new(name, "packing"), |b| {
                b.iter(|| {
                    kernel.pack_keys(&codes, HEAD, &mut keys);
                    kernel.pack_values(&codes, HEAD, &mut packed);
                });
            });
        }
        group.finish();
    }
}

/// Operations on a row between products.
fn rows(criterion: &mut Criterion) {
    const WIDTH: usize = 1536;
    let (x, weight) = (values(WIDTH), vec![1.0; WIDTH]);
    let mut group = criterion.benchmark_group(format!("a row of {WIDTH} values"));
    settings(&mut group);
    group.throughput(Throughput::Elements(WIDTH as u64));
    let mut run = |name: &str, operation: Operation<'_>| {
        let compute = |kernel: &Kernel| {
            let (mut activations, mut out) = (Activations::default(), x.clone());
            activations.resize(1, WIDTH);
            operation(kernel, &mut activations, &mut out);
            (activations.lines_mut().to_vec(), out)
        };
        let expected = compute(scalar());
        for kernel in compared() {
            assert!(compute(kernel) == expected, "{name}, {}", kernel.name());
            let (mut activations, mut out) = (Activations::default(), x.clone());
            activations.resize(1, WIDTH);
            group.bench_function(BenchmarkId::new(kernel.name(), name), |b| {
                b.iter(|| {
                    out.copy_from_slice(&x);
                    operation(kernel, &mut activations, &mut out);
                });
            });
        }
    };
    run("quantize", &|kernel, activations, out| {
        let blocks = activations.blocks();
        Activations::fill(kernel, activations.lines_mut(), blocks, 1, |_| &*out);
    });
    run("rms_norm", &|kernel, _, out| kernel.rms_norm(&x, &weight, 1e-5, out));
    run("silu gate", &|kernel, _, out| kernel.gate(Activation::Silu, out, &weight));
    run("exp_segment", &|kernel, _, out| _ = kernel.exp_segment(out));
}

criterion_group!(benches, products, attention, attention_int8, rows);
criterion_main!(benches);
