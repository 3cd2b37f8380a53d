//! The forward pass one layer at a time over many windows of tokens, for calibration: it stops wherever a linear layer reads
//! its input. A layer's weights are in memory only while it computes.

use super::batch::{Input, Logits};
use super::config::Config;
use super::ffn::FeedForward;
use super::ffn::dense::Mlp;
use super::ffn::experts::Experts;
use super::forward::Workspace;
use super::mixers::{Mixer, MixerContext, span_rows};
use super::model::{LoadOptions, Model};
use super::pass::Pass;
use super::transformer::{Layer, Weights};
use super::weights::loader::Loader;
use crate::error::{Error, Place, Result};
use crate::format::Checkpoint;
use crate::kernels::Kernel;
use crate::quant::packed::PANEL;
use crate::threads::ThreadPool;

/// A model without its layers, which are loaded one at a time.
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
    /// The network of a layer without experts.
    Dense,
    /// One of the experts among which tokens choose.
    Expert(usize),
    /// The shared expert, which all tokens use.
    Shared,
}

/// A place in a layer where one or several linear layers read the same input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Site {
    /// Query, key and value.
    Qkv,
    /// The output projection of attention.
    AttentionOutput,
    /// Gate and up.
    Up(Network),
    /// Down.
    Down(Network),
}

impl Site {
    /// The expert that the site belongs to, if it is one of those that tokens choose.
    pub(crate) fn expert(self) -> Option<usize> {
        match self {
            Site::Up(Network::Expert(expert)) | Site::Down(Network::Expert(expert)) => Some(expert),
            _ => None,
        }
    }

    /// The tensors that may belong to the site, without the layer's prefix. Which of them exist depends on the family.
    pub(crate) fn tensors(self) -> Vec<String> {
        let (parts, network): (&[&str], _) = match self {
            Site::Qkv => (&["attn_qkv", "attn_q", "attn_k", "attn_v", "attn_gate"], Network::Dense),
            Site::AttentionOutput => (&["attn_output"], Network::Dense),
            Site::Up(network) => (&["ffn_gate", "ffn_up", "ffn_gate_up"], network),
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
    /// The index of the layer.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Width of the input of attention's output projection.
    pub(crate) fn attended_width(&self) -> usize {
        self.layer.mixer.out_proj().columns()
    }

    /// Width between up and down.
    pub(crate) fn width(&self, network: Network) -> usize {
        self.network(network).width
    }

    /// The feed-forward networks: experts in order, then the shared one.
    pub(crate) fn networks(&self) -> Vec<Network> {
        let Some(experts) = self.experts() else { return vec![Network::Dense] };
        let chosen = (0..experts.experts().len()).map(Network::Expert);
        chosen.chain(experts.shared().map(|_| Network::Shared)).collect()
    }

    fn experts(&self) -> Option<&Experts> {
        match &self.layer.ffn {
            FeedForward::Dense(_) => None,
            FeedForward::Experts(experts) => Some(experts),
            FeedForward::Both(both) => Some(&both.experts),
        }
    }

    fn network(&self, network: Network) -> &Mlp {
        match (&self.layer.ffn, network) {
            (FeedForward::Dense(mlp), _) => mlp,
            (FeedForward::Experts(experts), Network::Expert(index)) => &experts.experts()[index],
            (FeedForward::Experts(experts), _) => experts.shared().unwrap_or(&experts.experts()[0]),
            (FeedForward::Both(both), _) => &both.dense,
        }
    }
}

impl Layerwise {
    /// Loads everything of `checkpoint` except its layers, of which it checks the names and shapes of all tensors.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    pub(crate) fn load(checkpoint: &dyn Checkpoint, options: &LoadOptions) -> Result<Layerwise> {
        let model = Model::with_weights(checkpoint, options, None, Weights::without_layers)?;
        model.pool().run(|scope| Weights::check(scope, checkpoint, model.config()))?;
        Ok(Layerwise { model })
    }

    /// Hyperparameters.
    pub(crate) fn config(&self) -> &Config {
        self.model.config()
    }

    /// The thread pool that computes.
    pub(crate) fn pool(&self) -> &ThreadPool {
        self.model.pool()
    }

    /// The kernel that computes.
    pub(crate) fn kernel(&self) -> &'static Kernel {
        self.model.kernel()
    }

    /// Rows of the embedding.
    pub(crate) fn vocabulary(&self) -> usize {
        self.model.vocabulary()
    }

    /// The largest number of tokens in a window.
    pub(crate) fn context(&self) -> usize {
        self.model.context()
    }

    /// Cosines and sines `(positions, pairs)` of all pairs that layers without a window rotate, and the number of pairs.
    pub(crate) fn rotations(&self, positions: usize) -> (Vec<f32>, Vec<f32>, usize) {
        let rope = &self.model.transformer.positions.ropes[0];
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
        self.model.transformer.pool.run(|scope| {
            let layer = Layer::load(&Loader::new(scope, checkpoint, None), self.config(), index)?;
            Ok(LoadedLayer { index, layer })
        })
    }

