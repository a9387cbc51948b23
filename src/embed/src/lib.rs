//! embed: texts become vectors, which vote clusters and compares.
//!
//! What is read and what is written lie in one zone: [`table`] takes a zone and has no second one, so private texts
//! cannot become release vectors. Synthetic texts are embedded without a private root at all. Must never know: budget,
//! mechanism. Start reading at [`run`].

pub mod args;
pub mod run;
pub mod table;

pub use args::Args;
pub use run::run;

/// A model's failure by what the operator can do.
fn failure(error: lm::LmError) -> stage::Failure {
    stage::Failure::coded(error.exit_code(), error)
}
