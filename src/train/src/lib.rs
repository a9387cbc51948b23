//! Algorithm 1 of Yu et al. 2024 (arXiv 2402.13659): LoRA fine-tuning with DP-Adam on the private instructions.
//!
//! The only crate that holds private text, libtorch and noise together, so it stays short. Read [`step`] first: one
//! step of the algorithm in the paper's order. [`publish`] alone writes an adapter to the release zone, and only one that
//! noised gradients made; [`mod@run`] writes the run's claim and manifest there.

pub mod adapter;
pub mod args;
pub mod checkpoint;
pub mod corpus;
pub mod loss;
pub mod publish;
pub mod run;
pub mod step;
#[cfg(test)]
mod testing;

pub use args::Args;
pub use run::run;

/// A model's failure by what the operator can do.
fn failure(error: lm::LmError) -> stage::Failure {
    stage::Failure::coded(error.exit_code(), error)
}
