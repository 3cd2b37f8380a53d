//! Mixers: the half of a layer in which positions exchange information.
//!
//! A mixer is a file with its weights, its workspace and its computation, and an arm of [`Mixer`].

mod attention;
mod context;
mod heads;
mod int8_pages;
mod latent_attention;
pub(super) mod positions;
mod recurrent;
mod segments;

use attention::Attention;
pub(super) use context::MixerContext;
pub(super) use heads::span_rows;
use latent_attention::LatentAttention;
use positions::Positions;
pub(super) use recurrent::ChannelMix;
use recurrent::{GatedDelta, Mamba, Mamba2, ShortConvolution, TimeMix};

use super::arch::MixerKind;
use super::batch::Batch;
use super::buffer::Buffer;
use super::config::{Config, LayerConfig};
use super::fingerprint::FingerprintHasher;
use super::linear::{Linear, LinearInput};
use super::rope;
use super::state::recurrent::Recurrent;
use super::weights::loader::Loader;
use crate::error::Result;
use crate::kernels::Kernel;
use crate::quant::packed::PANEL;

/// The mixer of a layer.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one per layer, next to megabytes of weights")]
pub(super) enum Mixer {
    Attention(Attention),
    LatentAttention(LatentAttention),
    GatedDelta(GatedDelta),
    Mamba(Mamba),
    Mamba2(Mamba2),
    /// Both read the input, and their outputs are added.
    AttentionAndMamba2(Attention, Mamba2),
    ShortConvolution(ShortConvolution),
    TimeMix(TimeMix),
    /// Nothing: the layer is a feed-forward layer alone.
    None,
}

/// The widest rows of all mixers of a model, in numbers.
#[derive(Debug, Default)]
pub(super) struct Widths {
    attention: attention::Widths,
    latent: latent_attention::Widths,
    recurrent: recurrent::Widths,
    /// The input of mixers that several read, or 0.
    shared: usize,
    /// Inputs of linear layers.
    pub(super) input: usize,
}

