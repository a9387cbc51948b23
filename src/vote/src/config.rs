//! What was typed, and what it means. All of it is public.

use clap::Parser;
use lake::layout;
use privacy::accounting::DELTAS;
use serde::Serialize;

use crate::error::VoteError;
use crate::kmeans::Plan;

/// Lets private records vote in a noisy histogram over clusters of synthetic ones, and resamples to match.
///
/// Clusters are built from the synthetic embeddings alone. Each privacy unit of the train split gives one vote; the
/// counts get discrete Gaussian noise, and the budget for it is reserved before a vote is formed.
#[derive(Parser, Clone, Debug)]
#[command(
    name = "doppel-vote",
    version,
    after_help = "\
EXAMPLES
  doppel-vote --run demo --private s3://bucket/private --release s3://bucket/release \\
      --corpus chats --clusters 100 --target 500

EXIT CODES
  0 done or already done; 2 wrong usage; 3 an input is missing or malformed; 4 refused by the privacy budget; \
  5 storage failed, safe to retry"
)]
pub struct Args {
    /// Flags that every stage shares.
    #[command(flatten)]
    pub common: stage::Common,
    /// Corpus whose units vote.
    #[arg(long)]
    pub corpus: String,
    /// Number of clusters, K; at most the number of synthetic rows.
    ///
    /// Each bin gets noise of standard deviation --sigma, so that many small bins cost accuracy: the paper has 1,000 for
    /// 180,000 units.
    #[arg(long, default_value_t = 1000, value_name = "K")]
    pub clusters: usize,
    /// k-means iterations at most.
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub iterations: usize,
    /// How often k-means starts anew; the best is kept.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub restarts: usize,
    /// Cluster a sample of so many synthetic rows; all take part in everything else.
    #[arg(long, value_name = "ROWS")]
    pub subsample: Option<usize>,
    /// Share of the variance that principal components must carry, above 0 and at most 1.
    #[arg(long, default_value_t = 0.9)]
    pub variance: f64,
    /// Standard deviation of the discrete Gaussian noise on each bin; a unit moves one bin by at most 1.
    #[arg(long, default_value_t = 10.0)]
    pub sigma: f64,
    /// Rows to select; at most the number of synthetic rows.
    #[arg(long, value_name = "ROWS")]
    pub target: u64,
    /// Tell what ε this stage alone spends at this δ. Without it, the manifest tells it at the δ of the corpus's budget.
    #[arg(long)]
    pub delta: Option<f64>,
    /// Run whose synthetic embeddings come from the untuned model, for the private comparison.
    #[arg(long, value_name = "RUN", value_parser = stage::common::run_id)]
    pub baseline_run: Option<String>,
    /// Table of public texts to vote on, below the release root; `runs/RUN/synthetic` unless given.
    ///
    /// It needs the columns `id` and `text`, and this run must have embedded it.
    #[arg(long, value_name = "PATH")]
    pub candidates: Option<String>,
    /// Seed of public randomness: clustering and the choice within bins. Noise has its own secret key.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Checked settings.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Config {
    /// Corpus.
    pub corpus: String,
    /// K.
    pub clusters: usize,
    /// Iterations at most.
    pub iterations: usize,
    /// Restarts.
    pub restarts: usize,
    /// Rows to cluster.
    pub subsample: Option<usize>,
    /// Share of variance.
    pub variance: f64,
    /// Noise parameter.
    pub sigma: f64,
    /// Rows to select.
    pub target: u64,
    /// Baseline run.
    pub baseline_run: Option<String>,
    /// Path of the candidates table.
    pub candidates: String,
    /// Public seed.
    pub seed: u64,
}

impl Config {
    /// Checks what was typed; all findings come at once.
    pub fn new(args: &Args) -> Result<Self, VoteError> {
        let mut findings = Vec::new();
        let mut check = |holds: bool, finding: &str| {
            if !holds {
                findings.push(finding.to_owned());
            }
        };
        check(args.clusters > 0, "--clusters: expected at least 1");
        check(i32::try_from(args.clusters).is_ok(), "--clusters: expected a number that fits 32 bits");
        check(args.iterations > 0, "--iterations: expected at least 1");
        check(args.restarts > 0, "--restarts: expected at least 1");
        check(args.target > 0, "--target: expected at least 1");
        check(args.variance > 0.0 && args.variance <= 1.0, "--variance: expected a share above 0 and at most 1");
        check(args.sigma.is_finite() && args.sigma > 0.0, "--sigma: expected a positive number");
        let delta = args.delta.is_none_or(|delta| DELTAS.contains(&delta));
        check(delta, "--delta: expected a number between 0 and 1, such as 1e-6");
        let enough = args.subsample.is_none_or(|rows| rows >= args.clusters);
        check(enough, "--subsample: expected at least --clusters rows");
        if !findings.is_empty() {
            return Err(VoteError::Usage(findings.join("\n")));
        }
        let run = &args.common.run;
        Ok(Self {
            corpus: args.corpus.clone(),
            clusters: args.clusters,
            iterations: args.iterations,
            restarts: args.restarts,
            subsample: args.subsample,
            variance: args.variance,
            sigma: args.sigma,
            target: args.target,
            baseline_run: args.baseline_run.clone(),
            candidates: args.candidates.clone().unwrap_or_else(|| layout::synthetic(run)),
            seed: args.seed,
        })
    }

    /// How to cluster.
    pub fn plan(&self) -> Plan {
        Plan {
            clusters: self.clusters,
            iterations: self.iterations,
            restarts: self.restarts,
            subsample: self.subsample,
            seed: self.seed,
        }
    }
}
