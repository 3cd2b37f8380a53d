//! Vectors and scores of whole documents: hidden states, pooled and taken through the heads of the model.

use crate::error::{Error, Result};
use crate::model::adapter::rows::AdapterRows;
use crate::model::batch::{Input, Logits};
use crate::model::config::Pooling;
use crate::model::forward::Workspace;
use crate::model::model::Model;
use crate::model::pass::Pass;
use crate::model::state::session::Session;

/// Tokens of the documents that are computed in one step, unless one text has more.
const STEP_TOKENS: usize = 1024;

/// A text in tokens, and the index of the first token of a second text in it: of a document after a query, for example.
pub type TextTokens<'a> = (&'a [u32], Option<usize>);

impl Model {
    /// Embeddings of documents, `(documents, `[`embedding_width`](Model::embedding_width)`)`: hidden states after the last norm, made
    /// one vector by `pooling`, and taken through the dense modules that the model has. `None` pools as the file says,
    /// otherwise by the mean. `normalize` scales each vector to length 1.
    ///
    /// The bits of a vector do not depend on the other documents.
    ///
    /// # Errors
    /// Those of [`Model::forward`]; [`Error::CacheOverflow`] and [`Error::BadHiddenStates`].
    pub fn embed(
        &self,
        texts: &[&[u32]],
        pooling: Option<Pooling>,
        normalize: bool,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<f32>> {
        self.embed_with(None, texts, pooling, normalize, interrupted)
    }

    /// As [`Model::embed`], with the adapter of this name.
    ///
    /// # Errors
    /// Those of [`Model::embed`] and [`Model::session_with_adapter`].
    pub fn embed_with(
        &self,
        adapter: Option<&str>,
        texts: &[&[u32]],
        pooling: Option<Pooling>,
        normalize: bool,
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<f32>> {
        self.check_whole("embed")?;
        let pooling = pooling.or(self.config().pooling).unwrap_or(Pooling::Mean);
        let texts: Vec<TextTokens<'_>> = texts.iter().map(|tokens| (*tokens, None)).collect();
        let heads = &self.transformer.weights.heads;
        let session = self.session_with(adapter)?;
        let head = |pass: &Pass<'_>, w: &mut Workspace| heads.embed(pass, &mut w.input, &mut w.branch);
        let mut vectors = self.pooled(&session, &texts, pooling, interrupted, head)?;
        if normalize {
            vectors.chunks_exact_mut(self.embedding_width()).for_each(scale_to_length_1);
        }
        Ok(vectors)
    }

    /// Scores of documents by the model's classification head, `(documents, `[`labels`](Model::labels)`)`: its logits.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a model without such a head; otherwise as for [`Model::embed`].
    pub fn classify(&self, texts: &[TextTokens<'_>], interrupted: &(dyn Fn() -> bool + Sync)) -> Result<Vec<f32>> {
        self.classify_with(None, texts, interrupted)
    }

    /// As [`Model::classify`], with the adapter of this name.
    ///
    /// # Errors
    /// Those of [`Model::classify`] and [`Model::session_with_adapter`].
    pub fn classify_with(
        &self,
        adapter: Option<&str>,
        texts: &[TextTokens<'_>],
        interrupted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Vec<f32>> {
        let Some(classifier) = &self.transformer.weights.heads.classifier else {
            let found = format_args!("{} without a classification head", self.config().family.name);
            return Err(Error::argument("model", found, "a model for classification"));
        };
        let session = self.session_with(adapter)?;
        self.pooled(&session, texts, self.config().classifier.pooling, interrupted, |pass, w| {
            classifier.compute(pass, &mut w.input, &mut w.branch)
        })
    }

    /// Numbers of an embedding: the hidden size, or the width of the last dense module.
    pub fn embedding_width(&self) -> usize {
        self.transformer.weights.heads.width(self.config())
    }

    /// Whether the model generates text. Encoders and classifiers do not.
    pub fn generates(&self) -> bool {
        self.config().generates && self.labels() == 0
    }

    /// Whether hidden states become logits of tokens. A decoder with attention in both directions has logits, too.
    pub(in crate::model) fn has_logits(&self) -> bool {
        self.config().has_logits && self.labels() == 0
    }

    /// Scores per text of the classification head; 0 without one.
    pub fn labels(&self) -> usize {
        self.transformer.weights.heads.classifier.as_ref().map_or(0, |classifier| classifier.labels())
    }

    /// The names of the labels, as far as the file has them.
    pub fn label_names(&self) -> &[String] {
        &self.config().classifier.labels
    }

    /// Pools the hidden states of documents, each in a fork of the empty `session`, and takes the vectors through `head`, which replaces the input of the workspace.
    fn pooled(
        &self,
        session: &Session,
        texts: &[TextTokens<'_>],
        pooling: Pooling,
        interrupted: &(dyn Fn() -> bool + Sync),
        head: impl Fn(&Pass<'_>, &mut Workspace) + Sync,
    ) -> Result<Vec<f32>> {
        let hidden = self.config().hidden;
        let (mut out, mut states, mut rest) = (Vec::new(), Vec::new(), texts);
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = |text: &&TextTokens<'_>| {
                tokens += text.0.len();
                tokens <= STEP_TOKENS
            };
            let (step, later) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            rest = later;
            let mut sessions: Vec<Session> = step.iter().map(|_| session.fork()).collect();
            let inputs = step.iter().zip(&mut sessions);
            let mut inputs: Vec<Input<'_>> = inputs
                .map(|((tokens, second), session)| {
                    Input::new(session, tokens, Logits::Hidden).with_second_text(*second)
                })
                .collect();
            states.clear();
            self.forward(&mut inputs, &mut states, interrupted)?;
            sessions.iter().try_for_each(Session::check_cache)?;
            if states.iter().any(|value| !value.is_finite()) {
                return Err(Error::BadHiddenStates);
            }
            let mut left = &states[..];
            let mut pooled = Vec::with_capacity(step.len() * hidden);
            for (tokens, _) in step {
                let (own, others) = left.split_at(tokens.len() * hidden);
                left = others;
                pool(pooling, own, hidden, &mut pooled);
            }
            self.with_workspace(|w| -> Result<()> {
                let (model, rows) = (&self.transformer, step.len());
                w.input.reserve(rows, model.widths.input)?;
                w.branch.reserve(rows * model.widths.branch)?;
                w.input.resize(rows, hidden);
                w.input.values.copy_from_slice(&pooled);
                model.pool.run(|scope| {
                    let (config, kernel, threads) = (&model.config, model.kernel, model.pool.threads());
                    head(&Pass { config, kernel, scope, threads, adapters: AdapterRows::default() }, w);
                });
                out.extend_from_slice(&w.input.values);
                Ok(())
            })?;
        }
        Ok(out)
    }
}

/// Appends one vector `(hidden)` of the states of a text, `(tokens, hidden)`.
fn pool(pooling: Pooling, states: &[f32], hidden: usize, out: &mut Vec<f32>) {
    match pooling {
        Pooling::Cls => out.extend_from_slice(&states[..hidden]),
        Pooling::Last => out.extend_from_slice(&states[states.len() - hidden..]),
        Pooling::Mean => {
            let mut sums = vec![0.0f64; hidden];
            for state in states.chunks_exact(hidden) {
                sums.iter_mut().zip(state).for_each(|(sum, x)| *sum += f64::from(*x));
            }
            let count = (states.len() / hidden) as f64;
            out.extend(sums.iter().map(|sum| (sum / count) as f32));
        }
    }
}

/// Divides a vector by its length, unless that is 0.
fn scale_to_length_1(vector: &mut [f32]) {
    let length = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt().max(1e-12);
    vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
}
