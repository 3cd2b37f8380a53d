//! The allocator of the Python module, which returns large blocks to the system as soon as they are freed.
//!
//! glibc maps large blocks too, but raises its threshold with each that is freed: from then on it takes blocks of that size,
//! up to 32 MiB, from one of its heaps per thread, where a small block that outlives them keeps their memory from the
//! system. A process in which many threads load and use models in turn grows to several times what it needs. A Rust program
//! chooses its own allocator; a module in a Python process can have a private one. Small blocks stay with glibc, which trims
//! its heaps when a model is closed.
#![allow(unsafe_code, reason = "an allocator returns raw memory")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::{null_mut, without_provenance_mut};

/// Blocks of this many bytes and more are mapped.
pub(crate) const SMALLEST_MAP: usize = 256 << 10;
/// The smallest alignment of a map on any machine.
const PAGE: usize = 4096;

/// Maps large blocks from the system and takes others from Rust's default allocator.
#[derive(Debug)]
pub(crate) struct Allocator;

/// Whether a block with this layout is a map. The layout is known when a block is allocated and when it is freed.
fn is_mapped(layout: Layout) -> bool {
    layout.size() >= SMALLEST_MAP && layout.align() <= PAGE
}

// SAFETY: a block is allocated, resized and freed by the same of the two allocators, because `is_mapped` depends only on the
// layout. Both fulfil the contract of the trait, and nothing here unwinds.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_mapped(layout) {
            return map(layout.size());
        }
        // SAFETY: the caller's promises are those that `System` needs.
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
            // SAFETY: `block` is a map of that size, which is no longer used. The call fails where the process has too many
            // maps for the system to split one that it had merged. Then the block leaks, which cannot be reported.
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
                // SAFETY: `block` is a map of the old size, which the caller no longer uses after this succeeds.
                let moved = unsafe { libc::mremap(block.cast(), layout.size(), size, libc::MREMAP_MAYMOVE) };
                if moved == libc::MAP_FAILED { null_mut() } else { moved.cast() }
            }
            _ => {
                // SAFETY: neither size is zero.
                let other = unsafe { self.alloc(new) };
                if !other.is_null() {
                    // SAFETY: the two blocks are distinct, each at least as large as the smaller size, and `block` came from
                    // this allocator.
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

/// Returns the free memory of glibc's heaps to the system. Takes a few milliseconds and locks the heaps in turn.
#[cfg(feature = "python")]
pub(crate) fn trim() {
    // SAFETY: the function takes no pointer and may be called by any thread at any time.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Maps `size` bytes of zeros. Null when the system refuses.
fn map(size: usize) -> *mut u8 {
    let (readable, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: without an address and a file, the call affects no existing memory.
    let map = unsafe { libc::mmap(without_provenance_mut(0), size, readable, private, -1, 0) };
    if map == libc::MAP_FAILED { null_mut() } else { map.cast() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A block that checks that its contents are kept.
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
            // SAFETY: the block has that many bytes. They are read only after they were written or zeroed.
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
            let mut neighbor = Block::new(sizes[0], align, zeroed);
            let mut block = Block::new(sizes[0], align, zeroed);
            for size in &sizes[1..] {
                block.resize(*size);
                neighbor.check(sizes[0]);
            }
        }
    }

    #[test]
    fn large_blocks_return_to_the_system_at_once() {
        let pages = || {
            let text = std::fs::read_to_string("/proc/self/statm").unwrap();
            text.split(' ').next().unwrap().parse::<usize>().unwrap()
        };
        let before = pages();
        let layout = Layout::from_size_align(1 << 30, 64).unwrap();
        // SAFETY: the size is not zero.
        let block = unsafe { Allocator.alloc(layout) };
        assert!(!block.is_null());
        // Other tests run at the same time, and pages may have 64 KiB.
        assert!(pages() > before + (1 << 29) / (64 << 10));
        // SAFETY: the block has that layout.
        unsafe { Allocator.dealloc(block, layout) };
        assert!(pages() < before + (1 << 29) / PAGE);
    }

    #[test]
    fn an_impossible_size_is_null_and_leaves_the_block_alone() {
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
