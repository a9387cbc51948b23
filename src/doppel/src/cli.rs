//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::TypedValueParser;
use clap::{Args, Parser, Subcommand};
use lake::{PrivateRoot, StorageOptions};
use stage::common::Verbosity;
use stage::{Failure, Format};

use crate::roots::RootsArgs;

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
    Gc(crate::gc::GcArgs),
    Compact(crate::compact::CompactArgs),
    Openlineage(crate::openlineage::OpenlineageArgs),
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

/// Run a workflow file on this machine.
///
/// The file is an Argo Workflow (argoproj.io/v1alpha1), which Kubernetes runs as it is. Here its containers' commands
/// run as processes: as many at a time as the dependencies and the declared CPUs, GPUs and memory allow, with retries
/// as declared. Exit codes 2, 3 and 4 are final unless a retry expression says otherwise. Before the first task starts,
/// a preflight checks what can be checked and reports all findings at once.
///
/// Ctrl-C ends all tasks in order (a second one at once). Running again continues: stages that are done do nothing.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// Workflow file.
    pub file: PathBuf,
    /// A parameter of the workflow; repeatable.
    #[arg(short, long = "parameter", value_name = "NAME=VALUE", value_parser = name_value)]
    pub parameters: Vec<(String, String)>,
    /// Check the file and the parameters and print the tasks, without running anything.
    #[arg(long)]
    pub dry_run: bool,
    /// Skip the preflight, file and parameters excepted.
    #[arg(long)]
    pub no_preflight: bool,
    /// CPU slots; by default what this process may use.
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u64).range(1..=4096))]
    pub cpus: Option<u64>,
    /// GPU slots; by default those of this machine, or of CUDA_VISIBLE_DEVICES. A task without a GPU limit sees none.
    #[arg(long, value_name = "N", allow_negative_numbers = true,
          value_parser = clap::value_parser!(u64).range(0..=4096).map(|count| count as usize))]
    pub gpus: Option<usize>,
    /// Seconds between SIGTERM and SIGKILL when the run is stopped.
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, default_value_t = 20,
          value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub grace: u64,
    /// Folder for the tasks' logs; by default a temporary one, kept only when a task fails.
    #[arg(long, value_name = "DIR")]
    pub logs: Option<PathBuf>,
    /// What standard output carries at the end.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// Splits `name=value`.
fn name_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write it as name=value".to_owned()),
    }
}

/// An ε, which bounds something, or another number that 0 would make meaningless.
fn positive(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value: &f64| value.is_finite() && *value > 0.0);
    value.ok_or_else(|| "expected a number above 0, such as 8".to_owned())
}

/// A number of things that are there.
fn count(text: &str) -> Result<u64, String> {
    let value = text.parse().ok().filter(|value| *value > 0);
    value.ok_or_else(|| "expected a whole number above 0".to_owned())
}

/// A δ: a probability.
fn delta(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|value| privacy::accounting::DELTAS.contains(value));
    value.ok_or_else(|| "expected a number between 0 and 1, such as 1e-6".to_owned())
}

/// Where the private zone is.
#[derive(Args, Clone, Debug)]
pub struct PrivateArgs {
    /// Private root: a path, file://, s3://, gs:// or az:// URL.
    #[arg(long, env = "DOPPEL_PRIVATE", value_name = "URL", hide_env_values = true, global = true)]
    pub private: Option<String>,
    /// Deadline of one storage operation with its retries, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 180, global = true,
          value_parser = stage::common::storage_timeout())]
    pub storage_timeout: u64,
}

impl PrivateArgs {
    /// Opens the private root.
    pub async fn open(&self) -> Result<PrivateRoot, Failure> {
        let url = self.private.as_deref().filter(|url| !url.is_empty());
        let url = url.ok_or_else(|| {
            Failure::Usage("no private root is given\nhelp: pass --private URL, or set DOPPEL_PRIVATE".to_owned())
        })?;
        let options = StorageOptions { timeout: Duration::from_secs(self.storage_timeout) };
        Ok(PrivateRoot::open(url, &options).await?)
    }
}

/// Show what was spent on a corpus, or set its budget.
///
/// The ledger lies in the private root and is as private as the corpus: beside the parameters of mechanisms, which are
/// shown here, it holds digests that would confirm a right guess of the data.
#[derive(Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BudgetArgs {
    /// Set a corpus's budget.
    #[command(subcommand)]
    pub command: Option<BudgetCommand>,
    /// What to show.
    #[command(flatten)]
    pub show: BudgetShowArgs,
}

