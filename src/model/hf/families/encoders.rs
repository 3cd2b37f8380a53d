//! Encoders: models whose attention goes in both directions.

use super::family::{ActivationSource, BASE, HfFamily, Rotation, WindowRule};
use super::gemma::{GEMMA4, PLAIN_NORMS, PerLayerSizes, per_layer_sizes};
use super::parts::{NORMS, biased, default_attention, gated, head_norms};
use crate::error::Result;
use crate::model::arch::NormKind;
use crate::model::hf::entry::{Entry, Need, Transform, Values, tensor};
use crate::model::hf::heads::classifies;
use crate::model::hf::keys;
use crate::model::hf::metadata::MetadataWriter;
use crate::model::hf::settings::Settings;
use crate::model::hf::sizes::{Size, Sizes};
use Need::{Always, If, IfSo, Never, Optional};
use Transform::{Copy, RowsOfPart, SkipPadding};

/// Devlin et al. 2018, arXiv 1810.04805.
pub(super) const BERT: HfFamily = HfFamily {
    model_types: &["bert"],
    architecture: "bert",
    without_influence: BERT_UNUSED,
    bases: &["bert.", ""],
    outside: &[&embeddings(Copy), &head("~pooler.dense", "classifier")],
    layers: "~encoder.layer.",
    layer: &[&post_norm([
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "attention.output.LayerNorm",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    ])],
    ignored: &["cls.", "pooler.", "bert.pooler.", "embeddings.position_ids", "bert.embeddings.position_ids"],
    norm: NormKind::Layer,
    rotation: Rotation::None,
    encoder: true,
    adjust: |settings, sizes| {
        sizes.token_types = settings.count(&["type_vocab_size"])?;
        Ok(())
    },
    keys: bert_keys,
    ..BASE
};

