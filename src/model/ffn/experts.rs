//! Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): each row goes to a few of many networks.

use super::dense::{self, Mlp};
use super::router::{self, Choice, ChoiceCounts, Router};
use crate::error::Result;
use crate::kernels;
use crate::model::adapter::rows::RowPlan;
use crate::model::buffer::Buffer;
use crate::model::config::Config;
use crate::model::fingerprint::FingerprintHasher;
use crate::model::linear::{Linear, LinearInput};
use crate::model::pass::Pass;
use crate::model::weights::expert_cache::CachedExperts;
use crate::model::weights::loader::{Loader, Part};
use crate::quant::packed::PANEL;

/// The weights of a mixture of experts.
#[derive(Debug)]
pub(in crate::model) struct Experts {
    router: Router,
    /// The projections to and from the width that experts compute in, where that is not the stream's.
    latent: Option<Latent>,
    /// `(experts)`. Their matrices have no memory if `cached` has it.
    experts: Vec<Mlp>,
    /// The matrices of the experts, where not all of them are in memory.
    cached: Option<CachedExperts>,
    shared: Option<SharedExpert>,
}

/// A narrower vector that experts read and write.
#[derive(Debug)]
struct Latent {
    width: usize,
    /// `(width, hidden)`
    down: Linear,
    /// `(hidden, width)`
    up: Linear,
}

impl Latent {
    fn load(loader: &Loader<'_>, config: &Config, index: usize, width: usize) -> Result<Latent> {
        let matrix = |name: &str, rows: usize, columns: usize| {
            loader.linear(&[Part::new(format!("blk.{index}.{name}"), rows)], columns)
        };
        Ok(Latent {
            width,
            down: matrix("ffn_latent_down", width, config.hidden)?,
            up: matrix("ffn_latent_up", config.hidden, width)?,
        })
    }
}

/// An expert that every row uses.
#[derive(Debug)]
struct SharedExpert {
    mlp: Mlp,
    /// `(1, hidden)`: the sigmoid of its output is the weight of the expert's output, which is 1 without a gate.
    gate: Option<Linear>,
}

/// The workspace of a mixture of experts, besides that of a network.
#[derive(Debug, Default)]
pub(in crate::model) struct Workspace {
    /// `(rows, hidden)`: the input of all experts.
    source: Buffer,
    /// `(rows, width)`: what experts read instead, and the sum of what they write, in whole panels.
    latent: [Buffer; 2],
    routing: router::Scratch,
    /// `(rows, experts used)`
    choices: Vec<Choice>,
    /// The rows that chose one expert, and the weights of its output.
    chosen: Vec<(usize, f32)>,
    /// The adapters of the rows that chose one expert.
    plan: RowPlan,
    /// `(rows that chose one expert, hidden)`, then the input of its `down`.
    input: LinearInput,
    /// `(rows that chose one expert, hidden rounded up to panels)`; also the logits of the router.
    out: Buffer,
    /// `(rows)`: weights of the shared expert's output.
    gates: Vec<f32>,
}

impl Workspace {
    /// Allocates memory for `rows` rows: of `hidden` numbers, of inputs of `input` numbers and outputs of `out` numbers, and of
    /// `latent` numbers that experts compute in.
    pub(super) fn reserve(
        &mut self,
        rows: usize,
        hidden: usize,
        input: usize,
        out: usize,
        latent: usize,
    ) -> Result<()> {
        self.source.reserve(rows * hidden)?;
        self.latent.iter_mut().try_for_each(|buffer| buffer.reserve(rows * latent))?;
        self.out.reserve(rows * out)?;
        self.input.reserve(rows, hidden.max(input))
    }
}

impl Experts {
    /// Whether layer `index` of the file has experts.
    pub(super) fn is_in(loader: &Loader<'_>, index: usize) -> bool {
        loader.has(&format!("{}.weight", Router::name(index)))
    }

