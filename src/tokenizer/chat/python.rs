//! Values, filters and tests as they are in Python, where the library's differ.

use std::borrow::Cow;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, filters};

type Result<T> = std::result::Result<T, Error>;

/// Columns of a width or an indentation.
const MAX_WIDTH: usize = 10_000;

/// A width that a template may ask for.
pub(super) fn checked_width(width: usize) -> Result<usize> {
    if width <= MAX_WIDTH {
        Ok(width)
    } else {
        Err(error(format!("found a width of {width}, expected at most {MAX_WIDTH}")))
    }
}

/// Replaces filters and tests of the library.
pub(super) fn register(environment: &mut Environment<'_>) {
    environment.add_filter("string", |value: Value| text(&value));
    environment.add_filter("upper", |value: Value| text(&value).to_uppercase());
    environment.add_filter("lower", |value: Value| text(&value).to_lowercase());
    environment.add_filter("title", |value: Value| filters::title(Cow::Owned(text(&value))));
    environment.add_filter("capitalize", |value: Value| capitalize(&text(&value)));
    environment.add_filter("trim", trim);
    environment.add_filter("replace", replace);
    environment.add_filter("join", join);
    environment.add_filter("indent", indent);
    environment.add_filter("items", items);
    environment.add_filter("int", int);
    environment.add_filter("round", round);
    environment.add_filter("escape", |value: Value| escape(&text(&value)));
    environment.add_filter("e", |value: Value| escape(&text(&value)));
    environment.add_filter("wordcount", |value: Value| words(&text(&value)));
    environment.add_filter("center", |value: Value, width: Option<usize>| {
        pad(&text(&value), "center", width.unwrap_or(80), ' ')
    });
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_iterable);
    environment.add_test("number", |value: Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
}

fn error(what: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// Whether `for` takes the value: the library also takes none.
fn is_iterable(value: Value) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    matches!(value.kind(), Iterable | Map | Seq | String | Undefined)
}

fn length(value: Value) -> Result<usize> {
    match value.len() {
        Some(length) => Ok(length),
        None if value.is_undefined() => Ok(0),
        None if value.kind() == ValueKind::Iterable => Ok(value.try_iter()?.count()),
        None => Err(error(format!("a value of type {} has no length", value.kind()))),
    }
}

fn items(value: Value) -> Result<Value> {
    if value.is_undefined() { Ok(Value::from_iter::<[Value; 0]>([])) } else { filters::items(&value) }
}

/// An integer, or `default` where the value is none.
fn int(value: Value, default: Option<Value>) -> Value {
    let of_float = |number: f64| if number.is_finite() { Some(Value::from(number.trunc() as i64)) } else { None };
    let found = match value.kind() {
        ValueKind::Bool => Some(Value::from(i64::from(value.is_true()))),
        ValueKind::Number if value.is_integer() => Some(value.clone()),
        ValueKind::Number => f64::try_from(value.clone()).ok().and_then(of_float),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default().trim_matches(is_space);
            let whole = text.parse::<i64>().ok().map(Value::from);
            whole.or_else(|| text.parse::<f64>().ok().and_then(of_float))
        }
        _ => None,
    };
    found.or(default).unwrap_or_else(|| Value::from(0))
}

/// Rounds to the nearest number with that many decimals, to the even one of two, or as `method` says.
fn round(value: Value, precision: Option<usize>, method: Option<&str>) -> Result<Value> {
    let precision = precision.unwrap_or(0);
    if value.is_integer() {
        return Ok(value);
    }
    let number = f64::try_from(value)?;
    let step = 10f64.powi(i32::try_from(checked_width(precision)?).unwrap_or(0));
    let rounded = match method.unwrap_or("common") {
        "common" => format!("{number:.precision$}").parse().unwrap_or(number),
        "ceil" => (number * step).ceil() / step,
        "floor" => (number * step).floor() / step,
        other => return Err(error(format!("round: found {other:?}, expected common, ceil or floor"))),
    };
    Ok(Value::from(rounded))
}

