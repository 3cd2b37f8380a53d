//! Memory for the Python module: what is large goes back to the system as soon as it is given back.
//!
//! glibc maps large blocks too, but learns from each that is given back: from then on it takes blocks of that size, up to
//! 32 MiB, from one of the heaps that it keeps for every few threads, where a small block that stays behind them keeps
//! them from the system. A process in which many threads load and use models one after the other grows to several times
//! what it needs. Who uses the Rust crate chooses an allocator for the whole program; a module in a Python process
//! can have one to itself. What is small stays with glibc, which is told to look through its heaps when a model ends.
#![allow(unsafe_code, reason = "an allocator hands out memory")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::{null_mut, without_provenance_mut};

/// Blocks of this many bytes and more are mapped.
pub(crate) const SMALLEST_MAP: usize = 256 << 10;
/// What a map is aligned to at least, on any machine.
const PAGE: usize = 4096;

/// Maps large blocks from the system, and takes the others from Rust's usual allocator.
#[derive(Debug)]
pub(crate) struct Allocator;

/// Whether a block of that layout is a map. Both who takes a block and who gives it back know its layout.
fn is_mapped(layout: Layout) -> bool {
    layout.size() >= SMALLEST_MAP && layout.align() <= PAGE
}

// SAFETY: a block is made, resized and given back by the same of the two allocators, because `is_mapped` depends on nothing
// but the layout; both keep what the trait asks for, and none of this unwinds.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_mapped(layout) {
            return map(layout.size());
        }
        // SAFETY: the caller's promises are those that this asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_mapped(layout) {
            return map(layout.size());
        }
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if is_mapped(layout) {
            // SAFETY: `block` is a map of that size, which nobody uses any more. It stays where the system refuses to split
            // a larger one that it has made of neighbours, because there are too many; nobody can be told.
            unsafe { libc::munmap(block.cast(), layout.size()) };
            return;
        }
        // SAFETY: as in `alloc`, and `block` came from there.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that `size`, rounded up to the alignment, fits into `isize`.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (is_mapped(layout), is_mapped(new)) {
            // SAFETY: as in `alloc`, and `block` came from there.
            (false, false) => unsafe { System.realloc(block, layout, size) },
            (true, true) => {
                // SAFETY: `block` is a map of the old size, for which the caller has no use after this succeeds.
                let moved = unsafe { libc::mremap(block.cast(), layout.size(), size, libc::MREMAP_MAYMOVE) };
                if moved == libc::MAP_FAILED { null_mut() } else { moved.cast() }
            }
            _ => {
                // SAFETY: neither size is zero.
                let other = unsafe { self.alloc(new) };
                if !other.is_null() {
                    // SAFETY: the blocks are two, each at least as large as the smaller size, and `block` came from here.
                    unsafe {
                        block.copy_to_nonoverlapping(other, layout.size().min(size));
                        self.dealloc(block, layout);
                    }
                }
                other
            }
        }
    }
}

/// Gives the system back what lies free in the heaps of the C library, which keeps it otherwise for whoever comes next: a
/// few milliseconds, for which the heaps are locked one after the other.
#[cfg(feature = "python")]
pub(crate) fn trim() {
    // SAFETY: takes no pointer, and may be called by any thread at any time.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}

/// A new map of `size` bytes, all zero. Null when there is none.
fn map(size: usize) -> *mut u8 {
    let (readable, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: without an address and without a file this touches nothing that exists.
    let map = unsafe { libc::mmap(without_provenance_mut(0), size, readable, private, -1, 0) };
    if map == libc::MAP_FAILED { null_mut() } else { map.cast() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A block that is checked for what was written to it.
    struct Block {
        at: *mut u8,
        layout: Layout,
    }

    impl Block {
        fn new(size: usize, align: usize, zeroed: bool) -> Block {
            let layout = Layout::from_size_align(size, align).unwrap();
            // SAFETY: the size is not zero.
            let at = unsafe { if zeroed { Allocator.alloc_zeroed(layout) } else { Allocator.alloc(layout) } };
            assert!(!at.is_null() && at.addr().is_multiple_of(align));
            let mut block = Block { at, layout };
            assert!(!zeroed || block.bytes().iter().all(|byte| *byte == 0));
            block.fill(0);
            block
        }

        fn bytes(&mut self) -> &mut [u8] {
            // SAFETY: the block has that many bytes. Before they are written nobody reads them, unless they are zero.
            unsafe { std::slice::from_raw_parts_mut(self.at, self.layout.size()) }
        }

        fn fill(&mut self, from: usize) {
            for (i, byte) in self.bytes().iter_mut().enumerate().skip(from) {
                *byte = (i % 251) as u8;
            }
        }

        fn check(&mut self, len: usize) {
            assert!(self.bytes().iter().enumerate().take(len).all(|(i, byte)| *byte == (i % 251) as u8));
        }

        fn resize(&mut self, size: usize) {
            let old = self.layout.size();
            // SAFETY: the block has that layout, and the size is not zero.
            self.at = unsafe { Allocator.realloc(self.at, self.layout, size) };
            assert!(!self.at.is_null() && self.at.addr().is_multiple_of(self.layout.align()));
            self.layout = Layout::from_size_align(size, self.layout.align()).unwrap();
            self.check(old.min(size));
            self.fill(old.min(size));
        }
    }

    impl Drop for Block {
        fn drop(&mut self) {
            self.check(self.layout.size());
            // SAFETY: the block has that layout.
            unsafe { Allocator.dealloc(self.at, self.layout) };
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn blocks_keep_their_contents_through_all_sizes(
            align in (0u32..15).prop_map(|power| 1usize << power),
            zeroed: bool,
            sizes in prop::collection::vec(
                prop_oneof![1..3 * SMALLEST_MAP, SMALLEST_MAP - 2..SMALLEST_MAP + 3, Just(3 << 20)], 1..8
            ),
        ) {
            let mut neighbour = Block::new(sizes[0], align, zeroed);
            let mut block = Block::new(sizes[0], align, zeroed);
            for size in &sizes[1..] {
                block.resize(*size);
                neighbour.check(sizes[0]);
            }
        }
    }

    #[test]
    fn what_is_large_goes_back_at_once() {
        let pages = || {
            let text = std::fs::read_to_string("/proc/self/statm").unwrap();
            text.split(' ').next().unwrap().parse::<usize>().unwrap()
        };
        let before = pages();
        let layout = Layout::from_size_align(1 << 30, 64).unwrap();
        // SAFETY: the size is not zero.
        let block = unsafe { Allocator.alloc(layout) };
        assert!(!block.is_null());
        // Other tests run meanwhile, and pages may have 64 KiB.
        assert!(pages() > before + (1 << 29) / (64 << 10));
        // SAFETY: the block has that layout.
        unsafe { Allocator.dealloc(block, layout) };
        assert!(pages() < before + (1 << 29) / PAGE);
    }

    #[test]
    fn what_no_machine_has_is_null_and_a_block_that_cannot_grow_stays() {
        let most = isize::MAX as usize & !(PAGE - 1);
        // SAFETY: the size is not zero.
        assert!(unsafe { Allocator.alloc(Layout::from_size_align(most, 64).unwrap()) }.is_null());
        for size in [10, SMALLEST_MAP] {
            let block = Block::new(size, 8, true);
            // SAFETY: the block has that layout.
            assert!(unsafe { Allocator.realloc(block.at, block.layout, most) }.is_null());
        }
    }
}
