//! The hyperparameters of recurrent mixers, and the sizes of their states.

use super::layers::LayerConfig;
use super::metadata::MetadataReader;
use crate::error::Result;
use crate::model::arch::{Family, FeedForwardKind, MixerKind};
use crate::quant::packed::PANEL;

/// The widest state of a mixer, in numbers: more than any known model has, so that sizes cannot overflow.
const MAX_WIDTH: usize = 1 << 20;
/// The most numbers of the states of all layers.
const MAX_NUMBERS: usize = 1 << 36;

/// Recurrent mixers: those whose layers carry a state from one position to the next.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct RecurrentConfig {
    /// Positions that the convolution before a recurrence sees, its own included.
    pub kernel: usize,
    /// Channels of the recurrence: the values of all heads.
    pub inner: usize,
    /// Width of a key or query: rows of a head's state.
    pub state: usize,
    /// Heads; of Mamba, whose channels have states of their own, the rank of the step's projection.
    pub heads: usize,
    /// Groups of heads that share keys and queries.
    pub groups: usize,
    /// Bounds of the length of a step.
    pub step_limits: [f32; 2],
    /// Factor of the share of a value that a step writes: beta.
    pub beta_scale: f32,
    /// Epsilon of Mamba's norms of the step, B and C, where they have no weights.
    pub unweighted_norms: Option<f32>,
    /// Epsilon of the norm of the output, where it is not that of the other norms.
    pub norm_eps: Option<f32>,
    /// After each group of this many layers, norms count their epsilon four times as much; 0 for never.
    pub rescale_every: usize,
    /// Whether the norm of a gated output comes before the gate.
    pub norm_before_gate: bool,
    /// Whether consecutive heads of values share a head of keys; otherwise every nth does.
    pub grouped_values: bool,
}

/// The sizes of one layer's state, in numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct StateSizes {
    /// Earlier inputs of a convolution, `(tail, channels)`.
    pub(crate) tail: usize,
    pub(crate) channels: usize,
    /// The matrix of all heads, in `(panels, rows, 16)`.
    pub(crate) panels: usize,
    pub(crate) rows: usize,
    /// What a step needs, besides the input of the convolution and a number per column, to be repeated.
    pub(crate) vectors: usize,
}

impl RecurrentConfig {
    /// Width of a head's value.
    pub fn head_dim(&self) -> usize {
        self.inner / self.heads
    }

    /// The sizes of the state of a feed-forward layer of this kind. `None` for those without one.
    pub(crate) fn ffn_sizes(&self, kind: FeedForwardKind, hidden: usize) -> Option<StateSizes> {
        let sizes = StateSizes { tail: 1, channels: hidden, ..StateSizes::default() };
        (kind == FeedForwardKind::ChannelMix).then_some(sizes)
    }

    /// The sizes of the state of a layer with a mixer of this kind in a model of width `hidden`.
    pub(crate) fn sizes(&self, kind: MixerKind, hidden: usize) -> StateSizes {
        let tail = self.kernel - 1;
        let keys = self.groups * self.state;
        let panels = self.heads * self.head_dim().div_ceil(PANEL);
        let matrix = |gates: usize| StateSizes {
            tail,
            channels: self.inner + 2 * keys,
            panels,
            rows: self.state,
            vectors: keys + gates,
        };
        match kind {
            MixerKind::GatedDelta | MixerKind::Mamba2 | MixerKind::AttentionAndMamba2 => matrix(self.heads),
            MixerKind::KimiDelta => matrix(self.heads * self.state),
            MixerKind::Mamba => {
                let panels = self.inner.div_ceil(PANEL);
                let vectors = self.state + panels * PANEL;
                StateSizes { tail, channels: self.inner, panels, rows: self.state, vectors }
            }
            MixerKind::ShortConvolution => StateSizes { tail, channels: hidden, ..StateSizes::default() },
            // Sums of values and of weights, and their exponent.
            MixerKind::Rwkv => {
                let panels = self.inner.div_ceil(PANEL);
                StateSizes { tail, channels: hidden, panels, rows: 3, vectors: panels * PANEL }
            }
            MixerKind::Attention | MixerKind::LatentAttention | MixerKind::None => StateSizes::default(),
        }
    }
}

