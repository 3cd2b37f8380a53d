//! Every family as llama.cpp's converter writes it, against the results of transformers with the same checkpoint.

use std::path::Path;

use crate::logits::{distance, logits};
use nybble::model::Quantize;
use safetensors::SafeTensors;

#[test]
fn files_of_other_converters_compute_what_transformers_computes() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let mut files: Vec<_> = std::fs::read_dir(data.join("gguf")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let mut faults = Vec::new();
    for file in &files {
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        let bytes = std::fs::read(data.join("goldens").join(&name).join("golden.bin")).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let input = golden.tensor("input_ids").unwrap();
        let ids: Vec<u32> = bytemuck::pod_collect_to_vec(input.data());
        let expected: Vec<f32> = bytemuck::pod_collect_to_vec(golden.tensor("logits").unwrap().data());
        let options = nybble::model::LoadOptions::default().with_quantize(Quantize::Stored).with_threads(2);
        let model = match nybble::model::Model::load(file, &options) {
            Ok(model) => model,
            Err(error) => {
                faults.push(format!("{name}: {error}"));
                continue;
            }
        };
        let found = logits(&model, &ids[..input.shape()[1]], 40);
        // A converter that rounds the epsilon of norms, or a rotation, costs a little.
        let worst = distance(&found, &expected);
        println!("{name}: {worst}");
        if worst > 2e-3 {
            faults.push(format!("{name}: the logits differ by up to {worst}"));
        }
    }
    assert!(files.len() >= 37 && faults.is_empty(), "{} files: {faults:#?}", files.len());
}