    /// Checks that a layer of `checkpoint` consists of what this module computes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with a tensor that shows what it does not compute.
    pub(crate) fn check(&self, checkpoint: &dyn Checkpoint, loaded: &LoadedLayer) -> Result<()> {
        let LoadedLayer { index, layer } = loaded;
        let part = match layer {
            Layer { streams: Some(_), .. } => "altup_router.weight",
            Layer { per_layer: Some(_), .. } => "inp_gate.weight",
            Layer { scale: Some(_), .. } => "layer_output_scale.weight",
            Layer { ffn: FeedForward::Both(_), .. } => "ffn_gate_inp.weight",
            Layer { mixer: Mixer::LatentAttention(_), .. } => "attn_kv_a_mqa.weight",
            Layer { ffn: FeedForward::Experts(_), .. } if self.config().family.quirks.weighted_input => {
                "ffn_gate_inp.weight"
            }
            _ => return Ok(()),
        };
        Err(Error::Unsupported {
            path: checkpoint.path().to_path_buf(),
            place: Place::Tensor(format!("blk.{index}.{part}")),
            what: format!("calibration of a model of the family {}", self.config().family.name),
            supported: "supported: recipes without calibration for this family".to_owned(),
        })
    }

    /// Reads the weights of one site again, which may have changed.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    pub(crate) fn reload(&self, checkpoint: &dyn Checkpoint, loaded: &mut LoadedLayer, site: Site) -> Result<()> {
        let (config, LoadedLayer { index, layer }) = (self.config(), loaded);
        self.model.pool().run(|scope| {
            let loader = &Loader::new(scope, checkpoint, None);
            match site {
                Site::Qkv => layer.mixer.reload_in_proj(loader, config, *index),
                Site::AttentionOutput => layer.mixer.reload_out_proj(loader, config, *index),
                Site::Up(network) | Site::Down(network) => match (&mut layer.ffn, network) {
                    (FeedForward::Dense(mlp), _) => {
                        *mlp = Mlp::load(loader, config, *index, "", None)?;
                        Ok(())
                    }
                    (FeedForward::Experts(experts), Network::Expert(at)) => {
                        experts.reload(loader, config, *index, Some(at))
                    }
                    (FeedForward::Experts(experts), _) => experts.reload(loader, config, *index, None),
                    (FeedForward::Both(_), _) => Ok(()),
                },
            }
        })
    }

    /// The residual stream `(tokens, hidden)` before the first layer.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], and [`Error::ContextFull`] for a window
    /// that is longer than the context.
    pub(crate) fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.in_batches(tokens, |pass, w, _, stream: &mut Vec<f32>| {
            self.model.transformer.embed(pass, w);
            stream.extend_from_slice(&w.x);
        })
    }

    /// The input of query, key and value `(tokens, hidden)`.
    pub(crate) fn qkv_input(&self, loaded: &LoadedLayer, x: &[f32]) -> Vec<f32> {
        self.pass(|pass, w| {
            pass.norm(x, loaded.layer.mixer_norms.input.as_ref(), &mut w.input);
            w.input.values.to_vec()
        })
    }

    /// The input of attention's output projection `(tokens, attended_width)`, for the residual stream `x` of a window.
    ///
    /// # Errors
    /// Those of [`Layerwise::embed`].
    pub(crate) fn attended(&self, loaded: &LoadedLayer, x: &[f32]) -> Result<Vec<f32>> {
        let (hidden, positions) = (self.config().hidden, &self.model.transformer.positions);
        let LoadedLayer { index, layer: Layer { mixer_norms, mixer, .. } } = loaded;
        let tokens = vec![0; x.len() / hidden];
        self.in_batches(&tokens, |pass, w, inputs, attended: &mut Vec<f32>| {
            w.mixers.prepare(positions, &w.batch);
            let at = w.batch.rows.first().map_or(0, |row| row.position) * hidden;
            let x = &x[at..][..w.batch.rows.len() * hidden];
            pass.norm(x, mixer_norms.input.as_ref(), &mut w.input);
            let mut context = MixerContext { pass, positions, batch: &w.batch, inputs, layer: *index };
            mixer.mix(&mut context, &mut w.input, &mut w.mixers);
            attended.extend_from_slice(&w.input.values);
        })
    }

    /// Adds attention to the stream `x` and returns the input of the feed-forward networks `(tokens, hidden)`.
    pub(crate) fn join_attention(&self, loaded: &LoadedLayer, attended: Vec<f32>, x: &mut [f32]) -> Vec<f32> {
        let (layer, config) = (&loaded.layer, self.config());
        self.pass(|pass, w| {
            w.input.values.copy_from(&attended);
            pass.linear(layer.mixer.out_proj(), &mut w.input, &mut w.branch);
            pass.norm_branch(&mut w.branch, layer.mixer_norms.output.as_ref(), &mut w.rows);
            if !config.parallel {
                pass.join(x, &w.branch);
                pass.norm_stream(x, layer.mixer_norms.stream.as_ref(), &mut w.input);
            }
            pass.norm(x, layer.ffn_norm(config), &mut w.input);
            if config.parallel {
                pass.join(x, &w.branch);
            }
            w.input.values.to_vec()
        })
    }

    /// The experts that each token chooses, and their weights `(tokens, experts used)`. Empty for a dense layer.
    pub(crate) fn route(&self, loaded: &LoadedLayer, input: &[f32]) -> Vec<(usize, f32)> {
        let Some(experts) = loaded.experts() else { return Vec::new() };
        self.pass(|pass, w| {
            w.input.values.copy_from(input);
            experts.route(pass, &mut w.input)
        })
    }

    /// The weights `(tokens)` of the shared expert's output. Empty without a shared expert.
    pub(crate) fn shared_weights(&self, loaded: &LoadedLayer, input: &[f32]) -> Vec<f32> {
        let Some(experts) = loaded.experts() else { return Vec::new() };
        self.pass(|pass, w| {
            w.input.values.copy_from(input);
            experts.shared_weights(pass, &mut w.input)
        })
    }

    /// The input of a network's `down` `(tokens, width)`, from the input of the network.
    pub(crate) fn inner(&self, loaded: &LoadedLayer, network: Network, input: Vec<f32>) -> Vec<f32> {
        self.pass(|pass, w| {
            w.input.values.copy_from(&input);
            loaded.network(network).inner(pass, &mut w.input, &mut w.ffn.dense);
            w.input.values.to_vec()
        })
    }

    /// The output of a network's `down` `(tokens, hidden)`.
    pub(crate) fn down(&self, loaded: &LoadedLayer, network: Network, inner: Vec<f32>) -> Vec<f32> {
        let hidden = self.config().hidden;
        self.pass(|pass, w| {
            w.input.values.copy_from(&inner);
            pass.linear(&loaded.network(network).down, &mut w.input, &mut w.branch);
            let width = hidden.next_multiple_of(PANEL);
            w.branch.chunks(width).flat_map(|row| &row[..hidden]).copied().collect()
        })
    }

    /// Adds the output of the feed-forward networks `(tokens, hidden)` to the stream `x`.
    pub(crate) fn join_ffn(&self, loaded: &LoadedLayer, out: &[f32], x: &mut [f32]) {
        let hidden = self.config().hidden;
        self.pass(|pass, w| {
            let width = hidden.next_multiple_of(PANEL);
            w.branch.resize(out.len() / hidden * width);
            for (row, out) in w.branch.chunks_exact_mut(width).zip(out.chunks_exact(hidden)) {
                row[..hidden].copy_from_slice(out);
            }
            pass.norm_branch(&mut w.branch, loaded.layer.ffn_norms.output.as_ref(), &mut w.rows);
            pass.join(x, &w.branch);
            pass.norm_stream(x, loaded.layer.ffn_norms.stream.as_ref(), &mut w.input);
        });
    }

    /// The logits `(tokens, vocabulary)` of the stream `x` after the last layer.
    pub(crate) fn logits(&self, x: Vec<f32>) -> Vec<f32> {
        self.pass(|pass, w| {
            let mut logits = Vec::new();
            w.x.copy_from(&x);
            self.model.transformer.head(pass, w, &mut logits);
            logits
        })
    }

    fn pass<R>(&self, run: impl FnOnce(&Pass<'_>, &mut Workspace) -> R) -> R {
        let transformer = &self.model.transformer;
        self.model.with_workspace(|workspace| {
            transformer.pool.run(|scope| {
                let (config, kernel, threads) = (&transformer.config, transformer.kernel, transformer.pool.threads());
                run(&Pass { config, kernel, scope, threads }, workspace)
            })
        })
    }

    /// Runs `step` over the tokens of one session, a batch at a time.
    fn in_batches(
        &self,
        tokens: &[u32],
        mut step: impl FnMut(&Pass<'_>, &mut Workspace, &mut [Input<'_>], &mut Vec<f32>),
    ) -> Result<Vec<f32>> {
        let mut session = self.model.session();
        session.reserve(tokens.len())?;
        let mut inputs = [Input::new(&mut session, tokens, Logits::None)];
        let mut out = Vec::new();
        self.pass(|pass, w| {
            w.batch.start(1);
            while w.batch.gather(&inputs, !pass.config.causal, |rows| span_rows(pass.config, pass.threads, rows)) {
                step(pass, w, &mut inputs, &mut out);
                inputs[0].session.advance(w.batch.rows.len());
            }
        });
        Ok(out)
    }
}