/// Commands about the budget.
#[derive(Subcommand, Clone, Debug)]
#[expect(missing_docs, reason = "as above")]
pub enum BudgetCommand {
    Set(BudgetSetArgs),
}

/// Show what was spent.
#[derive(Args, Clone, Debug)]
pub struct BudgetShowArgs {
    /// Corpus; all corpora of the root where none is named.
    #[arg(value_name = "CORPUS", group = "one")]
    pub name: Option<String>,
    /// The same as a flag.
    #[arg(long, value_name = "NAME", group = "one")]
    pub corpus: Option<String>,
    /// Write a plot of ε over the ledger's entries to this .svg or .png file.
    #[arg(long, value_name = "FILE", requires = "one")]
    pub plot: Option<PathBuf>,
    /// What standard output carries.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Where the private zone is.
    #[command(flatten)]
    pub root: PrivateArgs,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// Set the budget of a corpus.
///
/// The budget is one (ε, δ) for all mechanisms that ever touch the corpus, composed. A stage that would exceed it is
/// refused with exit code 4 before it reads a record. Setting the same budget again does nothing.
#[derive(Args, Clone, Debug)]
pub struct BudgetSetArgs {
    /// Corpus.
    #[arg(long, value_name = "NAME")]
    pub corpus: String,
    /// Largest ε, under adding or removing one privacy unit; at most 1e6.
    #[arg(long, allow_negative_numbers = true, value_parser = positive)]
    pub epsilon: f64,
    /// The δ at which ε is taken.
    #[arg(long, allow_negative_numbers = true, value_parser = delta)]
    pub delta: f64,
    /// What standard output carries.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Where the private zone is.
    #[command(flatten)]
    pub root: PrivateArgs,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// Compute the ε of mechanisms, or the noise multiplier for a target ε.
///
/// Adjacency is adding or removing one privacy unit. ε is by privacy loss distributions (`pld`), rounded up, and by
/// Rényi DP (`rdp`) as a second opinion.
///
/// Example: the paper's training and its vote.
///
/// doppel account --delta 5e-7 --mechanism noise_multiplier=1.122,sampling_probability=0.022756,steps=439 \
///     --mechanism noise_multiplier=10,kind=discrete_gaussian
#[derive(Args, Clone, Debug)]
#[command(verbatim_doc_comment)]
pub struct AccountArgs {
    /// The δ at which ε is taken.
    #[arg(long, allow_negative_numbers = true, value_parser = delta)]
    pub delta: f64,
    /// A mechanism: noise_multiplier=S[,sampling_probability=Q][,steps=N][,kind=gaussian|discrete_gaussian]; repeatable,
    /// all are composed. With --target-epsilon, one of them leaves noise_multiplier out.
    #[arg(long = "mechanism", value_name = "SPEC", required = true)]
    pub mechanisms: Vec<String>,
    /// Find the smallest noise multiplier for which the composition keeps to this ε.
    #[arg(long, value_name = "E", allow_negative_numbers = true, value_parser = positive)]
    pub target_epsilon: Option<f64>,
    /// Print the trade-off between ε and δ; with a .svg or .png path, write it there as a plot too.
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub curve: Option<Option<PathBuf>>,
    /// What standard output carries.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// Tell which settings fit a privacy budget and a number of records.
///
/// Nothing private is read: N is what you declare. Each row is a Poisson-sampled training followed by one vote.
#[derive(Args, Clone, Debug)]
pub struct PlanArgs {
    /// Number of privacy units in the train split, as you declare it publicly.
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(u64).range(1..=1_000_000_000_000)
    )]
    pub records: u64,
    /// ε for training and votes together.
    #[arg(long, value_name = "E", allow_negative_numbers = true, value_parser = positive)]
    pub target_epsilon: f64,
    /// The δ at which ε is taken.
    #[arg(long, allow_negative_numbers = true, value_parser = delta)]
    pub delta: f64,
    /// σ of the votes' noise; 0 for no votes.
    #[arg(long, value_name = "S", allow_negative_numbers = true, default_value_t = 10.0)]
    pub vote_sigma: f64,
    /// Expected batch sizes to consider; by default a range that suits N.
    #[arg(long, value_delimiter = ',', value_name = "B,…", allow_negative_numbers = true, value_parser = count)]
    pub expected_batch_size: Vec<u64>,
    /// Numbers of steps to consider; by default a range.
    #[arg(long, value_delimiter = ',', value_name = "N,…", allow_negative_numbers = true, value_parser = count)]
    pub steps: Vec<u64>,
    /// Number of trained parameters, for the noise against the signal (rank 8 on q, k, v, o of a 7B model: 8.4 million).
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = count, default_value_t = 8_388_608)]
    pub parameters: u64,
    /// Examples per second of training, for the wall time: 8.5 is what SmolLM2-135M reaches to 128 tokens on two CPU cores
    /// (`make bench`).
    #[arg(long, value_name = "R", allow_negative_numbers = true, value_parser = positive, default_value_t = 8.5)]
    pub examples_per_second: f64,
    /// GPU hours at most, at the GPU's --examples-per-second; settings that need more are marked.
    #[arg(long, value_name = "H", allow_negative_numbers = true, value_parser = positive)]
    pub gpu_hours: Option<f64>,
    /// What standard output carries.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// Compare a run's sets and losses with held-out real records.
