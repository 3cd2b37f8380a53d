//! The forward pass one layer at a time over many windows of text, stopping wherever a linear layer reads its input: what
//! calibration looks at. A layer's weights are in memory only while it computes.

use std::sync::PoisonError;

use super::{Input, Logits, Pass, Scratch};
use crate::error::Result;
use crate::format::Checkpoint;
use crate::kernels::Kernel;
use crate::model::config::Config;
use crate::model::weights::{Ffn, Layer, Loader, Mlp, Part, Weights};
use crate::model::{LoadOptions, Model};
use crate::quant::packed::PANEL;
use crate::threads::ThreadPool;

/// A model without its layers, which are loaded one by one.
#[derive(Debug)]
pub(crate) struct Layerwise {
    model: Model,
}

/// One layer in memory.
#[derive(Debug)]
pub(crate) struct LoadedLayer {
    index: usize,
    layer: Layer,
}

/// A feed-forward network of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Network {
    /// That of a layer without experts.
    Dense,
    /// One of the experts among which tokens choose.
    Expert(usize),
    /// The expert that all tokens use.
    Shared,
}

/// A linear layer, or several that read the same input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Site {
    /// Query, key and value.
    Qkv,
    /// The output of attention.
    AttentionOutput,
    /// Gate and up.
    Up(Network),
    /// Down.
    Down(Network),
}

impl Site {
    /// The expert whose site it is.
    pub(crate) fn expert(self) -> Option<usize> {
        match self {
            Site::Up(Network::Expert(expert)) | Site::Down(Network::Expert(expert)) => Some(expert),
            _ => None,
        }
    }

    /// The tensors that may belong to it, without the layer's prefix; which of them there are depends on the family.
    pub(crate) fn tensors(self) -> Vec<String> {
        let (parts, network): (&[&str], _) = match self {
            Site::Qkv => (&["attn_qkv", "attn_q", "attn_k", "attn_v"], Network::Dense),
            Site::AttentionOutput => (&["attn_output"], Network::Dense),
            Site::Up(network) => (&["ffn_gate", "ffn_up"], network),
            Site::Down(network) => (&["ffn_down"], network),
        };
        let suffix = match network {
            Network::Dense => "",
            Network::Expert(_) => "_exps",
            Network::Shared => "_shexp",
        };
        parts.iter().map(|part| format!("{part}{suffix}.weight")).collect()
    }
}

impl LoadedLayer {
    /// Its number.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Width between up and down.
    pub(crate) fn width(&self, network: Network) -> usize {
        self.network(network).width
    }

    /// The feed-forward networks, experts in order and the shared one last.
    pub(crate) fn networks(&self) -> Vec<Network> {
        match &self.layer.ffn {
            Ffn::Dense(_) => vec![Network::Dense],
            Ffn::Experts { experts, shared, .. } => {
                (0..experts.len()).map(Network::Expert).chain(shared.iter().map(|_| Network::Shared)).collect()
            }
        }
    }

    fn network(&self, network: Network) -> &Mlp {
        match (&self.layer.ffn, network) {
            (Ffn::Dense(mlp), _) => mlp,
            (Ffn::Experts { experts, .. }, Network::Expert(index)) => &experts[index],
            (Ffn::Experts { shared, experts, .. }, _) => shared.as_ref().map_or(&experts[0], |(mlp, _)| mlp),
        }
    }
}

