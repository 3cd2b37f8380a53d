//! A limit of the memory for experts.
//!
//! Each layer has places for as many experts as the limit allows. The others are read from the file and packed when a row chooses them.
//! An expert takes the place of another one if it was chosen more often lately: a row counts less the longer ago it was.
//! Otherwise it stays only until the next one is read. Long prompts choose all experts of a layer, one after the other, and leave
//! those that have places where they are.
//!
//! Packing an expert again gives the same bits, so results do not depend on what is in memory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::expert_files::ExpertFiles;
use super::load_options::{ExpertMemory, LoadOptions};
use super::sizes::{EXPERT_STACKS, count, holds_experts, packed_bytes};
use crate::error::{Error, Result};
use crate::format::Checkpoint;
use crate::model::config::Config;
use crate::model::linear::Linear;
use crate::quant::packed::Packed;
use crate::system::aligned_buf::AlignedBuf;
use crate::system::arena::Arena;
use crate::system::memory;
use crate::threads::{PerProcess, Scope};

/// What a choice counts for after another row.
const DECAY: f32 = 0.98;

/// Bytes of memory that experts may take if `options` say so. `None` without a limit, and where it follows from the free memory.
///
/// # Errors
/// [`Error::InvalidArgument`] for a model without experts.
pub(in crate::model) fn wanted(options: &LoadOptions, config: &Config, expert_bytes: usize) -> Result<Option<usize>> {
    let Some(ExpertMemory::Bytes(bytes)) = options.expert_memory else { return Ok(None) };
    if config.experts.count == 0 || expert_bytes == 0 {
        let found = format!("{} GB for a model without experts", bytes as f64 / 1e9);
        return Err(Error::argument("expert_memory", found, "None, or a model with experts"));
    }
    Ok(Some(bytes))
}

/// The networks of an expert, up and down.
type Pair = [Linear; 2];

/// The experts of a model that are in memory.
#[derive(Debug)]
pub(in crate::model) struct ExpertCache {
    /// The number of experts of each layer that have places in memory.
    places: BTreeMap<usize, usize>,
    /// Bytes of the packed matrices of an expert, at most.
    largest: usize,
    /// Each process that is forked from this one has places of its own.
    state: PerProcess<Mutex<State>>,
    /// Experts that passes needed, and those of them that were read.
    counts: [AtomicU64; 2],
}

#[derive(Debug)]
struct State {
    layers: BTreeMap<usize, Places>,
    /// The expert that was read last and has no place: its layer and number.
    spare: Option<(usize, usize, Pair)>,
    arena: Arc<Arena>,
    /// The bytes of the file that are being packed.
    staging: AlignedBuf<u8>,
}

impl Default for State {
    fn default() -> State {
        let arena = Arc::new(Arena::recycling(0));
        State { layers: BTreeMap::new(), spare: None, arena, staging: AlignedBuf::default() }
    }
}

/// The experts of a layer.
#[derive(Debug, Default)]
struct Places {
    /// `(experts)`: those in memory.
    experts: Vec<Option<Pair>>,
    /// The number of those in memory.
    present: usize,
    /// `(experts)`: how often each was chosen lately.
    scores: Vec<f32>,
    /// `(experts)`: how many rows of the pass choose each.
    chosen: Vec<u32>,
}

impl Places {
    fn of(layers: &mut BTreeMap<usize, Places>, layer: usize, count: usize) -> &mut Places {
        layers.entry(layer).or_insert_with(|| Places {
            experts: (0..count).map(|_| None).collect(),
            present: 0,
            scores: vec![0.0; count],
            chosen: vec![0; count],
        })
    }

    /// Takes the expert out that was chosen least, if that is less than `expert` was and the pass does not need it.
    fn displace(&mut self, expert: usize) -> Option<Pair> {
        let free = |other: &usize| self.experts[*other].is_some() && self.chosen[*other] == 0;
        let least = (0..self.experts.len()).filter(free).min_by(|a, b| self.scores[*a].total_cmp(&self.scores[*b]))?;
        if self.scores[least] >= self.scores[expert] {
            return None;
        }
        self.present -= 1;
        self.experts[least].take()
    }
}

/// What the experts of a layer take.
struct LayerSize {
    layer: usize,
    count: usize,
    /// Bytes of a packed expert, at most.
    bytes: usize,
}

