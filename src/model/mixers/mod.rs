//! Mixers: the half of a layer in which positions exchange information.
//!
//! A mixer is a file with its weights, its workspace and its computation, and an arm of [`Mixer`].

mod attention;
mod context;
mod heads;
mod latent_attention;
pub(super) mod positions;
mod segments;

use attention::Attention;
pub(super) use context::MixerContext;
pub(super) use heads::span_rows;
use latent_attention::LatentAttention;
use positions::Positions;

use super::arch::MixerKind;
use super::batch::Batch;
use super::buffer::Buffer;
use super::config::{Config, LayerConfig};
use super::fingerprint::FingerprintHasher;
use super::linear::{Linear, LinearInput};
use super::rope;
use super::weights::loader::Loader;
use crate::error::Result;

/// The mixer of a layer.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one per layer, next to megabytes of weights")]
pub(super) enum Mixer {
    Attention(Attention),
    LatentAttention(LatentAttention),
}

/// The widest rows of all mixers of a model, in numbers.
#[derive(Debug, Default)]
pub(super) struct Widths {
    attention: attention::Widths,
    latent: latent_attention::Widths,
    /// Inputs of linear layers.
    pub(super) input: usize,
}

/// The workspaces of all kinds of mixers. One that no layer uses stays empty.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    angles: rope::Angles,
    attention: attention::Workspace,
    latent: latent_attention::Workspace,
}

impl Mixer {
    /// Reads the mixer of layer `index`.
    ///
    /// # Errors
    /// Those of [`Loader::linear`].
    pub(super) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Mixer> {
        match config.layers[index].kind.mixer {
            MixerKind::Attention => Attention::load(loader, config, index).map(Mixer::Attention),
            MixerKind::LatentAttention => LatentAttention::load(loader, config, index).map(Mixer::LatentAttention),
        }
    }

    /// Reads the input projection of layer `index` again, which may have changed.
    ///
    /// # Errors
    /// Those of [`Mixer::load`].
    pub(super) fn reload_in_proj(&mut self, loader: &Loader<'_>, config: &Config, index: usize) -> Result<()> {
        match self {
            Mixer::Attention(attention) => attention.reload_in_proj(loader, config, index),
            Mixer::LatentAttention(attention) => attention.reload_in_proj(loader, config, index),
        }
    }

    /// Reads the output projection of layer `index` again, which may have changed.
    ///
    /// # Errors
    /// Those of [`Mixer::load`].
    pub(super) fn reload_out_proj(&mut self, loader: &Loader<'_>, config: &Config, index: usize) -> Result<()> {
        match self {
            Mixer::Attention(attention) => attention.reload_out_proj(loader, config, index),
            Mixer::LatentAttention(attention) => attention.reload_out_proj(loader, config, index),
        }
    }

    /// `out (rows, hidden rounded up to panels) = mixer(input (rows, hidden))`. Overwrites `input`.
    pub(super) fn forward(
        &self,
        context: &mut MixerContext<'_, '_>,
        input: &mut LinearInput,
        workspace: &mut Workspace,
        out: &mut Buffer,
    ) {
        self.mix(context, input, workspace);
        context.pass.linear(self.out_proj(), input, out);
    }

    /// The mixer without its output projection: replaces `input (rows, hidden)` by the projection's input
    /// `(rows, columns of out_proj)`.
    pub(super) fn mix(&self, context: &mut MixerContext<'_, '_>, input: &mut LinearInput, workspace: &mut Workspace) {
        match self {
            Mixer::Attention(attention) => {
                attention.mix(context, input, &workspace.angles, &mut workspace.attention);
            }
            Mixer::LatentAttention(attention) => {
                attention.mix(context, input, &workspace.angles, &mut workspace.latent);
            }
        }
    }

    /// Stores what later positions read of `input (rows, hidden)`, without computing an output.
    pub(super) fn store(&self, context: &mut MixerContext<'_, '_>, input: &mut LinearInput, workspace: &mut Workspace) {
        match self {
            Mixer::Attention(attention) => {
                attention.store(context, input, &workspace.angles, &mut workspace.attention);
            }
            Mixer::LatentAttention(attention) => {
                attention.store(context, input, &workspace.angles, &mut workspace.latent);
            }
        }
    }

    /// The projection that reads the mixer's input.
    pub(super) fn in_proj(&self) -> &Linear {
        match self {
            Mixer::Attention(attention) => attention.in_proj(),
            Mixer::LatentAttention(attention) => attention.in_proj(),
        }
    }

    /// The projection that the mixer ends with.
    pub(super) fn out_proj(&self) -> &Linear {
        match self {
            Mixer::Attention(attention) => attention.out_proj(),
            Mixer::LatentAttention(attention) => attention.out_proj(),
        }
    }

    /// The linear layers.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        match self {
            Mixer::Attention(attention) => vec![attention.in_proj(), attention.out_proj()],
            Mixer::LatentAttention(attention) => attention.linears(),
        }
    }

    /// Hashes the weights.
    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        match self {
            Mixer::Attention(attention) => attention.fingerprint(hasher),
            Mixer::LatentAttention(attention) => attention.fingerprint(hasher),
        }
    }

    /// Widens `widths` to the rows of this mixer of `layer`.
    pub(super) fn widen(&self, layer: &LayerConfig, widths: &mut Widths) {
        let columns = self.linears().into_iter().map(Linear::columns).max();
        widths.input = widths.input.max(columns.unwrap_or(0));
        match self {
            Mixer::Attention(attention) => attention.widen(layer, &mut widths.attention),
            Mixer::LatentAttention(attention) => attention.widen(&mut widths.latent),
        }
    }
}

impl Workspace {
    /// Allocates memory for the rows of `batch`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub(super) fn reserve(&mut self, widths: &Widths, positions: &Positions, batch: &Batch) -> Result<()> {
        self.angles.reserve(&positions.ropes, batch.rows.len())?;
        self.attention.reserve(&widths.attention, batch)?;
        self.latent.reserve(&widths.latent, batch)
    }

    /// Computes what depends on the positions of the rows alone, for all layers.
    pub(super) fn prepare(&mut self, positions: &Positions, batch: &Batch) {
        self.angles.compute(&positions.ropes, batch.rows.iter().map(|row| row.position));
    }
}
