//! The command line.

use clap::{Args, Parser, Subcommand};

use crate::account::AccountArgs;
use crate::budget::BudgetArgs;
use crate::compact::CompactArgs;
use crate::compare::CompareArgs;
use crate::execute::RunArgs;
use crate::gc::GcArgs;
use crate::lineage::LineageArgs;
use crate::openlineage::OpenlineageArgs;
use crate::plan::PlanArgs;
use crate::rerun::RerunArgs;
use crate::runs::{RunsArgs, ShowArgs};

/// A synthetic double of a private collection of user instructions, with a differential-privacy guarantee.
///
/// `doppel run` executes a workflow file on this machine; `doppel budget`, `account` and `plan` answer questions about
/// privacy; `doppel STAGE …` calls the stage's binary `doppel-STAGE`.
///
/// Exit codes: 0 done; 1 a bug, or a task of a workflow that failed with another code; 2 wrong usage or configuration;
/// 3 an input is missing or malformed; 4 refused by the privacy budget; 5 storage or network, safe to retry; 129, 130
/// and 143 ended by SIGHUP, SIGINT and SIGTERM.
#[derive(Parser, Clone, Debug)]
#[command(name = "doppel", version, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Commands.
#[derive(Subcommand, Clone, Debug)]
#[expect(missing_docs, reason = "the help of a command is its arguments' comment, which one here would hide")]
pub enum Command {
    Run(RunArgs),
    Budget(BudgetArgs),
    Account(AccountArgs),
    Plan(PlanArgs),
    Compare(CompareArgs),
    Runs(RunsArgs),
    Show(ShowArgs),
    Gc(GcArgs),
    Compact(CompactArgs),
    Openlineage(OpenlineageArgs),
    Rerun(RerunArgs),
    Lineage(LineageArgs),
    /// Partition raw conversations into a corpus (doppel-partition).
    #[command(disable_help_flag = true)]
    Partition(Rest),
    /// Fine-tune a model on a corpus with differential privacy (doppel-train).
    #[command(disable_help_flag = true)]
    Train(Rest),
    /// Sample synthetic instructions (doppel-synthesize).
    #[command(disable_help_flag = true)]
    Synthesize(Rest),
    /// Embed texts (doppel-embed).
    #[command(disable_help_flag = true)]
    Embed(Rest),
    /// Let private records vote on clusters of synthetic ones, and resample (doppel-vote).
    #[command(disable_help_flag = true)]
    Vote(Rest),
    /// Query the release zone with SQL (doppel-query).
    #[command(disable_help_flag = true)]
    Query(Rest),
    /// Attack the training mechanism with canaries, for a lower bound on its ε (doppel-audit).
    #[command(disable_help_flag = true)]
    Audit(Rest),
}

/// Whatever the stage's binary takes.
#[derive(Args, Clone, Debug)]
pub struct Rest {
    /// Arguments of the stage.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_explains_what_a_command_does() {
        let doppel = Cli::command();
        let help = |names: &[&str]| {
            let start = &doppel;
            let found = names.iter().fold(start, |command, name| command.find_subcommand(name).unwrap());
            found.clone().render_long_help().to_string()
        };
        assert!(help(&["run"]).contains("Argo Workflow"));
        assert!(help(&["rerun"]).contains("Exit codes:"));
        assert!(help(&["gc"]).contains("What was spent stays spent"));
        assert!(help(&["budget"]).contains("as private as the corpus"));
        assert!(help(&["budget", "set"]).contains("refused with exit code 4"));
        for listed in ["account", "plan", "compare", "compact", "openlineage", "lineage"] {
            assert!(doppel.find_subcommand(listed).unwrap().get_long_about().is_some(), "{listed}");
        }
    }
}
