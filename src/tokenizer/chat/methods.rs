//! Methods of strings that the library lacks, as Python has them.

use minijinja::value::{Value, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

use super::python::{checked_width, is_space, pad};

type Result<T> = std::result::Result<T, Error>;

/// Calls a method of a value.
pub(super) fn call(state: &State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value> {
    let own = value.as_str().map(|text| of_string(text, method, args)).transpose()?.flatten();
    own.map_or_else(|| pycompat::unknown_method_callback(state, value, method, args), Ok)
}

/// `None` for a method that is not here.
fn of_string(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>> {
    let parts = |parts: [&str; 3]| Value::from_iter(parts);
    Ok(Some(match method {
        "removeprefix" => text.strip_prefix(from_args::<(&str,)>(args)?.0).unwrap_or(text).into(),
        "removesuffix" => text.strip_suffix(from_args::<(&str,)>(args)?.0).unwrap_or(text).into(),
        "partition" => {
            let separator = from_args::<(&str,)>(args)?.0;
            text.split_once(separator).map_or(parts([text, "", ""]), |(a, b)| parts([a, separator, b]))
        }
        "rpartition" => {
            let separator = from_args::<(&str,)>(args)?.0;
            text.rsplit_once(separator).map_or(parts(["", "", text]), |(a, b)| parts([a, separator, b]))
        }
        "rsplit" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let most = most.and_then(|most| usize::try_from(most).ok());
            Value::from(rsplit(text, separator, most))
        }
        "index" | "rindex" => {
            let part = from_args::<(&str,)>(args)?.0;
            let found = if method == "index" { text.find(part) } else { text.rfind(part) };
            let start = found.and_then(|at| text.get(..at));
            let missing = || Error::new(ErrorKind::InvalidOperation, format!("{method}: {part:?} is not in the text"));
            start.ok_or_else(missing)?.chars().count().into()
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            pad(text, method, width, fill.unwrap_or(' '))?.into()
        }
        "zfill" => {
            let width = from_args::<(usize,)>(args)?.0;
            let (sign, digits) = match text.strip_prefix(['-', '+']) {
                Some(digits) => text.split_at(text.len() - digits.len()),
                None => ("", text),
            };
            let zeros = checked_width(width)?.saturating_sub(text.chars().count());
            format!("{sign}{}{digits}", "0".repeat(zeros)).into()
        }
        "swapcase" => {
            let swapped = |c: char| -> String {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            text.chars().map(swapped).collect::<String>().into()
        }
        "isdecimal" => (!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())).into(),
        _ => return Ok(None),
    }))
}

/// Splits at the last `most` separators, or at whitespace.
fn rsplit(text: &str, separator: Option<&str>, most: Option<usize>) -> Vec<String> {
    let mut parts: Vec<&str> = Vec::new();
    let mut rest = if separator.is_none() { text.trim_matches(is_space) } else { text };
    while most.is_none_or(|most| parts.len() < most) {
        let Some((before, after)) = (match separator {
            Some(separator) => rest.rsplit_once(separator),
            None => rest.rsplit_once(is_space),
        }) else {
            break;
        };
        parts.push(after);
        rest = if separator.is_none() { before.trim_end_matches(is_space) } else { before };
    }
    if separator.is_some() || !rest.is_empty() {
        parts.push(rest);
    }
    parts.into_iter().rev().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::Environment;

    #[test]
    fn methods_of_strings_work_as_in_python() {
        let mut environment = Environment::new();
        environment.set_unknown_method_callback(call);
        for (expression, expected) in [
            ("'aab'.removeprefix('a')", "ab"),
            ("'abb'.removesuffix('b') ~ 'x'.removesuffix('y')", "abx"),
            ("'a-b-c'.partition('-')", r#"["a", "-", "b-c"]"#),
            ("'a-b-c'.rpartition('-')", r#"["a-b", "-", "c"]"#),
            ("'abc'.partition('-')", r#"["abc", "", ""]"#),
            ("'abc'.rpartition('-')", r#"["", "", "abc"]"#),
            ("'a-b-c'.rsplit('-', 1)", r#"["a-b", "c"]"#),
            ("'-a-'.rsplit('-')", r#"["", "a", ""]"#),
            ("' a  b c '.rsplit(none, 1)", r#"["a  b", "c"]"#),
            ("' a  b '.rsplit()", r#"["a", "b"]"#),
            ("''.rsplit()", "[]"),
            ("'éaba'.index('a')", "1"),
            ("'éaba'.rindex('a')", "3"),
            ("'ab'.ljust(4, '.')", "ab.."),
            ("'ab'.rjust(3)", " ab"),
            ("'ab'.center(5)", "  ab "),
            ("'-7'.zfill(4) ~ '12'.zfill(1)", "-00712"),
            ("'aBé'.swapcase()", "AbÉ"),
            ("'12'.isdecimal()", "True"),
            ("' a '.strip()", "a"),
        ] {
            let found = environment.compile_expression(expression).unwrap().eval(()).unwrap();
            assert_eq!(found.to_string(), expected, "{expression}");
        }
        for refused in ["'a'.index('b')", "'a'.center(99999)", "'a'.no_such()", "'a'.partition()"] {
            assert!(environment.compile_expression(refused).unwrap().eval(()).is_err(), "{refused}");
        }
    }
}