    /// Reads router, experts and shared expert of layer `index`.
    pub(super) fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<Experts> {
        let router = Router::load(loader, config, index)?;
        let count = config.experts.count;
        let latent = config.experts.latent.map(|width| Latent::load(loader, config, index, width)).transpose()?;
        let width = latent.as_ref().map_or(config.hidden, |latent| latent.width);
        let mut cached = loader.cached_experts(index, count)?;
        let mut experts = Vec::with_capacity(count);
        for expert in 0..count {
            let load =
                |loader: &Loader<'_>| Mlp::load_of_width(loader, config, index, "_exps", Some((expert, count)), width);
            experts.push(match &mut cached {
                None => load(loader)?,
                Some(cached) => {
                    let mut mlp = loader.load_expert(load)?;
                    cached.take(expert, mlp.linears_mut());
                    mlp
                }
            });
        }
        for stack in ["gate", "up", "gate_up", "down"] {
            loader.release(&format!("blk.{index}.ffn_{stack}_exps.weight"));
        }
        let shared = match loader.has(&format!("blk.{index}.ffn_up_shexp.weight")) {
            true => Some(SharedExpert::load(loader, config, index)?),
            false => None,
        };
        Ok(Experts { router, latent, experts, cached, shared })
    }

    /// Reads the weights of an expert again, which may have changed: that of a number, or the shared one.
    pub(in crate::model) fn reload(
        &mut self,
        loader: &Loader<'_>,
        config: &Config,
        index: usize,
        expert: Option<usize>,
    ) -> Result<()> {
        let count = self.experts.len();
        match (expert, &mut self.shared) {
            (Some(expert), _) => {
                let width = self.latent.as_ref().map_or(config.hidden, |latent| latent.width);
                let place = Some((expert, count));
                self.experts[expert] = Mlp::load_of_width(loader, config, index, "_exps", place, width)?;
            }
            (None, Some(shared)) => shared.mlp = Mlp::load(loader, config, index, "_shexp", None)?,
            (None, None) => {}
        }
        Ok(())
    }

    /// The experts, in order.
    pub(in crate::model) fn experts(&self) -> &[Mlp] {
        &self.experts
    }

    /// The expert that every row uses.
    pub(in crate::model) fn shared(&self) -> Option<&Mlp> {
        self.shared.as_ref().map(|shared| &shared.mlp)
    }

    /// All networks, the shared one last.
    pub(super) fn mlps(&self) -> impl Iterator<Item = &Mlp> {
        self.experts.iter().chain(self.shared())
    }

    /// Width of a row that experts compute in, in whole panels; 0 where it is the stream's.
    pub(super) fn latent_width(&self) -> usize {
        self.latent.as_ref().map_or(0, |latent| latent.down.width())
    }

    /// Width of a row of the router's logits.
    pub(super) fn router_width(&self) -> usize {
        self.router.logits.width()
    }

    pub(super) fn linears(&self) -> Vec<&Linear> {
        let mut all = vec![&self.router.logits];
        all.extend(self.latent.iter().flat_map(|latent| [&latent.down, &latent.up]));
        all.extend(self.mlps().flat_map(Mlp::linears));
        all.extend(self.shared.iter().filter_map(|shared| shared.gate.as_ref()));
        all
    }

    /// The experts that rows chose so far, if some may be left out.
    pub(in crate::model) fn choices(&self) -> &ChoiceCounts {
        self.router.choices()
    }

    /// Bytes of weights that a token reads, where it uses `used` experts.
    pub(super) fn bytes_read(&self, used: usize) -> usize {
        let all: usize = self.linears().into_iter().map(Linear::bytes).sum();
        match &self.cached {
            None => {
                let bytes: usize = self.experts.iter().flat_map(Mlp::linears).map(Linear::bytes).sum();
                all - bytes / self.experts.len().max(1) * self.experts.len().saturating_sub(used)
            }
            Some(cached) => all + cached.bytes_each() * used,
        }
    }

    pub(super) fn fingerprint(&self, hasher: &mut FingerprintHasher<'_>) {
        let Experts { router, latent, experts, cached, shared } = self;
        router.fingerprint(hasher);
        // Hashed only where they exist, so that models without them keep their fingerprints.
        if let Some(Latent { width: _, down, up }) = latent {
            hasher.linear(down);
            hasher.linear(up);
        }
        match cached {
            None => experts.iter().for_each(|mlp| mlp.fingerprint(hasher)),
            Some(cached) => experts.iter().enumerate().for_each(|(expert, mlp)| {
                hasher.pool().run(|scope| match cached.lend().get(scope, mlp.linears(), expert) {
                    Ok(linears) => mlp.fingerprint_with(linears, hasher),
                    Err(fault) => hasher.fail(fault),
                });
            }),
        }
        hasher.optional(shared.as_ref(), |hasher, SharedExpert { mlp, gate }| {
            mlp.fingerprint(hasher);
            hasher.optional(gate.as_ref(), FingerprintHasher::linear);
        });
    }

