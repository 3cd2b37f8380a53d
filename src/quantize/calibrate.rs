//! Calibration: what the inputs of every linear layer look like on a text.
//!
//! All windows of the text go through the model together, one layer at a time. Where a linear layer reads its input, the
//! moments of that input are summed, the layer is quantized, and the windows go on with the quantized weights: so later
//! layers make up for the errors of earlier ones. In memory are one layer's weights, the moments of one input, and the
//! activations of all windows, which go to a temporary file beyond a limit.

use std::path::Path;

use super::compute::{Compute, mirror};
use super::saved::{Saved, Writer};
use super::stream::Stream;
use crate::error::Result;
use crate::format::Checkpoint;
use crate::model::layerwise::{Layerwise, LoadedLayer, Network, Site};

/// Rows whose products are summed together.
const BATCH_ROWS: usize = 2048;
/// Numbers that each buffer of activations holds in memory: 256 MiB.
const IN_MEMORY: usize = 64 << 20;

/// Second moments of the inputs of a linear layer.
#[derive(Debug)]
pub(super) struct Moments {
    columns: usize,
    /// `(columns, columns)`: `x x^T`, the sum over tokens until [`finish`](Moments::finish) makes it a mean.
    pub(super) hessian: Vec<f32>,
    /// `(columns)`: `|x|`, likewise.
    pub(super) magnitude: Vec<f32>,
    /// Tokens that were seen.
    pub(super) tokens: usize,
    /// Rows that are not summed yet.
    waiting: Vec<f32>,
}

impl Moments {
    fn new(columns: usize) -> Moments {
        Moments {
            columns,
            hessian: vec![0.0; columns * columns],
            magnitude: vec![0.0; columns],
            tokens: 0,
            waiting: Vec::new(),
        }
    }

    /// Adds inputs `(tokens, columns)`.
    fn add(&mut self, x: &[f32], compute: &Compute<'_>) {
        self.tokens += x.len() / self.columns;
        for row in x.chunks(self.columns) {
            self.magnitude.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.abs());
        }
        self.waiting.extend_from_slice(x);
        if self.waiting.len() >= BATCH_ROWS * self.columns {
            self.flush(compute);
        }
    }

    fn flush(&mut self, compute: &Compute<'_>) {
        compute.add_moments(&self.waiting, self.columns, &mut self.hessian);
        self.waiting.clear();
    }

    fn finish(&mut self, compute: &Compute<'_>) {
        self.flush(compute);
        self.waiting = Vec::new();
        let factor = 1.0 / self.tokens.max(1) as f32;
        mirror(&mut self.hessian, self.columns, factor);
        self.magnitude.iter_mut().for_each(|sum| *sum *= factor);
    }
}

/// What is done where linear layers read their inputs.
pub(super) trait Visitor {
    /// Whether the site's inputs are asked for.
    fn wants(&self, layer: usize, site: Site) -> bool;

    /// Quantizes the site's tensors; `moments` are there if they were wanted.
    fn visit(&mut self, layer: usize, site: Site, moments: Option<Moments>) -> Result<()>;

    /// The checkpoint with what is quantized of it.
    fn checkpoint(&self) -> &dyn Checkpoint;

    /// Told before each window of a site. An error ends the calibration.
    fn step(&self, layer: usize, site: Site, window: usize) -> Result<()>;
}

/// Activations of all windows on their way through the layers.
pub(super) struct Calibration<'a> {
    layers: &'a Layerwise,
    compute: Compute<'a>,
    windows: &'a [Vec<u32>],
    folder: &'a Path,
    /// The residual stream.
    stream: Stream,
}

impl<'a> Calibration<'a> {
    /// The windows before the first layer. Temporary files go to `folder`.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io), and those of the forward pass.
    pub(super) fn start(layers: &'a Layerwise, windows: &'a [Vec<u32>], folder: &'a Path) -> Result<Calibration<'a>> {
        let mut calibration = Calibration::empty(layers, windows, folder);
        for (window, tokens) in windows.iter().enumerate() {
            calibration.stream.put(window, layers.embed(tokens)?)?;
        }
        Ok(calibration)
    }

    /// The windows before the layer at which a run with that `key` stopped, and the layer's number, if `path` has them.
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io)
    pub(super) fn resume(
        layers: &'a Layerwise,
        windows: &'a [Vec<u32>],
        folder: &'a Path,
        path: &Path,
        key: u64,
    ) -> Result<Option<(Calibration<'a>, usize)>> {
        let hidden = layers.config().hidden;
        let count = windows.iter().map(|tokens| tokens.len() * hidden).sum();
        let Some(saved) = Saved::open(path, key, count)? else { return Ok(None) };
        let mut calibration = Calibration::empty(layers, windows, folder);
        let mut at = 0;
        for (window, tokens) in windows.iter().enumerate() {
            let mut x = vec![0.0f32; tokens.len() * hidden];
            saved.read(at, &mut x)?;
            at += x.len();
            calibration.stream.put(window, x)?;
        }
        Ok(Some((calibration, saved.number as usize)))
    }

