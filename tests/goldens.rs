//! Every family against what transformers computed with the same tiny checkpoint, see tests/data/README.md.

use std::path::{Path, PathBuf};

use nybble::format::gguf::Gguf;
use nybble::model::hf::HfFolder;
use nybble::model::{Input, LoadOptions, Logits, Model, Quantize, Session, convert};
use nybble::quant::block::BlockType;
use safetensors::SafeTensors;

const VOCABULARY: usize = 320;

struct Golden {
    name: String,
    folder: PathBuf,
    /// `(3, 40)`
    input: Vec<Vec<u32>>,
    /// `(40, 320)` of the first row
    logits: Vec<f32>,
    /// `(3, 24)`
    greedy: Vec<Vec<u32>>,
    gap: Vec<Vec<f32>>,
}

fn goldens() -> Vec<Golden> {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(all).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    let read = |folder: PathBuf| {
        let bytes = std::fs::read(folder.join("golden.bin")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let numbers = |name: &str| file.tensor(name).unwrap().data().to_vec();
        let ids = |name: &str, len: usize| -> Vec<Vec<u32>> {
            let ids: Vec<u32> = bytemuck::pod_collect_to_vec(&numbers(name));
            ids.chunks(len).map(<[u32]>::to_vec).collect()
        };
        let gap: Vec<f32> = bytemuck::pod_collect_to_vec(&numbers("greedy_gap"));
        Golden {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            input: ids("input_ids", 40),
            logits: bytemuck::pod_collect_to_vec(&numbers("logits")),
            greedy: ids("greedy", 24),
            gap: gap.chunks(24).map(<[f32]>::to_vec).collect(),
            folder,
        }
    };
    let goldens: Vec<Golden> = folders.into_iter().map(read).collect();
    assert_eq!(goldens.len(), 30);
    goldens
}

fn load(path: &Path, quantize: Quantize, threads: usize) -> Model {
    let options = LoadOptions { quantize, threads: Some(threads), ..LoadOptions::default() };
    Model::load(path, &options).unwrap_or_else(|error| panic!("{error}"))
}

fn feed(model: &Model, session: &mut Session, tokens: &[u32]) -> Vec<f32> {
    let mut logits = Vec::new();
    let input = Input { session, tokens, logits: Logits::All };
    model.forward(&mut [input], &mut logits, &|| false).unwrap();
    logits
}

fn logits(model: &Model, tokens: &[u32], piece: usize) -> Vec<f32> {
    let mut session = model.session();
    tokens.chunks(piece).flat_map(|tokens| feed(model, &mut session, tokens)).collect()
}

fn top(logits: &[f32]) -> u32 {
    (0..logits.len()).fold(0, |best, id| if logits[id] > logits[best] { id } else { best }) as u32
}

/// Asserts that the model has the reference's logits, and its greedy tokens wherever they were clear.
fn agrees(golden: &Golden, model: &Model, what: &str) {
    let name = &golden.name;
    let found = logits(model, &golden.input[0], 40);
    let worst = found.iter().zip(&golden.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 2e-4, "{name}, {what}: the logits differ by up to {worst}");
    for (row, greedy) in golden.greedy.iter().enumerate() {
        let found = logits(model, &[&golden.input[row][..], greedy].concat(), 64);
        for (step, (logits, token)) in found.chunks(VOCABULARY).skip(39).zip(greedy).enumerate() {
            let clear = golden.gap[row][step] > 0.002;
            assert!(!clear || top(logits) == *token, "{name}, {what}: row {row}, step {step}");
        }
    }
}

#[test]
fn every_family_computes_what_transformers_computes() {
    for golden in goldens() {
        agrees(&golden, &load(&golden.folder, Quantize::Stored, 2), "as stored");
    }
}

#[test]
fn every_family_survives_the_way_through_a_gguf_file() {
    let folder = tempfile::tempdir().unwrap();
    for golden in goldens() {
        let path = folder.path().join("model.gguf");
        let source = HfFolder::open(&golden.folder).unwrap();
        convert::convert(&source, &Default::default(), &path, BlockType::F32, None).unwrap();
        let file = Gguf::open(&path).unwrap();
        assert!(file.get_str("general.architecture").unwrap().is_some());
        agrees(&golden, &load(&path, Quantize::Auto, 1), "converted");
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn eight_bits_keep_the_likeliest_token_of_every_family() {
    for golden in goldens() {
        let (exact, model) = (load(&golden.folder, Quantize::Stored, 2), load(&golden.folder, Quantize::Int8, 2));
        let (mut same, mut count) = (0, 0);
        for (row, greedy) in golden.input.iter().zip(&golden.greedy) {
            let tokens = [&row[..], greedy].concat();
            let (exact, found) = (logits(&exact, &tokens, 64), logits(&model, &tokens, 64));
            let pairs = exact.chunks(VOCABULARY).zip(found.chunks(VOCABULARY));
            count += tokens.len();
            same += pairs.filter(|(exact, found)| top(exact) == top(found)).count();
        }
        // Weights at random make near ties common; one tensor packed wrongly would leave next to nothing.
        let share = same as f64 / count as f64;
        println!("{}: {share:.3}", golden.name);
        assert!(share >= 0.85, "{}: {share:.3}", golden.name);
    }
}

#[test]
fn every_family_has_the_same_bits_on_any_threads_in_any_pieces_and_in_a_crowd() {
    let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    for golden in goldens() {
        for quantize in [Quantize::Stored, Quantize::Int4] {
            let name = format!("{}, {quantize:?}", golden.name);
            let (one, two) = (load(&golden.folder, quantize, 1), load(&golden.folder, quantize, 2));
            let alone: Vec<_> = golden.input.iter().map(|row| logits(&one, row, 40)).collect();
            for piece in [1, 7, 64] {
                assert!(bits(&logits(&two, &golden.input[0], piece)) == bits(&alone[0]), "{name}: pieces of {piece}");
            }
            let mut sessions: Vec<Session> = golden.input.iter().map(|_| two.session()).collect();
            let inputs = golden.input.iter().zip(&mut sessions);
            let mut inputs: Vec<_> =
                inputs.map(|(tokens, session)| Input { session, tokens, logits: Logits::All }).collect();
            let mut together = Vec::new();
            two.forward(&mut inputs, &mut together, &|| false).unwrap();
            assert!(bits(&together) == bits(&alone.concat()), "{name}: in a crowd");
        }
    }
}