    /// `out (rows, hidden rounded up to panels)`: the weighted sum of the outputs of the experts that each row of
    /// `input (rows, hidden)` chooses. Rows are grouped by expert.
    ///
    /// The outputs of a row are added in the order of the experts' numbers, so its bits do not depend on other rows.
    pub(super) fn forward(
        &self,
        pass: &Pass<'_>,
        input: &mut LinearInput,
        dense: &mut dense::Workspace,
        own: &mut Workspace,
        out: &mut Buffer,
    ) -> Result<()> {
        // Every expert reads the input.
        own.source.copy_from(&input.values);
        self.router.route(pass, input, &mut own.out, &mut own.routing, &mut own.choices);
        self.compute(pass, dense, own, out)
    }

    /// As [`Experts::forward`], where the router reads the residual stream `x (rows, hidden)` through a norm of its own.
    pub(super) fn forward_routed_by(
        &self,
        pass: &Pass<'_>,
        x: &[f32],
        input: &mut LinearInput,
        dense: &mut dense::Workspace,
        own: &mut Workspace,
        out: &mut Buffer,
    ) -> Result<()> {
        own.source.copy_from(&input.values);
        self.router.prepare(pass, x, input);
        self.router.route(pass, input, &mut own.out, &mut own.routing, &mut own.choices);
        self.compute(pass, dense, own, out)
    }

    /// The weighted sum of the outputs of the experts that were chosen, which read `own.source (rows, hidden)`.
    fn compute(
        &self,
        pass: &Pass<'_>,
        dense: &mut dense::Workspace,
        own: &mut Workspace,
        out: &mut Buffer,
    ) -> Result<()> {
        let (hidden, used) = (pass.config.hidden, pass.config.experts.used);
        let rows = own.source.len() / hidden;
        let width = hidden.next_multiple_of(PANEL);
        let weighted_input = pass.config.family.quirks.weighted_input;
        let Some(latent) = &self.latent else {
            out.resize(rows * width);
            self.compute_chosen(pass, dense, own, [hidden, used], weighted_input, out)?;
            self.add_shared(pass, dense, own, out);
            return Ok(());
        };
        // Experts read and write a narrower vector.
        let [mut narrow, mut sum] = std::mem::take(&mut own.latent);
        own.input.values.copy_from(&own.source);
        pass.linear(&latent.down, &mut own.input, &mut sum);
        narrow.resize(rows * latent.width);
        for (to, from) in narrow.chunks_exact_mut(latent.width).zip(sum.chunks_exact(latent.down.width())) {
            to.copy_from_slice(&from[..latent.width]);
        }
        std::mem::swap(&mut own.source, &mut narrow);
        self.compute_chosen(pass, dense, own, [latent.width, used], weighted_input, &mut sum)?;
        std::mem::swap(&mut own.source, &mut narrow);
        own.input.resize(rows, latent.width);
        for (to, from) in own.input.values.chunks_exact_mut(latent.width).zip(sum.chunks_exact(latent.down.width())) {
            to.copy_from_slice(&from[..latent.width]);
        }
        pass.linear(&latent.up, &mut own.input, out);
        own.latent = [narrow, sum];
        self.add_shared(pass, dense, own, out);
        Ok(())
    }

