//! (quant)
