//! Every fault in a model's keys and tensors is a clear error.

use std::io::{Seek, SeekFrom, Write as _};
use std::path::Path;

use crate::tiny_model::{ODD, Shape, metadata, tensors, write};
use half::{bf16, f16};
use nybble::format::gguf::{Gguf, Metadata, NewTensor, Value, Writer};
use nybble::model::{CacheType, Input, LoadOptions, Logits, Model};
use nybble::quant::block::BlockType;
use nybble::{Error, Place};

/// A shape for types with blocks of 256.
const WIDE: Shape = Shape { hidden: 256, heads: 8, kv_heads: 2, head_dim: 32, ffn: 256, layers: 1, ..ODD };

type Tensors = Vec<(String, Vec<u64>)>;

/// Loads a model after `change` has changed its keys and tensors.
fn load(change: impl FnOnce(&mut Metadata, &mut Tensors)) -> nybble::Result<Model> {
    load_with(change, &LoadOptions::default().with_threads(1))
}

fn load_with(change: impl FnOnce(&mut Metadata, &mut Tensors), options: &LoadOptions) -> nybble::Result<Model> {
    let folder = tempfile::tempdir().unwrap();
    let (mut metadata, mut tensors) = (metadata(&ODD), tensors(&ODD));
    change(&mut metadata, &mut tensors);
    let path = write(&folder.path().join("model.gguf"), &metadata, &tensors, BlockType::F32);
    Model::load(path, options)
}

/// Asserts that this value of `key` is refused, with the key and what was found.
fn assert_refused(key: &str, value: impl Into<Value>, found: &str, expected: &str) {
    let error = load(|metadata, _| {
        metadata.set(key, value);
    })
    .unwrap_err();
    let text = error.to_string();
    match &error {
        Error::Malformed { place, .. } | Error::Unsupported { place, .. } => {
            assert_eq!(*place, Place::Key(key.to_owned()), "{text}");
        }
        _ => panic!("{text}"),
    }
    assert!(text.contains("model.gguf") && text.contains(found) && text.contains(expected), "{text}");
}

#[test]
fn the_unchanged_model_loads() {
    let model = load(|_, _| ()).unwrap();
    assert_eq!((model.vocabulary(), model.context()), (101, 700));
}

#[test]
fn an_unknown_family_is_refused_with_the_known_ones() {
    assert_refused("general.architecture", "perceptron", "\"perceptron\"", "llama");
}

#[test]
fn a_missing_key_is_named() {
    let error = load(|metadata, _| {
        let kept: Vec<_> = metadata.iter().map(|(key, value)| (key.to_owned(), value.clone())).collect();
        *metadata = Metadata::new();
        for (key, value) in kept.into_iter().filter(|(key, _)| key != "llama.block_count") {
            metadata.set(key, value);
        }
    })
    .unwrap_err();
    assert!(matches!(&error, Error::Missing { place: Place::Key(key), .. } if key == "llama.block_count"), "{error}");
}

#[test]
fn counts_out_of_range_are_refused() {
    assert_refused("llama.block_count", 0u32, "found 0", "1 to");
    assert_refused("llama.block_count", 1u32 << 31, "2147483648", "at most 1024");
    assert_refused("llama.embedding_length", 0u32, "found 0", "1 to");
    assert_refused("llama.attention.head_count", 0u32, "found 0", "1 to");
    assert_refused("llama.attention.head_count_kv", 0u32, "found 0", "1 to");
    assert_refused("llama.attention.head_count_kv", 4u32, "found 4", "a divisor of the 6 heads");
    assert_refused("llama.attention.head_count_kv", 7u32, "found 7", "a divisor of the 6 heads");
    assert_refused("llama.attention.key_length", 1u32 << 20, "1048576", "at most 65536");
    assert_refused("llama.attention.value_length", 1u32 << 17, "131072", "at most 65536");
    assert_refused("llama.context_length", 0u32, "found 0", "1 to");
    assert_refused("llama.context_length", u32::MAX, "found 4294967295", "1 to 2147483648");
    assert_refused("llama.context_length", "long", "string", "an integer");
    assert_refused("llama.expert_count", -1i32, "i32", "an integer");
}