    /// `out (rows, hidden rounded up to panels)`: the weighted sum of the outputs of the experts that were chosen, which read
    /// `own.source (rows, hidden)`.
    fn compute_chosen(
        &self,
        pass: &Pass<'_>,
        dense: &mut dense::Workspace,
        own: &mut Workspace,
        [hidden, used]: [usize; 2],
        weighted_input: bool,
        out: &mut Buffer,
    ) -> Result<()> {
        let width = hidden.next_multiple_of(PANEL);
        out.fill(0.0);
        let mut lent = self.cached.as_ref().map(CachedExperts::lend);
        if let Some(lent) = &mut lent {
            let rows = own.choices.len() / used.max(1);
            let choices = own.choices.iter().map(|(expert, _)| *expert);
            lent.choose(choices, rows, |expert| self.experts[expert].linears());
        }
        for (expert, mlp) in self.experts.iter().enumerate() {
            own.chosen.clear();
            let choices = own.choices.iter().enumerate().filter(|(_, (chosen, _))| *chosen == expert);
            own.chosen.extend(choices.map(|(at, (_, weight))| (at / used, *weight)));
            if own.chosen.is_empty() {
                continue;
            }
            own.input.resize(own.chosen.len(), hidden);
            for ((row, weight), input) in own.chosen.iter_mut().zip(own.input.values.chunks_exact_mut(hidden)) {
                input.copy_from_slice(&own.source[*row * hidden..][..hidden]);
                if weighted_input {
                    input.iter_mut().for_each(|x| *x *= *weight);
                    *weight = 1.0;
                }
            }
            let rows = own.chosen.iter().map(|(row, _)| *row);
            let pass = &Pass { adapters: pass.adapters.select(rows, &mut own.plan), ..*pass };
            let linears = match &mut lent {
                None => mlp.linears(),
                Some(lent) => lent.get(pass.scope, mlp.linears(), expert)?,
            };
            mlp.forward_with(linears, pass, &mut own.input, dense, &mut own.out);
            for ((row, weight), output) in own.chosen.iter().zip(own.out.chunks(width)) {
                pass.kernel.add_scaled(&mut out[row * width..][..hidden], &output[..hidden], *weight);
            }
        }
        Ok(())
    }

    /// Adds the weighted output of the expert that every row uses to `out (rows, hidden rounded up to panels)`.
    fn add_shared(&self, pass: &Pass<'_>, dense: &mut dense::Workspace, own: &mut Workspace, out: &mut Buffer) {
        let Some(shared) = &self.shared else { return };
        let hidden = pass.config.hidden;
        let width = hidden.next_multiple_of(PANEL);
        own.input.values.copy_from(&own.source);
        shared.weights(pass, &mut own.input, &mut own.out, &mut own.gates);
        shared.mlp.forward(pass, &mut own.input, dense, &mut own.out);
        for ((out, output), weight) in out.chunks_mut(width).zip(own.out.chunks(width)).zip(&own.gates) {
            pass.kernel.add_scaled(&mut out[..hidden], &output[..hidden], *weight);
        }
    }

    /// The experts that each row of `input (rows, hidden)` chooses: `(rows, experts used)`.
    pub(in crate::model) fn route(&self, pass: &Pass<'_>, input: &mut LinearInput) -> Vec<Choice> {
        let mut choices = Vec::new();
        self.router.route(pass, input, &mut Buffer::default(), &mut router::Scratch::default(), &mut choices);
        choices
    }

    /// As [`Experts::route`], where the router reads the residual stream `x (rows, hidden)` through a norm of its own.
    pub(in crate::model) fn route_by(&self, pass: &Pass<'_>, x: &[f32], input: &mut LinearInput) -> Vec<Choice> {
        self.router.prepare(pass, x, input);
        self.route(pass, input)
    }

    /// The weights `(rows)` of the shared expert's output; none without a shared expert.
    pub(in crate::model) fn shared_weights(&self, pass: &Pass<'_>, input: &mut LinearInput) -> Vec<f32> {
        let mut weights = Vec::new();
        if let Some(shared) = &self.shared {
            shared.weights(pass, input, &mut Buffer::default(), &mut weights);
        }
        weights
    }
}

impl SharedExpert {
    fn load(loader: &Loader<'_>, config: &Config, index: usize) -> Result<SharedExpert> {
        let name = format!("blk.{index}.ffn_gate_inp_shexp");
        let gate = match loader.dims(&format!("{name}.weight")).map(|dims| dims.len()) {
            None => None,
            // One row, written with one dimension or two.
            Some(1) => Some(loader.row(&name, config.hidden)?),
            Some(_) => Some(loader.linear(&[Part::new(name, 1)], config.hidden)?),
        };
        Ok(SharedExpert { mlp: Mlp::load(loader, config, index, "_shexp", None)?, gate })
    }

    /// Writes the weights of the expert's output to `weights (rows)`. Overwrites `buffer`.
    fn weights(&self, pass: &Pass<'_>, input: &mut LinearInput, buffer: &mut Buffer, weights: &mut Vec<f32>) {
        weights.clear();
        weights.resize(input.values.len() / pass.config.hidden, 1.0);
        if let Some(gate) = &self.gate {
            pass.linear(gate, input, buffer);
            for (weight, out) in weights.iter_mut().zip(buffer.chunks(gate.width())) {
                *weight = 1.0 / (1.0 + kernels::exp(-out[0]));
            }
        }
    }
}
