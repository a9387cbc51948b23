//! `doppel compare`: what training and resampling bought, by the private comparison.
//!
//! PRIVACY: the one command that prints figures of private records. They come from the private root, go to standard
//! output alone, and say first what they are.

use arrow::array::AsArray;
use arrow::datatypes::{Float64Type, Int64Type};
use clap::Args;
use lake::{LakeError, Private, PrivateRoot, Table, Zone, layout};
use serde_json::{Value, json};
use stage::{Failure, Format, Summary, Verbosity};

use crate::roots::PrivateArgs;
use crate::table::table;

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

const NOTICE: &str =
    "PRIVATE figures, computed from real records without a mechanism: no ε covers them, do not publish";

/// The comparison of one run.
struct Comparison {
    run: String,
    /// Whether there was a vote.
    voted: bool,
    /// Sets of texts with their total variation to the test records; without those that there was nothing to compare
    /// for.
    sets: Vec<(String, f64)>,
    /// Validation loss by step, nats per token.
    losses: Vec<(i64, f64)>,
    /// The same of a baseline, which was trained without privacy.
    baseline: Vec<(i64, f64)>,
}

/// Reads the comparison of the run that `args` name.
pub async fn compare(args: CompareArgs) -> Result<Summary, Failure> {
    let root = args.root.open().await?;
    let comparison = read(&root, &args.id).await?;
    let comparison = comparison.expose();
    if !comparison.voted && comparison.losses.is_empty() && comparison.baseline.is_empty() {
        return Err(Failure::Input(unknown(&root, &args.id).await?));
    }
    Ok(Summary { text: comparison.text(), json: comparison.json() })
}

async fn read(root: &PrivateRoot, run: &str) -> Result<Private<Comparison>, Failure> {
    let table = root.table(&layout::of_run(run, layout::COMPARISON));
    let voted = table.version().await?.is_some();
    let loss = |stage: &str| root.table(&layout::loss(run, stage));
    let (losses, baseline) = (losses(&loss("train")).await?, losses(&loss("train-baseline")).await?);
    let mut comparison = Comparison { run: run.to_owned(), voted, sets: Vec::new(), losses, baseline };
    for batch in rows(&table, &["set", "total_variation"]).await? {
        let (sets, distances) = (batch.column(0).as_string::<i32>(), batch.column(1).as_primitive::<Float64Type>());
        let rows = sets.iter().flatten().map(str::to_owned).zip(distances.values().iter().copied());
        comparison.sets.extend(rows);
    }
    Ok(Private::new(comparison))
}

/// Validation losses in `table` by step.
async fn losses(table: &Table) -> Result<Vec<(i64, f64)>, LakeError> {
    let mut found = Vec::new();
    for batch in rows(table, &["step", "split", "loss"]).await? {
        let (steps, losses) =
            (batch.column(0).as_primitive::<Int64Type>(), batch.column(2).as_primitive::<Float64Type>());
        let rows = steps.values().iter().zip(batch.column(1).as_string::<i32>()).zip(losses.values());
        let validation = rows.filter(|((_, split), _)| *split == Some("validation"));
        found.extend(validation.map(|((step, _), loss)| (*step, *loss)));
    }
    found.sort_by_key(|(step, _)| *step);
    Ok(found)
}

/// All rows of the latest version of `table`; none where there is no table.
async fn rows(table: &Table, columns: &[&str]) -> Result<Vec<arrow::array::RecordBatch>, LakeError> {
    match table.version().await? {
        Some(version) => table.read(version, columns).await,
        None => Ok(Vec::new()),
    }
}

async fn unknown(root: &PrivateRoot, run: &str) -> Result<String, Failure> {
    let known = lake::manifest::list_runs(root).await?;
    let hint = match workflow::finding::nearest(run, known.iter().map(String::as_str)) {
        Some(near) if near != run => format!("did you mean `{near}`? "),
        _ => String::new(),
    };
    Ok(format!(
        "{}: the run `{run}` has no comparison here\n\
         help: {hint}train records losses and vote the comparison; `doppel runs` lists runs",
        root.url()
    ))
}

impl Comparison {
    fn text(&self) -> String {
        let mut text = format!("{NOTICE}\nrun {}, against held-out real records", self.run);
        if !self.sets.is_empty() {
            let rows = self.sets.iter().map(|(set, distance)| vec![set.clone(), format!("{distance:.3}")]);
            text += &format!("\n\n{}", table(&["set", "total variation"], &rows.collect::<Vec<_>>(), &[1]));
        }
        if let Some(missing) = self.missing() {
            text += &format!("\n\n{missing}");
        }
        for (losses, heading) in [
            (&self.losses, "validation loss (nats per token)"),
            (&self.baseline, "validation loss of the baseline without privacy (nats per token)"),
        ] {
            if !losses.is_empty() {
                let rows = losses.iter().map(|(step, loss)| vec![when(*step), format!("{loss:.3}")]);
                text += &format!("\n\n{}", table(&["", heading], &rows.collect::<Vec<_>>(), &[1]));
            }
        }
        text
    }

    /// What there was none of, so that the vote wrote no distance to it.
    fn missing(&self) -> Option<&'static str> {
        let has = |name: &str| self.sets.iter().any(|(set, _)| set == name);
        match (self.voted, self.sets.is_empty()) {
            (false, _) => None,
            (true, true) => Some("no held-out real records: there is nothing to compare the sets with"),
            (true, false) => (!has("selected")).then_some("no selected rows"),
        }
    }

    fn json(&self) -> Value {
        let sets = self.sets.iter().map(|(set, distance)| json!({ "set": set, "total_variation": distance }));
        let by_step = |losses: &[(i64, f64)]| -> Vec<Value> {
            losses.iter().map(|(step, loss)| json!({ "steps": step, "nats_per_token": loss })).collect()
        };
        json!({
            "private": NOTICE,
            "run": self.run,
            "sets": sets.collect::<Vec<_>>(),
            "missing": self.missing(),
            "validation_loss": by_step(&self.losses),
            "baseline_validation_loss": by_step(&self.baseline),
        })
    }
}

fn when(step: i64) -> String {
    if step == 0 { "before training".to_owned() } else { format!("after {step} steps") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_side_is_told_in_words() {
        let told = |voted: bool, sets: &[&str]| {
            let sets = sets.iter().map(|set| ((*set).to_owned(), 0.25)).collect();
            Comparison { run: "demo".into(), voted, sets, losses: vec![(0, 3.5)], baseline: Vec::new() }.text()
        };
        assert!(told(true, &[]).contains("no held-out real records"));
        let some = told(true, &["base", "synthetic"]);
        assert!(
            some.contains("no selected rows") && some.contains(&format!("synthetic{}0.250", " ".repeat(12))),
            "{some}"
        );
        for whole in [told(true, &["synthetic", "selected"]), told(false, &[])] {
            assert!(!whole.contains("no held-out") && !whole.contains("no selected"), "{whole}");
        }
    }
}
