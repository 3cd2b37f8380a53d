//! Which kernels this CPU runs.

#[cfg(target_arch = "aarch64")]
use super::neon;
use super::operations::Kernel;
use super::scalar;
#[cfg(target_arch = "x86_64")]
use super::{amx, avx2, avx512, avxvnni};

/// The kernels that this CPU can run, best first. Never empty: `scalar` is always there.
pub fn available() -> Vec<&'static Kernel> {
    let mut kernels = vec![];
    #[cfg(target_arch = "x86_64")]
    {
        // AMX comes last, so that it is used only where measuring finds it faster: its speed is not known yet.
        let found = [avx512::kernel(), avxvnni::kernel(), avx2::kernel(), amx::kernel()];
        kernels.extend(found.into_iter().flatten());
    }
    #[cfg(target_arch = "aarch64")]
    kernels.extend(neon::kernel());
    kernels.push(scalar::kernel());
    kernels
}
