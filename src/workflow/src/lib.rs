//! Workflow files: parse them, check them, run them here as processes.
//!
//! A workflow file is an Argo Workflow (`argoproj.io/v1alpha1`), so that Kubernetes runs it as it is. This crate
//! executes the same file on one machine. It knows Argo's words and Unix processes; it must never know what doppel's
//! stages do, nor touch object storage. A field that would change what happens and is not supported here is an error
//! that names the field and its place; one that only concerns a cluster (node selectors, images, …) is passed over.
//!
//! Start reading at [`load`]: text → [`yaml`] nodes with positions → [`model`] → [`check`] → [`plan`] (every task
//! instance is known before the first one starts, since no supported field depends on a task's output) → [`run`].

pub mod check;
mod counter;
mod decode;
mod fields;
pub mod finding;
pub mod machine;
pub mod model;
pub mod plan;
mod process;
pub mod quantity;
pub mod retry;
pub mod run;
mod substitute;
pub mod yaml;

pub use finding::{Finding, Findings, Position};
pub use machine::Machine;
pub use plan::{Job, Plan};
pub use process::Stop;
pub use run::{Event, JobReport, Observer, Options, Report, State, run};

/// Parses, checks and expands the workflow in `text` with `parameters` given on the command line.
///
/// `file` is only for messages. All findings of a phase are reported together.
pub fn load(file: &str, text: &str, parameters: &[(String, String)]) -> Result<Plan, Findings> {
    let mut findings = Findings::new(file);
    let root = match yaml::parse(text) {
        Ok(root) => root,
        Err(finding) => {
            findings.push(finding);
            return Err(findings);
        }
    };
    let workflow = decode::workflow(&root, &mut findings);
    let workflow = findings.done(workflow)?;
    check::check(&workflow, &mut findings);
    let workflow = findings.done(Some(workflow))?;
    let plan = plan::expand(&workflow, parameters, &mut findings);
    findings.done(plan)
}
