//! Tiny Hugging Face checkpoints with 4-bit weights, packed in each supported format.

use half::{bf16, f16};
use nybble::format::Checkpoint as _;
use nybble::quant::block::BlockType;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::hf_folder::{Checkpoint as Folder, Stored, llama, read};

/// Linear layers of the model: name, rows, columns.
pub(crate) const LINEAR: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", 64, 64),
    ("self_attn.k_proj", 32, 64),
    ("self_attn.v_proj", 32, 64),
    ("self_attn.o_proj", 64, 64),
    ("mlp.gate_proj", 96, 64),
    ("mlp.up_proj", 96, 64),
    ("mlp.down_proj", 64, 96),
];

/// Deterministic random numbers.
pub(crate) struct Dice(pub(crate) u32);

impl Dice {
    pub(crate) fn next(&mut self, below: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 16) % below
    }
}

/// Returns a one-layer Llama without its linear layers.
pub(crate) fn frame() -> Folder {
    let mut folder = llama().set("hidden_size", json!(64)).set("intermediate_size", json!(96));
    folder.tensors.clear();
    folder
        .listed("model.", "embed_tokens 5x64, norm 64")
        .listed("", "lm_head 5x64")
        .listed("model.layers.0.", "input_layernorm 64, post_attention_layernorm 64")
}

/// The type and values of scales.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Scales {
    F16,
    /// Powers of two in F16, whose products with zero points are exact in F16.
    Round,
    BF16,
    F32,
}

/// The format of a packed checkpoint.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Recipe {
    pub(crate) group: usize,
    pub(crate) symmetric: bool,
    pub(crate) scales: Scales,
    /// Whether the columns of a group are scattered, as with activation order.
    pub(crate) scattered: bool,
}

pub(crate) const PLAIN: Recipe = Recipe { group: 32, symmetric: false, scales: Scales::F16, scattered: false };

/// An unpacked 4-bit matrix.
pub(crate) struct Matrix {
    rows: usize,
    columns: usize,
    groups: usize,
    /// `(rows, columns)`
    codes: Vec<u32>,
    /// `(rows, groups)`
    zeros: Vec<u32>,
    scales: Vec<f32>,
    kind: Scales,
    /// `(columns)`
    order: Vec<usize>,
}

impl Matrix {
    pub(crate) fn new(recipe: Recipe, rows: usize, columns: usize, dice: &mut Dice) -> Matrix {
        let group = recipe.group.min(columns);
        let groups = columns.div_ceil(group);
        let scale = |dice: &mut Dice| {
            let number = 0.001 + dice.next(1000) as f32 * 1.7e-5;
            match recipe.scales {
                Scales::F16 => f16::from_f32(number).to_f32(),
                Scales::Round => 2f32.powi(-(5 + dice.next(4) as i32)),
                Scales::BF16 => bf16::from_f32(number).to_f32(),
                Scales::F32 => number,
            }
        };
        let order = (0..columns).map(|c| if recipe.scattered { c * 7 % columns } else { c } / group).collect();
        Matrix {
            codes: (0..rows * columns).map(|_| dice.next(16)).collect(),
            zeros: (0..rows * groups).map(|_| if recipe.symmetric { 8 } else { dice.next(16) }).collect(),
            scales: (0..rows * groups).map(|_| scale(dice)).collect(),
            kind: recipe.scales,
            order,
            rows,
            columns,
            groups,
        }
    }

    /// Returns the dequantized values `(rows, columns)`.
    pub(crate) fn values(&self) -> Vec<f32> {
        let value = |row: usize, column: usize| {
            let at = row * self.groups + self.order[column];
            self.scales[at] * (self.codes[row * self.columns + column] as f32 - self.zeros[at] as f32)
        };
        (0..self.rows).flat_map(|row| (0..self.columns).map(move |column| value(row, column))).collect()
    }

    pub(crate) fn code(&self, row: usize, column: usize) -> u32 {
        self.codes[row * self.columns + column]
    }

    pub(crate) fn zero(&self, row: usize, group: usize) -> u32 {
        self.zeros[row * self.groups + group]
    }

    /// Returns the scales as `(groups, rows)` or `(rows, groups)`.
    pub(crate) fn stored_scales(&self, name: String, groups_first: bool) -> Stored {
        let (groups, rows) = (self.groups, self.rows);
        let scales: Vec<f32> = if groups_first {
            (0..groups * rows).map(|i| self.scales[i % rows * groups + i / rows]).collect()
        } else {
            self.scales.clone()
        };
        let (dtype, bytes) = match self.kind {
            Scales::F16 | Scales::Round => {
                (Dtype::F16, scales.iter().flat_map(|s| f16::from_f32(*s).to_le_bytes()).collect())
            }
            Scales::BF16 => (Dtype::BF16, scales.iter().flat_map(|s| bf16::from_f32(*s).to_le_bytes()).collect()),
            Scales::F32 => (Dtype::F32, scales.iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<u8>>()),
        };
        let shape = if groups_first { vec![groups, rows] } else { vec![rows, groups] };
        Stored { name, shape, dtype, bytes }
    }

    pub(crate) fn stored_order(&self, name: String) -> Stored {
        let bytes = self.order.iter().flat_map(|group| (*group as i32).to_le_bytes()).collect();
        Stored { name, shape: vec![self.columns], dtype: Dtype::I32, bytes }
    }

