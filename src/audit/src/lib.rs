//! An empirical audit of DP training: attacks the product's own mechanism and states the ε that the attack proves.
//!
//! Accounting says what ε would be if the code did what the event says. This crate does not believe it: it puts
//! canaries into the data by coin, runs the product's sampler, clipping and noise, guesses from what is released which
//! canaries were there, and turns the guesses into a lower bound on ε that holds with a stated confidence. A bound above
//! the claimed ε proves a fault; one below it proves nothing, which is why the tests break the mechanism in the usual
//! ways (too little noise, everyone in every batch, no clipping) and show that the audit notices each.
//!
//! The attacker is the one of the guarantee: sees every released gradient, knows every canary, not the coins.
//!
//! Start reading at `attack`; the statistics are in [`bound`]. Nothing private is read and nothing is written.

mod args;
mod attack;
pub mod bound;
mod canary;
mod model;
mod parts;
mod report;
mod target;
#[cfg(test)]
mod tests;

use lm::LmError;
use privacy::AccountingError;
use stage::{Failure, Summary};

pub use args::Args;
use attack::Attack;
use canary::Directions;
use model::Model;
use parts::Parts;
use report::Report;

/// Runs the audits that `args` asks for. A bound above the claimed ε is a bug, and fails as one.
pub async fn run(args: Args) -> Result<Summary, Failure> {
    let mechanism = args.mechanism()?;
    let attack = Attack { delta: args.delta, confidence: args.confidence, seed: args.seed };
    let directions = || Directions::new(Parts::of(&mechanism), args.canaries, attack.key());
    let mut findings = vec![attack.per_step(&mut directions())?, attack.one_run("one run", &mut directions())?];
    if let Some(url) = &args.model {
        let mut model = Model::fetch(url, Parts::of(&mechanism), args.canaries, &attack).await?;
        findings.push(attack.one_run("one run of the model", &mut model)?);
    }
    let report = Report { mechanism, delta: args.delta, confidence: args.confidence, audits: findings };
    match report.refuted() {
        None => Ok(report.summary()),
        Some(reason) => {
            report.summary().print(args.format)?;
            Err(Failure::Bug(reason))
        }
    }
}

fn accounting(error: AccountingError) -> Failure {
    Failure::Usage(error.to_string())
}

/// A model's failure by what the operator can do.
fn failure(error: LmError) -> Failure {
    Failure::coded(error.exit_code(), error)
}
