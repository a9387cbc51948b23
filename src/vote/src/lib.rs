//! vote: Algorithm 2 of Yu et al. 2024 (arXiv 2402.13659). Private records vote in a noisy histogram over clusters of
//! synthetic texts, and a subset of those is chosen to match it.
//!
//! In the paper's order: [`pca`] and [`kmeans`] on public embeddings make a [`space`] of bins; in [`ballot`], the only
//! private step, units vote and noise is added; [`resample`] works on the noised counts; [`publish`] alone writes to
//! the release zone. [`compare`] writes to the private root. Start reading at [`run`].
//!
//! Must never know: models, texts of the corpus. It reads vectors, units and splits.

pub mod ballot;
pub mod compare;
pub mod config;
pub mod embeddings;
pub mod error;
pub mod kmeans;
pub mod matrix;
pub mod pca;
pub mod provenance;
pub mod publish;
pub mod resample;
mod run;
pub mod space;

pub use config::{Args, Config};
pub use error::VoteError;
pub use run::run;
