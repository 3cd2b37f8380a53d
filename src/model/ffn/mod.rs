//! Feed-forward layers: the half of a layer that treats every position by itself.
//!
//! A kind is a file with its weights, its workspace and its computation, and an arm of [`FeedForward`].

pub(super) mod dense;
pub(super) mod experts;
mod router;

use dense::Mlp;
use experts::Experts;

use super::arch::FeedForwardKind;
use super::buffer::Buffer;
use super::config::Config;
use super::fingerprint::FingerprintHasher;
use super::linear::{Linear, LinearInput};
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
}

/// The workspaces of all kinds of feed-forward layers. One that no layer uses stays empty.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    pub(super) dense: dense::Workspace,
    pub(super) experts: experts::Workspace,
}

impl FeedForward {
    /// Reads the feed-forward layer of layer `index`.
    ///
    /// # Errors
    /// Those of [`Loader::linear`]; [`Error::Malformed`](crate::Error::Malformed) for a router without a number of experts.
    pub(super) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<FeedForward> {
        match config.layers[index].kind.ffn {
            FeedForwardKind::DenseOrExperts if Experts::is_in(loader, index) => {
                Experts::load(loader, config, index).map(FeedForward::Experts)
            }
            FeedForwardKind::DenseOrExperts => Mlp::load(loader, config, index, "", None).map(FeedForward::Dense),
        }
    }

    /// `out (rows, hidden rounded up to panels) = ffn(input (rows, hidden))`. Overwrites `input`.
    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        input: &mut LinearInput,
        workspace: &mut Workspace,
        out: &mut Buffer,
    ) {
        match self {
            FeedForward::Dense(mlp) => mlp.forward(pass, input, &mut workspace.dense, out),
            FeedForward::Experts(experts) => {
                experts.forward(pass, input, &mut workspace.dense, &mut workspace.experts, out);
            }
        }
    }

    /// The linear layers.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        match self {
            FeedForward::Dense(mlp) => mlp.linears().to_vec(),
            FeedForward::Experts(experts) => experts.linears(),
        }
    }

    /// Bytes of weights that one token reads, where it uses `used` experts.
    pub(super) fn bytes_read(&self, used: usize) -> usize {
        let all = self.linears().into_iter().map(Linear::bytes).sum();
        match self {
            FeedForward::Dense(_) => all,
            FeedForward::Experts(experts) => all - experts.bytes_unused(used),
        }
    }

    /// Hashes the weights.
    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        match self {
            FeedForward::Dense(mlp) => mlp.fingerprint(hasher),
            FeedForward::Experts(experts) => experts.fingerprint(hasher),
        }
    }

    /// Widens `widths` to the rows of this layer.
    pub(super) fn widen(&self, config: &Config, widths: &mut Widths) {
        let columns = self.linears().into_iter().map(Linear::columns).max();
        widths.input = widths.input.max(columns.unwrap_or(0));
        match self {
            FeedForward::Dense(mlp) => widths.up = widths.up.max(mlp.up.width()),
            FeedForward::Experts(experts) => {
                let up = experts.mlps().map(|mlp| mlp.up.width()).max();
                widths.up = widths.up.max(up.unwrap_or(0));
                let hidden = config.hidden.next_multiple_of(PANEL);
                widths.experts = widths.experts.max(hidden).max(experts.router_width());
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
        if widths.experts > 0 {
            self.experts.reserve(rows, hidden, widths.input, widths.experts)?;
        }
        Ok(())
    }
}