/// The workspaces of all kinds of mixers. One that no layer uses stays empty.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    angles: rope::Angles,
    attention: attention::Workspace,
    latent: latent_attention::Workspace,
    recurrent: recurrent::Workspace,
    /// `(rows, hidden)`: the input of two mixers, and the output of the second, in whole panels.
    shared: [Buffer; 2],
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
            MixerKind::GatedDelta | MixerKind::KimiDelta => {
                GatedDelta::load(loader, config, index).map(Mixer::GatedDelta)
            }
            MixerKind::Mamba => Mamba::load(loader, config, index).map(Mixer::Mamba),
            MixerKind::Mamba2 => Mamba2::load(loader, config, index).map(Mixer::Mamba2),
            MixerKind::AttentionAndMamba2 => {
                let attention = Attention::load(loader, config, index)?;
                Ok(Mixer::AttentionAndMamba2(attention, Mamba2::load(loader, config, index)?))
            }
            MixerKind::ShortConvolution => ShortConvolution::load(loader, config, index).map(Mixer::ShortConvolution),
            MixerKind::Rwkv => TimeMix::load(loader, config, index).map(Mixer::TimeMix),
            MixerKind::None => Ok(Mixer::None),
        }
    }

    /// Reads the input projection of layer `index` again, which may have changed.
    ///
    /// # Errors
    /// Those of [`Mixer::load`].
    pub(super) fn reload_in_proj(&mut self, loader: &Loader<'_>, config: &Config, index: usize) -> Result<()> {
        match self {
            Mixer::Attention(own) => own.reload_in_proj(loader, config, index),
            Mixer::LatentAttention(own) => own.reload_in_proj(loader, config, index),
            // These projections are most of the others.
            _ => {
                *self = Mixer::load(loader, config, index)?;
                Ok(())
            }
        }
    }

    /// Reads the output projection of layer `index` again, which may have changed.
    ///
    /// # Errors
    /// Those of [`Mixer::load`].
    pub(super) fn reload_out_proj(&mut self, loader: &Loader<'_>, config: &Config, index: usize) -> Result<()> {
        match self {
            Mixer::Attention(own) => own.reload_out_proj(loader, config, index),
            Mixer::LatentAttention(own) => own.reload_out_proj(loader, config, index),
            // These projections are most of the others.
            _ => {
                *self = Mixer::load(loader, config, index)?;
                Ok(())
            }
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
        if let Mixer::AttentionAndMamba2(attention, mamba) = self {
            let [mut own, mut second] = std::mem::take(&mut workspace.shared);
            own.copy_from(&input.values);
            attention.mix(context, input, &workspace.angles, &mut workspace.attention);
            context.pass.linear(attention.out_proj(), input, out);
            input.values.copy_from(&own);
            mamba.mix(context, input, &mut workspace.recurrent);
            context.pass.linear(mamba.out_proj(), input, &mut second);
            context.pass.kernel.add_scaled(out, &second, 1.0);
            workspace.shared = [own, second];
            return;
        }
        self.mix(context, input, workspace);
        if let Some(out_proj) = self.out_proj() {
            context.pass.linear(out_proj, input, out);
        }
    }

    /// The mixer without its output projection: replaces `input (rows, hidden)` by the projection's input
    /// `(rows, columns of out_proj)`. Of mixers side by side, the first.
    pub(super) fn mix(&self, context: &mut MixerContext<'_, '_>, input: &mut LinearInput, workspace: &mut Workspace) {
        match self {
            Mixer::Attention(own) | Mixer::AttentionAndMamba2(own, _) => {
                own.mix(context, input, &workspace.angles, &mut workspace.attention);
            }
            Mixer::LatentAttention(own) => own.mix(context, input, &workspace.angles, &mut workspace.latent),
            Mixer::GatedDelta(own) => own.mix(context, input, &mut workspace.recurrent),
            Mixer::Mamba(own) => own.mix(context, input, &mut workspace.recurrent),
            Mixer::Mamba2(own) => own.mix(context, input, &mut workspace.recurrent),
            Mixer::ShortConvolution(own) => own.mix(context, input, &mut workspace.recurrent),
            Mixer::TimeMix(own) => own.mix(context, input, &mut workspace.recurrent),
            Mixer::None => {}
        }
    }

    /// Stores what later positions read of `input (rows, hidden)`, without computing an output. Mixers with a state of their own
    /// store nothing.
    pub(super) fn store(&self, context: &mut MixerContext<'_, '_>, input: &mut LinearInput, workspace: &mut Workspace) {
        match self {
            Mixer::Attention(attention) => {
                attention.store(context, input, &workspace.angles, &mut workspace.attention);
            }
            Mixer::LatentAttention(attention) => {
                attention.store(context, input, &workspace.angles, &mut workspace.latent);
            }
            _ => {}
        }
    }

    /// The projection that reads the mixer's input. Of mixers side by side, that of the first.
    pub(super) fn in_proj(&self) -> Option<&Linear> {
        self.projections().map(|(in_proj, _)| in_proj)
    }

    /// The projection that the mixer ends with. Of mixers side by side, that of the first.
    pub(super) fn out_proj(&self) -> Option<&Linear> {
        self.projections().map(|(_, out_proj)| out_proj)
    }

    fn projections(&self) -> Option<(&Linear, &Linear)> {
        match self {
            Mixer::Attention(own) | Mixer::AttentionAndMamba2(own, _) => Some((own.in_proj(), own.out_proj())),
            Mixer::LatentAttention(own) => Some((own.in_proj(), own.out_proj())),
            Mixer::GatedDelta(own) => Some((own.in_proj(), own.out_proj())),
            Mixer::Mamba(own) => Some((own.in_proj(), own.out_proj())),
            Mixer::Mamba2(own) => Some((own.in_proj(), own.out_proj())),
            Mixer::ShortConvolution(own) => Some((own.in_proj(), own.out_proj())),
            Mixer::TimeMix(own) => Some((own.in_proj(), own.out_proj())),
            Mixer::None => None,
        }
    }

    /// The linear layers.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        match self {
            Mixer::LatentAttention(own) => own.linears(),
            Mixer::GatedDelta(own) => own.linears(),
            Mixer::Mamba(own) => own.linears(),
            Mixer::TimeMix(own) => own.linears(),
            Mixer::AttentionAndMamba2(attention, mamba) => {
                vec![attention.in_proj(), attention.out_proj(), mamba.in_proj(), mamba.out_proj()]
            }
            _ => self.in_proj().into_iter().chain(self.out_proj()).collect(),
        }
    }

    /// Applies the rows that are recorded to the recurrent state of layer `index`.
    pub(super) fn settle(&self, kernel: &Kernel, state: &mut Recurrent, index: usize) {
        match self {
            Mixer::GatedDelta(own) => own.settle(kernel, state, index),
            Mixer::Mamba(own) => own.settle(kernel, state, index),
            Mixer::Mamba2(own) | Mixer::AttentionAndMamba2(_, own) => own.settle(kernel, state, index),
            Mixer::ShortConvolution(own) => own.settle(state, index),
            Mixer::TimeMix(own) => own.settle(kernel, state, index),
            Mixer::Attention(_) | Mixer::LatentAttention(_) | Mixer::None => {}
        }
    }

    /// Hashes the weights.
    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        match self {
            Mixer::Attention(own) => own.fingerprint(hasher),
            Mixer::LatentAttention(own) => own.fingerprint(hasher),
            Mixer::GatedDelta(own) => own.fingerprint(hasher),
            Mixer::Mamba(own) => own.fingerprint(hasher),
            Mixer::Mamba2(own) => own.fingerprint(hasher),
            Mixer::ShortConvolution(own) => own.fingerprint(hasher),
            Mixer::TimeMix(own) => own.fingerprint(hasher),
            Mixer::AttentionAndMamba2(attention, mamba) => {
                attention.fingerprint(hasher);
                mamba.fingerprint(hasher);
            }
            Mixer::None => {}
        }
    }

    /// Widens `widths` to the rows of this mixer of `layer`.
    pub(super) fn widen(&self, config: &Config, layer: &LayerConfig, widths: &mut Widths) {
        let columns = self.linears().into_iter().map(Linear::columns).max();
        widths.input = widths.input.max(columns.unwrap_or(0));
        match self {
            Mixer::Attention(own) => own.widen(layer, &mut widths.attention),
            Mixer::LatentAttention(own) => own.widen(&mut widths.latent),
            Mixer::GatedDelta(own) => own.widen(&mut widths.recurrent),
            Mixer::Mamba(own) => own.widen(&mut widths.recurrent),
            Mixer::Mamba2(own) => own.widen(&mut widths.recurrent),
            Mixer::ShortConvolution(own) => own.widen(&mut widths.recurrent),
            Mixer::TimeMix(own) => own.widen(config, &mut widths.recurrent),
            Mixer::AttentionAndMamba2(attention, mamba) => {
                attention.widen(layer, &mut widths.attention);
                mamba.widen(&mut widths.recurrent);
                widths.shared = config.hidden.next_multiple_of(PANEL);
            }
            Mixer::None => {}
        }
    }
}