#[test]
fn using_more_experts_than_there_are_is_refused() {
    let error = load(|metadata, _| {
        metadata.set("llama.expert_count", 4u32).set("llama.expert_used_count", 5u32);
    })
    .unwrap_err();
    let expected = "key \"llama.expert_used_count\": found 5, expected at most the 4 experts";
    assert!(error.to_string().ends_with(expected), "{error}");
}

#[test]
fn a_norm_in_blocks_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let infos = tensors(&ODD).into_iter().map(|(name, dims)| {
        let block_type = if name == "output_norm.weight" { BlockType::Q8_0 } else { BlockType::F32 };
        NewTensor::new(name, block_type, dims)
    });
    let mut writer = Writer::create(&path, &metadata(&ODD), infos).unwrap();
    for (name, dims) in tensors(&ODD) {
        writer.write_values(&name, &vec![0.5; dims.iter().product::<u64>() as usize]).unwrap();
    }
    writer.finish().unwrap();
    let error = Model::load(&path, &LoadOptions::default()).unwrap_err();
    let expected = "tensor \"output_norm.weight\": found Q8_0, expected F32, F16 or BF16";
    assert!(error.to_string().ends_with(expected), "{error}");
}

#[test]
fn impossible_rotations_are_refused() {
    assert_refused("llama.rope.dimension_count", 21u32, "found 21", "an even number up to 22");
    assert_refused("llama.rope.dimension_count", 24u32, "found 24", "an even number up to 22");
    assert_refused("llama.rope.dimension_count", 1u32 << 31, "found 2147483648", "an even number up to 22");
    assert_refused("llama.rope.freq_base", f32::NAN, "NaN", "a positive number");
    assert_refused("llama.rope.freq_base", -1.0f32, "-1", "a positive number");
    assert_refused("llama.rope.scaling.type", "spiral", "\"spiral\"", "yarn");
    assert_refused("llama.rope.scaling.factor", f32::INFINITY, "inf", "a positive number");
}

#[test]
fn a_rope_base_of_zero_means_the_default() {
    let with = |base: f32| {
        let model = load(|metadata, _| {
            metadata.set("llama.rope.freq_base", base);
        })
        .unwrap();
        let (mut session, mut logits) = (model.session(), Vec::new());
        let input = Input::new(&mut session, &[1, 2, 3], Logits::Last);
        model.forward(&mut [input], &mut logits, &|| false).unwrap();
        logits
    };
    assert_eq!(with(0.0), with(10_000.0));
    assert_ne!(with(0.0), with(5_000.0));
}

#[test]
fn an_epsilon_that_is_not_positive_is_refused() {
    let key = "llama.attention.layer_norm_rms_epsilon";
    assert_refused(key, f32::NAN, "NaN", "a positive number");
    assert_refused(key, -1e-5f32, "-0.00001", "a positive number");
    assert_refused(key, "small", "string", "a float");
}

#[test]
fn a_per_layer_list_of_the_wrong_length_is_refused() {
    for (values, found) in [(vec![], "0 values"), (vec![6u32], "1 values"), (vec![6; 3], "3 values")] {
        assert_refused("llama.attention.head_count", values, found, "2, one per layer");
    }
}

#[test]
fn head_counts_of_layers_must_fit_each_layer_and_the_tensors() {
    let error = load(|metadata, _| {
        metadata.set("llama.attention.head_count", vec![6u32, 5]);
    })
    .unwrap_err();
    assert!(error.to_string().contains("found 3, expected a divisor of the 5 heads"), "{error}");
    assert_refused("llama.attention.head_count", vec![6u32, 6, 6], "3 values", "2, one per layer");
    assert_refused("llama.attention.head_count", vec![6u32, 0], "found 0", "1 to");
    let error = load(|metadata, _| {
        metadata.set("llama.attention.head_count", vec![6u32, 3]);
    })
    .unwrap_err();
    assert!(error.to_string().contains("blk.1.attn_q.weight"), "{error}");
}

