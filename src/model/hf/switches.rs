//! Keys of `config.json` that nothing reads.
//!
//! Every key that a class of transformers defines is read, listed here or in the family's entry as without influence on the
//! result, or required to have the one value that is supported. A test compares the lists with `transformers.json`. Keys that
//! no class defines have no meaning in transformers either.

/// Switches that transformers applies in every family, and the value that is supported.
pub(super) const REQUIRED: &[(&str, bool)] = &[];

/// Keys without influence on the result, in any family.
#[cfg_attr(not(test), allow(dead_code, reason = "a list that the test holds against transformers"))]
pub(super) const WITHOUT_INFLUENCE: &[&str] = &[
    // What the file is, and what calls return.
    "dtype",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "return_dict",
    "transformers_version",
    "use_cache",
    // Read with the tokenizer.
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    // Training.
    "attention_dropout",
    "attn_pdrop",
    "dropout",
    "emb_pdrop",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "init_std",
    "initializer_range",
    "layerdrop",
    "resid_pdrop",
    "residual_dropout",
    "router_aux_loss_coef",
    // Heads for classes instead of tokens, whose tensors are refused.
    "classifier_dropout",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    // How the same numbers are computed.
    "attention_softmax_in_fp32",
    "chunk_size_feed_forward",
    "pretraining_tp",
    "reorder_and_upcast_attn",
    "scale_attention_softmax_in_fp32",
    "slow_but_exact",
];
