//! `doppel gc`: removes what no retained run refers to.
//!
//! What to keep follows from claims, manifests and the ledger; how a table shrinks without becoming unreadable is
//! [`lake::gc`]'s part.
//!
//! PRIVACY: of the private zone neither sizes nor names of data files are told, which would count records.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::Utc;
use clap::Args;
use lake::gc::{self, Pin, Plan, Retained};
use lake::{PrivateRoot, layout};
use ledger::Body;
use serde_json::{Value, json};
use stage::{Failure, Summary};

use crate::budget;
use crate::roots::{self, Known, Roots, RootsArgs};
use crate::table::table;

/// Remove what no retained run refers to.
///
/// All runs are retained but those named by --drop. Removed are: data files that no version of their table names, as
/// killed writers leave them, and unfinished writes to a local folder; data files of versions that compaction
/// superseded and nothing pins; what dropped runs left below runs/RUN, but for what a retained run or the ledger names;
/// old scratch areas of reruns. Never: the ledger, the noise key, a corpus, and whatever a ledger entry or a retained
/// claim or manifest names.
///
/// What was spent stays spent: claims and manifests of a dropped run that the ledger names, or that made a corpus,
/// stay. The id of a dropped run is closed for good, and dropping it again does nothing; a run that never was is
/// refused with exit code 3. With one root alone only what killed writers left and scratch go, since what the other
/// zone pins is not known.
///
/// Parts of uploads that were cut short are no objects on S3: set a lifecycle rule that aborts incomplete multipart
/// uploads.
#[derive(Args, Clone, Debug)]
pub struct GcArgs {
    /// List what would go, and remove nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Remove nothing that was written within this time, such as 36h or 7d: a writer may be about to commit it.
    ///
    /// A number and s, m, h or d. It must be longer than any stage takes from writing a file to committing it.
    #[arg(long, value_name = "DURATION", default_value = "7d", value_parser = age)]
    pub min_age: Duration,
    /// A run to drop; repeatable. Needs both roots.
    #[arg(long = "drop", value_name = "RUN", value_parser = stage::common::run_id)]
    pub dropped: Vec<String>,
    /// Where the roots are.
    #[command(flatten)]
    pub roots: RootsArgs,
}

/// A century in seconds: calendars end somewhere.
const LONGEST_AGE: u64 = 36_500 * 86_400;

/// A span of time: a number and its unit.
fn age(text: &str) -> Result<Duration, String> {
    let unit = text.chars().last().and_then(|unit| match unit {
        's' => Some(1),
        'm' => Some(60),
        'h' => Some(3600),
        'd' => Some(86_400),
        _ => None,
    });
    let number = text.get(..text.len().saturating_sub(1)).and_then(|number| number.parse::<u32>().ok());
    let seconds = number.zip(unit).map(|(number, unit)| u64::from(number) * unit);
    match seconds {
        Some(seconds) if seconds <= LONGEST_AGE => Ok(Duration::from_secs(seconds)),
        Some(_) => Err("expected at most 36500d".to_owned()),
        None => Err("expected a number and s, m, h or d, such as 36h or 7d".to_owned()),
    }
}

/// Removes, or lists, what nothing needs.
pub async fn gc(args: GcArgs) -> Result<Summary, Failure> {
    let roots = Roots::open(&args.roots).await?;
    if !args.dropped.is_empty() && (roots.private.is_none() || roots.release.is_none()) {
        return Err(Failure::Usage(
            "--drop: what a run left, and who else needs it, is told by both zones\n\
             help: pass --private URL and --release URL"
                .to_owned(),
        ));
    }
    let mut report = Report { dry_run: args.dry_run, ..Report::default() };
    let retained = retained(&args, &roots, &mut report).await?;
    let private = match &roots.private {
        Some(root) => Some((root, gc::plan(root, &retained).await?)),
        None => None,
    };
    let release = match &roots.release {
        Some(root) => Some((root, gc::plan(root, &retained).await?)),
        None => None,
    };
    if !args.dry_run {
        // First of all the ids are closed, so that no stage begins anew on what is half removed, that no id ever means
        // two things, and that a run that was dropped can be told from one that never was.
        for run in retained.dropped.keys() {
            close(&roots, run).await?;
        }
        if let Some((root, plan)) = &release {
            gc::remove(*root, plan).await?;
        }
        if let Some((root, plan)) = &private {
            gc::remove(*root, plan).await?;
        }
    }
    report.release = release.map(|(_, plan)| plan).unwrap_or_default();
    report.private = private.map(|(_, plan)| plan).unwrap_or_default();
    Ok(report.summary())
}

