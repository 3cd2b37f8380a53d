//! The weights of a head.

use crate::error::{Error, Place, Result};
use crate::model::arch::{FeedForwardKind, LayerKind, MixerKind, MtpInput};
use crate::model::config::Config;
use crate::model::linear::Linear;
use crate::model::norm::Norm;
use crate::model::state::cache::{CacheShape, CacheType};
use crate::model::transformer::{Layer, Widths};
use crate::model::weights::loader::{Loader, Part};
use crate::quant::packed::PANEL;

/// The weights of a head. It does not change.
#[derive(Debug)]
pub(in crate::model) struct Head {
    /// That of the model, with the head's layer as the only one.
    pub(super) config: Config,
    /// What the head reads.
    pub(super) input: MtpInput,
    /// Of embeddings and of states, before the projection.
    pub(super) embedding_norm: Norm,
    pub(super) state_norm: Norm,
    /// `(hidden, 2 * hidden)`: from a pair to the input of the layer.
    pub(super) projection: Linear,
    pub(super) layer: Layer,
    /// Before the output matrix; that of the model where the head has none.
    pub(super) norm: Option<Norm>,
    /// `(vocabulary, hidden)` each; those of the model where the head has none, or copies.
    pub(super) embedding: Option<Linear>,
    pub(super) output: Option<Linear>,
    pub(super) widths: Widths,
}

impl Head {
    /// Reads the head of a model with `vocabulary` tokens.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Malformed`] and [`Error::Unsupported`] with the tensor or the key.
    pub(in crate::model) fn load(loader: &Loader<'_>, config: &Config, vocabulary: usize) -> Result<Head> {
        let unsupported = |what: &str| Error::Unsupported {
            path: loader.path().to_path_buf(),
            place: Place::Key(format!("{}.nextn_predict_layers", config.family.name)),
            what: what.to_owned(),
            supported: "supported: heads of a layer of attention and a feed-forward network".to_owned(),
        };
        let (Some(mtp), Some(input)) = (config.mtp, config.family.mtp) else {
            return Err(unsupported("a head for multi-token prediction in this family"));
        };
        if config.parallel || config.streams.is_some() || !config.causal || loader.has("token_embd_proj.weight") {
            return Err(unsupported("a head for multi-token prediction whose branches are not in sequence"));
        }
        let LayerKind { mixer, ffn } = mtp.layer.kind;
        let attends = matches!(mixer, MixerKind::Attention | MixerKind::LatentAttention) && mtp.layer.shares.is_none();
        if !attends || ffn != FeedForwardKind::DenseOrExperts {
            return Err(unsupported("a head for multi-token prediction whose layer has no attention of its own"));
        }
        let (index, hidden) = (config.layers.len(), config.hidden);
        let mut whole = config.clone();
        whole.layers.push(mtp.layer);
        let name = |suffix: &str| format!("blk.{index}.nextn.{suffix}");
        let norm = |suffix: &str| {
            let norm = loader.norm(&name(suffix), config)?;
            norm.ok_or_else(|| loader.missing(&format!("{}.weight", name(suffix)), format_args!("{hidden} numbers")))
        };
        let own = |suffix: &str, others: &[&str]| {
            let weight = format!("{}.weight", name(suffix));
            let of_model = others.iter().find(|other| loader.has(other));
            if !loader.has(&weight) {
                return Ok(None);
            }
            if of_model.is_some_and(|other| loader.are_equal(&weight, other)) {
                loader.ignore(&weight);
                return Ok(None);
            }
            loader.linear(&[Part::new(name(suffix), vocabulary)], hidden).map(Some)
        };
        let layer = Layer::load(loader, &whole, index)?;
        let one = Config { layers: vec![mtp.layer], recurrent: None, ..config.clone() };
        let head = Head {
            input,
            embedding_norm: norm("enorm")?,
            state_norm: norm("hnorm")?,
            projection: loader.linear(&[Part::new(name("eh_proj"), hidden)], 2 * hidden)?,
            norm: loader.norm(&name("shared_head_norm"), config)?,
            embedding: own("embed_tokens", &["token_embd.weight"])?,
            output: own("shared_head_head", &["output.weight", "token_embd.weight"])?,
            widths: widths(&one, &layer),
            config: one,
            layer,
        };
        loader.check_leftovers_of(index)?;
        Ok(head)
    }

    /// The shape of the keys and values of the head's layer.
    pub(super) fn cache_shape(&self, cache_type: CacheType) -> CacheShape {
        CacheShape::of(&self.config, cache_type)
    }

    /// Bytes of all matrices.
    pub(in crate::model) fn bytes(&self) -> usize {
        let Head { projection, layer, embedding, output, .. } = self;
        let outside = [Some(projection), embedding.as_ref(), output.as_ref()].into_iter().flatten();
        outside.chain(layer.linears()).map(Linear::bytes).sum()
    }
}

/// The widest rows of the head.
fn widths(config: &Config, layer: &Layer) -> Widths {
    let mut widths = Widths { branch: config.hidden.next_multiple_of(PANEL), ..Widths::default() };
    if let Some(own) = config.layers.first() {
        layer.mixer.widen(config, own, &mut widths.mixers);
    }
    layer.ffn.widen(config, &mut widths.ffn);
    widths.input = (2 * config.hidden).max(widths.mixers.input).max(widths.ffn.input);
    widths
}
