//! Everything that a forward pass reads.

mod loader;

use super::linear::Linear;
use crate::quant::packed::Code;
pub use loader::Progress;
pub(super) use loader::{Loader, Part};

/// Scale and bias of a norm.
#[derive(Debug)]
pub(super) struct Norm {
    /// `(width)`
    pub(super) weight: Vec<f32>,
    /// `(width)`, or empty.
    pub(super) bias: Vec<f32>,
}

/// A norm of queries or keys.
#[derive(Debug)]
pub(super) struct HeadNorm {
    /// Weights of one width, or of that width a head.
    pub(super) norm: Norm,
    /// What is normalized together: a head, or all heads.
    pub(super) width: usize,
}

/// Gate, up and down.
#[derive(Debug)]
pub(super) struct Mlp {
    /// Gate and up, or up alone.
    pub(super) up: Linear,
    pub(super) down: Linear,
    /// Width between up and down.
    pub(super) width: usize,
}

/// A feed-forward layer.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one a layer, beside megabytes of weights")]
pub(super) enum Ffn {
    Dense(Mlp),
    Experts {
        /// `(experts, hidden)`
        router: Linear,
        experts: Vec<Mlp>,
        /// An expert that every token uses, and the gate `(1, hidden)` of its output.
        shared: Option<(Mlp, Option<Linear>)>,
    },
}

/// One transformer block. Norms that a family does not have are `None`.
#[derive(Debug)]
pub(super) struct Layer {
    /// Before attention.
    pub(super) attn_norm: Option<Norm>,
    /// Query, key and value.
    pub(super) qkv: Linear,
    pub(super) q_norm: Option<HeadNorm>,
    pub(super) k_norm: Option<HeadNorm>,
    pub(super) attn_output: Linear,
    /// After attention, before it joins.
    pub(super) attn_post_norm: Option<Norm>,
    /// Of the stream, after attention has joined.
    pub(super) attn_joined_norm: Option<Norm>,
    /// Before the feed-forward layer.
    pub(super) ffn_norm: Option<Norm>,
    pub(super) ffn: Ffn,
    /// After the feed-forward layer, before it joins.
    pub(super) ffn_post_norm: Option<Norm>,
    /// Of the stream, after the feed-forward layer has joined.
    pub(super) ffn_joined_norm: Option<Norm>,
}

impl Layer {
    fn linears(&self) -> Vec<&Linear> {
        let mut all = vec![&self.qkv, &self.attn_output];
        match &self.ffn {
            Ffn::Dense(mlp) => all.extend([&mlp.up, &mlp.down]),
            Ffn::Experts { router, experts, shared } => {
                all.push(router);
                all.extend(experts.iter().flat_map(|mlp| [&mlp.up, &mlp.down]));
                if let Some((mlp, gate)) = shared {
                    all.extend([&mlp.up, &mlp.down]);
                    all.extend(gate);
                }
            }
        }
        all
    }

    /// Bytes that one token reads: of experts, those it uses.
    fn bytes_read(&self, used: usize) -> usize {
        let all: usize = self.linears().into_iter().map(Linear::bytes).sum();
        match &self.ffn {
            Ffn::Dense(_) => all,
            Ffn::Experts { experts, .. } => {
                let experts_bytes: usize = experts.iter().map(|mlp| mlp.up.bytes() + mlp.down.bytes()).sum();
                all - experts_bytes / experts.len().max(1) * experts.len().saturating_sub(used)
            }
        }
    }
}

/// Everything that a forward pass reads.
#[derive(Debug)]
pub(super) struct Weights {
    /// `(vocabulary, hidden)`, or of the width of the projections.
    pub(super) embedding: Linear,
    /// From the embedding's width to the stream's and back, where they differ.
    pub(super) projections: Option<[Linear; 2]>,
    pub(super) embedding_norm: Option<Norm>,
    /// `(positions, hidden)`
    pub(super) positions: Option<Linear>,
    pub(super) layers: Vec<Layer>,
    pub(super) output_norm: Option<Norm>,
    /// As the embedding, which it is where there is none.
    pub(super) output: Option<Linear>,
    /// Divisors of the rotation's frequencies `(rotary / 2)`.
    pub(super) rope_factors: Option<Vec<f32>>,
}

impl Weights {
    /// The matrix that turns the last hidden state into logits.
    pub(super) fn output(&self) -> &Linear {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// Whether the model computes in single precision: its layers hold F32.
    pub(super) fn is_f32(&self) -> bool {
        let parts = self.layers.iter().flat_map(|layer| layer.qkv.parts());
        parts.into_iter().all(|part| part.layout().code == Code::F32)
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let ends = [Some(&self.embedding), self.positions.as_ref(), self.output.as_ref()];
        let ends = ends.into_iter().flatten().chain(self.projections.iter().flatten());
        ends.chain(self.layers.iter().flat_map(Layer::linears))
    }

    /// Bytes of all matrices.
    pub(super) fn bytes(&self) -> usize {
        self.linears().map(Linear::bytes).sum()
    }

    /// Bytes of the matrices that one decoded token reads, `used` experts a layer.
    pub(super) fn bytes_read(&self, used: usize) -> usize {
        let projections: usize = self.projections.iter().flatten().map(Linear::bytes).sum();
        let layers: usize = self.layers.iter().map(|layer| layer.bytes_read(used)).sum();
        layers + projections + self.output().bytes()
    }

    /// Weights of all matrices.
    pub(super) fn parameters(&self) -> usize {
        self.linears().flat_map(Linear::parts).map(|part| part.rows() * part.columns()).sum()
    }
}
