//! The rules that keep the house in order, read off the sources themselves: who may import whom, where instruction sets
//! and `unsafe` may appear, and how long a file may grow.

use std::fs;
use std::path::{Path, PathBuf};

/// The floors from the lowest up. A floor may import the ones before it, never one beside or above it.
const FLOORS: &[&[&str]] = &[
    &["error"],
    &["system"],
    &["threads"],
    &["quant"],
    &["format", "vocab"],
    &["kernels"],
    &["model"],
    &["engine", "quantize"],
    &["python"],
];

/// The only files with `unsafe`, each a file or a folder of that name, and what for.
const UNSAFE_FILES: &[(&str, &str)] = &[
    ("src/kernels/amx", "uses the tile registers, for which there are no intrinsics; enters AVX-512's functions"),
    ("src/kernels/avx2", "enters functions of its instruction set; loads and stores whole registers"),
    ("src/kernels/avx512", "enters functions of its instruction set; loads and stores whole registers"),
    ("src/kernels/avxvnni", "executes `vpdpbusd`; enters AVX2's functions"),
    ("src/kernels/neon", "enters functions of its instruction set; loads and stores whole registers; executes `sdot`"),
    ("src/kernels/operations", "calls the functions of a table, which only some CPUs can run"),
    ("src/kernels/scalar", "promises that every CPU can run its table"),
    ("src/format/mapped", "maps a file into memory"),
    ("src/system/allocator", "hands out memory"),
    ("src/threads/columns", "lends the workers disjoint parts of one buffer"),
    ("src/threads/job_slot", "lends the workers a closure of the one call that waits for them"),
    ("src/threads/pool", "calls the two above"),
];