/// Reads the keys of the recurrent layers. `None` for models without any.
pub(super) fn read(
    keys: &MetadataReader<'_>,
    family: &Family,
    hidden: usize,
    layers: &[LayerConfig],
) -> Result<Option<RecurrentConfig>> {
    let Some((kind, _)) = family.recurrent else { return Ok(None) };
    let Some(first) = layers.iter().find(|layer| layer.kind.mixer == kind) else { return Ok(None) };
    let config = sizes(keys, kind, hidden, first.heads)?;
    let wide = config.inner.saturating_mul(config.state).saturating_mul(layers.len());
    keys.check("ssm.state_size", config.state, wide <= MAX_NUMBERS, "a state that fits into memory")?;
    Ok(Some(RecurrentConfig { grouped_values: family.grouped_values, ..config }))
}

fn sizes(keys: &MetadataReader<'_>, kind: MixerKind, hidden: usize, heads: usize) -> Result<RecurrentConfig> {
    let count = |key: &str| {
        let count = keys.count(key)?;
        keys.check(key, count, count <= MAX_WIDTH, format_args!("at most {MAX_WIDTH}"))?;
        Ok(count)
    };
    let inner_eps = keys.positive("ssm.dt_b_c_rms_epsilon")?.unwrap_or(1e-6);
    let mut config = RecurrentConfig {
        kernel: 0,
        inner: hidden,
        state: 1,
        heads: 1,
        groups: 1,
        step_limits: [keys.positive("ssm.time_step_min")?.unwrap_or(0.0), time_step_max(keys)?],
        beta_scale: keys.positive("ssm.beta_scale")?.unwrap_or(1.0),
        unweighted_norms: keys.flag("ssm.dt_b_c_rms")?.unwrap_or(false).then_some(inner_eps),
        norm_eps: keys.positive("ssm.norm_epsilon")?,
        rescale_every: match keys.get("rescale_every") {
            Some(value) if value.as_u64() == Some(0) => 0,
            _ => keys.optional_count("rescale_every")?.unwrap_or(0),
        },
        norm_before_gate: keys.flag("ssm.norm_before_gate")?.unwrap_or(false),
        grouped_values: true,
    };
    if kind == MixerKind::Rwkv {
        config.kernel = 2;
        if keys.get("ssm.inner_size").is_some() {
            config.inner = count("ssm.inner_size")?;
        }
        return Ok(config);
    }
    let kernel = if kind == MixerKind::ShortConvolution { "shortconv.l_cache" } else { "ssm.conv_kernel" };
    config.kernel = count(kernel)?;
    keys.check(kernel, config.kernel, config.kernel <= 64, "at most 64")?;
    match kind {
        MixerKind::ShortConvolution => return Ok(config),
        MixerKind::KimiDelta => {
            config.state = count("kda.head_dim")?;
            (config.heads, config.groups, config.inner) = (heads, heads, heads * config.state);
            return Ok(config);
        }
        _ => {}
    }
    config.inner = count("ssm.inner_size")?;
    config.state = count("ssm.state_size")?;
    config.heads = count("ssm.time_step_rank")?;
    if kind == MixerKind::Mamba {
        return Ok(config);
    }
    config.groups = match keys.get("ssm.group_count") {
        None => 1,
        Some(_) => count("ssm.group_count")?,
    };
    let (inner, heads, groups) = (config.inner, config.heads, config.groups);
    let divides = heads <= inner && inner.is_multiple_of(heads);
    keys.check("ssm.time_step_rank", heads, divides, format_args!("a divisor of the inner size {inner}"))?;
    let divides = groups <= heads && heads.is_multiple_of(groups);
    keys.check("ssm.group_count", groups, divides, format_args!("a divisor of the {heads} heads"))?;
    let wide = groups.saturating_mul(config.state);
    keys.check(
        "ssm.state_size",
        config.state,
        wide <= MAX_WIDTH,
        format_args!("at most {} per group", MAX_WIDTH / groups),
    )?;
    Ok(config)
}

/// The largest length of a step, which may be infinite.
fn time_step_max(keys: &MetadataReader<'_>) -> Result<f32> {
    let key = "ssm.time_step_max";
    match keys.float(key)? {
        None => Ok(f32::INFINITY),
        Some(max) => keys.check(key, max, max > 0.0, "a positive number").map(|()| max),
    }
}