impl ExpertCache {
    /// The cache for the experts of `layers`. `needs` accepts the tensors that are held. `None` if all experts fit or nothing
    /// limits them.
    ///
    /// # Errors
    /// Those of [`wanted`]; [`Error::InvalidArgument`] for a limit that is too small.
    pub(in crate::model) fn new(
        checkpoint: &dyn Checkpoint,
        options: &LoadOptions,
        config: &Config,
        layers: Range<usize>,
        needs: &dyn Fn(&str) -> bool,
    ) -> Result<Option<Arc<ExpertCache>>> {
        if options.expert_memory.is_none() {
            return Ok(None);
        }
        let (mut sizes, mut staging) = (Vec::new(), 0);
        for layer in layers {
            let mut size = LayerSize { layer, count: config.experts.count.max(1), bytes: 0 };
            for stack in EXPERT_STACKS {
                let name = format!("blk.{layer}.ffn_{stack}_exps.weight");
                let Some(tensor) = checkpoint.tensor(&name) else { continue };
                size.bytes = size.bytes.saturating_add(packed_bytes(&name, &tensor) / size.count);
                let stored = tensor.rows.block_type().bytes_for(count(&tensor.dims)).unwrap_or(usize::MAX);
                staging = staging.max(stored / size.count);
            }
            sizes.extend((size.bytes > 0).then_some(size));
        }
        let total = sizes.iter().map(|size| size.bytes.saturating_mul(size.count)).fold(0, usize::saturating_add);
        // A stage of a pipeline may have none, but not the model as a whole.
        let has_experts = total.max(usize::from(checkpoint.names().into_iter().any(holds_experts)));
        let limit = match wanted(options, config, has_experts)? {
            Some(limit) => Some(limit),
            None => by_free_memory(checkpoint, total, needs),
        };
        let Some(limit) = limit.filter(|limit| *limit < total) else { return Ok(None) };
        let largest = sizes.iter().map(|size| size.bytes).max().unwrap_or(0);
        // An expert without a place, the buffers for the next one, and what is read of the file.
        let least = largest.saturating_mul(2).saturating_add(staging);
        let Some(for_places) = limit.checked_sub(least) else {
            let found = format!("{} GB", limit as f64 / 1e9);
            let expected = format!("at least {} GB for the largest experts", (least as f64 / 1e6).ceil() / 1e3);
            return Err(Error::argument("expert_memory", found, expected));
        };
        let state = State { arena: Arc::new(Arena::recycling(for_places)), ..State::default() };
        let cache = ExpertCache {
            places: divide(&sizes, for_places, total),
            largest,
            state: PerProcess::default(),
            counts: Default::default(),
        };
        *cache.lock() = state;
        Ok(Some(Arc::new(cache)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.get().lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the matrices of experts lie.
    pub(in crate::model) fn arena(&self) -> Arc<Arena> {
        Arc::clone(&self.lock().arena)
    }

    /// Notes that all experts are loaded.
    pub(in crate::model) fn end_loading(&self) {
        let state = self.lock();
        state.arena.trim(self.largest);
        state.arena.settle();
    }

    /// Bytes of the experts that are in memory.
    pub(in crate::model) fn bytes(&self) -> usize {
        let state = self.lock();
        let present = state.layers.values().flat_map(|layer| layer.experts.iter().flatten());
        present.flatten().map(Linear::bytes).sum()
    }

    /// Calls `act` with the matrices that are in memory.
    pub(in crate::model) fn with_matrices<R>(&self, act: impl FnOnce(&[&Packed]) -> R) -> R {
        let state = self.lock();
        let present = state.layers.values().flat_map(|layer| layer.experts.iter().flatten());
        let matrices: Vec<&Packed> = present.flatten().flat_map(Linear::parts).collect();
        act(&matrices)
    }

    /// How many experts passes have needed so far, and how many of them were read.
    pub(in crate::model) fn counts(&self) -> [u64; 2] {
        [0, 1].map(|i| self.counts[i].load(Ordering::Relaxed))
    }
}

/// The limit that leaves memory for everything else, if the experts do not fit into what is free.
fn by_free_memory(checkpoint: &dyn Checkpoint, experts: usize, needs: &dyn Fn(&str) -> bool) -> Option<usize> {
    let free = memory::available()?;
    let others = checkpoint.names().into_iter().filter(|name| needs(name) && !holds_experts(name));
    let bytes = |name: &str| checkpoint.tensor(name).map_or(0, |tensor| packed_bytes(name, &tensor));
    let others = others.map(bytes).fold(0, usize::saturating_add);
    if experts.saturating_add(others) <= free {
        return None;
    }
    // A quarter is left for the KV cache, the workspace, and pages of the file.
    Some(free.saturating_sub(others) / 4 * 3)
}

/// The number of places of each layer: the same share of the experts of all layers, and one more for the first ones if that fits.
fn divide(sizes: &[LayerSize], bytes: usize, total: usize) -> BTreeMap<usize, usize> {
    let share = |count: usize| (count as u128 * bytes as u128 / total.max(1) as u128) as usize;
    let mut left = bytes - sizes.iter().map(|size| share(size.count) * size.bytes).sum::<usize>();
    let mut places = BTreeMap::new();
    for size in sizes {
        let more = left >= size.bytes && share(size.count) < size.count;
        left -= if more { size.bytes } else { 0 };
        places.insert(size.layer, share(size.count) + usize::from(more));
    }
    places
}

/// The experts of a layer. Some of them are in memory.
#[derive(Debug)]
pub(in crate::model) struct CachedExperts {
    cache: Arc<ExpertCache>,
    layer: usize,
    count: usize,
    files: ExpertFiles,
    /// Bytes of all experts, packed.
    bytes: usize,
}

impl CachedExperts {
    /// `count` experts of layer `layer`, none of them in memory.
    pub(in crate::model) fn new(cache: Arc<ExpertCache>, layer: usize, count: usize, files: ExpertFiles) -> Self {
        CachedExperts { cache, layer, count, files, bytes: 0 }
    }

    /// Takes the matrices of an expert, which keeps its place in memory if there is one.
    pub(in crate::model) fn take(&mut self, expert: usize, linears: [&mut Linear; 2]) {
        self.bytes += linears.iter().map(|linear| linear.bytes()).sum::<usize>();
        let places = self.cache.places.get(&self.layer).copied().unwrap_or(0);
        let mut state = self.cache.lock();
        let State { layers, arena, .. } = &mut *state;
        let own = Places::of(layers, self.layer, self.count);
        let pair = linears.map(|linear| {
            let parts = linear.take_parts();
            linear.with_parts(parts)
        });
        if own.present < places {
            own.present += 1;
            own.experts[expert] = Some(pair);
        } else {
            put_back(arena, pair);
        }
    }

    /// Mean bytes of a packed expert.
    pub(in crate::model) fn bytes_each(&self) -> usize {
        self.bytes / self.count.max(1)
    }

    /// The experts for a pass. No other pass uses them meanwhile.
    pub(in crate::model) fn lend(&self) -> LentExperts<'_> {
        LentExperts { own: self, state: self.cache.lock() }
    }
}

/// Gives the memory of matrices back to the arena.
fn put_back(arena: &Arena, pair: Pair) {
    pair.into_iter().flat_map(Linear::into_parts).for_each(|part| arena.put_back(part.into_memory()));
}

/// The experts of a layer, for one pass.
pub(in crate::model) struct LentExperts<'a> {
    own: &'a CachedExperts,
    state: MutexGuard<'a, State>,
}

impl LentExperts<'_> {
    /// Notes the experts that the `rows` rows of a pass choose. Lets the system read those that are not in memory; `linears` returns the
    /// matrices of an expert, which have no memory.
    pub(in crate::model) fn choose<'b>(
        &mut self,
        choices: impl Iterator<Item = usize>,
        rows: usize,
        linears: impl Fn(usize) -> [&'b Linear; 2],
    ) {
        let CachedExperts { cache, layer, count, files, .. } = self.own;
        let own = Places::of(&mut self.state.layers, *layer, *count);
        own.chosen.fill(0);
        choices.filter(|expert| expert < count).for_each(|expert| own.chosen[expert] += 1);
        // The rows are a sequence in which each expert is chosen evenly.
        let before = DECAY.powi(rows.min(1 << 20) as i32);
        let each = (1.0 - before) / (1.0 - DECAY) / rows.max(1) as f32;
        for (score, chosen) in own.scores.iter_mut().zip(&own.chosen) {
            *score = *score * before + *chosen as f32 * each;
        }
        let missing = (0..*count).filter(|expert| own.chosen[*expert] > 0 && own.experts[*expert].is_none());
        // The first one is read now. The others are read while it is packed and multiplied.
        for expert in missing.skip(1) {
            linears(expert).into_iter().for_each(|linear| files.prefetch(linear));
        }
        let needed = own.chosen.iter().filter(|chosen| **chosen > 0).count() as u64;
        cache.counts[0].fetch_add(needed, Ordering::Relaxed);
    }