/// Pads a text as the method of this name does.
pub(super) fn pad(text: &str, method: &str, width: usize, fill: char) -> Result<String> {
    let missing = checked_width(width)?.saturating_sub(text.chars().count());
    let left = match method {
        "ljust" => 0,
        "rjust" => missing,
        _ => missing / 2 + (missing & width & 1),
    };
    let filled = |count: usize| String::from(fill).repeat(count);
    Ok(filled(left) + text + &filled(missing - left))
}

/// The text with the characters of HTML replaced, as the package markupsafe writes them.
fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('>', "&gt;").replace('<', "&lt;");
    text.replace('\'', "&#39;").replace('"', "&#34;")
}

fn words(text: &str) -> usize {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).count()
}

fn capitalize(text: &str) -> String {
    let mut characters = text.chars();
    let first = characters.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    first + &characters.as_str().to_lowercase()
}

/// Whitespace as Python's `str.strip` has it.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn trim(value: Value, characters: Option<Value>) -> String {
    let value = text(&value);
    match characters.filter(|characters| !characters.is_none()) {
        Some(characters) => value.trim_matches(|c| text(&characters).contains(c)).to_owned(),
        None => value.trim_matches(is_space).to_owned(),
    }
}

fn replace(value: Value, old: Value, new: Value, count: Option<usize>) -> String {
    let (value, old, new) = (text(&value), text(&old), text(&new));
    count.map_or_else(|| value.replace(&old, &new), |count| value.replacen(&old, &new, count))
}

fn join(values: Value, separator: Option<Value>, options: Kwargs) -> Result<String> {
    if !is_iterable(values.clone()) {
        return Err(error(format!("join: a value of type {} cannot be iterated over", values.kind())));
    }
    let separator = match separator {
        Some(separator) => Some(separator),
        None => options.get("d")?,
    };
    let attribute: Option<Value> = options.get("attribute")?;
    options.assert_all_used()?;
    let part = |value: Value| match &attribute {
        None => Ok(text(&value)),
        Some(name) => match name.as_str() {
            None => Ok(text(&value.get_item(name)?)),
            Some(path) => {
                let found = path.split('.').try_fold(value, |value, name| match name.parse::<usize>() {
                    Ok(index) => value.get_item_by_index(index),
                    Err(_) => value.get_attr(name),
                });
                Ok(text(&found?))
            }
        },
    };
    let parts: Result<Vec<String>> = values.try_iter()?.map(part).collect();
    Ok(parts?.join(&separator.map(|separator| text(&separator)).unwrap_or_default()))
}

/// Indents lines, which end where Python's `str.splitlines` ends them.
fn indent(
    value: Value,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> Result<String> {
    let width = match width {
        Some(width) => Some(width),
        None => options.get("width")?,
    };
    let [first, blank] = [(first, "first"), (blank, "blank")].map(|(given, name)| match given {
        Some(given) => Ok(given),
        None => options.get::<Option<bool>>(name).map(Option::unwrap_or_default),
    });
    let (first, blank) = (first?, blank?);
    options.assert_all_used()?;
    let margin = match width {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(checked_width(usize::try_from(width)?)?),
        },
    };
    checked_width(margin.len())?;
    let value = text(&value).replace("\r\n", "\n") + "\n";
    let ends =
        |c| matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut out = String::new();
    for (number, line) in value.split_terminator(ends).enumerate() {
        if number > 0 {
            out.push('\n');
        }
        if if number == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&margin);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// A number as Python prints it: the fewest digits that tell it from others, with an exponent for very large and small ones.
fn float(number: f64) -> String {
    if !number.is_finite() {
        return if number.is_nan() {
            "nan"
        } else if number > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .to_owned();
    }
    let short = format!("{number:e}");
    let (digits, exponent) = short.split_once('e').unwrap_or((&short, "0"));
    match exponent.parse::<i32>() {
        Ok(power) if !(-4..16).contains(&power) => {
            format!("{digits}e{}{:02}", if power < 0 { '-' } else { '+' }, power.unsigned_abs())
        }
        _ => format!("{number:?}"),
    }
}

/// A value as Python prints it.
pub(super) fn text(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None if value.is_undefined() => String::new(),
        None => repr(value),
    }
}