/// A layer whose norms follow its parts: queries, keys, values, output and norm of attention, then both matrices of the
/// feed-forward network and its norm.
const fn post_norm(names: [&'static str; 8]) -> [Entry; 8] {
    let [q, k, v, output, norm, up, down, last] = names;
    let names = [
        ["attn_q", q],
        ["attn_k", k],
        ["attn_v", v],
        ["attn_output", output],
        ["attn_output_norm", norm],
        ["ffn_up", up],
        ["ffn_down", down],
        ["layer_output_norm", last],
    ];
    biased(Always, names)
}

/// Keys of dropout, and of the initial values.
const BERT_UNUSED: &[&str] = &["attention_probs_dropout_prob", "hidden_dropout_prob", "tie_word_embeddings"];

/// The embeddings of tokens, positions and types, and their norm.
const fn embeddings(positions: Transform) -> [Entry; 4] {
    [
        tensor("token_embd", "~embeddings.word_embeddings"),
        tensor("position_embd", "~embeddings.position_embeddings").by(positions),
        tensor("token_types", "~embeddings.token_type_embeddings"),
        tensor("token_embd_norm", "~embeddings.LayerNorm").bias(Always),
    ]
}

/// The two matrices of a classification head.
const fn head(dense: &'static str, output: &'static str) -> [Entry; 2] {
    [tensor("cls", dense).both(IfSo(classifies)), tensor("cls.output", output).both(IfSo(classifies))]
}

fn bert_keys(keys: &mut MetadataWriter<'_>) -> Result<()> {
    keys.require("is_decoder", false)?;
    keys.require("add_cross_attention", false)?;
    match keys.settings.text(&["position_embedding_type"])? {
        Some(other) if other != "absolute" => {
            Err(keys.settings.unsupported("position_embedding_type", format_args!("{other:?}"), "supported: absolute"))
        }
        _ => Ok(()),
    }
}

/// Conneau et al. 2019, arXiv 1911.02116, and Liu et al. 2019, arXiv 1907.11692. Positions count from the id of the padding
/// token.
pub(super) const XLM_ROBERTA: HfFamily = HfFamily {
    model_types: &["xlm-roberta", "roberta", "camembert"],
    bases: &["roberta.", ""],
    outside: &[&embeddings(SkipPadding), &head("classifier.dense", "classifier.out_proj")],
    ignored: &["lm_head.", "pooler.", "roberta.pooler.", "embeddings.position_ids", "roberta.embeddings.position_ids"],
    adjust: |settings, sizes| {
        sizes.token_types = settings.count(&["type_vocab_size"])?;
        sizes.padding = settings.number(&["pad_token_id"])? + 1;
        let Some(context) = sizes.context.checked_sub(sizes.padding).filter(|context| *context > 0) else {
            let expected = format!("more than the {} positions of padding", sizes.padding);
            return Err(settings.malformed("max_position_embeddings", sizes.context, expected));
        };
        sizes.context = context;
        Ok(())
    },
    ..BERT
};

/// Clark et al. 2020, arXiv 2003.10555, with embeddings as wide as the layers.
pub(super) const ELECTRA: HfFamily = HfFamily {
    model_types: &["electra"],
    without_influence: &[
        "attention_probs_dropout_prob",
        "hidden_dropout_prob",
        "summary_last_dropout",
        "tie_word_embeddings",
    ],
    bases: &["electra.", ""],
    outside: &[&embeddings(Copy), &head("classifier.dense", "classifier.out_proj")],
    ignored: &[
        "discriminator_predictions.",
        "generator_",
        "embeddings.position_ids",
        "electra.embeddings.position_ids",
    ],
    keys: |keys| {
        let [embedding, hidden] = ["embedding_size", "hidden_size"].map(|key| keys.settings.count(&[key]));
        let (embedding, hidden) = (embedding?, hidden?);
        if embedding != hidden {
            let supported = format!("supported: {hidden}, the hidden size");
            return Err(keys.settings.unsupported("embedding_size", embedding, &supported));
        }
        head_of_first_token(keys, "gelu")?;
        bert_keys(keys)
    },
    ..BERT
};

/// The activation of a head for whole documents that reads the first token.
fn head_of_first_token(keys: &mut MetadataWriter<'_>, activation: &str) -> Result<()> {
    match classifies(keys.settings)? {
        true => keys.head_activation("classifier.activation", "hidden_act", activation),
        false => Ok(()),
    }
}

/// Sanh et al. 2019, arXiv 1910.01108.
pub(super) const DISTILBERT: HfFamily = HfFamily {
    model_types: &["distilbert"],
    without_influence: &["qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds", "tie_word_embeddings"],
    bases: &["distilbert.", ""],
    outside: &[
        &[
            tensor("token_embd", "~embeddings.word_embeddings"),
            tensor("position_embd", "~embeddings.position_embeddings"),
            tensor("token_embd_norm", "~embeddings.LayerNorm").bias(Always),
        ],
        &head("pre_classifier", "classifier"),
    ],
    layers: "~transformer.layer.",
    layer: &[&post_norm([
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "attention.out_lin",
        "sa_layer_norm",
        "ffn.lin1",
        "ffn.lin2",
        "output_layer_norm",
    ])],
    ignored: &["vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "distilbert.embeddings.position_ids"],
    // The class has no key for the epsilon.
    defaults: &[&[("layer_norm_eps", "1e-12")]],
    activation: ActivationSource::Under(&["activation"]),
    adjust: |_, _| Ok(()),
    keys: |keys| head_of_first_token(keys, "relu"),
    ..BERT
};

/// Boizard et al. 2025, arXiv 2503.05500.
pub(super) const EUROBERT: HfFamily = HfFamily {
    model_types: &["eurobert"],
    architecture: "eurobert",
    without_influence: &["mask_token_id", "tie_word_embeddings"],
    outside: &[&[tensor("token_embd", "~embed_tokens"), tensor("output_norm", "~norm")], &head("dense", "classifier")],
    layer: &[NORMS, &default_attention(Copy), &gated(Always, If("mlp_bias"))],
    ignored: &["lm_head."],
    encoder: true,
    keys: |keys| match classifier_pooling(keys, "late", "bos")? {
        true => head_of_first_token(keys, "gelu"),
        false => Ok(()),
    },
    ..BASE
};

/// Zhang et al. 2024, arXiv 2407.19669: mGTE.
pub(super) const GTE: HfFamily = HfFamily {
    model_types: &["gte"],
    architecture: "nomic-bert",
    defaults: &[&[("rope_theta", "1.6e5")]],
    bases: &["gte.", "new.", "model.", ""],
    outside: &[
        &[
            tensor("token_embd", "~embeddings.word_embeddings"),
            tensor("token_types", "~embeddings.token_type_embeddings").when(IfSo(has_types)),
            tensor("token_embd_norm", "~embeddings.LayerNorm").bias(Always),
        ],
        &head("~pooler.dense", "classifier"),
    ],
    layer: &[
        &biased(
            Always,
            [
                ["attn_qkv", "attention.qkv_proj"],
                ["attn_output", "attention.o_proj"],
                ["attn_output_norm", "attn_ln"],
                ["ffn_down", "mlp.down_proj"],
                ["layer_output_norm", "mlp_ln"],
            ],
        ),
        &[
            tensor("ffn_up", "mlp.up_gate_proj").by(RowsOfPart { part: 0, parts: 2 }),
            tensor("ffn_gate", "mlp.up_gate_proj").by(RowsOfPart { part: 1, parts: 2 }),
        ],
    ],
    ignored: &["lm_head.", "pooler.", "gte.pooler.", "new.pooler."],
    rotation: Rotation::All,
    adjust: |settings, sizes| {
        sizes.token_types = settings.number(&["type_vocab_size"])?;
        Ok(())
    },
    keys: |_| Ok(()),
    ..BERT
};

/// Nussbaum et al. 2024, arXiv 2402.01613: the names of Hugging Face's class, and those of GPT-2 in published files.
pub(super) const NOMIC_BERT: HfFamily = HfFamily {
    model_types: &["nomic_bert"],
    architecture: "nomic-bert",
    without_influence: &["attention_probs_dropout_prob", "hidden_dropout_prob"],
    bases: &["bert.", "nomic_bert.", ""],
    outside: &[&[
        tensor("token_embd", "~embeddings.word_embeddings"),
        tensor("token_types", "~embeddings.token_type_embeddings").when(IfSo(has_types)),
        tensor("token_embd_norm", "~emb_ln").bias(Always),
    ]],
    layers: "~encoder.layers.",
    layer: &[&[
        tensor("attn_qkv", "attn.Wqkv").bias(If("qkv_proj_bias")),
        tensor("attn_output", "attn.out_proj").bias(If("qkv_proj_bias")),
        tensor("attn_output_norm", "norm1").bias(Always),
        tensor("ffn_up", "mlp.fc11").bias(If("mlp_fc1_bias")),
        tensor("ffn_gate", "mlp.fc12").bias(If("mlp_fc1_bias")),
        tensor("ffn_down", "mlp.fc2").bias(If("mlp_fc2_bias")),
        tensor("layer_output_norm", "norm2").bias(Always),
    ]],
    ignored: &["cls.", "pooler.", "bert.pooler."],
    defaults: &[&[("rope_theta", "1e3")]],
    norm: NormKind::Layer,
    activation: ActivationSource::Under(&["hidden_act", "activation_function"]),
    encoder: true,
    adjust: |settings, sizes| {
        sizes.token_types = settings.number(&["type_vocab_size"])?;
        if let Some(trained) = settings.optional_count(&["max_trained_positions"])? {
            sizes.context = sizes.context.min(trained);
        }
        Ok(())
    },
    keys: |keys| {
        for switch in ["prenorm", "use_rms_norm", "parallel_block", "causal", "rotary_emb_interleaved"] {
            keys.require(switch, false)?;
        }
        for (key, none) in [("moe_every_n_layers", 0.0), ("rotary_emb_fraction", 1.0), ("rotary_scaling_factor", 1.0)] {
            let found = keys.settings.optional_float(&[key])?.unwrap_or(none);
            if found != none {
                return Err(keys.settings.unsupported(key, found, &format!("supported: {none}")));
            }
        }
        Ok(())
    },
    ..BASE
};

fn has_types(settings: &Settings) -> Result<bool> {
    Ok(settings.number(&["type_vocab_size"])? > 0)
}

/// Sturua et al. 2024, arXiv 2409.10173, without the adapters for tasks.
pub(super) const JINA_V3: HfFamily = HfFamily {
    model_types: &["jina_embeddings_v3"],
    architecture: "jina-bert-v3",
    defaults: &[&[("rope_theta", "2e4")]],
    bases: &["roberta.", "model.", ""],
    outside: &[
        &[
            tensor("token_embd", "~embeddings.word_embeddings"),
            tensor("token_types", "~embeddings.token_type_embeddings"),
            tensor("token_embd_norm", "~emb_ln").bias(Always),
        ],
        &head("classifier.dense", "classifier.out_proj"),
    ],
    layers: "~encoder.layers.",
    layer: &[&biased(
        Always,
        [
            ["attn_qkv", "mixer.Wqkv"],
            ["attn_output", "mixer.out_proj"],
            ["attn_output_norm", "norm1"],
            ["ffn_up", "mlp.fc1"],
            ["ffn_down", "mlp.fc2"],
            ["layer_output_norm", "norm2"],
        ],
    )],
    ignored: &["lm_head.", "pooler.", "roberta.pooler.", "model.pooler."],
    rotation: Rotation::All,
    keys: |_| Ok(()),
    ..BERT
};

/// Warner et al. 2024, arXiv 2412.13663.
pub(super) const MODERN_BERT: HfFamily = HfFamily {
    model_types: &["modernbert"],
    architecture: "modern-bert",
    defaults: &[&[("rope_theta", "1.6e5"), ("rope_local_base_freq", "1e4"), ("global_attn_every_n_layers", "3")]],
    without_influence: &[
        "cls_token_id",
        "decoder_bias",
        "deterministic_flash_attn",
        "initializer_cutoff_factor",
        "mlp_dropout",
        "sep_token_id",
        "sparse_pred_ignore_index",
        "sparse_prediction",
        "tie_word_embeddings",
    ],
    outside: &[&[
        tensor("token_embd", "~embeddings.tok_embeddings"),
        tensor("token_embd_norm", "~embeddings.norm").bias(If("norm_bias")),
        tensor("output_norm", "~final_norm").bias(If("norm_bias")),
        tensor("cls", "head.dense").when(IfSo(classifies)).bias(IfSo(head_bias)),
        tensor("cls.norm", "head.norm").when(IfSo(classifies)).bias(IfSo(head_norm_bias)),
        tensor("cls.output", "classifier").both(IfSo(classifies)),
    ]],
    layer: &[&[
        tensor("attn_norm", "attn_norm").when(Need::Where(|_, layer| layer > 0)).bias(Optional),
        tensor("attn_qkv", "attn.Wqkv").bias(If("attention_bias")),
        tensor("attn_output", "attn.Wo").bias(If("attention_bias")),
        tensor("ffn_norm", "mlp_norm").bias(If("norm_bias")),
        tensor("ffn_up", "mlp.Wi").dims(&[Size::Hidden, Size::TwiceFfn]).bias(If("mlp_bias")),
        tensor("ffn_down", "mlp.Wo").bias(If("mlp_bias")),
    ]],
    ignored: &["head.", "decoder."],
    norm: NormKind::Layer,
    activation: ActivationSource::Under(&["hidden_activation"]),
    window: WindowRule::FullFirstOf("global_attn_every_n_layers"),
    encoder: true,
    radius: false,
    keys: |keys| {
        let activation = keys.settings.text(&["classifier_activation"])?.unwrap_or_else(|| "gelu".to_owned());
        match classifier_pooling(keys, "cls", "cls")? {
            true => keys.head_activation("classifier.activation", "classifier_activation", &activation),
            false => Ok(()),
        }
    },
    ..BASE
};

/// Writes what a classification head reads: the mean of the hidden states, or the state of the `first` token. Returns whether
/// the model has such a head.
fn classifier_pooling(keys: &mut MetadataWriter<'_>, default: &str, first: &str) -> Result<bool> {
    // Read in any case: a key that nobody reads is refused.
    let pooling = keys.settings.text(&["classifier_pooling"])?.unwrap_or_else(|| default.to_owned());
    if !classifies(keys.settings)? {
        return Ok(false);
    }
    let number = match pooling.as_str() {
        "mean" => 1u32,
        other if other == first => 2,
        other => {
            let supported = format!("supported: {first}, mean");
            return Err(keys.settings.unsupported("classifier_pooling", format_args!("{other:?}"), &supported));
        }
    };
    keys.set("classifier.pooling_type", number);
    Ok(true)
}

fn head_bias(settings: &Settings) -> Result<bool> {
    Ok(classifies(settings)? && settings.switch("classifier_bias", false)?)
}

fn head_norm_bias(settings: &Settings) -> Result<bool> {
    Ok(classifies(settings)? && settings.switch("norm_bias", false)?)
}

/// Google 2026: EmbeddingGemma 2, the text part. Its vectors of layers are projections of the embedding alone.
pub(super) const EMBEDDING_GEMMA2: HfFamily = HfFamily {
    model_types: &["embedding_gemma2_text", "embedding_gemma2"],
    architecture: "gemma-embedding2",
    defaults: &[&[("sliding_window_pattern", "6"), ("rope_theta", "1e6"), ("rope_local_base_freq", "1e4")]],
    bases: &["model.language_model.", "language_model.", "model.", ""],
    outside: &[&[
        tensor("token_embd", "~embed_tokens"),
        tensor("output_norm", "~norm"),
        tensor("dense_2", "~embedding_projection"),
        tensor("per_layer_model_proj", "~ple.per_layer_model_projection"),
        tensor("per_layer_proj_norm", "~ple.per_layer_projection_norm"),
    ]],
    layer: &[
        &PLAIN_NORMS,
        &default_attention(Copy),
        &head_norms(Values::Same),
        &gated(Always, Never),
        &[
            tensor("inp_gate", "ple_block.per_layer_input_gate"),
            tensor("proj", "ple_block.per_layer_projection"),
            tensor("post_norm", "ple_block.post_per_layer_input_norm"),
            tensor("layer_output_scale", "layer_scalar").raw(),
        ],
    ],
    window: WindowRule::PeriodThenFull(&["sliding_window_pattern"]),
    encoder: true,
    adjust: |settings: &Settings, sizes: &mut Sizes| {
        sizes.per_layer_input = settings.count(&["hidden_size_per_layer_input"])?;
        sizes.projected = settings.count(&["embedding_dim"])?;
        let rule = WindowRule::PeriodThenFull(&["sliding_window_pattern"]);
        let own = PerLayerSizes {
            slides: keys::window_kinds(settings, sizes.layers, rule)?,
            global: settings.optional_count(&["global_head_dim"])?.unwrap_or(512),
            global_kv: Some(settings.optional_count(&["num_global_key_value_heads"])?.unwrap_or(1)),
            same: false,
            double: false,
        };
        per_layer_sizes(settings, sizes, &own)
    },
    keys: |keys| {
        keys.set("embedding_length_per_layer_input", keys.sizes.per_layer_input as u32);
        keys.dense_module([keys.sizes.hidden, keys.sizes.projected], "identity");
        Ok(())
    },
    ..GEMMA4
};