async fn close(roots: &Roots, run: &str) -> Result<(), Failure> {
    if let Some(root) = &roots.release {
        lake::manifest::close(root, run).await?;
    }
    if let Some(root) = &roots.private {
        lake::manifest::close(root, run).await?;
    }
    Ok(())
}

/// What has to stay, by claims, manifests and the ledger.
async fn retained(args: &GcArgs, roots: &Roots, report: &mut Report) -> Result<Retained, Failure> {
    let before = Utc::now() - args.min_age;
    let mut retained =
        Retained { before, every_version: roots.private.is_none() || roots.release.is_none(), ..Retained::default() };
    let mut reserved = BTreeSet::new();
    if let Some(root) = &roots.private {
        (retained.pins, reserved) = ledger_pins(root).await?;
    }
    let mut all = Vec::new();
    if let Some(root) = &roots.release {
        all.extend(roots::all(root).await?);
    }
    if let Some(root) = &roots.private {
        all.extend(roots::all(root).await?);
    }
    for run in &args.dropped {
        match last_write(roots, run).await? {
            None if !is_dropped(roots, run).await? => return Err(roots.unknown(run)),
            None => report.notes.push(format!("run {run}: dropped before, and nothing of it is left")),
            Some(at) if at >= before => report.notes.push(format!(
                "run {run}: kept for now, since it was written to at {} UTC, within --min-age",
                at.format("%Y-%m-%d %H:%M")
            )),
            Some(_) => {
                retained.dropped.insert(run.clone(), on_record(run, &reserved, &all));
            }
        }
    }
    retained.pins.extend(all.iter().filter(|told| !retained.dropped.contains_key(&told.run)).flat_map(pins));
    Ok(retained)
}

/// Why claims and manifests of `run` stay, and its id is closed: something that is never removed came of it.
fn on_record(run: &str, reserved: &BTreeSet<String>, all: &[Known]) -> Option<&'static str> {
    if reserved.contains(run) {
        return Some("the ledger names the run");
    }
    let mut claims = all.iter().filter(|told| told.run == run).flat_map(|told| &told.claims);
    claims.any(|claim| claim.stage == "partition").then_some("the run made a corpus")
}

async fn is_dropped(roots: &Roots, run: &str) -> Result<bool, Failure> {
    let release = match &roots.release {
        Some(root) => lake::manifest::is_dropped(root, run).await?,
        None => false,
    };
    let private = match &roots.private {
        Some(root) => lake::manifest::is_dropped(root, run).await?,
        None => false,
    };
    Ok(release || private)
}

async fn last_write(roots: &Roots, run: &str) -> Result<Option<chrono::DateTime<Utc>>, Failure> {
    let release = match &roots.release {
        Some(root) => gc::last_write(root, run).await?,
        None => None,
    };
    let private = match &roots.private {
        Some(root) => gc::last_write(root, run).await?,
        None => None,
    };
    Ok(release.max(private))
}

/// Corpus versions that the ledger names, and runs that it names.
async fn ledger_pins(root: &PrivateRoot) -> Result<(Vec<Pin>, BTreeSet<String>), Failure> {
    let (mut pins, mut runs) = (Vec::new(), BTreeSet::new());
    for corpus in ledger::corpora(root).await.map_err(budget::failure)? {
        let ledger = ledger::read(root, &corpus).await.map_err(budget::failure)?;
        for entry in ledger.entries {
            if let Body::Reserve { run, version, .. } = entry.body {
                pins.push(Pin { path: layout::corpus(&corpus), version: Some(version), run: None });
                runs.insert(run);
            }
        }
    }
    Ok((pins, runs))
}

