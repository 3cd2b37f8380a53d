//! Finds imports between the files of the crate, and circles of them.
//!
//! A path counts as an import of the file that defines its target: `super::Thing`, re-exported by the parent from a child,
//! is an import of the child. Re-exports (`pub use`) do not count as imports.

use std::collections::{BTreeMap, BTreeSet};

use crate::source::{code_only, is_word, tokens};

/// A path in a file, relative to the module `base`, without leading `crate`, `self` and `super`.
struct Import {
    base: String,
    path: Vec<String>,
    /// The name that a `use` gives it, `*` for a glob.
    alias: Option<String>,
    /// Whether it comes from a `pub use`, of any visibility.
    reexport: bool,
}

impl Import {
    fn is_glob(&self) -> bool {
        self.alias.as_deref() == Some("*")
    }
}

/// A module in a file of its own.
struct Module {
    file: String,
    imports: Vec<Import>,
}

/// The target of a path.
enum Target {
    Module(String),
    /// An item defined in the file of this module.
    Item(String),
}

/// The crate's modules by path: `""`, `model`, `model::forward`.
pub(crate) struct Modules(BTreeMap<String, Module>);

impl Modules {
    /// Parses `sources`, pairs of path below `src` and content.
    pub(crate) fn read(sources: &[(String, String)]) -> Self {
        let names: BTreeSet<String> = sources.iter().map(|(file, _)| module_of(file)).collect();
        let modules = sources.iter().map(|(file, text)| {
            let name = module_of(file);
            let imports = imports(&name, &tokens(&code_only(text)), &names);
            (name, Module { file: file.clone(), imports })
        });
        Modules(modules.collect())
    }

    /// Returns the files that each file imports.
    pub(crate) fn graph(&self) -> BTreeMap<String, BTreeSet<String>> {
        let edges = self.0.iter().map(|(name, module)| {
            let targets = module.imports.iter().filter(|import| !import.reexport).filter_map(|import| {
                let owner = match self.resolve(&import.base, &import.path, 0)? {
                    Target::Item(owner) => owner,
                    // A glob imports the items that its module defines.
                    Target::Module(owner) => import.is_glob().then_some(owner)?,
                };
                (owner != *name).then(|| self.0[&owner].file.clone())
            });
            (module.file.clone(), targets.collect())
        });
        edges.collect()
    }

    fn resolve(&self, base: &str, path: &[String], depth: usize) -> Option<Target> {
        let Some((first, rest)) = path.split_first() else { return Some(Target::Module(base.to_owned())) };
        let child = join(base, first);
        if self.0.contains_key(&child) {
            return self.resolve(&child, rest, depth);
        }
        let module = &self.0[base];
        let import = module.imports.iter().find(|import| import.alias.as_deref() == Some(first));
        // A longer chain of re-exports is a circle of names.
        if let Some(import) = import.filter(|_| depth < 10) {
            return match self.resolve(&import.base, &import.path, depth + 1)? {
                Target::Module(found) => self.resolve(&found, rest, depth),
                item => Some(item),
            };
        }
        Some(Target::Item(base.to_owned()))
    }
}

/// Describes each circle in `graph` by the imports between its files.
pub(crate) fn circles(graph: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let reached: BTreeMap<&String, BTreeSet<&String>> =
        graph.keys().map(|file| (file, reachable(graph, file))).collect();
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for (file, others) in &reached {
        if !others.contains(file) || seen.contains(file) {
            continue;
        }
        let circle: Vec<&&String> = others.iter().filter(|other| reached[**other].contains(file)).collect();
        seen.extend(circle.iter().map(|file| **file));
        let edges = circle.iter().flat_map(|from| {
            let inside = graph[**from].iter().filter(|to| circle.contains(&to));
            inside.map(move |to| format!("  {from} -> {to}"))
        });
        found.push(format!("{} files:\n{}", circle.len(), edges.collect::<Vec<_>>().join("\n")));
    }
    found
}

fn reachable<'a>(graph: &'a BTreeMap<String, BTreeSet<String>>, from: &str) -> BTreeSet<&'a String> {
    let mut reached = BTreeSet::new();
    let mut waiting: Vec<&String> = graph[from].iter().collect();
    while let Some(file) = waiting.pop() {
        if reached.insert(file) {
            waiting.extend(&graph[file]);
        }
    }
    reached
}

/// Returns the module path of `file`, a path below `src`.
fn module_of(file: &str) -> String {
    let name = file.strip_suffix(".rs").unwrap_or(file);
    let name = name.strip_suffix("/mod").unwrap_or(name);
    if name == "lib" { String::new() } else { name.replace('/', "::") }
}