/// A file that has grown past this is two files.
const MOST_LINES: usize = 650;

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
fn every_module_of_the_crate_stands_on_a_floor() {
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
fn instruction_sets_are_named_only_in_the_kernels() {
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
fn unsafe_stays_in_the_listed_files_and_every_block_says_why_it_is_sound() {
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
fn no_file_grows_past_what_a_reader_holds_in_mind() {
    let all = files(&["src", "tests", "benches", "examples", "fuzz", "python", "scripts"], &["rs", "py"]);
    assert!(all.iter().any(|file| relative(file) == "tests/architecture.rs"), "the files are found");
    let faults: Vec<String> = all
        .iter()
        .map(|file| (relative(file), read(file).lines().count()))
        .filter(|(_, lines)| *lines > MOST_LINES)
        .map(|(name, lines)| format!("{name} has {lines} lines"))
        .collect();
    assert!(faults.is_empty(), "over {MOST_LINES} lines:\n{}", faults.join("\n"));
}

// The tools above are tested on sources in which the answer is plain.

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
fn an_unsafe_block_without_its_comment_is_found() {
    let bare =
        "fn f() {\n    // SAFETY: checked.\n    let x =\n        unsafe { g() };\n    let y = unsafe { g() };\n}";
    assert_eq!(undocumented_unsafe(bare), [4]);
    assert_eq!(undocumented_unsafe("// Sends.\nunsafe impl Send for X {}"), [1]);
    assert_eq!(undocumented_unsafe("// SAFETY: no pointers\n// inside.\nunsafe impl Send for X {}"), [0usize; 0]);
    assert_eq!(undocumented_unsafe("#![allow(unsafe_code)]\n/// # Safety\nunsafe fn f() {}"), [0usize; 0]);
    assert_eq!(unsafe_lines("#![allow(unsafe_code)]\nunsafe fn f() {}"), [1]);
}

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn relative(file: &Path) -> String {
    let name = file.strip_prefix(repository()).unwrap_or(file);
    name.to_string_lossy().replace('\\', "/")
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// Every file below `folders` with one of `extensions`. A folder that does not exist holds none.
fn files(folders: &[&str], extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting: Vec<PathBuf> = folders.iter().map(|folder| repository().join(folder)).collect();
    while let Some(folder) = waiting.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for path in entries.map(|entry| entry.expect("a folder of the repository can be listed").path()) {
            if path.is_dir() {
                // Build folders of sub-crates and of Python are not ours to judge.
                let built = path.file_name().is_some_and(|name| name == "target" || name == "__pycache__");
                if !built {
                    waiting.push(path);
                }
            } else if path.extension().is_some_and(|e| extensions.iter().any(|wanted| e == *wanted)) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn height(floor: &str) -> Option<usize> {
    FLOORS.iter().position(|names| names.contains(&floor))
}

/// `place` is a file's path without its ending, or a folder's.
fn is_at(file: &str, place: &str) -> bool {
    file.strip_prefix(place).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
}

fn floor_of_file(file: &str) -> Option<(&'static str, usize)> {
    let floors = FLOORS.iter().enumerate().flat_map(|(height, names)| names.iter().map(move |name| (*name, height)));
    floors.into_iter().find(|(name, _)| is_at(file, &format!("src/{name}")))
}

/// The floor that a path in `file` leads to, where it leads to one.
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

/// What `lib.rs` lends to the root of the crate: (name, floor).
fn reexports(lib: &str) -> Vec<(String, String)> {
    let mut names = Vec::new();
    for path in paths(&code_only(lib)) {
        let path = if path[0] == "crate" { &path[1..] } else { &path[..] };
        if let [floor, .., name] = path
            && height(floor).is_some()
        {
            assert_ne!(name, "*", "lib.rs lends names one by one, so that they can be followed");
            names.push((name.clone(), floor.clone()));
        }
    }
    names
}

/// The source with comments, strings and characters made blank; lines stay where they are.
fn code_only(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut code = String::with_capacity(source.len());
    let mut i = 0;
    while i < chars.len() {
        let end = match at(i) {
            '/' if at(i + 1) == '/' => (i..chars.len()).find(|&j| at(j) == '\n').unwrap_or(chars.len()),
            '/' if at(i + 1) == '*' => end_of_block_comment(&chars, i),
            '"' => end_of_quoted(&chars, i, '"'),
            '\'' if at(i + 1) == '\\' || at(i + 2) == '\'' => end_of_quoted(&chars, i, '\''),
            'r' if !is_word(at(i.wrapping_sub(1))) || matches!(at(i.wrapping_sub(1)), 'b' | 'c') => {
                end_of_raw_string(&chars, i)
            }
            _ => i,
        };
        if end == i {
            code.push(at(i));
            i += 1;
        } else {
            code.extend(chars[i..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            i = end;
        }
    }
    code
}

fn end_of_block_comment(chars: &[char], start: usize) -> usize {
    let (mut depth, mut i) = (0, start);
    while i + 1 < chars.len() {
        match (chars[i], chars[i + 1]) {
            ('/', '*') => (depth, i) = (depth + 1, i + 2),
            ('*', '/') => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            return i;
        }
    }
    chars.len()
}

fn end_of_quoted(chars: &[char], start: usize, quote: char) -> usize {
    let mut i = start + 1;
    while i < chars.len() && chars[i] != quote {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    (i + 1).min(chars.len())
}

/// `start` itself where no raw string begins.
fn end_of_raw_string(chars: &[char], start: usize) -> usize {
    let hashes = chars[start + 1..].iter().take_while(|&&c| c == '#').count();
    let open = start + 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return start;
    }
    let closes = |i: usize| {
        chars[i] == '"' && chars.get(i + 1..i + 1 + hashes).is_some_and(|rest| rest.iter().all(|&c| c == '#'))
    };
    (open + 1..chars.len()).find(|&i| closes(i)).map_or(chars.len(), |i| i + 1 + hashes)
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Every word of blanked code, with its line from 0.
fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    code.lines().enumerate().flat_map(|(line, text)| {
        text.split(|c: char| !is_word(c)).filter(|word| !word.is_empty()).map(move |word| (line, word))
    })
}

/// Every path of two parts or more in blanked code, groups in braces written out.
fn paths(code: &str) -> Vec<Vec<String>> {
    let tokens = tokens(code);
    let mut found = Vec::new();
    let mut i = 0;
    while i < tokens.len() {
        if tokens[i].chars().all(is_word) {
            i = path_from(&tokens, i, Vec::new(), &mut found);
        } else {
            i += 1;
        }
    }
    found.retain(|path| path.len() > 1);
    found
}

fn tokens(code: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let word = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
        let length = if rest.starts_with("::") { 2 } else { word.max(first.len_utf8()) };
        tokens.push(rest[..length].to_string());
        rest = rest[length..].trim_start();
    }
    tokens
}

/// Reads the path that begins at token `i` into `found` and returns the token after it.
fn path_from(tokens: &[String], mut i: usize, mut path: Vec<String>, found: &mut Vec<Vec<String>>) -> usize {
    let at = |i: usize| tokens.get(i).map_or("", String::as_str);
    loop {
        match at(i) {
            "{" if !path.is_empty() => {
                i += 1;
                while !matches!(at(i), "}" | "") {
                    // What follows the path, such as `as name`, is no path of its own.
                    i = path_from(tokens, i, path.clone(), found);
                    while !matches!(at(i), "," | "}" | "") {
                        i += 1;
                    }
                    i += usize::from(at(i) == ",");
                }
                return i + 1;
            }
            token if token == "*" || (!token.is_empty() && token.chars().all(is_word)) => {
                path.push(token.to_string());
                i += 1;
                if at(i) != "::" {
                    found.push(path);
                    return i;
                }
                i += 1;
            }
            _ => {
                found.push(path);
                return i;
            }
        }
    }
}

/// The lines, from 0, with the keyword.
fn unsafe_lines(source: &str) -> Vec<usize> {
    words(&code_only(source)).filter(|(_, word)| *word == "unsafe").map(|(line, _)| line).collect()
}

/// The lines, from 0, of blocks and impls without a SAFETY comment directly above their statement.
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
