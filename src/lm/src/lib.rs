//! Models on libtorch: load, forward, per-example gradients, sampling, embedding.
//!
//! Knows no storage (local folders only) and no differential privacy.

pub mod adapter;
mod attention;
pub mod checkpoint;
mod cuda;
pub mod decoder;
pub mod device;
pub mod encoder;
pub mod generate;
pub mod gguf;
pub mod gradients;
mod kernels;
mod ops;
mod padding;
mod products;
mod rope;
pub mod template;
pub mod tokenizer;
mod workers;

pub use workers::tune_memory;

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
    /// libtorch failed.
    #[error("libtorch: {0}")]
    Torch(String),
}

impl LmError {
    /// The exit code of the stage contract, for `stage::Failure::coded`: this crate does not know stages.
    ///
    /// PRIVACY: no variant holds text of a record.
    pub fn exit_code(&self) -> u8 {
        match self {
            LmError::Usage(_) => 2,
            LmError::Malformed(_) => 3,
            LmError::Torch(_) => 1,
        }
    }
}

/// How libtorch and CUDA say that there is no more memory.
const OUT_OF_MEMORY: [&str; 4] = ["out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED"];

impl From<tch::TchError> for LmError {
    /// Memory that does not suffice is a matter of flags. Of what else may fail, the first line is kept (the rest is a
    /// trace of C++ calls), without numbers.
    ///
    /// PRIVACY: a shape, or the bytes of an allocation, would tell how long private records are.
    fn from(error: tch::TchError) -> Self {
        let text = error.to_string();
        if OUT_OF_MEMORY.iter().any(|sign| text.contains(sign)) {
            return Self::Usage(
                "libtorch: the device's memory does not suffice\n\
                 help: lower train's --micro-batch-tokens, synthesize's --batch-size or embed's --batch-tokens"
                    .into(),
            );
        }
        Self::Torch(text.lines().next().unwrap_or_default().replace(|letter: char| letter.is_ascii_digit(), "#"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn memory_that_does_not_suffice_is_a_usage_error() {
        // More than the address space of any CPU: nothing is allocated.
        let error = LmError::from(Tensor::f_zeros([1 << 50], (Kind::Float, Device::Cpu)).unwrap_err());
        assert!(matches!(&error, LmError::Usage(message) if message.contains("help:")), "{error}");
    }

    #[test]
    fn an_error_of_libtorch_tells_no_shape() {
        let ones = |length: i64| Tensor::ones([length], (Kind::Float, Device::Cpu));
        let error = LmError::from(ones(123).f_add(&ones(45)).unwrap_err()).to_string();
        assert!(error.starts_with("libtorch: ") && error.contains("must match"), "{error}");
        assert!(!error.contains(|letter: char| letter.is_ascii_digit()) && !error.contains('\n'), "{error}");
    }
}
