//! Passes the windows of a text through the model, layer by layer.
//!
//! All windows pass through one layer before the next. Where a linear layer reads its input, the moments of that input are
//! summed, the layer is quantized, and the windows continue with the quantized weights, so that later layers compensate for
//! the errors of earlier ones. Memory holds the weights of one layer, the moments of one input, and the activations of all
//! windows, which spill to a temporary file beyond a limit.

use std::path::Path;

use super::moments::Moments;
use super::spill_buffer::SpillBuffer;
use super::visitor::Visitor;
use crate::error::{Error, Result};
use crate::model::Session;
use crate::model::layerwise::{Layerwise, LoadedLayer, Network, Site};
use crate::quantize::compute::Compute;
use crate::quantize::resume::SnapshotFile;

/// Tokens that a calibration text needs at least.
const MIN_CALIBRATION_TOKENS: usize = 512;
/// Numbers that each buffer of activations keeps in memory: 256 MiB.
const IN_MEMORY: usize = 64 << 20;

/// Checks that windows are enough to calibrate on, fit into the context and contain known tokens only.
///
/// # Errors
/// [`Error::InvalidArgument`]
pub(in crate::quantize) fn check_windows(layers: &Layerwise, windows: &[Vec<u32>]) -> Result<()> {
    let tokens: usize = windows.iter().map(Vec::len).sum();
    if tokens < MIN_CALIBRATION_TOKENS {
        let expected = format!("at least {MIN_CALIBRATION_TOKENS}, better 50000");
        return Err(Error::argument("calibration", format_args!("{tokens} tokens"), expected));
    }
    let (longest, context) = (windows.iter().map(Vec::len).max().unwrap_or(0), layers.context());
    if longest > context {
        return Err(Error::argument("window", format_args!("{longest} tokens"), format_args!("at most {context}")));
    }
    match windows.iter().flatten().find(|token| **token as usize >= layers.vocabulary()) {
        Some(token) => Err(Error::argument("token", token, format_args!("an id below {}", layers.vocabulary()))),
        None => Ok(()),
    }
}

/// The activations of all windows between two layers.
pub(in crate::quantize) struct Calibration<'a> {
    layers: &'a Layerwise,
    compute: Compute<'a>,
    windows: &'a [Vec<u32>],
    folder: &'a Path,
    /// Per window `(tokens, hidden)`: the residual stream.
    residual: SpillBuffer,
    /// Per window, where layers share keys and values: those of the layers that others read.
    shared: Vec<Session>,
}

