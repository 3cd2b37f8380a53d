//! Rules about the sources: which module may import which, where instruction sets and `unsafe` may appear, and how large
//! files and folders may grow.

#[path = "architecture/modules.rs"]
mod modules;
#[path = "architecture/source.rs"]
mod source;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use modules::{Modules, circles};
use source::{code_only, files, paths, read, relative, repository, words};

/// Modules by floor, lowest first. A module may import only modules on lower floors.
const FLOORS: &[&[&str]] = &[
    &["error", "setters"],
    &["system"],
    &["threads"],
    &["quant"],
    &["format"],
    &["tokenizer"],
    &["kernels"],
    &["model"],
    &["engine", "quantize"],
    &["python"],
];

/// The only files with `unsafe`, by path of a file or folder, and the reason.
const UNSAFE_FILES: &[(&str, &str)] = &[
    ("src/kernels/amx", "uses the tile registers, for which there are no intrinsics; enters AVX-512's functions"),
    ("src/kernels/avx2", "enters functions of its instruction set; loads and stores whole registers"),
    ("src/kernels/avx512", "enters functions of its instruction set; loads and stores whole registers"),
    ("src/kernels/avxvnni", "executes `vpdpbusd`; enters AVX2's functions"),
    (
        "src/kernels/neon",
        "enters functions of its instruction set; loads and stores whole registers; executes `sdot` and `fcvtl`",
    ),
    ("src/kernels/cache", "asks the CPU for its caches; prefetches"),
    ("src/kernels/cpu", "reads the name of the CPU"),
    ("src/kernels/generic/unpack", "runs the intrinsics that instruction sets list for their registers"),
    ("src/kernels/generic/vector", "runs the intrinsics that instruction sets list for their registers"),
    ("src/kernels/operations", "calls the functions of a table, which only some CPUs can run"),
    ("src/kernels/scalar", "promises that every CPU can run its table"),
    ("src/kernels/tuning", "makes a table of functions that this CPU runs; reads the stepping of the CPU"),
    ("src/format/mapped", "maps a file into memory"),
    ("src/system/affinity", "calls the system"),
    ("src/system/allocator", "hands out memory"),
    ("src/system/fused", "defines a function of the C library"),
    ("src/system/huge_pages", "lends buffers disjoint parts of one map"),
    ("src/system/macos", "calls the system"),
    ("src/system/windows", "calls the system"),
    ("src/threads/columns", "lends the workers disjoint parts of one buffer"),
    ("src/threads/job_slot", "lends the workers a closure of the one call that waits for them"),
    ("src/threads/pool", "calls the two above"),
];

/// A longer file is two files.
const MAX_LINES: usize = 600;

/// A folder with more source files is two folders.
const MAX_FILES: usize = 15;

/// The suffixes of sources.
const SOURCES: &[&str] = &["rs", "py", "js", "css", "html"];

/// Every folder with sources.
const FOLDERS: &[&str] = &["src", "tests", "benches", "examples", "fuzz", "python", "scripts"];

#[test]
fn a_floor_imports_only_the_floors_below_it() {
    let root_names = reexports(&read(&repository().join("src/lib.rs")));
    let mut faults = Vec::new();
    for file in files(&["src"], &["rs"]) {
        let name = relative(&file);
        let Some((own, own_height)) = floor_of_file(&name) else { continue };
        for path in paths(&code_only(&read(&file))) {
            let Some(other) = imported_floor(&path, &file, &root_names) else { continue };
            if other != own && height(&other).is_none_or(|h| h >= own_height) {
                faults.push(format!("{name}: {own} names {other} in `{}`", path.join("::")));
            }
        }
    }
    assert!(faults.is_empty(), "imports go downwards only:\n{}", faults.join("\n"));
}

#[test]
fn every_module_of_the_crate_has_a_floor() {
    let mut modules = Vec::new();
    for entry in fs::read_dir(repository().join("src")).expect("src can be listed") {
        let path = entry.expect("an entry of src can be read").path();
        modules.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
    }
    modules.retain(|module| module != "lib");
    assert!(modules.iter().any(|module| module == "model"), "the modules are found: {modules:?}");
    for module in modules {
        assert!(height(&module).is_some(), "src/{module} has no floor: give it one in FLOORS");
    }
}

#[test]
fn only_the_kernels_name_instruction_sets() {
    let mut faults = Vec::new();
    for file in files(&["src"], &["rs"]) {
        let name = relative(&file);
        if name.starts_with("src/kernels/") {
            continue;
        }
        let code = code_only(&read(&file));
        for path in paths(&code) {
            if matches!(path[0].as_str(), "std" | "core") && path[1] == "arch" {
                faults.push(format!("{name}: {}", path.join("::")));
            }
        }
        for word in ["target_feature", "is_x86_feature_detected", "is_aarch64_feature_detected", "asm"] {
            if words(&code).any(|(_, w)| w == word) {
                faults.push(format!("{name}: {word}"));
            }
        }
    }
    assert!(faults.is_empty(), "only src/kernels/ knows instruction sets:\n{}", faults.join("\n"));
}

