//! synthesize: many instructions sampled from the base model with a DP-trained adapter.
//!
//! What comes out follows from the adapter alone, which a mechanism released, and from public seeds; so there is no
//! private root here, and none can be given a use. Must never know: corpus, budget. Start reading at [`run`]; what makes
//! a sample independent of how the work is cut is in [`plan`].

pub mod args;
pub mod plan;
pub mod rows;
pub mod run;

pub use args::Args;
pub use run::run;