#[test]
fn a_missing_tensor_is_named() {
    for name in ["token_embd.weight", "blk.1.attn_k.weight", "blk.0.ffn_norm.weight", "output_norm.weight"] {
        let error = load(|_, tensors| tensors.retain(|(tensor, _)| tensor != name)).unwrap_err();
        assert!(matches!(&error, Error::Missing { place: Place::Tensor(found), .. } if found == name), "{error}");
    }
}

#[test]
fn a_tensor_of_the_wrong_shape_is_refused_with_both_shapes() {
    for (name, wrong, expected) in [
        ("blk.1.attn_k.weight", vec![96, 65], "[96, 66]"),
        ("blk.0.attn_output.weight", vec![131, 96], "[132, 96]"),
        ("blk.0.attn_norm.weight", vec![95], "[96]"),
        ("output.weight", vec![96, 100], "[96, 101]"),
        ("blk.0.ffn_down.weight", vec![160, 95], "[160, 96]"),
        ("token_embd.weight", vec![95, 101], "[96, 101]"),
    ] {
        let error = load(|_, tensors| {
            for (tensor, dims) in tensors.iter_mut().filter(|(tensor, _)| tensor == name) {
                assert_ne!(*dims, wrong, "{tensor}");
                dims.clone_from(&wrong);
            }
        })
        .unwrap_err();
        let text = error.to_string();
        let at = Place::Tensor(name.to_owned());
        assert!(matches!(&error, Error::Malformed { place, .. } if *place == at), "{text}");
        assert!(text.contains(&format!("{wrong:?}")) && text.contains(expected), "{text}");
    }
}

/// Writes a model whose matrices have `block_type`, overwrites bytes of one row of a tensor, and loads it.
fn load_damaged(block_type: BlockType, name: &str, row: u64, at: u64, bytes: &[u8]) -> nybble::Result<Model> {
    let folder = tempfile::tempdir().unwrap();
    let shape = if block_type.block_len() == 256 { WIDE } else { ODD };
    let path = write(&folder.path().join("model.gguf"), &metadata(&shape), &tensors(&shape), block_type);
    let file = Gguf::open_unmapped(&path).unwrap();
    let tensor = file.tensor(name).unwrap();
    // The bytes of the embedding occur only once in the file, and show where the data begin.
    let (whole, embedding) = (std::fs::read(&path).unwrap(), file.tensor("token_embd.weight").unwrap());
    let data = file.data(embedding);
    let found = whole.windows(data.len()).position(|some| some == data).unwrap() as u64;
    let start = found - embedding.offset() + tensor.offset();
    let row_bytes = (tensor.nbytes() / tensor.rows()) as u64;
    let mut damaged = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    damaged.seek(SeekFrom::Start(start + row * row_bytes + at)).unwrap();
    damaged.write_all(bytes).unwrap();
    Model::load(path, &LoadOptions::default().with_threads(2))
}