    /// Packs it as AutoGPTQ does.
    pub(crate) fn gptq(&self, name: &str, one_less: bool) -> Vec<Stored> {
        let codes = words([self.columns / 8, self.rows], |at, row, i| self.code(row, 8 * at + i));
        let zeros = words([self.groups, self.rows / 8], |group, at, i| {
            self.zero(8 * at + i, group).wrapping_sub(u32::from(one_less)) & 15
        });
        vec![
            tensor(format!("{name}.qweight"), codes),
            tensor(format!("{name}.qzeros"), zeros),
            self.stored_scales(format!("{name}.scales"), true),
            self.stored_order(format!("{name}.g_idx")),
        ]
    }

    /// Packs it as AutoAWQ does.
    pub(crate) fn awq(&self, name: &str) -> Vec<Stored> {
        const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
        let codes = words([self.columns, self.rows / 8], |column, at, i| self.code(8 * at + ORDER[i], column));
        let zeros = words([self.groups, self.rows / 8], |group, at, i| self.zero(8 * at + ORDER[i], group));
        vec![
            tensor(format!("{name}.qweight"), codes),
            tensor(format!("{name}.qzeros"), zeros),
            self.stored_scales(format!("{name}.scales"), true),
        ]
    }

    /// Packs it as compressed-tensors does.
    pub(crate) fn compressed(&self, name: &str, symmetric: bool) -> Vec<Stored> {
        let codes = words([self.rows, self.columns / 8], |row, at, i| self.code(row, 8 * at + i));
        let zeros = words([self.rows / 8, self.groups], |at, group, i| self.zero(8 * at + i, group));
        let shape = [self.rows as i64, self.columns as i64].iter().flat_map(|size| size.to_le_bytes()).collect();
        let mut all = vec![
            tensor(format!("{name}.weight_packed"), codes),
            self.stored_scales(format!("{name}.weight_scale"), false),
            Stored { name: format!("{name}.weight_shape"), shape: vec![2], dtype: Dtype::I64, bytes: shape },
        ];
        if !symmetric {
            all.push(tensor(format!("{name}.weight_zero_point"), zeros));
        }
        if self.order.iter().enumerate().any(|(column, group)| column / (self.columns / self.groups) != *group) {
            all.push(self.stored_order(format!("{name}.weight_g_idx")));
        }
        all
    }
}

/// Packs eight nibbles per word, the first one lowest.
pub(crate) fn words(shape: [usize; 2], nibble: impl Fn(usize, usize, usize) -> u32) -> ([usize; 2], Vec<u32>) {
    let word = |i: usize| (0..8).fold(0, |word, n| word | nibble(i / shape[1], i % shape[1], n) << (4 * n));
    (shape, (0..shape[0] * shape[1]).map(word).collect())
}

pub(crate) fn tensor(name: String, (shape, words): ([usize; 2], Vec<u32>)) -> Stored {
    let bytes = words.into_iter().flat_map(u32::to_le_bytes).collect();
    Stored { name, shape: shape.to_vec(), dtype: Dtype::I32, bytes }
}

/// Returns a checkpoint packed by `pack`, and the same weights in F32.
pub(crate) fn pair(recipe: Recipe, config: Value, pack: impl Fn(&Matrix, &str) -> Vec<Stored>) -> (Folder, Folder) {
    let (mut packed, mut plain) = (frame().set("quantization_config", config), frame());
    let mut dice = Dice(5);
    for (name, rows, columns) in LINEAR {
        let matrix = Matrix::new(recipe, rows, columns, &mut dice);
        let name = format!("model.layers.0.{name}");
        packed.tensors.extend(pack(&matrix, &name));
        plain.tensors.push(Stored {
            name: format!("{name}.weight"),
            shape: vec![rows, columns],
            dtype: Dtype::F32,
            bytes: matrix.values().into_iter().flat_map(f32::to_le_bytes).collect(),
        });
    }
    (packed, plain)
}

pub(crate) fn gptq_config(group: i64) -> Value {
    json!({"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": false, "sym": false})
}

pub(crate) fn compressed_config(weights: Value) -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": null, "weights": weights}},
    })
}

pub(crate) fn gptq(recipe: Recipe) -> (Folder, Folder) {
    pair(recipe, gptq_config(recipe.group as i64), |matrix, name| matrix.gptq(name, true))
}

/// Asserts that both checkpoints hold the same weights, and that the linear layers of the first have type `expected`.
pub(crate) fn assert_same(packed: &Folder, plain: &Folder, expected: BlockType) {
    let (packed, plain) = (packed.write(), plain.write());
    let open = |folder: &tempfile::TempDir| nybble::model::hf::HfFolder::open(folder.path()).expect("it opens");
    let (packed, plain) = (open(&packed), open(&plain));
    assert!(packed.has_packed_layers() && !plain.has_packed_layers());
    let mut names = plain.names();
    names.sort_unstable();
    let mut found = packed.names();
    found.sort_unstable();
    assert_eq!(found, names);
    for name in names {
        assert_eq!(read(&packed, name), read(&plain, name), "{name}");
        let is_linear = packed.is_quantized(name);
        assert_eq!(is_linear, name.starts_with("blk.") && !name.contains("norm"), "{name}");
        if is_linear {
            assert_eq!(packed.tensor(name).expect("a tensor").rows.block_type(), expected, "{name}");
        }
    }
}
