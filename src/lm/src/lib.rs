//! Models on libtorch: load, forward, per-example gradients, sampling, embedding.
//!
//! Knows no storage (local folders only) and no differential privacy.

pub mod adapter;
pub mod checkpoint;
pub mod decoder;
pub mod device;
pub mod encoder;
pub mod generate;
pub mod gguf;
pub mod gradients;
mod kernels;
mod ops;
pub mod template;
pub mod tokenizer;
mod workers;

/// What can go wrong with a model: every variant is an input problem unless said otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LmError {
    /// A file or tensor is missing, cut short or of another shape or type; names file, tensor, found and expected.
    #[error("{0}")]
    Malformed(String),
    /// The configuration asks for something that is not supported, or a flag does not fit: usage.
    #[error("{0}")]
    Usage(String),
    /// libtorch failed (out of memory, …). The message never holds token text.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}
