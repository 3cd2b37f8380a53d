//! Families with layers that have a state: state spaces, delta rules, short convolutions and RWKV.

mod delta;
mod entries;
mod falcon;
mod hybrid;
mod kimi;
mod mamba;
mod rwkv;
mod shortconv;

pub(super) use delta::{OLMO_HYBRID, QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT};
pub(super) use falcon::FALCON_H1;
pub(super) use hybrid::{BAMBA, GRANITE_HYBRID, NEMOTRON_H};
pub(super) use kimi::KIMI_LINEAR;
pub(super) use mamba::{FALCON_MAMBA, JAMBA, MAMBA, MAMBA2};
pub(super) use rwkv::RWKV;
pub(super) use shortconv::{LFM2, LFM2_MOE};