impl Widths {
    /// Widens to the rows of a feed-forward layer that has a state.
    pub(super) fn widen_to(&mut self, channel_mix: &ChannelMix) {
        channel_mix.widen(&mut self.recurrent);
    }
}

impl Workspace {
    /// A feed-forward layer that has a state: `out (rows, hidden rounded up to panels)` from `input (rows, hidden)`, which is
    /// overwritten.
    pub(super) fn channel_mix(
        &mut self,
        mix: &ChannelMix,
        context: &mut MixerContext<'_, '_>,
        input: &mut LinearInput,
        out: &mut Buffer,
    ) {
        mix.forward(context, input, &mut self.recurrent, out);
    }

    /// Allocates memory for the rows of `batch`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub(super) fn reserve(&mut self, widths: &Widths, positions: &Positions, batch: &Batch) -> Result<()> {
        self.angles.reserve(&positions.ropes, batch.rows.len())?;
        self.attention.reserve(&widths.attention, batch)?;
        self.recurrent.reserve(&widths.recurrent, batch)?;
        self.shared.iter_mut().try_for_each(|buffer| buffer.reserve(batch.rows.len() * widths.shared))?;
        self.latent.reserve(&widths.latent, batch)
    }

    /// Computes what depends on the positions of the rows alone, for all layers.
    pub(super) fn prepare(&mut self, positions: &Positions, batch: &Batch) {
        self.angles.compute(&positions.ropes, batch.rows.iter().map(|row| row.position));
    }
}