impl<'a> Calibration<'a> {
    /// The embedded windows, before the first layer. Temporary files go to `folder`.
    ///
    /// # Errors
    /// [`Error::Io`]; those of the forward pass.
    pub(in crate::quantize) fn start(
        layers: &'a Layerwise,
        windows: &'a [Vec<u32>],
        folder: &'a Path,
    ) -> Result<Calibration<'a>> {
        let mut calibration = Calibration::empty(layers, windows, folder);
        for (window, tokens) in windows.iter().enumerate() {
            calibration.residual.put(window, layers.embed(tokens)?)?;
        }
        Ok(calibration)
    }

    /// The windows of a snapshot, and the layer before which they are; `None` without a snapshot.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(in crate::quantize) fn resume(
        layers: &'a Layerwise,
        windows: &'a [Vec<u32>],
        folder: &'a Path,
        file: &SnapshotFile,
    ) -> Result<Option<(Calibration<'a>, usize)>> {
        let hidden = layers.config().hidden;
        let count = windows.iter().map(|tokens| tokens.len() * hidden).sum();
        let Some(snapshot) = file.open(count)? else { return Ok(None) };
        let mut calibration = Calibration::empty(layers, windows, folder);
        let mut at = 0;
        for (window, tokens) in windows.iter().enumerate() {
            let mut x = vec![0.0f32; tokens.len() * hidden];
            snapshot.read(at, &mut x)?;
            at += x.len();
            calibration.residual.put(window, x)?;
        }
        Ok(Some((calibration, snapshot.position as usize)))
    }

    /// Saves the windows, which are before layer `layer`, for [`resume`](Calibration::resume).
    ///
    /// # Errors
    /// [`Error::Io`]
    pub(in crate::quantize) fn save(&mut self, file: &SnapshotFile, layer: usize) -> Result<()> {
        if self.layers.depends_on_earlier(layer) {
            // A snapshot has no keys and values. The earlier one stays.
            return Ok(());
        }
        let mut writer = file.create(layer as u64)?;
        for window in 0..self.windows.len() {
            writer.write(&self.residual.get(window)?)?;
        }
        writer.finish()
    }

    fn empty(layers: &'a Layerwise, windows: &'a [Vec<u32>], folder: &'a Path) -> Calibration<'a> {
        let compute = Compute::new(layers.pool(), layers.kernel());
        let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
        let residual = SpillBuffer::new(windows.len(), longest * layers.config().hidden, IN_MEMORY, folder);
        Calibration { layers, compute, windows, folder, residual, shared: Vec::new() }
    }

    /// A copy of the windows, to continue with other weights.
    ///
    /// # Errors
    /// Those of temporary files.
    pub(in crate::quantize) fn fork(&mut self) -> Result<Calibration<'a>> {
        let mut residual = self.buffer(self.layers.config().hidden);
        for window in 0..self.windows.len() {
            residual.put(window, self.residual.get(window)?)?;
        }
        let shared = self.shared.iter().map(Session::fork).collect();
        Ok(Calibration { residual, shared, ..*self })
    }

    /// The logits of all tokens of a window `(tokens, vocabulary)`, after the last layer.
    ///
    /// # Errors
    /// Those of temporary files.
    pub(in crate::quantize) fn logits(&mut self, window: usize) -> Result<Vec<f32>> {
        Ok(self.layers.logits(self.residual.get(window)?))
    }

    /// The moments of what the output matrix, which has `columns`, is multiplied by, after the last layer.
    ///
    /// # Errors
    /// Those of temporary files.
    pub(in crate::quantize) fn output_moments(&mut self, columns: usize) -> Result<Moments> {
        let mut moments = Moments::new(columns);
        for window in 0..self.windows.len() {
            moments.add(&self.layers.output_input(&self.residual.get(window)?), &self.compute);
        }
        moments.finish(&self.compute);
        Ok(moments)
    }

    /// Passes the windows through a layer. `visitor` quantizes its linear layers on the way.
    ///
    /// # Errors
    /// Those of `visitor`, of reading the layer and of temporary files.
    pub(in crate::quantize) fn layer(&mut self, index: usize, visitor: &mut dyn Visitor) -> Result<()> {
        let (layers, hidden) = (self.layers, self.layers.config().hidden);
        let mut loaded = layers.layer(visitor.checkpoint(), index)?;
        layers.check(visitor.checkpoint(), &loaded)?;
        let heads = loaded.attended_width();

        if visitor.wants(index, Site::Qkv) {
            let mut moments = Moments::new(hidden);
            for window in 0..self.windows.len() {
                visitor.step(index, Site::Qkv, window)?;
                moments.add(&layers.qkv_input(&loaded, &self.residual.get(window)?), &self.compute);
            }
            self.solve(&mut loaded, Site::Qkv, Some(moments), visitor)?;
        } else {
            self.solve(&mut loaded, Site::Qkv, None, visitor)?;
        }

        let is_shared = layers.is_shared(index) || layers.config().layers[index].shares.is_some();
        if is_shared && self.shared.is_empty() {
            self.shared.resize_with(self.windows.len(), || layers.session());
        }
        // Holds the output of attention first, then the input of the feed-forward networks.
        let mut inputs = self.buffer(heads.max(hidden));
        let wants = heads > 0 && visitor.wants(index, Site::AttentionOutput);
        let mut moments = wants.then(|| Moments::new(heads));
        for window in 0..self.windows.len() {
            visitor.step(index, Site::AttentionOutput, window)?;
            let x = self.residual.get(window)?;
            let out = match self.shared.get_mut(window).filter(|_| is_shared) {
                Some(session) => layers.attended(&loaded, &x, session)?,
                None => layers.attended(&loaded, &x, &mut layers.session())?,
            };
            moments.iter_mut().for_each(|moments| moments.add(&out, &self.compute));
            inputs.put(window, out)?;
        }
        self.solve(&mut loaded, Site::AttentionOutput, moments, visitor)?;

        for window in 0..self.windows.len() {
            let mut x = self.residual.take(window)?;
            let input = layers.join_attention(&loaded, inputs.take(window)?, &mut x);
            self.residual.put(window, x)?;
            inputs.put(window, input)?;
        }
        self.networks(&mut loaded, inputs, visitor)
    }

    /// Passes the windows through the feed-forward networks of a layer, one after the other.
    fn networks(&mut self, loaded: &mut LoadedLayer, mut inputs: SpillBuffer, visitor: &mut dyn Visitor) -> Result<()> {
        let (layers, hidden, has_both) = (self.layers, self.layers.config().hidden, loaded.has_both());
        let networks = loaded.networks();
        if networks.is_empty() {
            return Ok(());
        }
        let mut choices = Vec::new();
        let mut expert_inputs = self.buffer(if has_both { hidden } else { 0 });
        for window in 0..self.windows.len() {
            let x = self.residual.get(window)?;
            choices.push(layers.route(loaded, &x, &inputs.get(window)?));
            if has_both {
                expert_inputs.put(window, layers.expert_input(loaded, &x))?;
            }
        }
        let (mut branch, mut expert_branch) = (self.buffer(hidden), self.buffer(if has_both { hidden } else { 0 }));
        let last = networks.last().copied();
        for network in networks {
            let is_dense = network == Network::Dense;
            let (inputs, branch) = match has_both && !is_dense {
                true => (&mut expert_inputs, &mut expert_branch),
                false => (&mut inputs, &mut branch),
            };
            let mut chosen = Vec::with_capacity(self.windows.len());
            for (window, choice) in choices.iter().enumerate() {
                chosen.push(self.chosen(loaded, network, choice, &inputs.get(window)?));
            }
            let is_last = Some(network) == last || is_dense;
            self.network(loaded, network, is_last, &chosen, (inputs, branch), visitor)?;
        }
        for (window, tokens) in self.windows.iter().enumerate() {
            let mut x = self.residual.take(window)?;
            let mut out = branch.take(window)?;
            if has_both {
                out = layers.join_both(loaded, &out, &expert_branch.take(window)?);
            }
            layers.join_ffn(loaded, tokens, &out, &mut x)?;
            self.residual.put(window, x)?;
        }
        Ok(())
    }

    /// Passes the windows through one network: reads the `chosen` rows of `inputs` and adds the weighted outputs to `branch`.
    /// The last network consumes `inputs`.
    fn network(
        &self,
        loaded: &mut LoadedLayer,
        network: Network,
        is_last: bool,
        chosen: &[Vec<(usize, f32)>],
        (inputs, branch): (&mut SpillBuffer, &mut SpillBuffer),
        visitor: &mut dyn Visitor,
    ) -> Result<()> {
        let (layers, hidden, index) = (self.layers, self.layers.config().hidden, loaded.index());
        let (up, down) = (Site::Up(network), Site::Down(network));
        // Whether weights apply to the inputs of experts instead of their outputs.
        let is_weighted = up.expert().is_some() && layers.config().family.quirks.weighted_input;
        let gather = |inputs: &mut SpillBuffer, window: usize, is_last: bool| -> Result<Vec<f32>> {
            let all = if is_last { inputs.take(window)? } else { inputs.get(window)? };
            let rows = chosen[window].iter().map(|(row, weight)| (&all[row * hidden..][..hidden], weight));
            Ok(match is_weighted {
                true => rows.flat_map(|(row, weight)| row.iter().map(move |x| x * weight)).collect(),
                false => rows.flat_map(|(row, _)| row).copied().collect(),
            })
        };
        let mut moments = visitor.wants(index, up).then(|| Moments::new(hidden));
        if let Some(moments) = &mut moments {
            for window in 0..self.windows.len() {
                visitor.step(index, up, window)?;
                moments.add(&gather(inputs, window, false)?, &self.compute);
            }
        }
        self.solve(loaded, up, moments, visitor)?;

        let width = loaded.width(network);
        let mut inner = self.buffer(width);
        let mut moments = visitor.wants(index, down).then(|| Moments::new(width));
        for window in 0..self.windows.len() {
            visitor.step(index, down, window)?;
            let out = layers.inner(loaded, network, gather(inputs, window, is_last)?);
            moments.iter_mut().for_each(|moments| moments.add(&out, &self.compute));
            inner.put(window, out)?;
        }
        self.solve(loaded, down, moments, visitor)?;

        for window in 0..self.windows.len() {
            let out = layers.down(loaded, network, inner.take(window)?);
            let mut sum = branch.take(window)?;
            sum.resize(self.windows[window].len() * hidden, 0.0);
            for ((row, weight), out) in chosen[window].iter().zip(out.chunks(hidden)) {
                let weight = if is_weighted { 1.0 } else { *weight };
                self.compute.kernel.add_scaled(&mut sum[row * hidden..][..hidden], out, weight);
            }
            branch.put(window, sum)?;
        }
        Ok(())
    }

    /// The rows of a window that a network computes, and the weights of its outputs.
    fn chosen(
        &self,
        loaded: &LoadedLayer,
        network: Network,
        choice: &[(usize, f32)],
        inputs: &[f32],
    ) -> Vec<(usize, f32)> {
        let config = self.layers.config();
        match network {
            Network::Dense => (0..inputs.len() / config.hidden).map(|row| (row, 1.0)).collect(),
            Network::Shared => self.layers.shared_weights(loaded, inputs).into_iter().enumerate().collect(),
            Network::Expert(expert) => {
                let own = choice.iter().enumerate().filter(|(_, (chosen, _))| *chosen == expert);
                own.map(|(at, (_, weight))| (at / config.experts.used, *weight)).collect()
            }
        }
    }

    fn solve(
        &self,
        loaded: &mut LoadedLayer,
        site: Site,
        mut moments: Option<Moments>,
        visitor: &mut dyn Visitor,
    ) -> Result<()> {
        moments.iter_mut().for_each(|moments| moments.finish(&self.compute));
        visitor.visit(loaded.index(), site, moments)?;
        self.layers.reload(visitor.checkpoint(), loaded, site)
    }

    fn longest(&self) -> usize {
        self.windows.iter().map(Vec::len).max().unwrap_or(0)
    }

    fn buffer(&self, width: usize) -> SpillBuffer {
        SpillBuffer::new(self.windows.len(), self.longest() * width, IN_MEMORY, self.folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Checkpoint;
    use crate::model::arch::{FeedForwardKind, MixerKind};
    use crate::model::hf::HfFolder;
    use crate::model::{Input, LoadOptions, Logits, Model, Quantize};

    /// Wants all moments and changes nothing.
    struct Spectator<'a> {
        checkpoint: &'a dyn Checkpoint,
        seen: Vec<(usize, Site, usize)>,
    }

    impl Visitor for Spectator<'_> {
        fn wants(&self, _: usize, _: Site) -> bool {
            true
        }

        fn visit(&mut self, layer: usize, site: Site, moments: Option<Moments>) -> Result<()> {
            self.seen.push((layer, site, moments.map_or(0, |moments| moments.tokens)));
            Ok(())
        }

        fn checkpoint(&self) -> &dyn Checkpoint {
            self.checkpoint
        }

        fn step(&self, _: usize, _: Site, _: usize) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn layer_by_layer_gives_the_bits_of_the_forward_pass_for_every_family() {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens");
        let (mut families, mut refused) = (0, Vec::new());
        for folder in std::fs::read_dir(goldens).unwrap() {
            let folder = folder.unwrap().path();
            let options = LoadOptions { quantize: Quantize::Stored, threads: Some(1), ..LoadOptions::default() };
            let checkpoint = HfFolder::open(&folder).unwrap();
            let windows: Vec<Vec<u32>> =
                (0..3).map(|w| (0..40 - w).map(|i| (i * 37 + w * 91) % 256).collect()).collect();
            let layers = Layerwise::load(&checkpoint, &options).unwrap();
            let mut spectator = Spectator { checkpoint: &checkpoint, seen: Vec::new() };
            let mut calibration = Calibration::start(&layers, &windows, Path::new(".")).unwrap();
            let count = layers.config().layers.len();
            if let Err(error) = (0..count).try_for_each(|index| calibration.layer(index, &mut spectator)) {
                assert!(error.to_string().contains("recipes without calibration"), "{error}");
                refused.push(folder.file_name().unwrap().to_string_lossy().into_owned());
                continue;
            }

            let model = Model::load(&folder, &options).unwrap();
            for (window, tokens) in windows.iter().enumerate() {
                let (mut session, mut expected) = (model.session(), Vec::new());
                let input = Input::new(&mut session, tokens, Logits::All);
                model.forward(&mut [input], &mut expected, &|| false).unwrap();
                let found = layers.logits(calibration.residual.get(window).unwrap());
                assert_eq!(found, expected, "{}, window {window}", folder.display());
            }
            let tokens: usize = windows.iter().map(Vec::len).sum();
            for layer in 0..count {
                let at = |wanted: fn(&Site) -> bool| {
                    let own = spectator.seen.iter().filter(move |(of, site, _)| *of == layer && wanted(site));
                    own.map(|(_, _, tokens)| tokens).sum::<usize>()
                };
                let kind = layers.config().layers[layer].kind;
                if kind.mixer != MixerKind::None {
                    assert_eq!(at(|site| *site == Site::Qkv), tokens);
                    assert_eq!(at(|site| *site == Site::AttentionOutput), tokens);
                }
                if kind.ffn == FeedForwardKind::None {
                    assert_eq!(at(|site| matches!(site, Site::Up(_) | Site::Down(_))), 0);
                    continue;
                }
                let dense = at(|site| matches!(site, Site::Up(Network::Dense))) > 0;
                let routed_to = layers.config().experts.used.max(1);
                let has_experts = at(|site| matches!(site, Site::Up(Network::Expert(_)))) > 0;
                let experts = usize::from(dense) + if has_experts || !dense { routed_to } else { 0 };
                let routed = at(|site| matches!(site, Site::Up(Network::Dense | Network::Expert(_))));
                assert_eq!(routed, tokens * experts, "{}", folder.display());
            }
            families += 1;
        }
        refused.sort();
        assert_eq!(refused, ["falcon_h1", "gemma3n", "rwkv"]);
        assert_eq!(families, 88);
    }
}