///
/// What the training and the resampling bought: the distance of each set of texts to the test records over the bins of
/// the vote, and the validation loss before and after training, that of a baseline (`train --no-dp`) too. These figures
/// come from private records without a mechanism, from the private root; they are for whoever may read that root, and
/// no ε covers them.
#[derive(Args, Clone, Debug)]
pub struct CompareArgs {
    /// Run id.
    #[arg(value_name = "RUN", value_parser = stage::common::run_id)]
    pub id: String,
    /// What standard output carries.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Where the private zone is.
    #[command(flatten)]
    pub root: PrivateArgs,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

/// List the runs of both roots.
#[derive(Args, Clone, Debug)]
pub struct RunsArgs {
    /// Where the roots are.
    #[command(flatten)]
    pub roots: RootsArgs,
}

/// Show the stages of one run, with inputs, outputs and configuration.
#[derive(Args, Clone, Debug)]
pub struct ShowArgs {
    /// Run id.
    #[arg(value_parser = stage::common::run_id)]
    pub id: String,
    /// Where the roots are.
    #[command(flatten)]
    pub roots: RootsArgs,
}

/// Repeat a run from its pinned inputs and compare, or make a new release from them.
///
/// Without --as, each finished stage runs again as it was started, on the versions that it read, under the same noise,
/// and every output is compared: tables row for row, adapters tensor for tensor. Nothing is published and nothing is
/// spent. What the stages write lies below reruns/RUN in the private root, and stays there only where something
/// differs, or the rerun did not end: two results under equal noise that differ tell something private, so the second
/// must not be released.
///
/// With --as, the stages but partition run once more under a new run id, on the same corpus version and with the same
/// settings: a new release with fresh noise, which the budget must pay. The same command continues it when interrupted.
///
/// Exit codes: 0 everything that was repeated is equal, or the new release is there; 2 wrong usage, such as a model
/// that is not found; 3 something is not equal, or there is no such run; 4 the budget does not suffice; 5 storage or
/// network.
#[derive(Args, Clone, Debug)]
pub struct RerunArgs {
    /// Run id.
    #[arg(value_name = "RUN", value_parser = stage::common::run_id)]
    pub id: String,
    /// Make a new release under this run id.
    #[arg(long = "as", value_name = "NEW", value_parser = stage::common::run_id)]
    pub new: Option<String>,
    /// Repeat this stage alone, by its name in `doppel show`.
    #[arg(long, value_name = "NAME", conflicts_with = "new")]
    pub stage: Option<String>,
    /// Value of a flag in all stages that were given it, such as model=models/smollm2; repeatable.
    ///
    /// Runs record a model on a local disk by its name alone, so where it lies now must be said, whatever its folder is
    /// called. Without --as its digest must be the recorded one; with --as another is told at the end. Raw inputs are
    /// read where they were.
    #[arg(short, long = "parameter", value_name = "FLAG=VALUE", value_parser = name_value)]
    pub parameters: Vec<(String, String)>,
    /// Where the roots are; both are needed.
    #[command(flatten)]
    pub roots: RootsArgs,
}

/// Walk back from a table to the raw input.
///
/// By the manifests in both roots: which stage of which run wrote the table, by which binary, with which settings, and
/// from which versions; and so on for each of those. With one root, the walk ends where the other would be read.
#[derive(Args, Clone, Debug)]
pub struct LineageArgs {
    /// Table or other output, by its path below its root, such as runs/demo/selected, demo/selected or corpora/chats;
    /// TABLE@VERSION for a version other than the latest.
    pub table: String,
    /// Where the roots are.
    #[command(flatten)]
    pub roots: RootsArgs,
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