#[test]
fn unsafe_is_in_listed_files_only_and_has_safety_comments() {
    let mut faults = Vec::new();
    let mut unused: Vec<&str> = UNSAFE_FILES.iter().map(|(place, _)| *place).collect();
    for file in files(&["src", "tests", "benches", "examples", "fuzz"], &["rs"]) {
        let name = relative(&file);
        let source = read(&file);
        let listed = UNSAFE_FILES.iter().any(|(place, _)| is_at(&name, place));
        for line in unsafe_lines(&source) {
            unused.retain(|place| !is_at(&name, place));
            if !listed {
                faults.push(format!("{name}:{}: `unsafe` in a file that is not listed", line + 1));
            }
        }
        for line in undocumented_unsafe(&source) {
            faults.push(format!("{name}:{}: no SAFETY comment above", line + 1));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(unused.is_empty(), "listed without need: {unused:?}");
}

#[test]
fn no_file_imports_itself_through_others() {
    let sources: Vec<(String, String)> =
        files(&["src"], &["rs"]).iter().map(|file| (relative(file)["src/".len()..].to_owned(), read(file))).collect();
    let found = circles(&Modules::read(&sources).graph());
    assert!(
        found.is_empty(),
        "{} circles of imports; move what they share into a leaf:\n{}",
        found.len(),
        found.join("\n")
    );
}

#[test]
fn no_file_has_more_than_600_lines() {
    let all = files(FOLDERS, SOURCES);
    for known in ["tests/architecture.rs", "python/nybble/server/page/app/main.js"] {
        assert!(all.iter().any(|file| relative(file) == known), "the files are found");
    }
    let lines = all.iter().map(|file| (relative(file), read(file).lines().count()));
    let faults: Vec<_> = lines.filter(|(_, lines)| *lines > MAX_LINES).collect();
    assert!(faults.is_empty(), "over {MAX_LINES} lines: {faults:?}");
}

#[test]
fn no_folder_has_more_than_15_source_files() {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for folder in files(FOLDERS, SOURCES).iter().filter_map(|file| file.parent()) {
        *counts.entry(relative(folder)).or_default() += 1;
    }
    assert!(counts.contains_key("src/model"), "the folders are found: {counts:?}");
    counts.retain(|_, count| *count > MAX_FILES);
    assert!(counts.is_empty(), "over {MAX_FILES} source files: {counts:?}");
}

// Tests of the scanner on small sources.

#[test]
fn comments_strings_and_characters_are_not_code() {
    let source = r##"let a = "unsafe \" x"; // unsafe
/* unsafe /* nested */ unsafe */ let b = r#"unsafe " "#; let c = '"'; let d = '\''; fn e<'a>(f: &'a str) {}"##;
    let code = code_only(source);
    assert_eq!(code.lines().count(), 2);
    let seen: Vec<&str> = words(&code).map(|(_, word)| word).collect();
    assert_eq!(seen, ["let", "a", "let", "b", "let", "c", "let", "d", "fn", "e", "a", "f", "a", "str"]);
}

#[test]
fn imports_are_seen_in_groups_in_paths_and_over_lines() {
    let source =
        "use crate::{error::{self, Error as E}, model::*,\n kernels};\nlet x = crate::quant::f::<u8>(super::y);";
    let seen: Vec<String> = paths(source).iter().map(|path| path.join("::")).collect();
    let expected = [
        "crate::error::self",
        "crate::error::Error",
        "crate::model::*",
        "crate::kernels",
        "crate::quant::f",
        "super::y",
    ];
    assert_eq!(seen, expected);
}

#[test]
fn an_import_through_a_reexport_counts_as_one_of_its_floor() {
    let names = reexports("pub mod model; pub use model::{Model, config::Config}; pub use error::Error;");
    let floor = |path: &[&str]| {
        let path: Vec<String> = path.iter().map(ToString::to_string).collect();
        imported_floor(&path, &repository().join("src/quant/block.rs"), &names)
    };
    assert_eq!(floor(&["crate", "Model"]).as_deref(), Some("model"));
    assert_eq!(floor(&["crate", "Config"]).as_deref(), Some("model"));
    assert_eq!(floor(&["crate", "engine", "Sampler"]).as_deref(), Some("engine"));
    assert_eq!(floor(&["super", "super", "threads", "ThreadPool"]).as_deref(), Some("threads"));
    assert_eq!(floor(&["std", "model"]), None);
}

#[test]
fn circles_are_found_through_reexports_and_inline_modules() {
    let graph = |sources: &[(&str, &str)]| {
        let owned: Vec<_> = sources.iter().map(|(file, text)| (file.to_string(), text.to_string())).collect();
        Modules::read(&owned).graph()
    };
    let lib = ("lib.rs", "pub mod a; pub use a::One;");
    let one = ("a/one.rs", "use super::two; struct One; fn f() { two::g() }");
    let parent = ("a/mod.rs", "mod one; mod two; pub use one::One; pub(crate) fn own() {}");
    let found = circles(&graph(&[lib, parent, one, ("a/two.rs", "fn g() { crate::One }")]));
    assert_eq!(found, ["2 files:\n  a/one.rs -> a/two.rs\n  a/two.rs -> a/one.rs"]);
    // Neither a re-export nor the name of a module alone counts as an import.
    assert!(circles(&graph(&[lib, parent, one, ("a/two.rs", "use super::one; use super::own;")])).is_empty());
    let caller = ("a/mod.rs", "mod one; mod two; pub(crate) fn own() { two::g() }");
    let glob = ("a/two.rs", "use super::*; pub fn g() {}");
    assert_eq!(circles(&graph(&[lib, caller, one, glob])).len(), 1);
    // In an inline module `super` is the file itself.
    let inline = ("a/two.rs", "pub fn g() {} mod tests { use super::*; fn f() { super::g() } }");
    assert!(circles(&graph(&[lib, caller, one, inline])).is_empty());
    let group = ("a/two.rs", "use crate::{a::{one::{self as first, One}, own}}; fn g() { first::f() }");
    assert_eq!(graph(&[lib, parent, one, group])["a/two.rs"].len(), 2);
}

#[test]
fn an_unsafe_block_without_its_comment_is_found() {
    let bare =
        "fn f() {\n    // SAFETY: checked.\n    let x =\n        unsafe { g() };\n    let y = unsafe { g() };\n}";
    assert_eq!(undocumented_unsafe(bare), [4]);
    assert_eq!(undocumented_unsafe("// Sends.\nunsafe impl Send for X {}"), [1]);
    assert_eq!(undocumented_unsafe("// SAFETY: no pointers\n// inside.\nunsafe impl Send for X {}"), [0usize; 0]);
    assert_eq!(undocumented_unsafe("#![allow(unsafe_code)]\n/// # Safety\nunsafe fn f() {}"), [0usize; 0]);
    assert_eq!(unsafe_lines("#![allow(unsafe_code)]\nunsafe fn f() {}"), [1]);
}

fn height(floor: &str) -> Option<usize> {
    FLOORS.iter().position(|names| names.contains(&floor))
}

/// `place` is the path of a file without its extension, or of a folder.
fn is_at(file: &str, place: &str) -> bool {
    file.strip_prefix(place).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
}

fn floor_of_file(file: &str) -> Option<(&'static str, usize)> {
    let floors = FLOORS.iter().enumerate().flat_map(|(height, names)| names.iter().map(move |name| (*name, height)));
    floors.into_iter().find(|(name, _)| is_at(file, &format!("src/{name}")))
}

/// The floor of the module that a path in `file` leads to, if any.
fn imported_floor(path: &[String], file: &Path, root_names: &[(String, String)]) -> Option<String> {
    let supers = path.iter().take_while(|part| *part == "super").count();
    let first = path.get(if path[0] == "crate" { 1 } else { supers })?;
    if path[0] == "crate" {
        let through_root = root_names.iter().find(|(name, _)| name == first).map(|(_, floor)| floor.clone());
        return height(first).map(|_| first.clone()).or(through_root);
    }
    // `super::model` means the floor, unless a module of that name lies in the file's own folder.
    let folder = file.parent()?;
    let near = folder.join(first).exists() || folder.join(format!("{first}.rs")).exists();
    let at_root = folder == repository().join("src");
    (supers > 0 && height(first).is_some() && (at_root || !near)).then(|| first.clone())
}

/// The names that `lib.rs` re-exports: (name, floor).
fn reexports(lib: &str) -> Vec<(String, String)> {
    let mut names = Vec::new();
    for path in paths(&code_only(lib)) {
        let path = if path[0] == "crate" { &path[1..] } else { &path[..] };
        if let [floor, .., name] = path
            && height(floor).is_some()
        {
            assert_ne!(name, "*", "lib.rs re-exports names one by one, so that they can be followed");
            names.push((name.clone(), floor.clone()));
        }
    }
    names
}

/// The lines with the keyword `unsafe`, counted from 0.
fn unsafe_lines(source: &str) -> Vec<usize> {
    words(&code_only(source)).filter(|(_, word)| *word == "unsafe").map(|(line, _)| line).collect()
}

/// The lines, counted from 0, of `unsafe` blocks and impls without a SAFETY comment directly above their statement.
fn undocumented_unsafe(source: &str) -> Vec<usize> {
    let code = code_only(source);
    let (lines, code_lines): (Vec<&str>, Vec<&str>) = (source.lines().collect(), code.lines().collect());
    let argues = |line: usize| {
        let after = code_lines[line].split("unsafe").nth(1).unwrap_or("").trim_start();
        after.is_empty() || after.starts_with('{') || after.starts_with("impl")
    };
    let documented = |line: usize| {
        for above in (0..line).rev() {
            let text = lines[above].trim();
            if text.starts_with("//") {
                let run = lines[..=above].iter().rev().take_while(|comment| comment.trim().starts_with("//"));
                return run.into_iter().any(|comment| comment.contains("SAFETY:"));
            }
            if text.is_empty() || text.ends_with([';', '{', '}']) {
                return false;
            }
        }
        false
    };
    unsafe_lines(source).into_iter().filter(|&line| argues(line) && !documented(line)).collect()
}
