//! The tile registers: detection, configuration and the product.
//!
//! Written from Intel's Software Developer's Manual (volume 1 chapter 18, volume 2 `LDTILECFG`, `TDPBSUD`) and Linux's
//! `Documentation/arch/x86/xstate.rst`. Rust has no stable intrinsics for tiles, hence the assembler.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::hint::black_box;
use std::marker::PhantomData;

use super::product::{Dots, Sums, WCodes, XCodes};
use crate::kernels::activations::MAX_TILE_ROWS;
use crate::quant::packed::{BLOCK, CacheLine, PANEL};

/// Proof that the CPU has AMX-TILE and AMX-INT8 and that this process may use them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Amx(());

impl Amx {
    /// # Safety
    ///
    /// [`are_usable`] must be true.
    pub(super) unsafe fn new() -> Self {
        Amx(())
    }
}

/// Whether the CPU has tiles and their INT8 products and the operating system lets this process use them.
pub(super) fn are_usable() -> bool {
    const TILE: u32 = 1 << 24;
    const INT8: u32 = 1 << 25;
    #[allow(unused_unsafe, reason = "reading a leaf was unsafe in earlier versions of Rust")]
    // SAFETY: every CPU with 64-bit instructions has CPUID, and leaf 7 is read only if it exists.
    let has = |features| unsafe { __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & features == features };
    has(TILE | INT8) && ask_for_permission()
}

/// Requests permission to use the tiles from Linux, which saves their state, 8 KiB per thread, only for processes with it.
///
/// The permission covers all threads of the process. Requesting it again is harmless.
#[cfg(target_os = "linux")]
fn ask_for_permission() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const REQUEST_STATE: i64 = 0x1023; // ARCH_REQ_XCOMP_PERM
    const TILE_DATA: i64 = 18; // the state component of CPUID leaf 13
    let mut result = ARCH_PRCTL;
    // SAFETY: the call takes two numbers and touches no memory of ours; the kernel overwrites rax, rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") REQUEST_STATE,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Other systems are not supported.
#[cfg(not(target_os = "linux"))]
fn ask_for_permission() -> bool {
    false
}

/// The operand of `LDTILECFG`: bytes per row and rows of each of 8 tiles. The other entries are zero.
#[derive(Debug)]
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const _: () = assert!(size_of::<Config>() == 64);

/// The tile configuration of this thread. It cannot leave the thread; dropping it releases the tiles.
#[derive(Debug)]
struct Configured(PhantomData<*mut ()>);

impl Configured {
    /// Configures tiles of `(rows, bytes per row)`: at most 8 tiles of 16 rows of 64 bytes.
    ///
    /// # Safety
    ///
    /// A thread must not make another one while it has this one: a thread has one configuration.
    unsafe fn new(_: Amx, shapes: &[(usize, usize)]) -> Self {
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, &(rows, bytes)) in shapes.iter().enumerate() {
            assert!(i < 8 && (1..=16).contains(&rows) && (4..=64).contains(&bytes), "tile {i}: {rows} rows of {bytes}");
            (config.rows[i], config.row_bytes[i]) = (rows as u8, bytes as u16);
        }
        // SAFETY: an `Amx` exists, so the CPU has tiles and this process may use them. `config` is 64 readable bytes and, as
        // was just checked, within the limits of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags)) };
        Configured(PhantomData)
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: `self` exists, so the tiles are configured, and nothing else on this thread uses them.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags)) };
    }
}

/// Tiles for products of blocks in `PARTS` parts: tile 0 holds the sums, 1 activations, 2 weights.
#[derive(Debug)]
pub(super) struct Tiles<const PARTS: usize>(Configured);

impl<const PARTS: usize> Tiles<PARTS> {
    const COLUMNS: usize = BLOCK / PARTS;

    /// Configures this thread's tiles.
    ///
    /// # Safety
    ///
    /// A thread must not make others, nor measure its [`peak`], while it has these.
    pub(super) unsafe fn new(amx: Amx) -> Self {
        let sums = (MAX_TILE_ROWS, PANEL * size_of::<i32>());
        let (x, w) = ((MAX_TILE_ROWS, Self::COLUMNS), (Self::COLUMNS / 4, size_of::<CacheLine>()));
        // SAFETY: the caller's promise.
        Tiles(unsafe { Configured::new(amx, &[sums, x, w]) })
    }
}

