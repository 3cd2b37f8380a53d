//! (threads)
