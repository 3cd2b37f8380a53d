//! Reads tensors by name, checks their shapes and packs them.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use super::expert_cache::{CachedExperts, ExpertCache};
use super::expert_files::ExpertFiles;
use crate::error::{Error, Place, Result};
use crate::format::{Checkpoint, Tensor};
use crate::model::arch::NormKind;
use crate::model::config::Config;
use crate::model::linear::{Linear, PartSource, RowSource};
use crate::model::norm::{HeadNorm, Norm};
use crate::quant::block::BlockType;
use crate::quant::pack;
use crate::quant::packed::Packed;
use crate::system::arena::Arena;
use crate::threads::Scope;

/// Called with the number of units of a task that are done, and their total. An error ends the task:
/// [`Error::Interrupted`] cancels it.
pub type Progress<'a> = &'a (dyn Fn(usize, usize) -> Result<()> + Sync);

/// Maps a row of a packed matrix to the row of the tensor that it is read from.
pub(in crate::model) type RowMap<'a> = &'a (dyn Fn(usize) -> usize + Sync);

/// Rows of a tensor that become part of a [`Linear`].
pub(in crate::model) struct Part<'a> {
    /// The tensor's name without `.weight`.
    pub(in crate::model) name: String,
    pub(in crate::model) rows: usize,
    /// The row of the tensor that becomes row `i`.
    pub(in crate::model) order: RowMap<'a>,
    /// Rows of the whole tensor: more than `rows` where one tensor holds several parts.
    pub(in crate::model) of: usize,
    /// The number of matrices that the tensor holds, for experts in three dimensions.
    pub(in crate::model) stack: Option<usize>,
}

impl<'a> Part<'a> {
    /// All rows of a tensor.
    pub(in crate::model) fn new(name: impl Into<String>, rows: usize) -> Part<'a> {
        Part { name: name.into(), rows, order: &|row| row, of: rows, stack: None }
    }
}

/// Reads tensors of a checkpoint.
pub(in crate::model) struct Loader<'a> {
    scope: &'a Scope<'a>,
    checkpoint: &'a dyn Checkpoint,
    progress: Option<Progress<'a>>,
    /// Weights that are packed.
    done: Cell<usize>,
    /// Weights of all matrices; 0 without `progress`.
    total: usize,
    /// The names of tensors that were read.
    used: RefCell<HashSet<String>>,
    /// Whether matrices get no memory and are not read.
    is_hollow: Cell<bool>,
    /// Where matrices lie.
    arena: Arena,
    /// Bytes of all tensors in the file.
    expected: usize,
    /// Whether matrices with many zeros become sparse, in a model with that many bytes of weights.
    sparse: Option<&'a dyn Fn(usize) -> bool>,
    /// The experts that are in memory, where that is not all of them.
    experts: Option<Arc<ExpertCache>>,
    /// Where the matrices of an expert lie, while they load.
    expert_arena: RefCell<Option<Arc<Arena>>>,
}

/// Rows that a task compares.
const EQUAL_ROWS: usize = 256;

/// The number of the layer that a tensor belongs to.
pub(crate) fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// Whether a tensor that nothing reads is without influence on the result.
fn is_harmless(name: &str) -> bool {
    // Parts that text does not pass through, and layers that predict several tokens at once.
    const STARTS: &[&str] =
        &["a.", "audio.", "mm.", "mtp.", "multi_modal_projector.", "v.", "vision.", "vision_tower."];
    // Factors of other kinds of rotation than the file's, and the plain frequencies of old converters.
    const WHOLE: &[&str] = &["rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"];
    const ENDS: &[&str] = &[".attn_rot_embd.weight", ".rope_freqs.weight", ".rotary_emb.inv_freq"];
    let nextn = name.strip_prefix("blk.").is_some_and(|rest| rest.contains(".nextn."));
    STARTS.iter().any(|start| name.starts_with(start))
        || WHOLE.contains(&name)
        || ENDS.iter().any(|end| name.ends_with(end))
        || nextn
}

/// Dimensions without those of 1 at the end, which the format allows to leave out. The first one stays.
fn trimmed(dims: &[usize]) -> &[usize] {
    let len = dims.iter().rposition(|dim| *dim != 1).map_or(1, |last| last + 1);
    &dims[..len.min(dims.len())]
}