impl<const PARTS: usize> Dots for Tiles<PARTS> {
    const PARTS: usize = PARTS;

    fn dots(&self, x: &XCodes, w: &WCodes, part: usize, out: &mut Sums) {
        let columns = Self::COLUMNS;
        let (x, w) = (&x.as_flattened()[part * columns..], &w[part * columns / 4..][..columns / 4]);
        assert!(x.len() >= (MAX_TILE_ROWS - 1) * BLOCK + columns);
        // SAFETY: `self` is this thread's configuration, so the loads read `MAX_TILE_ROWS` rows of `columns` bytes, `BLOCK`
        // apart, which `x` has, and `columns / 4` lines, which `w` has; the store writes `MAX_TILE_ROWS` rows of 64 bytes, 64
        // apart, which is all of `out`.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tileloadd tmm1, [{x} + {x_stride}*1]",
                "tileloadd tmm2, [{w} + {line}*1]",
                "tdpbsud tmm0, tmm1, tmm2", // signed activations times unsigned weights
                "tilestored [{out} + {line}*1], tmm0",
                x = in(reg) x.as_ptr(),
                x_stride = in(reg) BLOCK,
                w = in(reg) w.as_ptr(),
                out = in(reg) out.as_mut_ptr(),
                line = in(reg) size_of::<CacheLine>(),
                out("tmm0") _,
                out("tmm1") _,
                out("tmm2") _,
                options(nostack, preserves_flags),
            );
        }
    }
}

/// [`Kernel::peak_int8`](crate::kernels::Kernel::peak_int8) with six sums of products of whole tiles.
///
/// # Safety
///
/// The thread must have no [`Tiles`].
pub(super) unsafe fn peak(amx: Amx, rounds: usize) -> (u64, i32) {
    const SUMS: usize = 6;
    // SAFETY: the caller's promise, and no other is made here.
    let _tiles = unsafe { Configured::new(amx, &[(16, 64); 8]) };
    let (x, w) = black_box(([CacheLine([0xfb; 64]); 16], [CacheLine([3; 64]); 16]));
    let mut sums = [[CacheLine([0; 64]); 16]; SUMS];
    if rounds > 0 {
        // SAFETY: the tiles were just configured, which also zeroes them. The loads read 16 lines each, which `x` and `w` have,
        // and the stores write 16 lines each, which together are all of `sums`.
        unsafe {
            asm!(
                "tileloadd tmm6, [{x} + {line}*1]",
                "tileloadd tmm7, [{w} + {line}*1]",
                "2:",
                "tdpbsud tmm0, tmm6, tmm7",
                "tdpbsud tmm1, tmm6, tmm7",
                "tdpbsud tmm2, tmm6, tmm7",
                "tdpbsud tmm3, tmm6, tmm7",
                "tdpbsud tmm4, tmm6, tmm7",
                "tdpbsud tmm5, tmm6, tmm7",
                "dec {rounds}",
                "jnz 2b",
                "tilestored [{sums} + {line}*1], tmm0",
                "tilestored [{sums} + {line}*1 + 1024], tmm1",
                "tilestored [{sums} + {line}*1 + 2048], tmm2",
                "tilestored [{sums} + {line}*1 + 3072], tmm3",
                "tilestored [{sums} + {line}*1 + 4096], tmm4",
                "tilestored [{sums} + {line}*1 + 5120], tmm5",
                x = in(reg) x.as_ptr(),
                w = in(reg) w.as_ptr(),
                sums = in(reg) sums.as_mut_ptr(),
                line = in(reg) size_of::<CacheLine>(),
                rounds = inout(reg) rounds => _,
                out("tmm0") _,
                out("tmm1") _,
                out("tmm2") _,
                out("tmm3") _,
                out("tmm4") _,
                out("tmm5") _,
                out("tmm6") _,
                out("tmm7") _,
                options(nostack),
            );
        }
    }
    let lanes: &[i32] = bytemuck::cast_slice(sums.as_flattened());
    let checksum = lanes.iter().fold(0, |sum: i32, lane| sum.wrapping_add(*lane));
    // Each sum has 16 x 16 dot products of 64 columns.
    (rounds as u64 * (SUMS * 16 * 16 * 64 * 2) as u64, checksum)
}