/// What a run's claims and manifests name.
fn pins(told: &Known) -> Vec<Pin> {
    let pin =
        |path: &str, version| Pin { path: path.trim_matches('/').to_owned(), version, run: Some(told.run.clone()) };
    let claims = told.claims.iter().chain(told.manifests.iter().map(|manifest| &manifest.claim));
    let inputs = claims.flat_map(|claim| &claim.inputs).map(|input| pin(&input.location, input.version));
    let outputs = told.manifests.iter().flat_map(|manifest| &manifest.outputs);
    inputs.chain(outputs.map(|output| pin(&output.path, output.version))).collect()
}

/// What was, or would be, removed and kept.
#[derive(Default)]
struct Report {
    dry_run: bool,
    private: Plan,
    release: Plan,
    notes: Vec<String>,
}

impl Report {
    fn summary(&self) -> Summary {
        Summary { text: self.text(), json: self.json() }
    }

    /// Places of the private zone with the reasons, without how much there is.
    fn private_places(&self) -> BTreeSet<(&str, &str)> {
        self.private.removals.iter().map(|removal| (removal.place.as_str(), removal.reason.text())).collect()
    }

    fn kept(&self) -> Vec<(&'static str, &gc::Kept)> {
        let private = self.private.kept.iter().map(|kept| ("private", kept));
        private.chain(self.release.kept.iter().map(|kept| ("release", kept))).collect()
    }

    fn total(&self) -> u64 {
        self.release.removals.iter().map(|removal| removal.size).sum()
    }

    fn text(&self) -> String {
        let mut rows: Vec<Vec<String>> = Vec::new();
        for removal in &self.release.removals {
            let reason = removal.reason.text().to_owned();
            rows.push(vec!["release".to_owned(), removal.path.clone(), bytes(removal.size), reason]);
        }
        for (place, reason) in self.private_places() {
            rows.push(vec!["private".to_owned(), place.to_owned(), String::new(), reason.to_owned()]);
        }
        let mut text = Vec::new();
        let done = if self.dry_run { "would be removed" } else { "removed" };
        match rows.is_empty() {
            true => text.push("gc: nothing to remove".to_owned()),
            false => {
                text.push(table(&["zone", "path", "size", "why"], &rows, &[2]));
                let private = if self.private.removals.is_empty() { "" } else { ", and the private places above" };
                text.push(format!("{done}: {} of the release zone{private}", bytes(self.total())));
            }
        }
        text.extend(self.kept().iter().map(|(zone, kept)| format!("kept: {zone} {}: {}", kept.path, kept.reason)));
        text.extend(self.notes.iter().cloned());
        text.join("\n")
    }

    fn json(&self) -> Value {
        let release = self
            .release
            .removals
            .iter()
            .map(|removal| json!({ "path": removal.path, "bytes": removal.size, "reason": removal.reason.text() }));
        let private =
            self.private_places().into_iter().map(|(place, reason)| json!({ "place": place, "reason": reason }));
        let kept = self
            .kept()
            .into_iter()
            .map(|(zone, kept)| json!({ "zone": zone, "path": kept.path, "reason": kept.reason }));
        json!({
            "dry_run": self.dry_run,
            "release": release.collect::<Value>(),
            "release_bytes": self.total(),
            "private": private.collect::<Value>(),
            "kept": kept.collect::<Value>(),
            "notes": self.notes,
        })
    }
}

/// Bytes for people: `17 B`, `1.5 MB`.
fn bytes(count: u64) -> String {
    let units = ["kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = "B";
    for larger in units {
        if value < 1000.0 {
            break;
        }
        value /= 1000.0;
        unit = larger;
    }
    if unit == "B" { format!("{count} B") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_has_a_unit() {
        let hours = |hours: u64| Ok(Duration::from_secs(hours * 3600));
        assert_eq!((age("36h"), age("7d"), age("60m"), age("3600s")), (hours(36), hours(168), hours(1), hours(1)));
        for text in ["", "7", "d", "-1d", "1.5h", "7 d", "7ü", "9999999999d", "36501d", "4294967295d"] {
            assert!(age(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!([999, 1000, 1_540_000, 2_000_000_000_000].map(bytes), ["999 B", "1.0 kB", "1.5 MB", "2.0 TB"]);
    }
}
