//! Adapters in folders that PEFT has saved: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use super::experts;
use super::factors::{Delta, Factors, transposed};
use super::file::{AdapterFile, Base, BaseCopy};
use super::peft_config::PeftConfig;
use super::peft_folder::{Folder, Matrix, Module};
use crate::error::{Error, Place, Result};
use crate::format::safetensors::SafeTensors;
use crate::model::hf::placement::Placement;

/// The file of matrices.
const FILE: &str = "adapter_model.safetensors";
/// Where PEFT puts the model in the names of its tensors.
const PREFIX: &str = "base_model.model.";
/// Parts of names in front of a module that differ between classes of the same model.
const WRAPPERS: &[&str] = &["model", "language_model", "text_model", "transformer", "gpt_neox", "backbone", "decoder"];

/// What a tensor of the file is.
enum Role<'a> {
    A(&'a str),
    B(&'a str),
    TableA(&'a str),
    TableB(&'a str),
    /// A matrix of the base.
    Base(&'a str),
    /// What is not computed.
    Other(&'static str),
}

fn role<'a>(name: &'a str) -> Role<'a> {
    let module = name.strip_prefix(PREFIX).unwrap_or(name);
    type Make<'a> = fn(&'a str) -> Role<'a>;
    let ends: [(&str, Make<'a>); 6] = [
        (".lora_A.weight", Role::A),
        (".lora_B.weight", Role::B),
        (".lora_embedding_A", Role::TableA),
        (".lora_embedding_B", Role::TableB),
        (".base_layer.weight", Role::Base),
        (".weight", Role::Base),
    ];
    if name.contains(".modules_to_save.") || name.contains(".original_module.") {
        return Role::Other("a module that was trained as a whole (modules_to_save)");
    }
    match ends.into_iter().find_map(|(end, role)| Some(role(module.strip_suffix(end)?))) {
        _ if name.contains("lora_magnitude_vector") => Role::Other("a magnitude of DoRA"),
        Some(Role::Base(own)) if own.contains(".lora_") => Role::Other("a tensor that does not belong to LoRA"),
        Some(role) => role,
        None if name.ends_with(".bias") => Role::Other("a trained bias"),
        None => Role::Other("a tensor that does not belong to LoRA"),
    }
}

/// A module's name without the parts that differ between classes.
fn tail(module: &str) -> &str {
    let mut rest = module;
    while let Some((first, others)) = rest.split_once('.')
        && WRAPPERS.contains(&first)
    {
        rest = others;
    }
    rest
}

/// Reads the adapter in the folder at `path`.
///
/// # Errors
/// [`Error::Io`]; [`Error::Malformed`], [`Error::Missing`] and [`Error::Unsupported`] with the key or the tensor.
pub(super) fn read(path: &Path, base: &Base<'_>) -> Result<AdapterFile> {
    let config = PeftConfig::read(path)?;
    if !path.join(FILE).is_file() && path.join("adapter_model.bin").is_file() {
        return Err(Error::Unsupported {
            path: path.join("adapter_model.bin"),
            place: Place::File,
            what: "an adapter in PyTorch's format".to_owned(),
            supported: format!("supported: {FILE}, which PEFT saves with safe_serialization=True"),
        });
    }
    // A file of a few megabytes: read, so that nothing depends on it afterwards.
    let folder = Folder { config, files: SafeTensors::open_file(path, FILE, false)? };
    let mut read = AdapterFile::default();
    let mut modules: BTreeMap<&str, Module<'_>> = BTreeMap::new();
    let mut copies = Vec::new();
    for tensor in folder.files.tensors() {
        let matrix = || folder.matrix(tensor);
        match role(tensor.name()) {
            Role::A(module) => modules.entry(module).or_default().a = Some(matrix()?),
            Role::B(module) => modules.entry(module).or_default().b = Some(matrix()?),
            Role::TableA(module) => {
                let own = modules.entry(module).or_default();
                (own.a, own.is_table) = (Some(matrix()?), true);
            }
            Role::TableB(module) => {
                let own = modules.entry(module).or_default();
                (own.b, own.is_table) = (Some(matrix()?), true);
            }
            Role::Base(module) => copies.push((module, matrix()?)),
            Role::Other(what) => return Err(folder.unsupported(tensor, what)),
        }
    }
    experts::take(&folder, &mut modules, base, &mut read)?;
    let placements = chosen(&folder, &modules, base)?;
    let by_tail: HashMap<&str, &str> = modules.keys().map(|name| (tail(name), *name)).collect();
    let find = |name: &String| {
        let name = *by_tail.get(tail(name))?;
        Some((name, modules.get(name)?))
    };
    let mut used: HashSet<&str> = HashSet::new();
    for placement in &placements {
        let own: Vec<_> = placement.modules.iter().map(find).collect();
        if own.iter().all(Option::is_none) {
            continue;
        }
        used.extend(own.iter().flatten().map(|(name, _)| *name));
        let delta = folder.delta(placement, &own)?;
        if read.deltas.insert(placement.tensor.clone(), delta).is_some() {
            return Err(folder.twice(&placement.tensor));
        }
    }
    if let Some((name, module)) = modules.iter().find(|(name, _)| !used.contains(*name)) {
        return Err(folder.unknown(name, module));
    }
    for (module, matrix) in copies {
        read.copies.push(folder.copy(module, matrix, &placements)?);
    }
    Ok(read)
}

/// Where the modules belong: of the possible answers, the first that has them all.
fn chosen(folder: &Folder, modules: &BTreeMap<&str, Module<'_>>, base: &Base<'_>) -> Result<Vec<Placement>> {
    let mut best: Option<(usize, Vec<Placement>)> = None;
    for placements in (base.placements)()? {
        let known: HashSet<&str> =
            placements.iter().flat_map(|placement| &placement.modules).map(|module| tail(module)).collect();
        let count = modules.keys().filter(|module| known.contains(tail(module))).count();
        if best.as_ref().is_none_or(|(most, _)| count > *most) {
            best = Some((count, placements));
        }
    }
    match best {
        Some((_, placements)) => Ok(placements),
        None => Err(Error::Unsupported {
            path: folder.files.folder().to_path_buf(),
            place: Place::File,
            what: format!("a PEFT adapter for a GGUF file of the family {}", base.config.family.name),
            supported: "supported: an adapter in GGUF, or the model as a Hugging Face folder".to_owned(),
        }),
    }
}

impl Folder {
    fn twice(&self, tensor: &str) -> Error {
        let expected = "modules of different tensors";
        Error::malformed(self.files.folder(), Place::Tensor(format!("{tensor}.weight")), "several modules", expected)
    }

    /// The error for a module that the model does not have, or whose adapter is not computed.
    fn unknown(&self, name: &str, module: &Module<'_>) -> Error {
        match module.a.or(module.b) {
            Some(matrix) => self.unsupported(matrix.tensor, &format!("an adapter of {name}")),
            None => Error::malformed(self.files.folder(), Place::File, name, "modules with matrices"),
        }
    }

    /// The matrices of the module called `name`, `A (rank, columns)` and `B (rows, rank)`. Those of an embedding are transposed,
    /// so that they change a matrix with a row for each token.
    fn pair(&self, name: &str, module: &Module<'_>, rows: usize, columns: usize) -> Result<Factors> {
        let (Some(a), Some(b)) = (module.a, module.b) else {
            let missing = if module.a.is_none() { "A" } else { "B" };
            let place = Place::Tensor(format!("{PREFIX}{name}.lora_{missing}.weight"));
            let expected = "both matrices of a module".to_owned();
            return Err(Error::Missing { path: self.files.folder().join(FILE), place, expected });
        };
        let rank = a.rows;
        let (wide, tall) = if module.is_table { (rows, columns) } else { (columns, rows) };
        for (matrix, shape) in [(a, [rank, wide]), (b, [tall, rank])] {
            if [matrix.rows, matrix.columns] != shape {
                let found = format!("shape {:?}", matrix.tensor.shape());
                return Err(self.malformed(matrix.tensor, found, &format!("{shape:?}, as the model has")));
            }
        }
        let scale = self.config.scale(name, rank)?;
        let (a, b) = (self.values(a)?, self.values(b)?);
        Ok(match module.is_table {
            true => Factors::scaled(rank, transposed(&b, rank), transposed(&a, rows), scale),
            false => Factors::scaled(rank, a, b, scale),
        })
    }

    /// The change of a tensor whose modules are these, in their order.
    fn delta(&self, placement: &Placement, modules: &[Option<(&str, &Module<'_>)>]) -> Result<Delta> {
        let [columns, rows, count] = placement.dims;
        if let Some((name, module)) = modules.iter().flatten().next()
            && (!placement.is_supported() || (count > 1 && !placement.is_stack))
        {
            return Err(self.unknown(name, module));
        }
        if placement.is_stack {
            let mut delta = Delta::empty(placement.dims);
            for (to, module) in delta.matrices.iter_mut().zip(modules) {
                *to = module.map(|(name, module)| self.pair(name, module, rows, columns)).transpose()?;
            }
            return Ok(delta);
        }
        // The modules' matrices one after the other: rows of one module have zeros for the ranks of the others.
        let heights = self.heights(placement, modules)?;
        let pairs: Vec<_> = modules
            .iter()
            .zip(&heights)
            .map(|(module, height)| module.map(|(name, module)| self.pair(name, module, *height, columns)).transpose())
            .collect::<Result<_>>()?;
        let rank: usize = pairs.iter().flatten().map(|pair| pair.rank).sum();
        let (mut down, mut up, mut at) = (Vec::new(), Vec::new(), 0);
        for (pair, height) in pairs.iter().zip(heights) {
            let Some(pair) = pair else {
                up.resize(up.len() + height * rank, 0.0);
                continue;
            };
            down.extend_from_slice(&pair.down);
            for row in pair.up.chunks_exact(pair.rank) {
                let start = up.len();
                up.resize(start + rank, 0.0);
                up[start + at..][..pair.rank].copy_from_slice(row);
            }
            at += pair.rank;
        }
        let (down, up) = (placement.arrange_columns(down, columns), placement.arrange(&up, rank));
        Ok(Delta { dims: placement.dims, matrices: vec![Some(Factors { rank, down, up })] })
    }

    /// The rows of each module: those of its matrix, and for the one without matrices what is left.
    fn heights(&self, placement: &Placement, modules: &[Option<(&str, &Module<'_>)>]) -> Result<Vec<usize>> {
        let all = placement.source_rows();
        if let [_] = modules {
            return Ok(vec![all]);
        }
        let own = |module: &Option<(&str, &Module<'_>)>| module.and_then(|(_, module)| module.b).map(|b| b.rows);
        let known: Vec<Option<usize>> = modules.iter().map(own).collect();
        let (sum, missing) = known.iter().fold((0usize, 0), |(sum, missing), rows| match rows {
            Some(rows) => (sum.saturating_add(*rows), missing),
            None => (sum, missing + 1),
        });
        let first = modules.iter().flatten().find_map(|(_, module)| module.b);
        match (all.checked_sub(sum), first) {
            (Some(0), _) if missing == 0 => Ok(known.into_iter().flatten().collect()),
            (Some(left), _) if missing == 1 && left > 0 => {
                Ok(known.into_iter().map(|rows| rows.unwrap_or(left)).collect())
            }
            (_, Some(matrix)) => {
                let what = format!("adapters of some of the modules of {}.weight", placement.tensor);
                Err(self.unsupported(matrix.tensor, &what))
            }
            (_, None) => Err(self.twice(&placement.tensor)),
        }
    }

    /// A copy of a matrix of the base.
    fn copy(&self, module: &str, matrix: Matrix<'_>, placements: &[Placement]) -> Result<BaseCopy> {
        let ends = ["token_embd", "output"];
        let place = placements.iter().filter(|placement| ends.contains(&placement.tensor.as_str()));
        let place = place.into_iter().find(|placement| placement.modules.iter().any(|own| tail(own) == tail(module)));
        let Some(place) = place.filter(|place| place.is_supported()) else {
            return Err(self.unsupported(matrix.tensor, "a whole matrix, which was trained or repeats the base"));
        };
        if [matrix.rows, matrix.columns] != [place.source_rows(), place.dims[0]] {
            let expected = format!("{:?}, as the model has", [place.source_rows(), place.dims[0]]);
            let found = format!("shape {:?}: a matrix of the base that was resized", matrix.tensor.shape());
            return Err(self.malformed(matrix.tensor, found, &expected));
        }
        Ok(BaseCopy {
            source: matrix.tensor.name().to_owned(),
            path: self.files.path(matrix.tensor).to_path_buf(),
            tensor: place.tensor.clone(),
            values: place.arrange(&self.values(matrix)?, matrix.columns),
            columns: matrix.columns,
        })
    }
}
