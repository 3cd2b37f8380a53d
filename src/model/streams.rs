//! Several residual streams: a layer computes one and predicts the others (AltUp, Baykal et al. 2023, arXiv 2301.13310).
//! A low-rank branch joins attention (LAuReL, Menghani et al. 2024, arXiv 2411.07501). Gemma 3n has both.

use super::buffer::Buffer;
use super::config::{Config, StreamsConfig};
use super::fingerprint::FingerprintHasher;
use super::linear::{Linear, LinearInput};
use super::norm::Norm;
use super::pass::Pass;
use super::pipeline::held::Held;
use super::weights::loader::{Loader, Part};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::quant::packed::PANEL;

/// Magnitudes are not divided by less than this.
const LEAST_MAGNITUDE: f32 = 1e-5;

/// The projections from the embedding to the other streams, and back.
#[derive(Debug)]
pub(super) struct Streams {
    /// `(streams - 1)` matrices `(hidden, hidden)`
    begin: Vec<Linear>,
    /// As `begin`.
    end: Vec<Linear>,
}

/// The streams of a pass.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    /// `(streams, rows, hidden)`
    pub(super) all: Buffer,
    /// As `all`: the streams as a layer predicts them.
    pub(super) predicted: Buffer,
    /// `(rows, hidden)`: the low-rank branch.
    pub(super) low_rank: Buffer,
}

impl Workspace {
    /// Allocates memory for `rows` rows of `hidden` numbers.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub(super) fn reserve(&mut self, rows: usize, hidden: usize, streams: usize) -> Result<()> {
        self.all.reserve(streams * rows * hidden)?;
        self.predicted.reserve(streams * rows * hidden)?;
        self.low_rank.reserve(rows * hidden)
    }
}

impl Streams {
    /// Reads the projections, where the model has several streams.
    ///
    /// # Errors
    /// Those of [`Loader::linear`].
    pub(super) fn load(loader: &Loader<'_>, config: &Config, held: &Held) -> Result<Option<Streams>> {
        let Some(StreamsConfig { count, .. }) = config.streams else { return Ok(None) };
        let (others, hidden) = (count - 1, config.hidden);
        let stack = |loader: &Loader<'_>, name: &str| {
            let one = |index: usize| {
                let order = move |row| index * hidden + row;
                let part = Part { name: name.to_owned(), rows: hidden, order: &order, of: hidden, stack: Some(others) };
                loader.linear(&[part], hidden)
            };
            (0..others).map(one).collect::<Result<Vec<_>>>()
        };
        let begin = loader.load_if(held.embedding, |loader| stack(loader, "altup_proj"))?;
        let end = loader.load_if(held.head, |loader| stack(loader, "altup_unembd_proj"))?;
        Ok(Some(Streams { begin, end }))
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.begin.iter().chain(&self.end)
    }

    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        let Streams { begin, end } = self;
        begin.iter().chain(end).for_each(|linear| hasher.linear(linear));
    }

    /// Makes all streams of the embeddings `x (rows, hidden)`, each as large as those.
    pub(super) fn begin(
        &self,
        pass: &Pass<'_>,
        x: &[f32],
        input: &mut LinearInput,
        branch: &mut Buffer,
        streams: &mut Workspace,
    ) {
        let size = x.len();
        streams.all.resize((self.begin.len() + 1) * size);
        streams.all[..size].copy_from_slice(x);
        for (linear, at) in self.begin.iter().zip(1..) {
            pass.norm(x, None, input);
            pass.linear(linear, input, branch);
            rescale(pass, x, branch, &mut streams.all[at * size..][..size]);
        }
    }

    /// Makes `x (rows, hidden)` the mean of all streams, each projected and as large as the first.
    pub(super) fn end(
        &self,
        pass: &Pass<'_>,
        x: &mut [f32],
        input: &mut LinearInput,
        branch: &mut Buffer,
        streams: &mut Workspace,
    ) {
        let (size, count) = (x.len(), self.end.len() + 1);
        let (first, others) = streams.all.split_at_mut(size);
        x.copy_from_slice(first);
        for (linear, stream) in self.end.iter().zip(others.chunks_exact_mut(size)) {
            pass.norm(stream, None, input);
            pass.linear(linear, input, branch);
            rescale(pass, first, branch, stream);
            pass.kernel.add_scaled(x, stream, 1.0);
        }
        x.iter_mut().for_each(|x| *x /= count as f32);
    }
}

/// `out (rows, hidden)`: the rows of `branch (rows, hidden rounded up to panels)`, as large as those of `like`.
fn rescale(pass: &Pass<'_>, like: &[f32], branch: &[f32], out: &mut [f32]) {
    let hidden = pass.config.hidden;
    let mean = |row: &[f32]| (row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() / row.len() as f64) as f32;
    let rows = like.chunks(hidden).zip(branch.chunks(hidden.next_multiple_of(PANEL)));
    for ((like, row), out) in rows.zip(out.chunks_mut(hidden)) {
        let row = &row[..hidden];
        let (wanted, found) = (mean(like).sqrt(), mean(row).max(LEAST_MAGNITUDE).sqrt());
        out.iter_mut().zip(row).for_each(|(out, x)| *out = x * wanted / found);
    }
}

