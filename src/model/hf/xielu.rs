//! The parameters of xIELU, which checkpoints hold as tensors and GGUF as keys.

use super::families::HfFamily;
use crate::error::{Error, Place, Result};
use crate::format::gguf::Metadata;
use crate::format::safetensors::SafeTensors;

/// The parameters, and what they are where the checkpoint lacks them.
const PARAMETERS: [(&str, Option<f32>); 4] =
    [("alpha_p", None), ("alpha_n", None), ("beta", Some(0.5)), ("eps", Some(-1e-6))];

/// Writes the parameters of all layers to `metadata`.
///
/// # Errors
/// [`Error::Missing`] and [`Error::Malformed`] with the checkpoint's name of the tensor.
pub(super) fn write(family: &HfFamily, files: &SafeTensors, layers: usize, metadata: &mut Metadata) -> Result<()> {
    let is_base = |base: &&&str| files.tensors().iter().any(|tensor| tensor.name().starts_with(**base));
    let base = family.bases.iter().find(is_base).copied().unwrap_or_default();
    let prefix = family.layers.replace('~', base);
    for (parameter, default) in PARAMETERS {
        let number = |layer: usize| {
            let name = format!("{prefix}{layer}.mlp.act_fn.{parameter}");
            let place = || Place::Tensor(name.clone());
            let Some(tensor) = files.tensor(&name) else {
                return default.ok_or_else(|| Error::Missing {
                    path: files.folder().to_path_buf(),
                    place: place(),
                    expected: "a number".to_owned(),
                });
            };
            let mut value = [0.0];
            let block_type = tensor.block_type().filter(|kind| files.data(tensor).len() == kind.block_bytes());
            match block_type.map(|kind| kind.decode(files.data(tensor), &mut value)) {
                Some(Ok(())) if value[0].is_finite() => Ok(value[0]),
                _ => {
                    let found = format!("{} of shape {:?}", tensor.dtype(), tensor.shape());
                    Err(Error::malformed(files.path(tensor), place(), found, "one finite number in F32, F16 or BF16"))
                }
            }
        };
        let numbers = (0..layers).map(number).collect::<Result<Vec<f32>>>()?;
        metadata.set(format!("xielu.{parameter}"), numbers);
    }
    Ok(())
}