    /// The matrices of an expert. `linears` are the ones without memory.
    ///
    /// # Errors
    /// Those of [`ExpertFiles::check_unchanged`] and [`ExpertFiles::read`].
    pub(in crate::model) fn get(
        &mut self,
        scope: &Scope<'_>,
        linears: [&Linear; 2],
        expert: usize,
    ) -> Result<[&Linear; 2]> {
        let CachedExperts { cache, layer, count, files, .. } = self.own;
        let State { layers, spare, arena, staging } = &mut *self.state;
        let own = Places::of(layers, *layer, *count);
        if own.experts[expert].is_none()
            && !matches!(spare, Some((of, number, _)) if (*of, *number) == (*layer, expert))
        {
            cache.counts[1].fetch_add(1, Ordering::Relaxed);
            let mut has_place = own.present < cache.places.get(layer).copied().unwrap_or(0);
            if !has_place && let Some(other) = own.displace(expert) {
                put_back(arena, other);
                has_place = true;
            } else if !has_place && let Some((_, _, other)) = spare.take() {
                put_back(arena, other);
            }
            files.check_unchanged()?;
            let [up, down] = linears;
            let pair = [files.read(scope, arena, staging, up)?, files.read(scope, arena, staging, down)?];
            arena.trim(cache.largest);
            if has_place {
                own.present += 1;
                own.experts[expert] = Some(pair);
            } else {
                *spare = Some((*layer, expert, pair));
            }
        }
        let found = own.experts[expert].as_ref().or(spare.as_ref().map(|(_, _, pair)| pair));
        let [up, down] = found.expect("an expert that was read");
        Ok([up, down])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_divided_by_the_experts_of_layers() {
        let sizes = |all: &[(usize, usize, usize)]| {
            all.iter().map(|(layer, count, bytes)| LayerSize { layer: *layer, count: *count, bytes: *bytes }).collect()
        };
        let places = |sizes: Vec<LayerSize>, bytes: usize| {
            let total = sizes.iter().map(|size| size.count * size.bytes).sum();
            divide(&sizes, bytes, total).into_iter().collect::<Vec<_>>()
        };
        let even: Vec<LayerSize> = sizes(&[(1, 8, 10), (2, 8, 10), (3, 8, 10)]);
        assert_eq!(places(even, 120), [(1, 4), (2, 4), (3, 4)]);
        // What is left is enough for one more.
        assert_eq!(places(sizes(&[(1, 8, 10), (2, 8, 10)]), 90), [(1, 5), (2, 4)]);
        assert_eq!(places(sizes(&[(0, 8, 10), (5, 8, 30)]), 160), [(0, 4), (5, 4)]);
        assert_eq!(places(sizes(&[(0, 8, 10)]), 0), [(0, 0)]);
        assert_eq!(places(sizes(&[(0, 8, 10)]), 80), [(0, 8)]);
    }

    #[test]
    fn the_expert_that_was_chosen_least_loses_its_place() {
        let linear = || Linear::new(Vec::new());
        let mut layers = BTreeMap::new();
        let own = Places::of(&mut layers, 3, 4);
        for expert in [0, 1, 2] {
            own.experts[expert] = Some([linear(), linear()]);
        }
        own.present = 3;
        own.scores = vec![0.5, 0.2, 0.9, 0.6];
        // Expert 1 is needed.
        own.chosen = vec![0, 1, 0, 1];
        assert!(own.displace(3).is_some());
        assert!(own.experts[0].is_none() && own.experts[1].is_some() && own.experts[2].is_some() && own.present == 2);
        // Expert 2 was chosen more often.
        assert!(own.displace(3).is_none() && own.present == 2);
    }
}
