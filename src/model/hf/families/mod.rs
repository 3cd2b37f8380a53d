//! The families as data: names, shapes and switches of `config.json`, and the names and layouts of tensors.
//!
//! A family that resembles another one is that family with differences (`..LLAMA`).

mod alibi;
mod deepseek;
mod family;
mod gemma;
mod gpt;
mod llama;
mod modern;
mod parts;
mod phi;
mod qwen;

pub(super) use family::{ActivationSource, HfFamily, Rotation, WindowRule};

/// Every family that can be read.
const FAMILIES: &[&HfFamily] = &[
    &llama::LLAMA,
    &llama::MISTRAL,
    &llama::MIXTRAL,
    &llama::GRANITE,
    &llama::SMOLLM3,
    &llama::OLMO2,
    &llama::STABLELM,
    &qwen::QWEN2,
    &qwen::QWEN2_MOE,
    &qwen::QWEN3,
    &qwen::QWEN3_MOE,
    &gemma::GEMMA,
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &gpt::GPT2,
    &gpt::GPT_BIGCODE,
    &gpt::GPTJ,
    &gpt::GPT_NEOX,
    &gpt::OPT,
    &gpt::STARCODER2,
    &alibi::BLOOM,
    &alibi::FALCON,
    &alibi::MPT,
    &phi::PHI,
    &phi::PHI3,
    &gemma::GEMMA3N,
    &gemma::GEMMA4,
    &modern::GPT_OSS,
    &modern::LLAMA4,
    &modern::MINISTRAL3,
    &modern::ARCEE,
    &modern::APERTUS,
    &modern::BITNET,
    &modern::OLMO,
    &modern::OLMO3,
    &modern::OLMOE,
    &modern::COHERE,
    &modern::COHERE2,
    &modern::EXAONE4,
    &modern::GLM,
    &modern::GLM4,
    &modern::GLM4_MOE,
    &modern::DOTS1,
    &modern::ERNIE4_5,
    &modern::ERNIE4_5_MOE,
    &modern::HUNYUAN_DENSE,
    &modern::HY_V3,
    &modern::SEED_OSS,
    &modern::NEMOTRON,
    &modern::MINIMAX_M2,
    &modern::PHIMOE,
    &modern::GRANITE_MOE,
    &modern::GRANITE_MOE_SHARED,
    &modern::GRANITE_SWA,
    &modern::GRANITE_MOE_SWA,
    &modern::MELLUM,
    &modern::LAGUNA,
    &modern::MUSE_GLIMMER,
    &deepseek::DEEPSEEK_V2,
    &deepseek::DEEPSEEK_V3,
    &deepseek::GLM4_MOE_LITE,
];

/// Every family that can be read.
#[cfg(test)]
pub(super) fn all() -> &'static [&'static HfFamily] {
    FAMILIES
}

/// The family of a `model_type`.
pub(super) fn by_model_type(name: &str) -> Option<&'static HfFamily> {
    FAMILIES.iter().find(|family| family.model_types.contains(&name)).copied()
}

/// Every `model_type` that can be read.
pub(super) fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().flat_map(|family| family.model_types).copied()
}