impl Layerwise {
    /// Everything of `checkpoint` but its layers.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    pub(crate) fn load(checkpoint: &dyn Checkpoint, options: &LoadOptions) -> Result<Layerwise> {
        Ok(Layerwise { model: Model::with_weights(checkpoint, options, None, Weights::without_layers)? })
    }

    /// Hyper-parameters.
    pub(crate) fn config(&self) -> &Config {
        &self.model.config
    }

    /// The threads that compute.
    pub(crate) fn pool(&self) -> &ThreadPool {
        &self.model.pool
    }

    /// The kernel that computes.
    pub(crate) fn kernel(&self) -> &'static Kernel {
        self.model.kernel
    }

    /// Rows of the embedding.
    pub(crate) fn vocabulary(&self) -> usize {
        self.model.vocabulary()
    }

    /// Tokens that a window may have.
    pub(crate) fn context(&self) -> usize {
        self.model.context
    }

    /// Cosines and sines of all pairs that ordinary layers rotate, position by position `(positions, pairs)`, and the number
    /// of pairs.
    pub(crate) fn rotations(&self, positions: usize) -> (Vec<f32>, Vec<f32>, usize) {
        let rope = &self.model.ropes[0];
        let pairs = rope.pairs();
        let (mut cos, mut sin) = (vec![0.0; positions * pairs], vec![0.0; positions * pairs]);
        let rows = cos.chunks_mut(pairs.max(1)).zip(sin.chunks_mut(pairs.max(1)));
        rows.enumerate().for_each(|(position, (cos, sin))| rope.angles(position, cos, sin));
        (cos, sin, pairs)
    }

    /// Reads a layer.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    pub(crate) fn layer(&self, checkpoint: &dyn Checkpoint, index: usize) -> Result<LoadedLayer> {
        self.model.pool.run(|scope| {
            let layer = Loader::new(scope, checkpoint, None).layer(&self.model.config, index)?;
            Ok(LoadedLayer { index, layer })
        })
    }

    /// Reads the weights of one site again, which may be others now.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    pub(crate) fn reload(&self, checkpoint: &dyn Checkpoint, loaded: &mut LoadedLayer, site: Site) -> Result<()> {
        let (config, index) = (&self.model.config, loaded.index);
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        self.model.pool.run(|scope| {
            let loader = Loader::new(scope, checkpoint, None);
            let layer = &mut loaded.layer;
            match site {
                Site::Qkv => layer.qkv = loader.qkv(config, &name)?,
                Site::AttentionOutput => {
                    let part = Part::new(name("attn_output"), config.hidden);
                    layer.attn_output = loader.linear(&[part], config.heads * config.head_dim)?;
                }
                Site::Up(network) | Site::Down(network) => match (&mut layer.ffn, network) {
                    (Ffn::Dense(mlp), _) => *mlp = loader.mlp(config, &name, "", None)?,
                    (Ffn::Experts { experts, .. }, Network::Expert(at)) => {
                        let count = experts.len();
                        experts[at] = loader.mlp(config, &name, "_exps", Some((at, count)))?;
                    }
                    (Ffn::Experts { shared, .. }, _) => {
                        if let Some((mlp, _)) = shared {
                            *mlp = loader.mlp(config, &name, "_shexp", None)?;
                        }
                    }
                },
            }
            Ok(())
        })
    }

    /// The residual stream `(tokens, hidden)` before the first layer.
    pub(crate) fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.in_pieces(tokens, |pass, s, _, stream: &mut Vec<f32>| {
            pass.embed(s);
            stream.extend_from_slice(&s.x);
        })
    }

    /// The input of query, key and value `(tokens, hidden)`.
    pub(crate) fn qkv_input(&self, loaded: &LoadedLayer, x: &[f32]) -> Vec<f32> {
        self.pass(|pass, s| {
            pass.norm(x, loaded.layer.attn_norm.as_ref(), &mut s.input);
            s.input.values.clone()
        })
    }

    /// The input of attention's output matrix `(tokens, heads * head_dim)`, for the residual stream `x` of a window.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), and
    /// [`Error::ContextFull`](crate::Error::ContextFull) for a window that is longer than the context.
    pub(crate) fn attended(&self, loaded: &LoadedLayer, x: &[f32]) -> Result<Vec<f32>> {
        let hidden = self.model.config.hidden;
        let tokens = vec![0; x.len() / hidden];
        self.in_pieces(&tokens, |pass, s, inputs, attended: &mut Vec<f32>| {
            pass.rotations(s);
            let at = s.rows.first().map_or(0, |row| row.position) * hidden;
            s.x.clear();
            s.x.extend_from_slice(&x[at..][..s.rows.len() * hidden]);
            pass.attention(s, &loaded.layer, loaded.index, inputs);
            attended.extend_from_slice(&s.input.values);
        })
    }

    /// Adds attention to the stream `x` and returns the input of the feed-forward networks `(tokens, hidden)`.
    pub(crate) fn join_attention(&self, loaded: &LoadedLayer, attended: Vec<f32>, x: &mut [f32]) -> Vec<f32> {
        let layer = &loaded.layer;
        self.pass(|pass, s| {
            s.input.values = attended;
            pass.linear(&layer.attn_output, &mut s.input, &mut s.joining);
            pass.post_norm(&mut s.joining, layer.attn_post_norm.as_ref(), &mut s.room);
            if !self.model.config.parallel {
                pass.join(x, &s.joining);
                pass.norm_stream(x, layer.attn_joined_norm.as_ref(), &mut s.input);
            }
            pass.norm(x, pass.ffn_norm(layer), &mut s.input);
            if self.model.config.parallel {
                pass.join(x, &s.joining);
            }
            s.input.values.clone()
        })
    }

    /// The experts that each token chooses, and their weights `(tokens, experts used)`; all of them for a shared one.
    pub(crate) fn route(&self, loaded: &LoadedLayer, input: &[f32]) -> Vec<(usize, f32)> {
        let Ffn::Experts { router, .. } = &loaded.layer.ffn else { return Vec::new() };
        self.pass(|pass, s| {
            let mut choice = Vec::new();
            s.input.values = input.to_vec();
            pass.route(router, &mut s.input, &mut s.ffn, &mut choice);
            choice
        })
    }

    /// What the shared expert's output is multiplied with `(tokens)`.
    pub(crate) fn shared_weights(&self, loaded: &LoadedLayer, input: &[f32]) -> Vec<f32> {
        let Ffn::Experts { shared: Some((_, gate)), .. } = &loaded.layer.ffn else { return Vec::new() };
        self.pass(|pass, s| {
            s.input.values = input.to_vec();
            let mut weights = Vec::new();
            pass.shared_weights(gate.as_ref(), &mut s.input, &mut s.ffn, &mut weights);
            weights
        })
    }

    /// The input of a network's `down` `(tokens, width)`, from the input of the network.
    pub(crate) fn inner(&self, loaded: &LoadedLayer, network: Network, input: Vec<f32>) -> Vec<f32> {
        self.pass(|pass, s| {
            s.input.values = input;
            pass.mlp_inner(loaded.network(network), &mut s.input, &mut s.ffn);
            std::mem::take(&mut s.input.values)
        })
    }

    /// The output of a network's `down` `(tokens, hidden)`.
    pub(crate) fn down(&self, loaded: &LoadedLayer, network: Network, inner: Vec<f32>) -> Vec<f32> {
        let hidden = self.model.config.hidden;
        self.pass(|pass, s| {
            s.input.values = inner;
            pass.linear(&loaded.network(network).down, &mut s.input, &mut s.joining);
            let width = hidden.next_multiple_of(PANEL);
            s.joining.chunks(width).flat_map(|row| &row[..hidden]).copied().collect()
        })
    }

    /// Adds the output of the feed-forward networks `(tokens, hidden)` to the stream `x`.
    pub(crate) fn join_ffn(&self, loaded: &LoadedLayer, out: &[f32], x: &mut [f32]) {
        let hidden = self.model.config.hidden;
        self.pass(|pass, s| {
            let width = hidden.next_multiple_of(PANEL);
            s.joining.clear();
            for row in out.chunks(hidden) {
                s.joining.extend_from_slice(row);
                s.joining.resize(s.joining.len().next_multiple_of(width), 0.0);
            }
            pass.post_norm(&mut s.joining, loaded.layer.ffn_post_norm.as_ref(), &mut s.room);
            pass.join(x, &s.joining);
            pass.norm_stream(x, loaded.layer.ffn_joined_norm.as_ref(), &mut s.input);
        });
    }

    /// The logits `(tokens, vocabulary)` of the stream `x` after the last layer.
    pub(crate) fn logits(&self, x: Vec<f32>) -> Vec<f32> {
        self.pass(|pass, s| {
            let mut logits = Vec::new();
            s.x = x;
            pass.head(s, &mut logits);
            logits
        })
    }

    fn pass<R>(&self, run: impl FnOnce(&Pass<'_>, &mut Scratch) -> R) -> R {
        let mut kept = self.model.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = kept.pop().unwrap_or_default();
        let (model, kernel) = (&self.model, self.model.kernel);
        let result = model.pool.run(|scope| run(&Pass { model, kernel, scope }, &mut scratch));
        kept.push(scratch);
        result
    }

    /// Runs `step` over the tokens of one session, as many at a time as a pass takes.
    fn in_pieces(
        &self,
        tokens: &[u32],
        mut step: impl FnMut(&Pass<'_>, &mut Scratch, &mut [Input<'_>], &mut Vec<f32>),
    ) -> Result<Vec<f32>> {
        let mut session = self.model.session();
        session.reserve(tokens.len())?;
        let mut inputs = [Input { session: &mut session, tokens, logits: Logits::None }];
        let mut out = Vec::new();
        self.pass(|pass, s| {
            s.done.clear();
            s.done.push(0);
            while s.gather(&inputs, |rows| self.model.attention_rows(rows)) {
                step(pass, s, &mut inputs, &mut out);
                inputs[0].session.advance(s.rows.len());
            }
        });
        Ok(out)
    }
}
