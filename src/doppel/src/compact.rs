//! `doppel compact`: few files in place of the many that sharded appends leave.
//!
//! PRIVACY: of a private table neither files nor versions are told, nor whether there was anything to do: each counts
//! records.

use std::collections::BTreeSet;

use clap::Args;
use lake::{Writers, Zone, layout};
use serde_json::json;
use stage::{Failure, Summary};

use crate::roots::{Roots, RootsArgs};
use crate::table::table;

/// Merge the small files that sharded appends leave.
///
/// Each table gets one new version with the same rows in the same order; older versions stay readable until
/// `doppel gc` removes what nothing pins. Stages may run meanwhile. A table with few or large files is left alone.
#[derive(Args, Clone, Debug)]
pub struct CompactArgs {
    /// Tables as paths below a root, such as runs/demo/synthetic; by default all tables of all runs.
    #[arg(value_name = "TABLE", conflicts_with = "run")]
    pub tables: Vec<String>,
    /// The tables of this run alone.
    #[arg(long, value_name = "RUN", value_parser = stage::common::run_id)]
    pub run: Option<String>,
    /// Bytes of a merged file; files of half that size or more stay as they are.
    #[arg(long, value_name = "BYTES", default_value_t = 128 << 20, value_parser = clap::value_parser!(u64).range(1..))]
    pub target_size: u64,
    /// Where the roots are.
    #[command(flatten)]
    pub roots: RootsArgs,
}

/// What became of one table.
struct Compacted {
    zone: &'static str,
    table: String,
    /// Whether there is a new version, and which is the latest.
    change: (bool, Option<i64>),
}

/// Compacts tables.
pub async fn compact(args: CompactArgs) -> Result<Summary, Failure> {
    let roots = Roots::open(&args.roots).await?;
    if let Some(corpus) = args.tables.iter().find(|table| layout::is_of_corpus(table.trim_matches('/'))) {
        return Err(Failure::Usage(format!(
            "{corpus}: a corpus is one commit, and releases name its version; one more would tell its size\n\
             help: name tables of runs"
        )));
    }
    if let Some(run) = &args.run {
        roots.run(run).await?;
    }
    let mut done = Vec::new();
    if let Some(root) = &roots.release {
        compact_zone(root, &args, &mut done).await?;
    }
    if let Some(root) = &roots.private {
        compact_zone(root, &args, &mut done).await?;
    }
    let missing = args.tables.iter().find(|wanted| !done.iter().any(|one| one.table == wanted.trim_matches('/')));
    if let Some(missing) = missing {
        return Err(Failure::Input(format!(
            "{missing}: no table there in any root given\nhelp: name its path, such as runs/demo/synthetic"
        )));
    }
    Ok(summary(&done, &roots))
}

async fn compact_zone<Z: Zone>(zone: &Z, args: &CompactArgs, done: &mut Vec<Compacted>) -> Result<(), Failure> {
    let below = args.run.as_ref().map_or(layout::RUNS.to_owned(), |run| layout::run(run));
    let paths = zone.list(if args.tables.is_empty() { &below } else { "" }).await?;
    let mut tables: BTreeSet<&str> = paths.iter().filter_map(|path| Some(path.split_once("/_delta_log/")?.0)).collect();
    if !args.tables.is_empty() {
        tables.retain(|table| args.tables.iter().any(|wanted| wanted.trim_matches('/') == *table));
    }
    for path in tables {
        let table = zone.table(path);
        let compacted = table.compact(args.target_size, writers(zone, path).await?).await?;
        done.push(Compacted { zone: Z::NAME, table: path.to_owned(), change: (compacted, table.version().await?) });
    }
    Ok(())
}

/// Whether stages may still append to the table at `path`: until all that its run began have ended, in all shards.
async fn writers<Z: Zone>(zone: &Z, path: &str) -> Result<Writers, Failure> {
    let Some(run) = layout::run_of(path) else {
        return Ok(Writers::Ended);
    };
    let claims = lake::manifest::claims_of(zone, run).await?;
    let manifests = lake::manifest::manifests_of(zone, run).await?;
    let ended = |stage: &str, shard| {
        manifests.iter().any(|manifest| manifest.claim.stage == stage && manifest.claim.shard == shard)
    };
    let all_ended = claims.iter().all(|claim| match claim.shard {
        None => ended(&claim.stage, None),
        Some((_, count)) => (0..count).all(|index| ended(&claim.stage, Some((index, count)))),
    });
    Ok(if all_ended && !claims.is_empty() { Writers::Ended } else { Writers::Running })
}

fn summary(done: &[Compacted], roots: &Roots) -> Summary {
    let told = |one: &Compacted| match (one.zone, one.change) {
        ("release", (true, Some(version))) => format!("compacted as version {version}"),
        ("release", _) => "already compact".to_owned(),
        _ => "compact".to_owned(),
    };
    let rows: Vec<Vec<String>> =
        done.iter().map(|one| vec![one.zone.to_owned(), one.table.clone(), told(one)]).collect();
    let json = done.iter().map(|one| match one.zone {
        "release" => {
            json!({ "zone": one.zone, "table": one.table, "compacted": one.change.0, "version": one.change.1 })
        }
        _ => json!({ "zone": one.zone, "table": one.table }),
    });
    let text = match rows.is_empty() {
        true => format!("no tables to compact in {}", roots.names()),
        false => table(&["zone", "table", "state"], &rows, &[]),
    };
    Summary { text, json: json.collect() }
}
