//! The filter `tojson`.

use minijinja::ErrorKind;
use minijinja::value::{Kwargs, Value, ValueKind};

use super::python;

/// JSON as Python's `json.dumps` writes it, without escapes for HTML.
pub(super) fn filter(value: Value, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    let sorted: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    options.assert_all_used()?;
    if indent.is_some_and(|indent| indent > 16) {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "tojson: indent: expected at most 16"));
    }
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        _ => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let style = Style { indent, item, key, ascii: ascii == Some(true), sorted: sorted == Some(true) };
    let mut out = String::new();
    style.write(&mut out, &value, 0)?;
    Ok(out)
}

/// A key as JSON has it.
fn key_text(key: &Value) -> String {
    match key.kind() {
        ValueKind::None => "null".to_owned(),
        ValueKind::Bool => if key.is_true() { "true" } else { "false" }.to_owned(),
        _ => python::text(key),
    }
}

struct Style {
    indent: Option<usize>,
    item: String,
    key: String,
    ascii: bool,
    sorted: bool,
}

impl Style {
    fn write(&self, out: &mut String, value: &Value, level: usize) -> std::result::Result<(), minijinja::Error> {
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(out, '[', ']', level, &items, |out, item| self.write(out, item, level + 1))
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sorted {
                    keys.sort();
                }
                self.list(out, '{', '}', level, &keys, |out, key| {
                    self.string(out, &key_text(key));
                    out.push_str(&self.key);
                    self.write(out, &value.get_item(key)?, level + 1)
                })
            }
            ValueKind::String => {
                self.string(out, value.as_str().unwrap_or_default());
                Ok(())
            }
            ValueKind::None => {
                out.push_str("null");
                Ok(())
            }
            ValueKind::Bool => {
                out.push_str(if value.is_true() { "true" } else { "false" });
                Ok(())
            }
            ValueKind::Number => {
                out.push_str(&match f64::try_from(value.clone()) {
                    Ok(number) if number.is_nan() => "NaN".to_owned(),
                    Ok(number) if number.is_infinite() => {
                        if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned()
                    }
                    _ => python::text(value),
                });
                Ok(())
            }
            other => {
                let message = format!("tojson: a value of type {other} is not JSON");
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            }
        }
    }

    fn list(
        &self,
        out: &mut String,
        open: char,
        close: char,
        level: usize,
        items: &[Value],
        write: impl Fn(&mut String, &Value) -> std::result::Result<(), minijinja::Error>,
    ) -> std::result::Result<(), minijinja::Error> {
        out.push(open);
        let new_line = |out: &mut String, level: usize| {
            if let Some(indent) = self.indent.filter(|_| !items.is_empty()) {
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent * level));
            }
        };
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(&self.item);
            }
            new_line(out, level + 1);
            write(out, item)?;
        }
        new_line(out, level);
        out.push(close);
        Ok(())
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if u32::from(c) < 0x20 || self.ascii && !c.is_ascii() => {
                    let mut units = [0; 2];
                    c.encode_utf16(&mut units).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}
