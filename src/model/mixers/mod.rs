//! Mixers: the half of a layer in which positions exchange information.
//!
//! A mixer is a file with its weights, its workspace and its computation, and an arm of [`Mixer`].

mod attention;
mod context;
pub(super) mod positions;
mod segments;

use attention::Attention;
pub(super) use attention::span_rows;
pub(super) use context::MixerContext;
use positions::Positions;

use super::arch::MixerKind;
use super::batch::Batch;
use super::buffer::Buffer;
use super::config::Config;
use super::fingerprint::FingerprintHasher;
use super::linear::{Linear, LinearInput};
use super::weights::loader::Loader;
use crate::error::Result;

/// The mixer of a layer.
#[derive(Debug)]
pub(super) enum Mixer {
    Attention(Attention),
}

/// The widest rows of all mixers of a model, in numbers.
#[derive(Debug, Default)]
pub(super) struct Widths {
    attention: attention::Widths,
    /// Inputs of linear layers.
    pub(super) input: usize,
}

/// The workspaces of all kinds of mixers. One that no layer uses stays empty.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    attention: attention::Workspace,
}

impl Mixer {
    /// Reads the mixer of layer `index`.
    ///
    /// # Errors
    /// Those of [`Loader::linear`].
    pub(super) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Mixer> {
        match config.layers[index].kind.mixer {
            MixerKind::Attention => Attention::load(loader, config, index).map(Mixer::Attention),
        }
    }

    /// Reads the input projection of layer `index` again, which may have changed.
    ///
    /// # Errors
    /// Those of [`Mixer::load`].
    pub(super) fn reload_in_proj(&mut self, loader: &Loader<'_>, config: &Config, index: usize) -> Result<()> {
        match self {
            Mixer::Attention(attention) => attention.reload_in_proj(loader, config, index),
        }
    }

    /// Reads the output projection of layer `index` again, which may have changed.
    ///
    /// # Errors
    /// Those of [`Mixer::load`].
    pub(super) fn reload_out_proj(&mut self, loader: &Loader<'_>, config: &Config, index: usize) -> Result<()> {
        match self {
            Mixer::Attention(attention) => attention.reload_out_proj(loader, config, index),
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
            Mixer::Attention(attention) => attention.mix(context, input, &mut workspace.attention),
        }
    }

    /// The projection that reads the mixer's input.
    pub(super) fn in_proj(&self) -> &Linear {
        match self {
            Mixer::Attention(attention) => attention.in_proj(),
        }
    }

    /// The projection that the mixer ends with.
    pub(super) fn out_proj(&self) -> &Linear {
        match self {
            Mixer::Attention(attention) => attention.out_proj(),
        }
    }

    /// The linear layers.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        match self {
            Mixer::Attention(attention) => vec![attention.in_proj(), attention.out_proj()],
        }
    }

    /// Hashes the weights.
    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        match self {
            Mixer::Attention(attention) => attention.fingerprint(hasher),
        }
    }

    /// Widens `widths` to the rows of this mixer.
    pub(super) fn widen(&self, widths: &mut Widths) {
        let columns = self.linears().into_iter().map(Linear::columns).max();
        widths.input = widths.input.max(columns.unwrap_or(0));
        match self {
            Mixer::Attention(attention) => attention.widen(&mut widths.attention),
        }
    }
}

impl Workspace {
    /// Allocates memory for the rows of `batch`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub(super) fn reserve(
        &mut self,
        widths: &Widths,
        config: &Config,
        positions: &Positions,
        batch: &Batch,
    ) -> Result<()> {
        self.attention.reserve(&widths.attention, config, positions, batch)
    }

    /// Computes what depends on the positions of the rows alone, for all layers.
    pub(super) fn prepare(&mut self, positions: &Positions, batch: &Batch) {
        self.attention.prepare(positions, batch);
    }
}