/// How a layer predicts and corrects the streams.
#[derive(Debug)]
pub(super) struct LayerStreams {
    router_norm: Norm,
    /// `(streams, hidden)`
    router: Vec<f32>,
    /// `(streams, streams, streams)`: for each stream, what the router makes of each other.
    predict: Vec<f32>,
    /// `(streams, streams)`
    correct: Vec<f32>,
    /// `(hidden)`: factors of the computed stream, for the layer's own vector.
    pub(super) correct_scale: Vec<f32>,
    /// `(rank, hidden)`
    pub(super) left: Linear,
    /// `(hidden, rank)`
    pub(super) right: Linear,
    /// Of the low-rank branch.
    pub(super) low_rank_norm: Option<Norm>,
}

impl LayerStreams {
    /// Reads the weights of layer `index`, where the model has several streams.
    ///
    /// # Errors
    /// Those of [`Loader::linear`].
    pub(super) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Option<LayerStreams>> {
        let Some(StreamsConfig { count, .. }) = config.streams else { return Ok(None) };
        let name = |suffix: &str| format!("blk.{index}.{suffix}");
        let hidden = config.hidden;
        let table = |suffix: &str, columns: usize, rows: usize| loader.table(&name(suffix), &[columns, rows]);
        let left = name("laurel_l");
        let rank = loader.dims(&format!("{left}.weight")).and_then(|dims| dims.get(1).copied()).unwrap_or(1);
        let router_norm = loader.norm(&name("altup_router_norm"), config)?;
        Ok(Some(LayerStreams {
            router_norm: router_norm.ok_or_else(|| loader.missing(&name("altup_router_norm.weight"), "a norm"))?,
            router: table("altup_router.weight", hidden, count)?,
            predict: table("altup_predict_coef.weight", count, count * count)?,
            correct: table("altup_correct_coef.weight", count, count)?,
            correct_scale: loader.vector(&name("altup_correct_scale.weight"), hidden)?,
            left: loader.linear(&[Part::new(left, rank)], hidden)?,
            right: loader.linear(&[Part::new(name("laurel_r"), hidden)], rank)?,
            low_rank_norm: loader.norm(&name("laurel_post_norm"), config)?,
        }))
    }

    pub(super) fn linears(&self) -> [&Linear; 2] {
        [&self.left, &self.right]
    }

    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher) {
        let LayerStreams { router_norm, router, predict, correct, correct_scale, left, right, low_rank_norm } = self;
        hasher.norm(router_norm);
        for numbers in [router, predict, correct, correct_scale] {
            hasher.bytes(bytemuck::cast_slice(numbers));
        }
        hasher.linear(left);
        hasher.linear(right);
        hasher.optional(low_rank_norm.as_ref(), FingerprintHasher::norm);
    }

    /// What the router makes of a row `x (hidden)`: a number per stream.
    fn route(&self, config: &Config, kernel: &Kernel, x: &[f32], normed: &mut [f32]) -> Vec<f32> {
        self.router_norm.apply(config, kernel, x, normed);
        let hidden = x.len();
        let product = |row: &[f32]| row.iter().zip(&*normed).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let logits = self.router.chunks_exact(hidden).map(|row| product(row) / hidden as f64);
        logits.map(|logit| libm::tanh(logit) as f32).collect()
    }

    /// Predicts all streams of a layer from those before it.
    pub(super) fn predict(&self, pass: &Pass<'_>, streams: &mut Workspace, active: usize, size: usize) {
        let (hidden, count) = (pass.config.hidden, streams.all.len() / size);
        let Workspace { all, predicted, .. } = streams;
        predicted.copy_from(all);
        let mut normed = vec![0.0; hidden];
        for row in 0..size / hidden {
            let of = |stream: usize| stream * size + row * hidden;
            let routed = self.route(pass.config, pass.kernel, &all[of(active)..][..hidden], &mut normed);
            for (to, own) in self.predict.chunks_exact(count * count).enumerate() {
                for (from, coefficients) in own.chunks_exact(count).enumerate() {
                    let weight = coefficients.iter().zip(&routed).map(|(a, b)| a * b).sum::<f32>();
                    pass.kernel.add_scaled(&mut predicted[of(to)..][..hidden], &all[of(from)..][..hidden], weight);
                }
            }
        }
    }

    /// Makes the streams what was predicted, corrected by how far the computed stream `x (rows, hidden)` is from its
    /// prediction.
    pub(super) fn correct(&self, pass: &Pass<'_>, streams: &mut Workspace, active: usize, x: &[f32]) {
        let (hidden, size) = (pass.config.hidden, x.len());
        let count = streams.all.len() / size;
        let Workspace { all, predicted, .. } = streams;
        all.copy_from(predicted);
        let (mut normed, mut news) = (vec![0.0; hidden], vec![0.0; hidden]);
        for (row, x) in x.chunks_exact(hidden).enumerate() {
            let of = |stream: usize| stream * size + row * hidden;
            let routed = self.route(pass.config, pass.kernel, x, &mut normed);
            let old = &predicted[of(active)..][..hidden];
            news.iter_mut().zip(x.iter().zip(old)).for_each(|(out, (x, old))| *out = x - old);
            for (to, coefficients) in self.correct.chunks_exact(count).enumerate() {
                let weight = 1.0 + coefficients.iter().zip(&routed).map(|(a, b)| a * b).sum::<f32>();
                pass.kernel.add_scaled(&mut all[of(to)..][..hidden], &news, weight);
            }
        }
    }
}
