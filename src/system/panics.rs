//! Panics as values, for callers that must not unwind.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `compute`. Returns the message of a panic as an error.
pub(crate) fn catch<R>(compute: impl FnOnce() -> R) -> Result<R, String> {
    catch_unwind(AssertUnwindSafe(compute)).map_err(|payload| {
        let message = payload.downcast_ref::<String>().map(String::as_str);
        message.or_else(|| payload.downcast_ref().copied()).unwrap_or("a panic").to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_with_its_message() {
        let number = std::hint::black_box(7);
        assert_eq!(catch(|| number), Ok(7));
        assert_eq!(catch(|| -> u8 { panic!("index {number}") }), Err("index 7".to_owned()), "formatted");
        assert_eq!(catch(|| -> u8 { panic!("no number") }), Err("no number".to_owned()), "literal");
        assert_eq!(catch(|| -> u8 { std::panic::panic_any(number) }), Err("a panic".to_owned()), "another type");
    }
}
