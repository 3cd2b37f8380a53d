//! The unit of aligned memory.

use bytemuck::{Pod, Zeroable};

/// A cache line. A load of a whole line never touches two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct CacheLine(pub [u8; 64]);