fn join(module: &str, name: &str) -> String {
    if module.is_empty() { name.to_owned() } else { format!("{module}::{name}") }
}

/// Returns all paths in the code of `module`, in `use` declarations and elsewhere.
fn imports(module: &str, tokens: &[String], modules: &BTreeSet<String>) -> Vec<Import> {
    let at = |i: usize| tokens.get(i).map_or("", String::as_str);
    let mut found: Vec<Import> = Vec::new();
    // For each open inline module, the depth of braces outside it.
    let (mut braces, mut inline) = (0, Vec::new());
    let mut i = 0;
    while i < tokens.len() {
        match at(i) {
            "mod" if at(i + 2) == "{" => {
                inline.push(braces);
                braces += 1;
                i += 3;
            }
            "use" => {
                let reexport = i > 0 && (at(i - 1) == "pub" || at(i - 1) == ")");
                let mut leaves = Vec::new();
                i = use_tree(tokens, i + 1, Vec::new(), &mut leaves);
                for (path, alias) in leaves {
                    let own_glob =
                        alias == "*" && path.len() <= inline.len() && path.iter().all(|part| part == "super");
                    if let Some((base, path)) = anchored(module, inline.len(), &path, modules).filter(|_| !own_glob) {
                        found.push(Import { base, path, alias: Some(alias), reexport });
                    }
                }
            }
            token => {
                braces += usize::from(token == "{");
                if token == "}" {
                    braces = braces.saturating_sub(1);
                    inline.pop_if(|depth| *depth == braces);
                }
                let starts = is_name(token) && at(i + 1) == "::" && (i == 0 || at(i - 1) != "::");
                let mut path = vec![token.to_owned()];
                i += 1;
                while starts && at(i) == "::" && is_name(at(i + 1)) {
                    path.push(at(i + 1).to_owned());
                    i += 2;
                }
                if starts && let Some((base, path)) = anchored(module, inline.len(), &path, modules) {
                    found.push(Import { base, path, alias: None, reexport: false });
                }
            }
        }
    }
    // A path that begins with a name counts if the name is imported or a child module.
    let aliases: BTreeSet<String> = found.iter().filter_map(|import| import.alias.clone()).collect();
    found.retain(|import| {
        let bare = import.alias.is_none() && import.base == module && !import.path.is_empty();
        !bare || aliases.contains(&import.path[0]) || modules.contains(&join(module, &import.path[0]))
    });
    found
}

fn is_name(token: &str) -> bool {
    token.chars().all(is_word) && !token.is_empty()
}

/// Splits `path` into the module that it starts from and the remaining path. `inline` is the number of inline modules around
/// it.
fn anchored(module: &str, inline: usize, path: &[String], modules: &BTreeSet<String>) -> Option<(String, Vec<String>)> {
    let supers = path.iter().take_while(|part| *part == "super").count();
    match path.first().map(String::as_str) {
        Some("crate") => Some((String::new(), path[1..].to_vec())),
        Some("self") => Some((module.to_owned(), path[1..].to_vec())),
        Some("super") => {
            let mut base = module;
            for _ in inline..supers {
                base = base.rsplit_once("::").map_or("", |(parent, _)| parent);
            }
            modules.contains(base).then(|| (base.to_owned(), path[supers..].to_vec()))
        }
        _ => Some((module.to_owned(), path.to_vec())),
    }
}

/// Parses the tree of a `use` from token `i` into pairs of path and alias, and returns the index after it. A glob becomes the
/// path of its module with the alias `*`.
fn use_tree(tokens: &[String], mut i: usize, mut path: Vec<String>, found: &mut Vec<(Vec<String>, String)>) -> usize {
    let at = |i: usize| tokens.get(i).map_or("", String::as_str);
    loop {
        match at(i) {
            "{" => {
                i += 1;
                while !matches!(at(i), "}" | "") {
                    i = use_tree(tokens, i, path.clone(), found);
                    i += usize::from(at(i) == ",");
                }
                return i + 1;
            }
            "*" => {
                found.push((path, "*".to_owned()));
                return i + 1;
            }
            "::" => i += 1,
            token if is_name(token) => {
                if token != "self" || path.is_empty() {
                    path.push(token.to_owned());
                }
                i += 1;
                if at(i) != "::" {
                    let renamed = at(i) == "as";
                    let alias = if renamed { at(i + 1).to_owned() } else { path.last().cloned().unwrap_or_default() };
                    found.push((path, alias));
                    return if renamed { i + 2 } else { i };
                }
            }
            _ => return i,
        }
    }
}
