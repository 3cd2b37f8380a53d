//! Lists the source files of the repository and scans their code.

use std::fs;
use std::path::{Path, PathBuf};

pub(crate) fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

pub(crate) fn relative(file: &Path) -> String {
    let name = file.strip_prefix(repository()).unwrap_or(file);
    name.to_string_lossy().replace('\\', "/")
}

pub(crate) fn read(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// Returns every file below `folders` with one of `extensions`, sorted. Missing folders are skipped.
pub(crate) fn files(folders: &[&str], extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting: Vec<PathBuf> = folders.iter().map(|folder| repository().join(folder)).collect();
    while let Some(folder) = waiting.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for path in entries.map(|entry| entry.expect("a folder of the repository can be listed").path()) {
            if path.is_dir() {
                // Build folders of sub-crates, bytecode of Python, and libraries that stay as their authors publish them.
                let skipped = ["target", "__pycache__", "vendor"];
                if !path.file_name().is_some_and(|name| skipped.iter().any(|each| name == *each)) {
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

/// Replaces comments, strings and characters by spaces and keeps line breaks.
pub(crate) fn code_only(source: &str) -> String {
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

/// Returns `start` if no raw string begins there.
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

pub(crate) fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Returns every word of code without comments and strings, with its line counted from 0.
pub(crate) fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    code.lines().enumerate().flat_map(|(line, text)| {
        text.split(|c: char| !is_word(c)).filter(|word| !word.is_empty()).map(move |word| (line, word))
    })
}

/// Returns every path of two or more parts in code without comments and strings. Groups in braces are expanded.
pub(crate) fn paths(code: &str) -> Vec<Vec<String>> {
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

pub(crate) fn tokens(code: &str) -> Vec<String> {
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

/// Parses the path from token `i` into `found` and returns the index after it.
fn path_from(tokens: &[String], mut i: usize, mut path: Vec<String>, found: &mut Vec<Vec<String>>) -> usize {
    let at = |i: usize| tokens.get(i).map_or("", String::as_str);
    loop {
        match at(i) {
            "{" if !path.is_empty() => {
                i += 1;
                while !matches!(at(i), "}" | "") {
                    // What follows the path, such as `as name`, is not a path.
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
