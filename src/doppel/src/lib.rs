//! The front of doppel: `doppel run` executes a workflow file on this machine, `doppel budget` and its relatives answer
//! questions about privacy, `doppel <stage>` calls the stage's binary.
//!
//! It starts stages as processes and must never link one, nor libtorch. Reading starts at [`cli`]; running at
//! [`execute`].

pub mod account;
pub mod afford;
pub mod anew;
pub mod budget;
pub mod cli;
pub mod compact;
pub mod compare;
pub mod equal;
pub mod execute;
pub mod exit;
pub mod finding;
pub mod gc;
pub mod invocation;
pub mod lineage;
pub mod openlineage;
pub mod plan;
pub mod plot;
pub mod preflight;
pub mod recorded;
pub mod rerun;
pub mod roots;
pub mod runs;
pub mod stages;
pub mod table;
pub mod values;
pub mod view;

use budget::BudgetCommand;
use cli::{Cli, Command};
use stage::{Failure, Summary};

/// Does what the command line says.
pub async fn run(cli: Cli) -> Result<Summary, Failure> {
    match cli.command {
        Command::Run(args) => execute::run(args).await,
        Command::Budget(args) => {
            exit::on_signal(async {
                match args.command {
                    Some(BudgetCommand::Set(set)) => budget::set(set).await,
                    None => budget::show(args.show).await,
                }
            })
            .await
        }
        Command::Account(args) => exit::on_signal(beside(move || account::account(&args))).await,
        Command::Plan(args) => exit::on_signal(beside(move || plan::plan(&args))).await,
        Command::Compare(args) => exit::on_signal(compare::compare(args)).await,
        Command::Runs(args) => exit::on_signal(runs::list(args)).await,
        Command::Show(args) => exit::on_signal(runs::show(args)).await,
        Command::Gc(args) => exit::on_signal(gc::gc(args)).await,
        Command::Compact(args) => exit::on_signal(compact::compact(args)).await,
        Command::Openlineage(args) => exit::on_signal(openlineage::openlineage(args)).await,
        Command::Rerun(args) => exit::on_signal(rerun::rerun(args)).await,
        Command::Lineage(args) => exit::on_signal(lineage::lineage(args)).await,
        // `main` has gone there before the command line was parsed.
        Command::Partition(_)
        | Command::Train(_)
        | Command::Synthesize(_)
        | Command::Embed(_)
        | Command::Vote(_)
        | Command::Query(_)
        | Command::Audit(_) => Err(Failure::Usage("a stage comes first: doppel STAGE …".to_owned())),
    }
}

/// Computes on a thread of its own, so that signals are heard meanwhile.
async fn beside<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Failure::Bug(error.to_string())),
    }
}
