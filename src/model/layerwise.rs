//! The forward pass one layer at a time over many windows of tokens, for calibration: it stops wherever a linear layer reads
//! its input. A layer's weights are in memory only while it computes.

use super::adapter::rows::AdapterRows;
use super::batch::{Input, Logits};
use super::buffer::Buffer;
use super::config::Config;
use super::ffn::dense::Mlp;
use super::ffn::experts::Experts;
use super::ffn::{DenseAndExperts, FeedForward};
use super::forward::Workspace;
use super::linear::Linear;
use super::mixers::{Mixer, MixerContext, span_rows};
use super::model::Model;
use super::pass::Pass;
use super::pipeline::held::Held;
use super::state::session::Session;
use super::transformer::{Layer, Weights};
use super::weights::load_options::LoadOptions;
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

/// The tensors that read the input of the mixer.
const QKV: &[&str] = &[
    "attn_qkv",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_gate",
    "attn_q_a",
    "attn_kv_a_mqa",
    "ssm_in",
    "ssm_alpha",
    "ssm_beta",
    "ssm_ba",
    "ssm_f_a",
    "ssm_g_a",
    "shortconv.in_proj",
];

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
            Site::Qkv => (QKV, Network::Dense),
            Site::AttentionOutput => (&["attn_output", "ssm_out", "shortconv.out_proj"], Network::Dense),
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
        self.layer.mixer.out_proj().map_or(0, Linear::columns)
    }

    /// Width between up and down.
    pub(crate) fn width(&self, network: Network) -> usize {
        self.network(network).map_or(0, |mlp| mlp.width)
    }

    /// The feed-forward networks: experts in order, then the shared one.
    pub(crate) fn networks(&self) -> Vec<Network> {
        let Some(experts) = self.experts() else {
            return if matches!(self.layer.ffn, FeedForward::ChannelMix(_) | FeedForward::None) {
                Vec::new()
            } else {
                vec![Network::Dense]
            };
        };
        let chosen = (0..experts.experts().len()).map(Network::Expert);
        let dense = self.both().map(|_| Network::Dense);
        dense.into_iter().chain(chosen).chain(experts.shared().map(|_| Network::Shared)).collect()
    }

    /// Whether a dense network accompanies experts, which have an input of their own.
    pub(crate) fn has_both(&self) -> bool {
        self.both().is_some()
    }

    fn both(&self) -> Option<&DenseAndExperts> {
        match &self.layer.ffn {
            FeedForward::Both(both) => Some(both),
            _ => None,
        }
    }

    fn experts(&self) -> Option<&Experts> {
        match &self.layer.ffn {
            FeedForward::Experts(experts) => Some(experts),
            FeedForward::Both(both) => Some(&both.experts),
            _ => None,
        }
    }

    fn network(&self, network: Network) -> Option<&Mlp> {
        match (&self.layer.ffn, network) {
            (FeedForward::ChannelMix(_) | FeedForward::None, _) => None,
            (FeedForward::Dense(mlp), _) => Some(mlp),
            (FeedForward::Both(both), Network::Dense) => Some(&both.dense),
            (FeedForward::Experts(experts) | FeedForward::Both(DenseAndExperts { experts, .. }), _) => match network {
                Network::Expert(index) => experts.experts().get(index),
                _ => experts.shared().or(experts.experts().first()),
            },
        }
    }
}