impl<'a> Loader<'a> {
    /// A loader of the tensors whose names `needs` accepts, and perhaps of others. They lie side by side in memory.
    pub(in crate::model) fn new(
        scope: &'a Scope<'a>,
        checkpoint: &'a dyn Checkpoint,
        progress: Option<Progress<'a>>,
        needs: &dyn Fn(&str) -> bool,
    ) -> Loader<'a> {
        let needed = || checkpoint.names().into_iter().filter(|name| needs(name));
        let tensors = || needed().filter_map(|name| checkpoint.tensor(name));
        let weights = |tensor: &Tensor<'_>| tensor.dims.iter().fold(1, |all: usize, dim| all.saturating_mul(*dim));
        let total = match progress {
            Some(_) => tensors().filter(|tensor| tensor.dims.len() > 1).map(|tensor| weights(&tensor)).sum(),
            None => 0,
        };
        let bytes = |tensor: Tensor<'_>| tensor.rows.block_type().bytes_for(weights(&tensor)).unwrap_or(0);
        let expected = tensors().map(bytes).fold(0, usize::saturating_add);
        Loader {
            progress,
            total,
            expected,
            arena: Arena::new(expected).spread(scope.nodes() > 1),
            ..Loader::separate(scope, checkpoint)
        }
    }

    /// The loader, which does not store the zeros of matrices with many, if `is_faster` says so for the bytes of all tensors. It is asked
    /// only where there is such a matrix.
    pub(in crate::model) fn with_sparse(self, is_faster: &'a dyn Fn(usize) -> bool) -> Loader<'a> {
        Loader { sparse: Some(is_faster), ..self }
    }

    /// A loader of matrices that are freed one by one.
    pub(in crate::model) fn separate(scope: &'a Scope<'a>, checkpoint: &'a dyn Checkpoint) -> Loader<'a> {
        Loader {
            scope,
            checkpoint,
            progress: None,
            done: Cell::new(0),
            total: 0,
            used: RefCell::default(),
            is_hollow: Cell::new(false),
            expected: 0,
            arena: Arena::new(0),
            sparse: None,
            experts: None,
            expert_arena: RefCell::default(),
        }
    }

    /// The loader, which leaves only some experts in memory.
    pub(in crate::model) fn with_experts(self, experts: Option<Arc<ExpertCache>>) -> Loader<'a> {
        Loader { experts, ..self }
    }

    /// A loader that checks the names and the shapes of matrices without reading their weights.
    pub(in crate::model) fn hollow(scope: &'a Scope<'a>, checkpoint: &'a dyn Checkpoint) -> Loader<'a> {
        Loader { is_hollow: Cell::new(true), ..Loader::separate(scope, checkpoint) }
    }
}

impl Loader<'_> {
    /// Calls `load`. Unless it is `wanted`, names and shapes of matrices are checked, and their weights are not read.
    pub(in crate::model) fn load_if<T>(&self, wanted: bool, load: impl FnOnce(&Self) -> T) -> T {
        let before = self.is_hollow.get();
        self.is_hollow.set(before || !wanted);
        let loaded = load(self);
        self.is_hollow.set(before);
        loaded
    }

    /// The `count` experts of layer `index`, where only some of them stay in memory.
    ///
    /// # Errors
    /// Those of [`ExpertFiles::locate`].
    pub(in crate::model) fn cached_experts(&self, index: usize, count: usize) -> Result<Option<CachedExperts>> {
        let Some(cache) = self.experts.as_ref().filter(|_| !self.is_hollow.get()) else { return Ok(None) };
        let files = ExpertFiles::locate(self.checkpoint, index)?;
        Ok(Some(CachedExperts::new(Arc::clone(cache), index, count, files)))
    }

    /// Calls `load`, which reads an expert of a layer that may not keep all in memory.
    pub(in crate::model) fn load_expert<T>(&self, load: impl FnOnce(&Self) -> T) -> T {
        *self.expert_arena.borrow_mut() = self.experts.as_ref().map(|experts| experts.arena());
        let loaded = load(self);
        *self.expert_arena.borrow_mut() = None;
        loaded
    }

    /// The dimensions of a tensor, the fastest-varying first, if the file has it.
    pub(in crate::model) fn dims(&self, name: &str) -> Option<Vec<usize>> {
        self.checkpoint.tensor(name).map(|tensor| tensor.dims)
    }

    /// Whether the file has a tensor.
    pub(in crate::model) fn has(&self, name: &str) -> bool {
        self.checkpoint.tensor(name).is_some()
    }

    /// Returns the memory of a tensor that will not be read again.
    pub(in crate::model) fn release(&self, name: &str) {
        self.checkpoint.release(name);
    }

    /// Reports that nothing is packed yet.
    pub(in crate::model) fn report_start(&self) -> Result<()> {
        self.report(0)
    }

    /// Reports that everything is packed. A file may hold more than is used.
    pub(in crate::model) fn report_end(&self) -> Result<()> {
        self.report(self.total)
    }

    fn report(&self, done: usize) -> Result<()> {
        self.done.set(done);
        self.progress.map_or(Ok(()), |progress| progress(done, self.total))
    }

    /// The file or folder, for errors.
    pub(in crate::model) fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    fn tensor(&self, name: &str, expected: impl std::fmt::Display) -> Result<Tensor<'_>> {
        self.optional(name).ok_or_else(|| self.missing(name, expected))
    }

    /// A tensor that will be read, if the file has it.
    fn optional(&self, name: &str) -> Option<Tensor<'_>> {
        let tensor = self.checkpoint.tensor(name)?;
        self.used.borrow_mut().insert(name.to_owned());
        Some(tensor)
    }

    /// Checks, when everything is loaded, that the file has no tensor that nothing has read: the model that it comes from
    /// computes something else.
    ///
    /// The tensors of a head for multi-token prediction are left to [`Loader::check_leftovers_of`].
    pub(in crate::model) fn check_leftovers(&self, config: &Config) -> Result<()> {
        let layers = config.layers.len();
        let head = layers..layers + config.mtp.map_or(0, |mtp| mtp.layers);
        self.check_names(|name| !is_harmless(name) && !layer_of(name).is_some_and(|layer| head.contains(&layer)))
    }

    /// As [`Loader::check_leftovers`], for the tensors of layer `index`, a head.
    pub(in crate::model) fn check_leftovers_of(&self, index: usize) -> Result<()> {
        self.check_names(|name| layer_of(name) == Some(index))
    }

    /// Checks that no tensor is left whose name is `wanted`.
    fn check_names(&self, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let used = self.used.borrow();
        match self.checkpoint.names().into_iter().find(|name| !used.contains(*name) && wanted(name)) {
            None => Ok(()),
            Some(name) => Err(Error::Unsupported {
                path: self.path().to_path_buf(),
                place: Place::Tensor(name.to_owned()),
                what: "a tensor that models of this family do not have".to_owned(),
                supported: "supported: files without it, because it changes what the model computes".to_owned(),
            }),
        }
    }

    /// Whether two tensors of the file hold the same rows.
    pub(in crate::model) fn are_equal(&self, name: &str, other: &str) -> bool {
        let (Some(one), Some(other)) = (self.checkpoint.tensor(name), self.checkpoint.tensor(other)) else {
            return false;
        };
        if self.is_hollow.get() || one.dims != other.dims || one.rows.block_type() != other.rows.block_type() {
            return false;
        }
        let rows: usize = one.dims.iter().skip(1).product();
        let is_same = |row: usize| {
            let (mut scratch, mut more) = (Vec::new(), Vec::new());
            one.rows.row(row, &mut scratch) == other.rows.row(row, &mut more)
        };
        // A few rows tell most tensors apart, so that not all of them are read.
        let few = [0, rows / 3, rows / 2, rows.saturating_sub(1)];
        let mut parts = vec![true; rows.div_ceil(EQUAL_ROWS)];
        if rows == 0 || !few.into_iter().all(is_same) {
            return false;
        }
        self.scope.for_each_chunk(&mut parts, 1, |part, same| {
            let own = part * EQUAL_ROWS..rows.min((part + 1) * EQUAL_ROWS);
            same.fill(own.into_iter().all(is_same));
        });
        parts.into_iter().all(|same| same)
    }

    /// The error that a tensor is missing.
    pub(in crate::model) fn missing(&self, name: &str, expected: impl std::fmt::Display) -> Error {
        Error::Missing {
            path: self.path().to_path_buf(),
            place: Place::Tensor(name.to_owned()),
            expected: expected.to_string(),
        }
    }

    /// The error that a tensor is not as expected.
    pub(in crate::model) fn malformed(
        &self,
        name: &str,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> Error {
        Error::malformed(self.path(), Place::Tensor(name.to_owned()), found, expected)
    }

    /// The error that a tensor has another shape than expected.
    pub(in crate::model) fn wrong_shape(&self, name: &str, found: &[usize], expected: impl std::fmt::Display) -> Error {
        self.malformed(name, format_args!("shape {found:?}"), expected)
    }

    /// The error that a tensor has values that are not finite.
    fn not_finite(&self, name: &str, found: impl std::fmt::Display) -> Error {
        self.malformed(name, found, "finite numbers")
    }

    /// A vector of `width` numbers, decoded.
    pub(in crate::model) fn vector(&self, name: &str, width: usize) -> Result<Vec<f32>> {
        let tensor = self.tensor(name, format_args!("{width} numbers"))?;
        if trimmed(&tensor.dims) != [width] {
            return Err(self.wrong_shape(name, &tensor.dims, format_args!("[{width}]")));
        }
        self.numbers(name, &tensor, width)
    }

    /// All `len` numbers of a small tensor of any shape.
    fn numbers(&self, name: &str, tensor: &Tensor<'_>, len: usize) -> Result<Vec<f32>> {
        let block_type = tensor.rows.block_type();
        if !matches!(block_type, BlockType::F32 | BlockType::F16 | BlockType::BF16) {
            return Err(self.malformed(name, block_type.name(), "F32, F16 or BF16"));
        }
        let mut values = vec![0.0; len];
        let width = tensor.dims.first().copied().unwrap_or(1);
        for (index, row) in values.chunks_mut(width.max(1)).enumerate() {
            block_type.decode(tensor.rows.row(index, &mut Vec::new()), row)?;
        }
        match values.iter().position(|value| !value.is_finite()) {
            Some(at) => Err(self.not_finite(name, format_args!("{} at index {at}", values[at]))),
            None => Ok(values),
        }
    }

    /// All numbers of a small tensor of this shape, decoded.
    pub(in crate::model) fn table(&self, name: &str, dims: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.tensor(name, format_args!("shape {dims:?}"))?;
        if trimmed(&tensor.dims) != trimmed(dims) {
            return Err(self.wrong_shape(name, &tensor.dims, format_args!("{dims:?}")));
        }
        self.numbers(name, &tensor, dims.iter().product())
    }

    /// All numbers of a small tensor of this shape, where dimensions of 1 do not count.
    pub(in crate::model) fn numbers_of(&self, name: &str, dims: &[usize]) -> Result<Vec<f32>> {
        let tensor = self.tensor(name, format_args!("shape {dims:?}"))?;
        let large = |dims: &[usize]| dims.iter().copied().filter(|dim| *dim != 1).collect::<Vec<_>>();
        if large(&tensor.dims) != large(dims) {
            return Err(self.wrong_shape(name, &tensor.dims, format_args!("{dims:?}")));
        }
        let len: usize = dims.iter().product();
        let rows = Tensor { dims: tensor.dims.clone(), rows: tensor.rows };
        self.numbers(name, &rows, len)
    }

    /// As [`Loader::vector`], or an empty vector where the file has no such tensor.
    fn optional_vector(&self, name: &str, width: usize) -> Result<Vec<f32>> {
        match self.has(name) {
            true => self.vector(name, width),
            false => Ok(Vec::new()),
        }
    }

    /// The norm of the residual stream called `name`, if the file has it.
    pub(in crate::model) fn norm(&self, name: &str, config: &Config) -> Result<Option<Norm>> {
        self.norm_of(name, config, config.hidden, config.norm_eps)
    }

    /// The norm called `name` of `width` numbers, if the file has it.
    pub(in crate::model) fn norm_of(
        &self,
        name: &str,
        config: &Config,
        width: usize,
        eps: f32,
    ) -> Result<Option<Norm>> {
        // The second name is that of one norm in files of Falcon-H1.
        let names = [format!("{name}.weight"), name.to_owned()];
        let Some(weight_name) = names.into_iter().find(|name| self.has(name)) else { return Ok(None) };
        let weight = self.vector(&weight_name, width)?;
        let bias = match config.family.norm {
            NormKind::Rms => Vec::new(),
            NormKind::Layer => self.optional_vector(&format!("{name}.bias"), width)?,
        };
        Ok(Some(Norm { weight, bias, eps }))
    }

    /// Counts a tensor as read that nothing needs.
    pub(in crate::model) fn ignore(&self, name: &str) {
        self.used.borrow_mut().insert(name.to_owned());
    }

    /// The norm of queries or keys: `(head_dim)` shared by the heads, `(heads, head_dim)`, or all heads as one row.
    pub(in crate::model) fn head_norm(
        &self,
        name: &str,
        config: &Config,
        heads: usize,
        dim: usize,
    ) -> Result<Option<HeadNorm>> {
        let Some(tensor) = self.optional(&format!("{name}.weight")) else { return Ok(None) };
        let all = heads * dim;
        let (len, width) = match *trimmed(&tensor.dims) {
            [width] if width == dim => (dim, dim),
            [width] if width == all => (all, all),
            [width, count] if width == dim && count == heads => (all, dim),
            _ => {
                let expected = format_args!("[{dim}], [{dim}, {heads}] or [{all}]");
                return Err(self.wrong_shape(&format!("{name}.weight"), &tensor.dims, expected));
            }
        };
        let weight = self.numbers(&format!("{name}.weight"), &tensor, len)?;
        let bias = match config.family.norm {
            NormKind::Layer => self.optional(&format!("{name}.bias")),
            NormKind::Rms => None,
        };
        let bias = match bias {
            Some(tensor) => self.numbers(&format!("{name}.bias"), &tensor, len)?,
            None => Vec::new(),
        };
        Ok(Some(HeadNorm { norm: Norm { weight, bias, eps: config.norm_eps }, width }))
    }

    /// Matrices with `columns` input features, side by side, with their biases.
    pub(in crate::model) fn linear(&self, parts: &[Part<'_>], columns: usize) -> Result<Linear> {
        let mut tensors = Vec::new();
        for part in parts {
            let name = format!("{}.weight", part.name);
            let mut wanted = vec![columns, part.of];
            wanted.extend(part.stack);
            let tensor = self.tensor(&name, format_args!("shape {wanted:?}"))?;
            if trimmed(&tensor.dims) != trimmed(&wanted) {
                return Err(self.wrong_shape(&name, &tensor.dims, format_args!("{wanted:?}")));
            }
            tensors.push((part, name, tensor));
        }
        // Parts share their input, so its columns can be reordered only if all parts have the same order.
        let reordered: Option<Vec<_>> = tensors.iter().map(|(_, _, tensor)| tensor.rows.reordered()).collect();
        let reordered = reordered.filter(|all| {
            parts.iter().all(|part| part.name.starts_with("blk.")) && all.iter().all(|one| one.0 == all[0].0)
        });
        let mut packed = Vec::new();
        for (at, (part, name, tensor)) in tensors.iter().enumerate() {
            let source = reordered.as_ref().map_or(tensor.rows.as_ref(), |all| all[at].1.as_ref());
            packed.push((self.pack(name, source, part.rows, columns, part.order)?, self.bias(part)?));
            self.report(self.done.get() + part.rows * columns)?;
        }
        let order = reordered.and_then(|all| all.into_iter().next()).map(|first| first.0);
        // Parts may share a tensor, so its memory is returned when all of them are packed.
        for part in parts.iter().filter(|part| part.stack.is_none()) {
            self.checkpoint.release(&format!("{}.weight", part.name));
        }
        let sources = parts.iter().map(|part| PartSource {
            name: part.name.clone(),
            dims: [columns, part.of, part.stack.unwrap_or(1)],
            count: part.rows,
            rows: RowSource::new(part.rows, part.order),
        });
        let is_f32 = tensors.iter().all(|(_, _, tensor)| tensor.rows.block_type() == BlockType::F32);
        let linear = Linear::new(packed).with_order(order).with_sources(sources.collect());
        Ok(if self.is_hollow.get() { linear.hollow(is_f32) } else { linear })
    }

    fn bias(&self, part: &Part<'_>) -> Result<Vec<f32>> {
        if let Some(count) = part.stack {
            let name = format!("{}.bias", part.name);
            let Some(tensor) = self.optional(&name) else { return Ok(Vec::new()) };
            let wanted = [part.of, count];
            if trimmed(&tensor.dims) != trimmed(&wanted) {
                return Err(self.wrong_shape(&name, &tensor.dims, format_args!("{wanted:?}")));
            }
            let all = self.numbers(&name, &tensor, part.of * count)?;
            return Ok((0..part.rows).map(|row| all[(part.order)(row)]).collect());
        }
        let bias = self.optional_vector(&format!("{}.bias", part.name), part.of)?;
        Ok(if bias.is_empty() { bias } else { (0..part.rows).map(|row| bias[(part.order)(row)]).collect() })
    }

    fn pack(
        &self,
        name: &str,
        source: &dyn pack::Rows,
        rows: usize,
        columns: usize,
        order: RowMap<'_>,
    ) -> Result<Packed> {
        let block_type = source.block_type();
        if !block_type.is_supported() {
            return Err(Error::Unsupported {
                path: self.path().to_path_buf(),
                place: Place::Tensor(name.to_owned()),
                what: format!("the type {}", block_type.name()),
                supported: format!("supported: {}", BlockType::names(BlockType::is_supported)),
            });
        }
        if self.is_hollow.get() {
            return Ok(Packed::hollow(rows, columns));
        }
        // The packed form is at most a panel and a block larger than the tensor, which the file has in full: this bounds
        // the memory that a small file can ask for.
        let of_experts = self.expert_arena.borrow();
        let arena = of_experts.as_deref().unwrap_or(&self.arena);
        let release = &|| self.checkpoint.release(name);
        let job = pack::PackJob { source, rows, columns, order, release, arena };
        // Experts that take the places of others have the same layout.
        let may_be_sparse = self.sparse.filter(|_| of_experts.is_none());
        let is_sparse = may_be_sparse.is_some_and(|is_faster| job.has_many_zeros() && is_faster(self.expected));
        let packed = if is_sparse { job.run_sparse(self.scope) } else { job.run(self.scope) };
        packed.map_err(|error| match error {
            pack::PackError::Memory(error) => error,
            pack::PackError::NotFinite(row) => {
                self.not_finite(name, format_args!("NaN or an infinity in row {}", order(row)))
            }
        })
    }

    /// The transpose of `count` rows of a matrix from row `first` on, a matrix `(columns, count)`; the tensor has `of` rows of
    /// `columns` numbers.
    pub(in crate::model) fn transposed(
        &self,
        name: &str,
        [first, count]: [usize; 2],
        columns: usize,
        of: usize,
    ) -> Result<Linear> {
        let name = format!("{name}.weight");
        let tensor = self.tensor(&name, format_args!("shape [{columns}, {of}]"))?;
        if trimmed(&tensor.dims) != trimmed(&[columns, of]) {
            return Err(self.wrong_shape(&name, &tensor.dims, format_args!("[{columns}, {of}]")));
        }
        let block_type = tensor.rows.block_type();
        if self.is_hollow.get() {
            return Ok(Linear::new(vec![(Packed::hollow(columns, count), Vec::new())]));
        }
        let mut values = vec![0.0; count * columns];
        for (row, out) in values.chunks_exact_mut(columns).enumerate() {
            block_type.decode(tensor.rows.row(first + row, &mut Vec::new()), out)?;
        }
        let source = Transposed { values, columns, count };
        Ok(Linear::new(vec![(self.pack(&name, &source, columns, count, &|row| row)?, Vec::new())]))
    }

    /// A vector as a matrix of one row, without a bias.
    pub(in crate::model) fn row(&self, name: &str, columns: usize) -> Result<Linear> {
        let name = format!("{name}.weight");
        let tensor = self.tensor(&name, format_args!("{columns} numbers"))?;
        if trimmed(&tensor.dims) != [columns] {
            return Err(self.wrong_shape(&name, &tensor.dims, format_args!("[{columns}]")));
        }
        Ok(Linear::new(vec![(self.pack(&name, tensor.rows.as_ref(), 1, columns, &|row| row)?, Vec::new())]))
    }
}

/// The columns of a small matrix as rows.
struct Transposed {
    /// `(count, columns)`
    values: Vec<f32>,
    columns: usize,
    count: usize,
}

impl pack::Rows for Transposed {
    fn block_type(&self) -> BlockType {
        BlockType::F32
    }

    fn row<'a>(&'a self, index: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        scratch.clear();
        let column = (0..self.count).map(|row| self.values[row * self.columns + index]);
        scratch.extend(column.flat_map(f32::to_le_bytes));
        scratch
    }
}