#[test]
fn weights_that_are_nan_or_infinite_are_refused_with_tensor_and_row() {
    let halves = [f16::NAN, f16::INFINITY, f16::NEG_INFINITY].map(|x| x.to_le_bytes().to_vec());
    let brains = [bf16::NAN, bf16::INFINITY].map(|x| x.to_le_bytes().to_vec());
    let singles = [f32::NAN, f32::INFINITY].map(|x| x.to_le_bytes().to_vec());
    // Offsets in a row of numbers that must be finite: scales and minimums.
    type Case<'a> = (BlockType, &'a [u64], &'a [Vec<u8>]);
    let places: [Case<'_>; 16] = [
        (BlockType::F32, &[0, 4 * 95], &singles),
        (BlockType::F16, &[0, 2 * 95], &halves),
        (BlockType::BF16, &[0, 2 * 95], &brains),
        (BlockType::Q4_0, &[0, 2 * 18], &halves),
        (BlockType::Q4_1, &[0, 2, 2 * 20 + 2], &halves),
        (BlockType::Q5_0, &[0, 22], &halves),
        (BlockType::Q5_1, &[0, 2], &halves),
        (BlockType::Q8_0, &[0, 2 * 34], &halves),
        (BlockType::Q2_K, &[80, 82], &halves),
        (BlockType::Q3_K, &[108], &halves),
        (BlockType::Q4_K, &[0, 2], &halves),
        (BlockType::Q5_K, &[0, 2], &halves),
        (BlockType::Q6_K, &[208], &halves),
        (BlockType::IQ4_NL, &[0, 18], &halves),
        (BlockType::IQ4_XS, &[0], &halves),
        (BlockType::TQ2_0, &[64], &halves),
    ];
    for (block_type, places, values) in places {
        // Packing reorders the rows of queries. The error has the row of the file.
        for (name, row) in [("blk.0.attn_q.weight", 5), ("token_embd.weight", 100), ("blk.0.ffn_down.weight", 0)] {
            for (at, value) in places.iter().flat_map(|at| values.iter().map(move |value| (*at, value))) {
                let error = load_damaged(block_type, name, row, at, value).unwrap_err();
                let text = error.to_string();
                let place = Place::Tensor(name.to_owned());
                assert!(matches!(&error, Error::Malformed { place: at, .. } if *at == place), "{text}");
                let expected = format!("found NaN or an infinity in row {row}, expected finite numbers");
                assert!(text.contains("model.gguf") && text.ends_with(&expected), "{} {text}", block_type.name());
            }
        }
    }
}

#[test]
fn the_largest_finite_scales_load() {
    for block_type in [BlockType::Q4_0, BlockType::Q6_K, BlockType::F16] {
        let at = if block_type == BlockType::Q6_K { 208 } else { 0 };
        assert!(load_damaged(block_type, "blk.0.attn_q.weight", 5, at, &f16::MAX.to_le_bytes()).is_ok());
    }
    // An exponent of 255 is NaN by the standard.
    assert!(load_damaged(BlockType::MXFP4, "blk.0.attn_q.weight", 5, 0, &[200]).is_ok());
    let error = load_damaged(BlockType::MXFP4, "blk.0.attn_q.weight", 5, 0, &[255]).unwrap_err();
    assert!(error.to_string().ends_with("found NaN or an infinity in row 5, expected finite numbers"), "{error}");
}

#[test]
fn a_norm_that_is_nan_or_infinite_is_refused_with_its_index() {
    for (value, found) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let error = load_damaged(BlockType::Q4_0, "output_norm.weight", 0, 4 * 7, &value.to_le_bytes()).unwrap_err();
        let expected = format!("tensor \"output_norm.weight\": found {found} at index 7, expected finite numbers");
        assert!(error.to_string().ends_with(&expected), "{error}");
    }
}

#[test]
fn an_unmapped_file_may_be_cut_while_it_loads() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder.path().join("model.gguf"), &metadata(&ODD), &tensors(&ODD), BlockType::Q4_0);
    let options = LoadOptions::default().with_threads(1);
    let mapped = Model::load(&path, &options).unwrap();
    // The first report comes when the file is open and nothing is packed. With a mapped file this would end the process.
    let cut = |done: usize, _: usize| {
        if done == 0 {
            std::fs::OpenOptions::new().write(true).truncate(true).open(&path).unwrap();
        }
        Ok(())
    };
    let read = Model::load_with(&path, &options.with_mmap(false), Some(&cut)).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
    assert_eq!(read.fingerprint(), mapped.fingerprint());
}

#[test]
fn a_huge_context_allocates_nothing_until_it_is_used() {
    for context in [i32::MAX as u32, 1 << 31] {
        let model = load(|metadata, _| {
            metadata.set("llama.context_length", context);
        })
        .unwrap();
        let mut session = model.session();
        assert_eq!((session.context(), session.bytes()), (context as usize, 0));
        let input = Input::new(&mut session, &[1], Logits::None);
        model.forward(&mut [input], &mut Vec::new(), &|| false).unwrap();
        assert!(session.bytes() < 1 << 20, "{} bytes", session.bytes());
    }
}

