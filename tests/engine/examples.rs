//! Every program in `examples/rust` runs on a tiny model. `cargo test` has built them.

use std::env::consts::EXE_SUFFIX;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nybble::format::gguf::StringArray;
use nybble::model::{LoadOptions, Model};
use nybble::quant::block::BlockType;
use tempfile::TempDir;

use crate::tiny_model::{self, ODD, Shape};

/// A model whose vocabulary consists of bytes.
fn model(folder: &TempDir, matrix_type: BlockType) -> PathBuf {
    let shape = Shape { vocabulary: 259, ..ODD };
    let texts: StringArray = ["<unk>", "<s>", "</s>"]
        .map(str::to_owned)
        .into_iter()
        .chain((0..256).map(|b| format!("<0x{b:02X}>")))
        .collect();
    let mut metadata = tiny_model::metadata(&shape);
    metadata
        .set("tokenizer.ggml.model", "llama")
        .set("tokenizer.ggml.tokens", texts)
        .set("tokenizer.ggml.token_type", [vec![2i32, 3, 3], vec![6; 256]].concat())
        .set("tokenizer.ggml.scores", vec![0f32; shape.vocabulary])
        .set("tokenizer.ggml.bos_token_id", 1u32)
        .set("tokenizer.ggml.eos_token_id", 2u32)
        .set("tokenizer.ggml.add_space_prefix", false)
        .set("tokenizer.chat_template", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}");
    tiny_model::write(&folder.path().join("model.gguf"), &metadata, &tiny_model::tensors(&shape), matrix_type)
}

/// The command that runs an example.
fn example(name: &str) -> Command {
    let tests = std::env::current_exe().unwrap();
    let folder = tests.parent().and_then(Path::parent).unwrap().join("examples");
    let program = folder.join(format!("{name}{EXE_SUFFIX}"));
    assert!(program.is_file(), "{} does not exist: `cargo test` without `--test` builds it", program.display());
    Command::new(program)
}

/// What an example prints, given a line on standard input.
fn printed<S: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = S>) -> String {
    let mut command = example(name);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A program that does not read may have ended before this.
    let _ = child.stdin.take().unwrap().write_all(b"Hi\n");
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

#[test]
fn every_example_has_a_test() {
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/rust")).unwrap() {
        let name = entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned();
        let named = format!("(\"{name}\"");
        assert!(include_str!("examples.rs").contains(&named), "{name}");
    }
}

#[test]
fn text_generation_prints_text() {
    let folder = TempDir::new().unwrap();
    let model = model(&folder, BlockType::Q4_0);
    assert!(!printed("generate", [model.as_os_str(), OsStr::new("Once")]).trim().is_empty());
    assert!(!printed("cancel", [&model]).trim().is_empty());
    let lines = printed("batch", [model.to_str().unwrap(), "One", "Two"]);
    assert!(lines.contains("One: \"One") && lines.contains("Two: \"Two"), "{lines}");
    assert!(printed("logits", [model.to_str().unwrap(), "1", "2", "3"]).contains(" tokens per second"));
    let compared = printed("embed", [model.to_str().unwrap(), "a cat", "a kitten"]);
    assert!(compared.ends_with(" \"a cat\" \"a kitten\"\n"), "{compared}");
}

#[cfg(feature = "chat")]
#[test]
fn a_chat_answers_a_line() {
    let folder = TempDir::new().unwrap();
    assert!(printed("chat", [model(&folder, BlockType::Q4_0)]).ends_with('\n'));
}

#[test]
fn a_session_continues_from_its_file() {
    let folder = TempDir::new().unwrap();
    let paths = [model(&folder, BlockType::Q4_0), folder.path().join("prompt.session")];
    assert!(printed("session", &paths).starts_with("0 of "));
    let second = printed("session", &paths);
    let counts: Vec<usize> = second.split_whitespace().take(3).filter_map(|word| word.parse().ok()).collect();
    assert!(counts[0] > 32 && counts[0] <= counts[1], "{second}");
}

#[test]
fn a_quantized_file_can_be_loaded() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("quantized.gguf");
    let lines = printed("quantize", [&model(&folder, BlockType::F32), &out]);
    assert!(lines.contains(" tensors, written to "), "{lines}");
    Model::load(&out, &LoadOptions::default().with_threads(1)).unwrap();
}

#[test]
fn the_server_answers_a_request() {
    let folder = TempDir::new().unwrap();
    let mut command = example("server");
    command.arg(model(&folder, BlockType::Q4_0)).arg("127.0.0.1:0").stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let answer = TcpStream::connect(line.trim().rsplit(' ').next().unwrap()).and_then(|mut stream| {
        stream.write_all(b"POST /generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\nHi")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(answer.unwrap().starts_with(b"HTTP/1.1 200 OK"), "{line}");
}