    /// Writes the windows, which come before layer `layer`, to `path`, for [`resume`](Calibration::resume).
    ///
    /// # Errors
    /// [`Error::Io`](crate::error::Error::Io)
    pub(super) fn save(&mut self, path: &Path, key: u64, layer: usize) -> Result<()> {
        let mut writer = Writer::create(path, key, layer as u64)?;
        for window in 0..self.windows.len() {
            writer.write(&self.stream.get(window)?)?;
        }
        writer.finish()
    }

    fn empty(layers: &'a Layerwise, windows: &'a [Vec<u32>], folder: &'a Path) -> Calibration<'a> {
        let compute = Compute::new(layers.pool(), layers.kernel());
        let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
        let stream = Stream::new(windows.len(), longest * layers.config().hidden, IN_MEMORY, folder);
        Calibration { layers, compute, windows, folder, stream }
    }

    /// The windows as they are now, to be taken through other weights.
    ///
    /// # Errors
    /// Those of temporary files.
    pub(super) fn fork(&mut self) -> Result<Calibration<'a>> {
        let mut stream = self.buffer(self.layers.config().hidden);
        for window in 0..self.windows.len() {
            stream.put(window, self.stream.get(window)?)?;
        }
        Ok(Calibration { stream, ..*self })
    }

    /// The logits of all tokens of a window `(tokens, vocabulary)`, after the last layer.
    ///
    /// # Errors
    /// Those of temporary files.
    pub(super) fn logits(&mut self, window: usize) -> Result<Vec<f32>> {
        Ok(self.layers.logits(self.stream.get(window)?))
    }

    /// Takes the windows through a layer, whose linear layers `visitor` quantizes on the way.
    ///
    /// # Errors
    /// Those of `visitor`, of reading the layer and of temporary files.
    pub(super) fn layer(&mut self, index: usize, visitor: &mut dyn Visitor) -> Result<()> {
        let (layers, hidden) = (self.layers, self.layers.config().hidden);
        let heads = layers.config().heads * layers.config().head_dim;
        let mut loaded = layers.layer(visitor.checkpoint(), index)?;

        if visitor.wants(index, Site::Qkv) {
            let mut moments = Moments::new(hidden);
            for window in 0..self.windows.len() {
                visitor.step(index, Site::Qkv, window)?;
                moments.add(&layers.qkv_input(&loaded, &self.stream.get(window)?), &self.compute);
            }
            self.solve(&mut loaded, Site::Qkv, Some(moments), visitor)?;
        } else {
            self.solve(&mut loaded, Site::Qkv, None, visitor)?;
        }

        // First the output of attention, then the input of the feed-forward networks.
        let mut inputs = self.buffer(heads.max(hidden));
        let mut moments = visitor.wants(index, Site::AttentionOutput).then(|| Moments::new(heads));
        for window in 0..self.windows.len() {
            visitor.step(index, Site::AttentionOutput, window)?;
            let out = layers.attended(&loaded, &self.stream.get(window)?)?;
            moments.iter_mut().for_each(|moments| moments.add(&out, &self.compute));
            inputs.put(window, out)?;
        }
        self.solve(&mut loaded, Site::AttentionOutput, moments, visitor)?;

        for window in 0..self.windows.len() {
            let mut x = self.stream.take(window)?;
            let input = layers.join_attention(&loaded, inputs.take(window)?, &mut x);
            self.stream.put(window, x)?;
            inputs.put(window, input)?;
        }
        self.networks(&mut loaded, inputs, visitor)
    }

    /// The feed-forward networks of a layer, one after the other.
    fn networks(&mut self, loaded: &mut LoadedLayer, mut inputs: Stream, visitor: &mut dyn Visitor) -> Result<()> {
        let (layers, hidden) = (self.layers, self.layers.config().hidden);
        let networks = loaded.networks();
        let mut choices = Vec::new();
        for window in 0..self.windows.len() {
            choices.push(layers.route(loaded, &inputs.get(window)?));
        }
        let mut joining = self.buffer(hidden);
        let last = networks.last().copied();
        for network in networks {
            let mut chosen = Vec::with_capacity(self.windows.len());
            for (window, choice) in choices.iter().enumerate() {
                chosen.push(self.chosen(loaded, network, choice, &inputs.get(window)?));
            }
            let is_last = Some(network) == last;
            self.network(loaded, network, is_last, &chosen, (&mut inputs, &mut joining), visitor)?;
        }
        for window in 0..self.windows.len() {
            let mut x = self.stream.take(window)?;
            layers.join_ffn(loaded, &joining.take(window)?, &mut x);
            self.stream.put(window, x)?;
        }
        Ok(())
    }