#[test]
fn a_context_longer_than_that_of_the_model_is_refused() {
    for context in [0, 701] {
        let options = LoadOptions::default().with_context(context).with_threads(1);
        let error = load_with(|_, _| (), &options).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { name: "context", .. }), "{error}");
    }
}

#[test]
fn tokens_beyond_the_context_are_refused_without_effect() {
    let options = LoadOptions::default().with_context(70).with_threads(1);
    let model = load_with(|_, _| (), &options).unwrap();
    let mut session = model.session();
    let mut feed = |count| {
        let tokens = vec![1; count];
        let input = Input::new(&mut session, &tokens, Logits::None);
        let result = model.forward(&mut [input], &mut Vec::new(), &|| false);
        (result, session.len())
    };
    assert!(feed(60).0.is_ok());
    let (result, len) = feed(11);
    assert!(matches!(result, Err(Error::ContextFull { used: 60, requested: 11, context: 70 })));
    assert_eq!(len, 60);
    assert!(feed(10).0.is_ok());
}

#[test]
fn unknown_tokens_and_foreign_sessions_are_refused() {
    let (model, other) = (load(|_, _| ()).unwrap(), load(|_, _| ()).unwrap());
    let mut session = model.session();
    for tokens in [&[101][..], &[u32::MAX], &[]] {
        let input = Input::new(&mut session, tokens, Logits::Last);
        let error = model.forward(&mut [input], &mut Vec::new(), &|| false).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
    }
    let mut strange = load(|metadata, tensors| {
        metadata.set("llama.block_count", 1u32);
        tensors.retain(|(name, _)| !name.starts_with("blk.1"));
    })
    .unwrap()
    .session();
    let input = Input::new(&mut strange, &[1], Logits::Last);
    let error = other.forward(&mut [input], &mut Vec::new(), &|| false).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { name: "session", .. }), "{error}");
}

#[test]
fn an_unknown_kernel_is_refused_with_the_available_ones() {
    let options = LoadOptions::default().with_kernel("abacus".to_owned());
    let error = load_with(|_, _| (), &options).unwrap_err();
    assert!(error.to_string().contains("abacus") && error.to_string().contains("scalar"), "{error}");
}

#[test]
fn an_unknown_cache_type_is_refused_with_the_known_ones() {
    for known in [CacheType::F32, CacheType::F16, CacheType::Int8] {
        assert_eq!(CacheType::by_name(known.name()).unwrap(), known);
    }
    for unknown in ["int4", "INT8", ""] {
        let error = CacheType::by_name(unknown).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { name: "cache_type", .. }), "{error}");
        assert!(error.to_string().contains("f16, int8 or f32") && error.to_string().contains(unknown), "{error}");
    }
}

#[test]
fn a_tensor_of_another_size_is_an_error_in_recurrent_layers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gguf");
    for name in ["kimi_linear", "qwen3_5", "lfm2", "granitemoehybrid", "nemotron_h", "falcon_h1", "jamba", "mamba2"] {
        let file = Gguf::open(data.join(format!("{name}.gguf"))).unwrap();
        let shapes: Vec<(String, Vec<u64>)> =
            file.tensors().iter().map(|tensor| (tensor.name().to_owned(), tensor.dims().to_vec())).collect();
        let parts = ["ssm_", "shortconv", "attn_qkv", "attn_gate"];
        let own = |name: &str| name.starts_with("blk.0.") && parts.iter().any(|part| name.contains(part));
        for (i, (tensor, dims)) in shapes.iter().enumerate().filter(|(_, (name, _))| own(name)) {
            for (d, dim) in dims.iter().enumerate().filter(|(_, dim)| **dim > 1) {
                for changed in [dim - 1, dim + 32] {
                    let mut shapes = shapes.clone();
                    shapes[i].1[d] = changed;
                    write(&path, file.metadata(), &shapes, BlockType::F32);
                    let error = Model::load(&path, &LoadOptions::default()).unwrap_err();
                    let is_named = matches!(&error, Error::Malformed { place: Place::Tensor(_), .. });
                    assert!(is_named, "{name}: {tensor} {dims:?}, {changed}: {error}");
                }
            }
        }
    }
}
