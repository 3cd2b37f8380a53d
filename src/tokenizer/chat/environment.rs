//! The environment of chat templates, with the functions that Hugging Face's `transformers` provides.

use std::fmt::Write;

use chrono::{Local, NaiveDateTime};
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, Output, State};

use super::{json, methods, python};

/// Steps of one rendering. Real templates need about 100 per message.
const MAX_STEPS: u64 = 10_000_000;
/// Characters of a pattern of `strftime_now`.
const MAX_PATTERN: usize = 100;

/// The reason for which a template refuses its messages.
pub(super) fn refusal(error: &minijinja::Error) -> Option<String> {
    error.detail()?.strip_prefix(REFUSED).map(str::to_owned)
}

const REFUSED: &str = "refused: ";

pub(super) fn one_line(error: &minijinja::Error) -> String {
    let line = error.line().map(|line| format!("line {line}: ")).unwrap_or_default();
    let text = format!("{line}{error}");
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect()
}

/// `{% generation %}` marks the model's answers for training. It has no effect on prompts.
pub(super) fn without_generation_tags(source: &str) -> String {
    let (mut out, mut rest) = (String::with_capacity(source.len()), source);
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|end| start + end) else { break };
        let inner = &rest[start + 2..end];
        let replaced = match inner.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace()) {
            "generation" => inner.replace("generation", "with"),
            "endgeneration" => inner.replace("endgeneration", "endwith"),
            _ => inner.to_owned(),
        };
        out.push_str(&rest[..start + 2]);
        out.push_str(&replaced);
        out.push_str("%}");
        rest = &rest[end + 2..];
    }
    out + rest
}

/// The environment of templates.
pub(super) fn environment<'s>() -> Environment<'s> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(MAX_STEPS));
    environment.set_formatter(format);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(methods::call);
    environment.add_filter("tojson", json::filter);
    python::register(&mut environment);
    environment.add_function("raise_exception", |message: Value| -> std::result::Result<(), minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{REFUSED}{}", python::text(&message))))
    });
    environment.add_function("strftime_now", strftime_now);
    environment
}

fn format(out: &mut Output<'_>, _: &State<'_, '_>, value: &Value) -> std::result::Result<(), minijinja::Error> {
    out.write_str(&python::text(value)).map_err(minijinja::Error::from)
}

/// The local time in a pattern of `strftime`.
fn strftime_now(pattern: &str) -> std::result::Result<String, minijinja::Error> {
    date(Local::now().naive_local(), pattern)
}

fn date(time: NaiveDateTime, pattern: &str) -> std::result::Result<String, minijinja::Error> {
    let refused = |why: &str| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {why}"));
    if pattern.chars().count() > MAX_PATTERN || pattern.contains(|c: char| c.is_ascii_digit()) {
        return Err(refused("the pattern is too long or contains a width"));
    }
    let mut out = String::new();
    // Fails for what chrono does not know, and for the time zone, which a local time does not have.
    match write!(out, "{}", time.format(pattern)) {
        Ok(()) => Ok(out),
        Err(_) => Err(refused(&format!("the pattern {pattern:?} is not supported"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Five and three quarter hours east of Greenwich.
    const ZONE: &str = "NPT-05:45";

    fn at(seconds: i64) -> NaiveDateTime {
        chrono::DateTime::from_timestamp(seconds, 0).unwrap().naive_utc()
    }

    #[test]
    fn dates_are_written_in_the_patterns_of_templates() {
        assert_eq!(date(at(0), "%A %d %B %Y %H:%M:%S").unwrap(), "Thursday 01 January 1970 00:00:00");
        assert_eq!(date(at(951_782_399), "%a %-d %b %y, %I:%M %p").unwrap(), "Mon 28 Feb 00, 11:59 PM");
        assert_eq!(date(at(951_782_400), "%Y-%m-%d%%").unwrap(), "2000-02-29%");
        for refused in ["%Q", "%Z", "%100000Y", &"%Y".repeat(51)] {
            assert!(date(at(0), refused).is_err(), "{refused}");
        }
    }

    #[test]
    fn templates_see_the_local_time() {
        // A process cannot change its time zone safely while other threads run, so the test starts itself in this one.
        if std::env::var("TZ").as_deref() != Ok(ZONE) {
            let test = "tokenizer::chat::environment::tests::templates_see_the_local_time";
            // `make test-arm` names an emulator, which cannot start programs like itself without it.
            let emulator = std::env::var("NYBBLE_TEST_RUNNER").unwrap_or_default();
            let program = std::env::current_exe().unwrap().into_os_string();
            let mut words = emulator.split_whitespace().map(Into::into).chain([program]);
            let mut command = std::process::Command::new(words.next().unwrap());
            let done = command.args(words).args([test, "--exact"]).env("TZ", ZONE).output().unwrap();
            let printed = String::from_utf8_lossy(&done.stdout);
            let errors = String::from_utf8_lossy(&done.stderr);
            assert!(done.status.success() && printed.contains("1 passed"), "{}: {printed}{errors}", done.status);
            return;
        }
        let east = chrono::TimeDelta::minutes(5 * 60 + 45);
        let minute = || date(chrono::Utc::now().naive_utc() + east, "%d %H:%M").unwrap();
        let before = minute();
        let shown = strftime_now("%d %H:%M").unwrap();
        assert!([before, minute()].contains(&shown), "{shown}");
    }
}
