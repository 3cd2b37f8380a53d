//! Feed-forward layers: the half of a layer that treats every position by itself.
//!
//! A kind is a file with its weights, its workspace and its computation, and an arm of [`FeedForward`].

pub(super) mod dense;
pub(super) mod expert_use;
pub(super) mod experts;
mod router;

use dense::Mlp;
use experts::Experts;

use super::arch::FeedForwardKind;
use super::buffer::Buffer;
use super::config::Config;
use super::fingerprint::FingerprintHasher;
use super::linear::{Linear, LinearInput};
use super::mixers::ChannelMix;
use super::norm::Norm;
use super::pass::Pass;
use super::weights::loader::Loader;
use crate::error::Result;
use crate::quant::packed::PANEL;

/// The feed-forward layer of a layer.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one per layer, next to megabytes of weights")]
pub(super) enum FeedForward {
    Dense(Mlp),
    Experts(Experts),
    Both(DenseAndExperts),
    /// A layer with a state, which `mixers` computes.
    ChannelMix(ChannelMix),
    /// Nothing: the layer is a mixer alone.
    None,
}

/// A dense network and experts side by side, each with its norms (Gemma 4).
#[derive(Debug)]
pub(super) struct DenseAndExperts {
    pub(super) dense: Mlp,
    /// Of the output of the dense network.
    dense_norm: Option<Norm>,
    pub(super) experts: Experts,
    /// Of the input of the experts.
    input_norm: Option<Norm>,
    /// Of the output of the experts.
    output_norm: Option<Norm>,
}

impl DenseAndExperts {
    fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<DenseAndExperts> {
        let norm = |name: &str| loader.norm(&format!("blk.{index}.{name}"), config);
        Ok(DenseAndExperts {
            dense: Mlp::load(loader, config, index, "", None)?,
            dense_norm: norm("post_ffw_norm_1")?,
            experts: Experts::load(loader, config, index)?,
            input_norm: norm("pre_ffw_norm_2")?,
            output_norm: norm("post_ffw_norm_2")?,
        })
    }

    /// The input of the experts, from the residual stream `x (rows, hidden)`.
    pub(super) fn expert_input(&self, pass: &Pass<'_>, x: &[f32], input: &mut LinearInput) {
        pass.norm(x, self.input_norm.as_ref(), input);
    }

    /// Adds the output of the experts to that of the dense network, `out`, both `(rows, hidden rounded up to panels)`.
    pub(super) fn join(&self, pass: &Pass<'_>, out: &mut Buffer, experts: &mut Buffer, rows: &mut Vec<f32>) {
        pass.norm_branch(out, self.dense_norm.as_ref(), rows);
        pass.norm_branch(experts, self.output_norm.as_ref(), rows);
        pass.kernel.add_scaled(out, experts, 1.0);
    }
}

/// The widest rows of all feed-forward layers of a model, in numbers.
#[derive(Debug, Default)]
pub(super) struct Widths {
    /// Gate and up.
    up: usize,
    /// Inputs of linear layers.
    pub(super) input: usize,
    /// Outputs of experts and of the router. 0 without experts.
    experts: usize,
    /// Outputs of experts that a dense network accompanies. 0 without them.
    both: usize,
    /// What experts compute in where it is not the stream's width. 0 without.
    latent: usize,
}

/// The workspaces of all kinds of feed-forward layers. One that no layer uses stays empty.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    pub(super) dense: dense::Workspace,
    pub(super) experts: experts::Workspace,
    /// `(rows, hidden rounded up to panels)`: the output of experts that a dense network accompanies.
    both: Buffer,
    /// `(tasks, hidden)`: a row for the norm of each task.
    rows: Vec<f32>,
}

impl FeedForward {
    /// Reads the feed-forward layer of layer `index`.
    ///
    /// # Errors
    /// Those of [`Loader::linear`]; [`Error::Malformed`](crate::Error::Malformed) for a router without a number of experts.
    pub(super) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<FeedForward> {
        match config.layers[index].kind.ffn {
            FeedForwardKind::None => Ok(FeedForward::None),
            FeedForwardKind::ChannelMix => ChannelMix::load(loader, config, index).map(FeedForward::ChannelMix),
            FeedForwardKind::DenseOrExperts
                if Experts::is_in(loader, index) && loader.has(&format!("blk.{index}.ffn_down.weight")) =>
            {
                DenseAndExperts::load(loader, config, index).map(FeedForward::Both)
            }
            FeedForwardKind::DenseOrExperts if Experts::is_in(loader, index) => {
                Experts::load(loader, config, index).map(FeedForward::Experts)
            }
            FeedForwardKind::DenseOrExperts => Mlp::load(loader, config, index, "", None).map(FeedForward::Dense),
        }
    }