fn repr(value: &Value) -> String {
    let all = |value: &Value| value.try_iter().into_iter().flatten().collect::<Vec<_>>();
    match value.kind() {
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            let mut quoted = String::from(quote);
            for c in text.chars() {
                match c {
                    '\\' => quoted.push_str("\\\\"),
                    '\n' => quoted.push_str("\\n"),
                    '\r' => quoted.push_str("\\r"),
                    '\t' => quoted.push_str("\\t"),
                    c if c == quote => quoted.extend(['\\', c]),
                    c => quoted.push(c),
                }
            }
            quoted.push(quote);
            quoted
        }
        ValueKind::Seq | ValueKind::Iterable => {
            format!("[{}]", all(value).iter().map(repr).collect::<Vec<_>>().join(", "))
        }
        ValueKind::Map => {
            let entry = |key: &Value| {
                let value = value.get_item(key).unwrap_or_default();
                format!("{}: {}", repr(key), repr(&value))
            };
            format!("{{{}}}", all(value).iter().map(entry).collect::<Vec<_>>().join(", "))
        }
        ValueKind::Number if !value.is_integer() => float(f64::try_from(value.clone()).unwrap_or(f64::NAN)),
        _ => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_in_python() {
        for (number, written) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (-1.5e-7, "-1.5e-07"),
            (123456789012345.6, "123456789012345.6"),
            (9999999999999998.0, "9999999999999998.0"),
            (1e16, "1e+16"),
            (1.25e100, "1.25e+100"),
            (5e-324, "5e-324"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "nan"),
        ] {
            assert_eq!(float(number), written);
        }
    }

    #[test]
    fn filters_and_tests_work_as_in_python() {
        let mut environment = Environment::new();
        register(&mut environment);
        for (expression, expected) in [
            ("['string', none, true, 1.0] | upper", "['STRING', NONE, TRUE, 1.0]"),
            ("{'A': 1e20} | lower", "{'a': 1e+20}"),
            ("[1e-7, 'é'] | string", "[1e-07, 'é']"),
            ("'it IS <so>' | title", "It Is <So>"),
            ("'éCOLE' | capitalize", "École"),
            ("' \u{1c}a\n' | trim", "a"),
            ("'xxaxy' | trim('xy')", "a"),
            ("[1] | trim", "[1]"),
            ("'aaa' | replace('a', 'b', 2)", "bba"),
            ("none | replace('N', 1)", "1one"),
            ("[1.0, none, 'a'] | join(', ')", "1.0, None, a"),
            ("[{'a': {'b': 1}}, {'a': {'b': true}}] | join('+', attribute='a.b')", "1+True"),
            ("missing | join", ""),
            ("'a\n\nb\n' | indent(2)", "a\n\n  b\n"),
            ("'a\r\nb' | indent('> ', first=true)", "> a\n> b"),
            ("'a\n\nb' | indent(width=1, blank=true)", "a\n \n b"),
            ("missing | length", "0"),
            ("range(9) | length", "9"),
            ("missing | items | list | length", "0"),
            (
                "['x' | int, 'x' | int(5), ' 7 ' | int, '2.9' | int, -2.9 | int, true | int, none | int] | string",
                "[0, 5, 7, 2, -2, 1, 0]",
            ),
            ("[2.5 | round, 3.14159 | round(2), 3.2 | round(0, 'ceil'), 3 | round] | string", "[2.0, 3.14, 4.0, 3]"),
            ("'<a&\"\\'>' | e", "&lt;a&amp;&#34;&#39;&gt;"),
            ("'Hi, my_friend 2' | wordcount", "3"),
            ("('ab' | center(6)) ~ '|'", "  ab  |"),
            (
                "(none is iterable, missing is iterable, 'a' is iterable, 1 is iterable) | string",
                "[False, True, True, False]",
            ),
            (
                "({'a': 1} is sequence, 'a' is sequence, [] is sequence, true is number) | string",
                "[True, True, True, True]",
            ),
        ] {
            let found = environment.compile_expression(expression).unwrap().eval(()).unwrap();
            assert_eq!(found.to_string(), expected, "{expression}");
        }
        for refused in ["none | length", "none | join", "7 | join", "'a' | indent(999999)"] {
            assert!(environment.compile_expression(refused).unwrap().eval(()).is_err(), "{refused}");
        }
    }
}