impl Layerwise {
    /// Loads everything of `checkpoint` except its layers. It checks the names and shapes of all tensors in them.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    pub(crate) fn load(checkpoint: &dyn Checkpoint, options: &LoadOptions) -> Result<Layerwise> {
        let whole = |config: &Config| Held::whole(config.layers.len());
        let load =
            |loader: &Loader<'_>, config: &Config, context, _: &Held| Weights::without_layers(loader, config, context);
        let model = Model::with_weights(checkpoint, options, None, whole, load)?;
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
            let layer = Layer::load(&Loader::separate(scope, checkpoint), self.config(), index)?;
            Ok(LoadedLayer { index, layer })
        })
    }

    /// Checks that a layer of `checkpoint` consists of what this module computes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with a tensor that shows what it does not compute.
    pub(crate) fn check(&self, checkpoint: &dyn Checkpoint, loaded: &LoadedLayer) -> Result<()> {
        let LoadedLayer { index, layer } = loaded;
        let tensor = match (&layer.streams, &layer.mixer) {
            (Some(_), _) => "altup_router.weight",
            (None, Mixer::AttentionAndMamba2(..)) => "ssm_in.weight",
            (None, Mixer::TimeMix(_)) => "time_mix_key.weight",
            (None, _) if self.config().experts.latent.is_some() => "ffn_latent_down.weight",
            (None, _) => return Ok(()),
        };
        Err(Error::Unsupported {
            path: checkpoint.path().to_path_buf(),
            place: Place::Tensor(format!("blk.{index}.{tensor}")),
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
            let loader = &Loader::separate(scope, checkpoint);
            match site {
                Site::Qkv => layer.mixer.reload_in_proj(loader, config, *index),
                Site::AttentionOutput => layer.mixer.reload_out_proj(loader, config, *index),
                Site::Up(network) | Site::Down(network) => match (&mut layer.ffn, network) {
                    (FeedForward::ChannelMix(_) | FeedForward::None, _) => Ok(()),
                    (FeedForward::Dense(mlp), _) => {
                        *mlp = Mlp::load(loader, config, *index, "", None)?;
                        Ok(())
                    }
                    (FeedForward::Both(both), Network::Dense) => {
                        both.dense = Mlp::load(loader, config, *index, "", None)?;
                        Ok(())
                    }
                    (FeedForward::Experts(experts) | FeedForward::Both(DenseAndExperts { experts, .. }), _) => {
                        experts.reload(loader, config, *index, site.expert())
                    }
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
        self.in_batches(tokens, &mut self.session(), |pass, w, _, stream: &mut Vec<f32>| {
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

    /// An empty session.
    pub(crate) fn session(&self) -> Session {
        self.model.session()
    }

    /// Whether a later layer reads the keys and values of layer `index`.
    pub(crate) fn is_shared(&self, index: usize) -> bool {
        self.config().layers.iter().any(|layer| layer.shares == Some(index))
    }

    /// Whether layer `index` or a later one reads keys and values of a layer before it.
    pub(crate) fn depends_on_earlier(&self, index: usize) -> bool {
        self.config().layers.iter().skip(index).any(|layer| layer.shares.is_some_and(|source| source < index))
    }

    /// The input of attention's output projection `(tokens, attended_width)`, for the residual stream `x` of a window. The keys
    /// and values go to `session`, or come from it where the layer reads those of an earlier one.
    ///
    /// # Errors
    /// Those of [`Layerwise::embed`].
    pub(crate) fn attended(&self, loaded: &LoadedLayer, x: &[f32], session: &mut Session) -> Result<Vec<f32>> {
        let (hidden, positions) = (self.config().hidden, &self.model.transformer.positions);
        let LoadedLayer { index, layer: Layer { mixer_norms, mixer, .. } } = loaded;
        let tokens = vec![0; x.len() / hidden];
        self.in_batches(&tokens, session, |pass, w, inputs, attended: &mut Vec<f32>| {
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
            let Some(out_proj) = layer.mixer.out_proj() else {
                pass.norm(x, layer.ffn_norm(config), &mut w.input);
                return w.input.values.to_vec();
            };
            w.input.values.copy_from(&attended);
            pass.linear(out_proj, &mut w.input, &mut w.branch);
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

    /// The input of the experts `(tokens, hidden)` that a dense network accompanies, from the stream `x` after attention.
    pub(crate) fn expert_input(&self, loaded: &LoadedLayer, x: &[f32]) -> Vec<f32> {
        self.pass(|pass, w| {
            if let Some(both) = loaded.both() {
                both.expert_input(pass, x, &mut w.input);
            }
            w.input.values.to_vec()
        })
    }

    /// The experts that each token chooses, and their weights `(tokens, experts used)`, from the stream `x` after attention and
    /// the input of the feed-forward networks. Empty for a dense layer.
    pub(crate) fn route(&self, loaded: &LoadedLayer, x: &[f32], input: &[f32]) -> Vec<(usize, f32)> {
        let Some(experts) = loaded.experts() else { return Vec::new() };
        self.pass(|pass, w| {
            if loaded.has_both() {
                return experts.route_by(pass, x, &mut w.input);
            }
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
            if let Some(mlp) = loaded.network(network) {
                mlp.inner(pass, &mut w.input, &mut w.ffn.dense);
            }
            w.input.values.to_vec()
        })
    }

    /// The output of a network's `down` `(tokens, hidden)`.
    pub(crate) fn down(&self, loaded: &LoadedLayer, network: Network, inner: Vec<f32>) -> Vec<f32> {
        let hidden = self.config().hidden;
        self.pass(|pass, w| {
            w.input.values.copy_from(&inner);
            if let Some(mlp) = loaded.network(network) {
                pass.linear(&mlp.down, &mut w.input, &mut w.branch);
            }
            let width = hidden.next_multiple_of(PANEL);
            w.branch.chunks(width).flat_map(|row| &row[..hidden]).copied().collect()
        })
    }

    /// The output of a dense network and of the experts next to it `(tokens, hidden)`, from the output of each.
    pub(crate) fn join_both(&self, loaded: &LoadedLayer, dense: &[f32], experts: &[f32]) -> Vec<f32> {
        let hidden = self.config().hidden;
        self.pass(|pass, w| {
            let mut sum = Buffer::default();
            pad_rows(dense, hidden, &mut w.branch);
            pad_rows(experts, hidden, &mut sum);
            if let Some(both) = loaded.both() {
                both.join(pass, &mut w.branch, &mut sum, &mut w.rows);
            }
            let width = hidden.next_multiple_of(PANEL);
            w.branch.chunks(width).flat_map(|row| &row[..hidden]).copied().collect()
        })
    }

    /// Adds the output of the feed-forward networks `(tokens, hidden)` to the stream `x` of a window of `tokens`.
    ///
    /// # Errors
    /// Those of [`Layerwise::embed`].
    pub(crate) fn join_ffn(&self, loaded: &LoadedLayer, tokens: &[u32], out: &[f32], x: &mut [f32]) -> Result<()> {
        let (hidden, layer) = (self.config().hidden, &loaded.layer);
        let vectors = self.vectors(loaded, tokens)?;
        self.pass(|pass, w| {
            pad_rows(out, hidden, &mut w.branch);
            pass.norm_branch(&mut w.branch, layer.ffn_norms.output.as_ref(), &mut w.rows);
            pass.join(x, &w.branch);
            pass.norm_stream(x, layer.ffn_norms.stream.as_ref(), &mut w.input);
            if let Some(per_layer) = &layer.per_layer {
                per_layer.compute(pass, 0, x, &mut w.input, &vectors, &mut w.branch, &mut w.rows);
                pass.join(x, &w.branch);
            }
            if let Some(scale) = layer.scale {
                x.iter_mut().for_each(|x| *x *= scale);
            }
        });
        Ok(())
    }

    /// The vectors of a layer that depend on the tokens `(tokens, width)`; none where it has none.
    fn vectors(&self, loaded: &LoadedLayer, tokens: &[u32]) -> Result<Vec<f32>> {
        let transformer = &self.model.transformer;
        let (Some(all), Some(_)) = (&transformer.weights.per_layer, &loaded.layer.per_layer) else {
            return Ok(Vec::new());
        };
        let width = all.width() / self.config().layers.len();
        self.in_batches(tokens, &mut self.session(), |pass, w, _, vectors| {
            transformer.embed(pass, w);
            let Workspace { batch, x, input, branch, rows, per_layer: out, .. } = w;
            all.compute(pass, &batch.rows, x, input, branch, rows, out);
            vectors.extend(out.chunks(all.width()).flat_map(|row| &row[loaded.index * width..][..width]));
        })
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

    /// What the output matrix is multiplied by `(tokens, its columns)`, for the stream `x` after the last layer.
    pub(crate) fn output_input(&self, x: &[f32]) -> Vec<f32> {
        self.pass(|pass, w| {
            w.x.copy_from(x);
            self.model.transformer.output_input(pass, w);
            w.input.values.to_vec()
        })
    }

    fn pass<R>(&self, run: impl FnOnce(&Pass<'_>, &mut Workspace) -> R) -> R {
        let transformer = &self.model.transformer;
        self.model.with_workspace(|workspace| {
            transformer.pool.run(|scope| {
                let (config, kernel, threads) = (&transformer.config, transformer.kernel, transformer.pool.threads());
                run(&Pass { config, kernel, scope, threads, adapters: AdapterRows::default() }, workspace)
            })
        })
    }

    /// Runs `step` over the tokens of `session`, from its first position on, a batch at a time. A session that is not empty
    /// holds keys and values of as many tokens.
    fn in_batches(
        &self,
        tokens: &[u32],
        session: &mut Session,
        mut step: impl FnMut(&Pass<'_>, &mut Workspace, &mut [Input<'_>], &mut Vec<f32>),
    ) -> Result<Vec<f32>> {
        match session.len() {
            0 => session.reserve(tokens.len())?,
            _ => session.rewind()?,
        }
        let mut inputs = [Input::new(session, tokens, Logits::None)];
        let mut out = Vec::new();
        self.pass(|pass, w| {
            w.batch.start(1);
            let whole = if pass.config.causal { 0 } else { usize::MAX };
            while w.batch.gather(&inputs, whole, |rows| span_rows(pass.config, pass.threads, rows)) {
                step(pass, w, &mut inputs, &mut out);
                inputs[0].session.advance(w.batch.rows.len());
                if let Some(state) = inputs[0].session.state_mut() {
                    state.end_batch();
                }
            }
        });
        Ok(out)
    }
}

/// Copies `rows (tokens, hidden)` to `out (tokens, hidden rounded up to panels)`.
fn pad_rows(rows: &[f32], hidden: usize, out: &mut Buffer) {
    let width = hidden.next_multiple_of(PANEL);
    out.resize(rows.len() / hidden * width);
    for (out, row) in out.chunks_exact_mut(width).zip(rows.chunks_exact(hidden)) {
        out[..hidden].copy_from_slice(row);
    }
}