    /// `out (rows, hidden rounded up to panels) = ffn(input (rows, hidden))`, where `x` is the residual stream that the input
    /// is the norm of. Overwrites `input`.
    ///
    /// # Errors
    /// Those of reading experts that are not in memory.
    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        x: &[f32],
        input: &mut LinearInput,
        workspace: &mut Workspace,
        out: &mut Buffer,
    ) -> Result<()> {
        match self {
            FeedForward::Dense(mlp) => mlp.forward(pass, input, &mut workspace.dense, out),
            FeedForward::Experts(experts) => {
                experts.forward(pass, input, &mut workspace.dense, &mut workspace.experts, out)?;
            }
            FeedForward::Both(layer) => {
                let Workspace { dense, experts, both, rows } = workspace;
                layer.dense.forward(pass, input, dense, out);
                layer.expert_input(pass, x, input);
                layer.experts.forward_routed_by(pass, x, input, dense, experts, both)?;
                layer.join(pass, out, both, rows);
            }
            FeedForward::ChannelMix(_) | FeedForward::None => {}
        }
        Ok(())
    }

    /// The linear layers.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        match self {
            FeedForward::Dense(mlp) => mlp.linears().to_vec(),
            FeedForward::Experts(experts) => experts.linears(),
            FeedForward::Both(both) => both.dense.linears().into_iter().chain(both.experts.linears()).collect(),
            FeedForward::ChannelMix(own) => own.linears(),
            FeedForward::None => Vec::new(),
        }
    }

    /// Bytes of weights that one token reads, where it uses `used` experts.
    pub(super) fn bytes_read(&self, used: usize) -> usize {
        match self {
            FeedForward::Dense(_) | FeedForward::ChannelMix(_) | FeedForward::None => {
                self.linears().into_iter().map(Linear::bytes).sum()
            }
            FeedForward::Experts(experts) => experts.bytes_read(used),
            FeedForward::Both(both) => {
                both.dense.linears().into_iter().map(Linear::bytes).sum::<usize>() + both.experts.bytes_read(used)
            }
        }
    }

    /// The experts, if there are any.
    pub(super) fn experts(&self) -> Option<&Experts> {
        match self {
            FeedForward::Experts(experts) => Some(experts),
            FeedForward::Both(both) => Some(&both.experts),
            FeedForward::Dense(_) | FeedForward::ChannelMix(_) | FeedForward::None => None,
        }
    }

    /// Hashes the weights.
    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        match self {
            FeedForward::Dense(mlp) => mlp.fingerprint(hasher),
            FeedForward::Experts(experts) => experts.fingerprint(hasher),
            FeedForward::Both(DenseAndExperts { dense, dense_norm, experts, input_norm, output_norm }) => {
                dense.fingerprint(hasher);
                experts.fingerprint(hasher);
                for norm in [dense_norm, input_norm, output_norm] {
                    hasher.optional(norm.as_ref(), FingerprintHasher::norm);
                }
            }
            FeedForward::ChannelMix(own) => own.fingerprint(hasher),
            FeedForward::None => {}
        }
    }

    /// Widens `widths` to the rows of this layer.
    pub(super) fn widen(&self, config: &Config, widths: &mut Widths) {
        let columns = self.linears().into_iter().map(Linear::columns).max();
        widths.input = widths.input.max(columns.unwrap_or(0));
        let (dense, experts) = match self {
            FeedForward::Dense(mlp) => (Some(mlp), None),
            FeedForward::Experts(experts) => (None, Some(experts)),
            FeedForward::Both(both) => (Some(&both.dense), Some(&both.experts)),
            FeedForward::ChannelMix(_) | FeedForward::None => (None, None),
        };
        if let Some(mlp) = dense {
            widths.up = widths.up.max(mlp.up.width());
        }
        if let Some(experts) = experts {
            let up = experts.mlps().map(|mlp| mlp.up.width()).max();
            widths.up = widths.up.max(up.unwrap_or(0));
            let hidden = config.hidden.next_multiple_of(PANEL);
            widths.experts = widths.experts.max(hidden).max(experts.router_width()).max(experts.latent_width());
            widths.latent = widths.latent.max(experts.latent_width());
            if dense.is_some() {
                widths.both = hidden;
            }
        }
    }
}

impl Workspace {
    /// Allocates memory for `rows` rows of `hidden` numbers.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub(super) fn reserve(&mut self, widths: &Widths, rows: usize, hidden: usize) -> Result<()> {
        self.dense.up.reserve(rows * widths.up)?;
        self.both.reserve(rows * widths.both)?;
        if widths.experts > 0 {
            self.experts.reserve(rows, hidden, widths.input, widths.experts, widths.latent)?;
        }
        Ok(())
    }
}
