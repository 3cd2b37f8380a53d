//! Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): `W x + scale * B (A x)`.
//!
//! | module | contents |
//! | --- | --- |
//! | `file`, `factors` | an adapter as its file describes it, under GGUF's names and in GGUF's order of rows |
//! | `read` | an adapter in any format |
//! | `peft`, `peft_folder`, `peft_config`, `experts` | folders that PEFT has saved |
//! | `gguf` | GGUF files |
//! | `bind`, `low_rank` | an adapter in memory, packed for the linear layers of a model |
//! | `rows` | the products of a batch whose rows have different adapters |
//! | `merged` | a checkpoint with an adapter merged into its matrices |
//! | `registry`, `models` | the adapters of a model by name: loading and choosing them |

mod bind;
mod experts;
mod factors;
mod file;
mod gguf;
pub(super) mod low_rank;
pub(super) mod merged;
mod models;
mod peft;
mod peft_config;
mod peft_folder;
mod read;
pub(super) mod registry;
pub(super) mod rows;
