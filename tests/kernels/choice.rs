//! The available kernels and how one is chosen.

use std::process::Command;

use nybble::Error;
use nybble::kernels::{available, best, by_name, choose};

fn names() -> Vec<&'static str> {
    available().iter().map(|kernel| kernel.name()).collect()
}

#[test]
fn every_required_kernel_runs_here() {
    println!("kernels: {}", names().join(", "));
    let required = std::env::var("NYBBLE_REQUIRE_KERNELS").unwrap_or_default();
    for name in required.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        assert!(
            names().contains(&name),
            "NYBBLE_REQUIRE_KERNELS requires {name}, but this CPU runs only {:?}",
            names()
        );
    }
}

#[test]
fn scalar_is_always_available_and_last() {
    assert_eq!(names().last(), Some(&"scalar"));
    assert_eq!(best().name(), names()[0]);
}

#[test]
fn every_kernel_is_found_by_its_unique_name() {
    for (i, name) in names().iter().enumerate() {
        assert_eq!(by_name(name).unwrap().name(), *name);
        assert_eq!(choose(Some(name)).unwrap().name(), *name);
        assert!(!names()[..i].contains(name), "{name} twice");
    }
}

#[test]
fn an_unknown_name_is_an_error_that_lists_the_available_kernels() {
    for name in ["abacus", "", "SCALAR", "avx"] {
        for error in [by_name(name).unwrap_err(), choose(Some(name)).unwrap_err()] {
            let text = error.to_string();
            assert!(
                matches!(&error, Error::UnknownKernel { name: n, available } if n == name && *available == names())
            );
            assert!(names().iter().all(|name| text.contains(name)), "{text}");
            assert!(text.contains(&format!("{name:?}")), "{text}");
        }
    }
}

/// A command that runs this program again, in the same emulator if `make test-arm` names one.
fn this_program() -> Command {
    let program = std::env::current_exe().unwrap().into_os_string();
    let emulator = std::env::var("NYBBLE_TEST_RUNNER").unwrap_or_default();
    let mut words = emulator.split_whitespace().map(Into::into).chain([program]);
    let mut command = Command::new(words.next().unwrap());
    command.args(words);
    command
}

/// Set in the process that `the_environment_chooses_the_kernel_by_default` starts.
const CHILD: &str = "NYBBLE_TEST_CHOICE";

#[test]
fn the_environment_chooses_the_kernel_by_default() {
    if std::env::var_os(CHILD).is_some() {
        match choose(None) {
            Ok(kernel) => println!("[chose {}]", kernel.name()),
            Err(error) => println!("[error {error}]"),
        }
        println!("[asked {}]", choose(Some("scalar")).unwrap().name());
        return;
    }
    let cases = names().into_iter().map(|name| (name, format!("[chose {name}]")));
    let cases =
        cases.chain([("", format!("[chose {}]", best().name())), ("abacus", "[error kernel \"abacus\"".into())]);
    for (value, expected) in cases {
        let output = this_program()
            .args(["choice::the_environment_chooses_the_kernel_by_default", "--exact", "--nocapture"])
            .env("NYBBLE_KERNEL", value)
            .env(CHILD, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains(&expected), "NYBBLE_KERNEL={value}: {text}");
        assert!(text.contains("[asked scalar]"), "NYBBLE_KERNEL={value}: {text}");
    }
}