    /// One network: its inputs are the `chosen` rows of `inputs`, of which the last network leaves nothing, its weighted outputs
    /// are added to `joining`.
    fn network(
        &self,
        loaded: &mut LoadedLayer,
        network: Network,
        is_last: bool,
        chosen: &[Vec<(usize, f32)>],
        (inputs, joining): (&mut Stream, &mut Stream),
        visitor: &mut dyn Visitor,
    ) -> Result<()> {
        let (layers, hidden, index) = (self.layers, self.layers.config().hidden, loaded.index());
        let (up, down) = (Site::Up(network), Site::Down(network));
        let gather = |inputs: &mut Stream, window: usize, is_last: bool| -> Result<Vec<f32>> {
            let all = if is_last { inputs.take(window)? } else { inputs.get(window)? };
            Ok(chosen[window].iter().flat_map(|(row, _)| &all[row * hidden..][..hidden]).copied().collect())
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
            let mut sum = joining.take(window)?;
            sum.resize(self.windows[window].len() * hidden, 0.0);
            for ((row, weight), out) in chosen[window].iter().zip(out.chunks(hidden)) {
                self.compute.kernel.add_scaled(&mut sum[row * hidden..][..hidden], out, *weight);
            }
            joining.put(window, sum)?;
        }
        Ok(())
    }

    /// The rows of a window that go through a network, and the weights of its outputs.
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

    fn buffer(&self, width: usize) -> Stream {
        Stream::new(self.windows.len(), self.longest() * width, IN_MEMORY, self.folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::hf::HfFolder;
    use crate::model::{Input, LoadOptions, Logits, Model, Quantize};

    /// Asks for all moments and changes nothing.
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
    fn layer_by_layer_every_family_computes_the_bits_of_the_forward_pass() {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/goldens");
        let mut families = 0;
        for folder in std::fs::read_dir(goldens).unwrap() {
            let folder = folder.unwrap().path();
            let options = LoadOptions { quantize: Quantize::Stored, threads: Some(1), ..LoadOptions::default() };
            let checkpoint = HfFolder::open(&folder).unwrap();
            let windows: Vec<Vec<u32>> =
                (0..3).map(|w| (0..40 - w).map(|i| (i * 37 + w * 91) % 320).collect()).collect();
            let layers = Layerwise::load(&checkpoint, &options).unwrap();
            let mut spectator = Spectator { checkpoint: &checkpoint, seen: Vec::new() };
            let mut calibration = Calibration::start(&layers, &windows, Path::new(".")).unwrap();
            let count = layers.config().layers.len();
            (0..count).for_each(|index| calibration.layer(index, &mut spectator).unwrap());

            let model = Model::load(&folder, &options).unwrap();
            for (window, tokens) in windows.iter().enumerate() {
                let (mut session, mut expected) = (model.session(), Vec::new());
                let input = Input { session: &mut session, tokens, logits: Logits::All };
                model.forward(&mut [input], &mut expected, &|| false).unwrap();
                let found = layers.logits(calibration.stream.get(window).unwrap());
                assert_eq!(found, expected, "{}, window {window}", folder.display());
            }
            let tokens: usize = windows.iter().map(Vec::len).sum();
            for layer in 0..count {
                let at = |wanted: fn(&Site) -> bool| {
                    let own = spectator.seen.iter().filter(move |(of, site, _)| *of == layer && wanted(site));
                    own.map(|(_, _, tokens)| tokens).sum::<usize>()
                };
                assert_eq!(at(|site| *site == Site::Qkv), tokens);
                assert_eq!(at(|site| *site == Site::AttentionOutput), tokens);
                let experts = layers.config().experts.used.max(1);
                let routed = at(|site| matches!(site, Site::Up(Network::Dense | Network::Expert(_))));
                assert_eq!(routed, tokens * experts, "{}", folder.display());
            }
            families += 1;
        }
        assert_eq!(families, 30);
    }

    #[test]
    fn moments_are_means_over_all_tokens() {
        let pool = crate::threads::ThreadPool::new(1).unwrap();
        let compute = Compute::new(&pool, crate::kernels::best());
        let mut moments = Moments::new(2);
        // More than one batch.
        for _ in 0..3000 {
            moments.add(&[1.0, -2.0, 3.0, 0.0], &compute);
        }
        moments.finish(&compute);
        assert_eq!((moments.tokens, &moments.hessian[..]), (6000, &[5.0, -1.0, -1.0, 2.0][..]));
        assert_eq!(moments.magnitude, [2.0, 1.0]);
    }
}
