//! Where things lie in a root: the paths that stages agree on.
//!
//! ```text
//! corpora/CORPUS               table of a corpus, and beside it
//!         CORPUS.terms.json    what it promises, and
//!         CORPUS.owner.json    the run that wrote it                          private
//! keys/, ledger/CORPUS/        the noise key, and what was spent              private
//! runs/RUN/stages/             claims and manifests, in the zone of the stage
//!          dropped.json        mark of a run that was let go of
//!          adapter, synthetic, selected, …                                    release
//!          embeddings          of synthetic text, or of a corpus              release, or private
//!          comparison, comparison_bins, partition-counts.json                 private
//!          STAGE/              what a stage keeps for itself                  private
//! reruns/RUN/                  what reruns of a run write                     private
//! ```

/// Folder of all corpora.
pub const CORPORA: &str = "corpora";
/// Folder of all runs.
pub const RUNS: &str = "runs";
/// Folder of what reruns write, by run, private.
pub const RERUNS: &str = "reruns";
/// Folder of a run's claims and manifests.
pub(crate) const STAGES: &str = "stages";
/// Marks a run whose results were removed while its claims stay on record; in the run's folder.
pub(crate) const DROPPED: &str = "dropped.json";

/// Table of a corpus.
pub fn corpus(corpus: &str) -> String {
    format!("{CORPORA}/{corpus}")
}

/// What a corpus promises: [`crate::CorpusTerms`].
pub fn terms(corpus: &str) -> String {
    format!("{CORPORA}/{corpus}.terms.json")
}

/// The run that wrote a corpus.
pub fn owner(corpus: &str) -> String {
    format!("{CORPORA}/{corpus}.owner.json")
}

/// Whether `path` is a corpus, or of one.
pub fn is_of_corpus(path: &str) -> bool {
    path.strip_prefix(CORPORA).is_some_and(|rest| rest.starts_with('/'))
}

/// Folder of a run.
pub fn run(run: &str) -> String {
    format!("{RUNS}/{run}")
}

/// What a run has under `name`.
pub fn of_run(run: &str, name: &str) -> String {
    format!("{RUNS}/{run}/{name}")
}

/// The run that `path` belongs to.
pub fn run_of(path: &str) -> Option<&str> {
    path.strip_prefix(RUNS)?.strip_prefix('/')?.split('/').next()
}

/// Folder of a run's claims and manifests.
pub fn stages(run: &str) -> String {
    of_run(run, STAGES)
}

/// The mark of a run that was dropped.
pub(crate) fn dropped(run: &str) -> String {
    of_run(run, DROPPED)
}

/// Folder of a run's adapter.
pub fn adapter(run: &str) -> String {
    of_run(run, "adapter")
}

/// Table of a run's synthetic instructions.
pub fn synthetic(run: &str) -> String {
    of_run(run, "synthetic")
}

/// Table of vectors: of synthetic text in the release zone, of a corpus in the private one.
pub fn embeddings(run: &str) -> String {
    of_run(run, "embeddings")
}

/// Name in a run of the table of its distances from real records, private.
pub const COMPARISON: &str = "comparison";
/// Name in a run of the table of counts that these were taken from, private.
pub const COMPARISON_BINS: &str = "comparison_bins";

/// How many records partition kept and dropped, private.
pub fn partition_counts(run: &str) -> String {
    of_run(run, "partition-counts.json")
}

/// What `stage` keeps for itself in the private root, such as checkpoints.
pub fn working(run: &str, stage: &str) -> String {
    of_run(run, stage)
}

/// Table of the losses of `stage`, private.
pub fn loss(run: &str, stage: &str) -> String {
    format!("{}/loss", working(run, stage))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_tells_its_run() {
        assert_eq!(run_of(&loss("demo", "train")), Some("demo"));
        assert_eq!(run_of(&run("demo")), Some("demo"));
        assert_eq!(run_of(&corpus("runs")), None);
        assert_eq!(run_of("runs-of-others/demo"), None);
    }
}
