//! The Python module `nybble._native`: converts values, releases the GIL, delegates. It contains no logic. The package
//! `nybble` builds its API on it, and `_native.pyi` describes it to type checkers.

mod constraint;
mod detach;
mod errors;
mod evaluate;
mod gguf;
mod model;
mod pipeline;
mod processor;
mod quantize;
mod scheduler;
mod session;
mod tokenizer;
mod tokens;

/// The allocator of everything in this module. It returns memory to the system when a model is closed.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: crate::system::allocator::Allocator = crate::system::allocator::Allocator;

/// The compiled half of the package `nybble`.
#[pyo3::pymodule]
mod _native {
    #[pymodule_export]
    use super::constraint::{Constraint, Vocabulary};
    #[pymodule_export]
    use super::evaluate::{Reference, perplexity};
    #[pymodule_export]
    use super::gguf::{GgufFile, TensorInfo, check_output, convert, write_file};
    #[pymodule_export]
    use super::model::{
        Model, Sequence, available_bytes, cpu_name, default_threads, kernels, model_needs, resident_bytes, tuning,
    };
    #[pymodule_export]
    use super::pipeline::{Stage, divide, pipeline};
    #[pymodule_export]
    use super::quantize::{quantize, remove_leftovers};
    #[pymodule_export]
    use super::scheduler::Scheduler;
    #[pymodule_export]
    use super::session::Session;
    #[pymodule_export]
    use super::tokenizer::{TokenizerDescription, pre_tokenizer_names};
    #[pymodule_export]
    use super::tokens::Sampled;

    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "Python's name for it")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
