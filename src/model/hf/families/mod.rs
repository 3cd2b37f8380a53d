//! The families as data: names, shapes and switches of `config.json`, and the names and layouts of tensors.
//!
//! A family that resembles another one is that family with differences (`..LLAMA`).

mod alibi;
mod deepseek;
mod encoders;
mod family;
mod gemma;
mod glm;
mod gpt;
mod granite;
mod llama;
mod modern;
mod olmo;
mod parts;
mod phi;
mod qwen;
mod recurrent;

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
    &olmo::OLMO,
    &olmo::OLMO3,
    &olmo::OLMOE,
    &olmo::COHERE,
    &olmo::COHERE2,
    &olmo::EXAONE4,
    &glm::GLM,
    &glm::GLM4,
    &glm::GLM4_MOE,
    &glm::DOTS1,
    &glm::ERNIE4_5,
    &glm::ERNIE4_5_MOE,
    &glm::HUNYUAN_DENSE,
    &glm::HY_V3,
    &glm::SEED_OSS,
    &modern::NEMOTRON,
    &glm::MINIMAX_M2,
    &modern::PHIMOE,
    &granite::GRANITE_MOE,
    &granite::GRANITE_MOE_SHARED,
    &granite::GRANITE_SWA,
    &granite::GRANITE_MOE_SWA,
    &modern::MELLUM,
    &modern::LAGUNA,
    &modern::MUSE_GLIMMER,
    &deepseek::DEEPSEEK_V2,
    &deepseek::DEEPSEEK_V3,
    &deepseek::GLM4_MOE_LITE,
    &encoders::BERT,
    &encoders::XLM_ROBERTA,
    &encoders::ELECTRA,
    &encoders::DISTILBERT,
    &encoders::EUROBERT,
    &encoders::GTE,
    &encoders::MODERN_BERT,
    &encoders::NOMIC_BERT,
    &encoders::JINA_V3,
    &encoders::EMBEDDING_GEMMA2,
    &recurrent::QWEN3_NEXT,
    &recurrent::QWEN3_5,
    &recurrent::QWEN3_5_MOE,
    &recurrent::OLMO_HYBRID,
    &recurrent::KIMI_LINEAR,
    &recurrent::LFM2,
    &recurrent::LFM2_MOE,
    &recurrent::GRANITE_HYBRID,
    &recurrent::BAMBA,
    &recurrent::NEMOTRON_H,
    &recurrent::FALCON_H1,
    &recurrent::MAMBA,
    &recurrent::MAMBA2,
    &recurrent::FALCON_MAMBA,
    &recurrent::JAMBA,
    &recurrent::RWKV,
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

/// The families whose GGUF files have this architecture.
pub(super) fn of_architecture(name: &str) -> impl Iterator<Item = &'static HfFamily> {
    FAMILIES.iter().filter(move |family| family.architecture == name).copied()
}

/// Every `model_type` that can be read.
pub(super) fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().flat_map(|family| family.model_types).copied()
}
