//! Lakes side by side: copies to begin from, what came of them, and whether it is the same.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use arrow::array::{Array, ArrayRef};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use lake::{PrivateRoot, ReleaseRoot, StorageOptions, Zone};
use serde_json::Value;

use crate::binaries;

/// A noise key for tests: with the same one, lakes draw the same noise.
pub const NOISE_KEY: &str = "4444444444444444444444444444444444444444444444444444444444444444\n";

/// The command of a line without blanks within its words, such as [`crate::tiny::Workplace`] makes.
pub fn command(line: &str) -> Command {
    let mut words = line.split_whitespace();
    let mut command = binaries::command(words.next().expect("a line begins with a program"));
    for (variable, _) in std::env::vars().filter(|(variable, _)| variable.starts_with("AWS_")) {
        command.env_remove(variable);
    }
    command.args(words);
    command
}

/// Gives the private root at `folder` the key of all tests.
pub fn write_noise_key(folder: &Path) {
    std::fs::create_dir_all(folder.join("keys")).expect("a folder");
    std::fs::write(folder.join("keys/noise.key"), NOISE_KEY).expect("a key");
}

/// Every file below `folder`, none where there is no folder. Files may come and go meanwhile.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(files(&entry.path())),
            _ => found.push(entry.path()),
        }
    }
    found.sort();
    found
}

/// Every file below `folder` with its content, by path.
pub fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    files(folder).into_iter().map(|path| (path.clone(), std::fs::read(path).expect("a file is readable"))).collect()
}

/// Copies the folder `from` to `to`, which it replaces.
pub fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    for file in files(from) {
        let target = to.join(file.strip_prefix(from).expect("it lies in the folder"));
        std::fs::create_dir_all(target.parent().expect("a file lies in a folder")).expect("a folder");
        std::fs::copy(&file, &target).expect("a file is copied");
    }
}

/// Copies everything between a root at a URL and a folder on this machine; one of the two is a folder.
///
/// Credentials come from the environment, so this belongs in a process of its own.
pub async fn transfer(from: &str, to: &str) {
    let options = StorageOptions::default();
    let remote = if from.contains("://") { from } else { to };
    match ReleaseRoot::open(remote, &options).await {
        Ok(root) => between(&root, from, to).await,
        // It is marked as the other zone.
        Err(_) => between(&PrivateRoot::open(remote, &options).await.expect("a root"), from, to).await,
    }
}

async fn between<Z: Zone>(root: &Z, from: &str, to: &str) {
    if from.contains("://") {
        if !root.list("").await.expect("a listing").is_empty() {
            root.download("", Path::new(to)).await.expect("a download");
        }
        return;
    }
    for file in files(Path::new(from)) {
        let path = file.strip_prefix(from).expect("it lies in the folder").to_str().expect("a plain name");
        root.put(path, std::fs::read(&file).expect("a file").into()).await.expect("an upload");
    }
}

/// What the lake at `folder` holds that a run decides: the rows of every table in their order, and the bytes of adapters
/// and centroids.
///
/// When and how often something was attempted is no part of it, nor is the ledger, whose entries carry times.
pub fn results(folder: &Path) -> BTreeMap<String, Vec<String>> {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let mut found = BTreeMap::new();
    runtime.block_on(async {
        let options = StorageOptions::default();
        let url = |zone: &str| folder.join(zone).display().to_string();
        let private = PrivateRoot::open(&url("private"), &options).await.expect("a private root");
        tables(&private, &folder.join("private"), &mut found).await;
        let release = ReleaseRoot::open(&url("release"), &options).await.expect("a release root");
        tables(&release, &folder.join("release"), &mut found).await;
    });
    for file in files(&folder.join("release")) {
        let path = relative(folder, &file);
        // What a write that was killed left under the name of its attempt is no object.
        if path.contains('#') {
            continue;
        }
        if path.contains("/adapter/") || path.ends_with("centroids.safetensors") {
            let bytes = std::fs::read(&file).expect("a file is readable");
            found.insert(path, vec![bytes.iter().map(|byte| format!("{byte:02x}")).collect()]);
        }
    }
    found
}

async fn tables<Z: Zone>(zone: &Z, folder: &Path, found: &mut BTreeMap<String, Vec<String>>) {
    let files = files(folder);
    let logs = files.iter().filter_map(|file| file.parent().filter(|parent| parent.ends_with("_delta_log")));
    let mut paths: Vec<String> = logs.filter_map(Path::parent).map(|table| relative(folder, table)).collect();
    paths.dedup();
    for path in paths {
        found.insert(format!("{}/{path}", Z::NAME), rows(zone, &path).await);
    }
}

/// All rows of the latest version, in their order.
async fn rows<Z: Zone>(zone: &Z, path: &str) -> Vec<String> {
    let table = zone.table(path);
    let version = table.pin().await.expect("a version");
    let schema = table.schema(version).await.expect("columns");
    let columns: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    let batches = table.read(version, &columns).await.expect("rows");
    let row = |columns: &[Vec<String>], row: usize| {
        columns.iter().map(|cells| cells[row].as_str()).collect::<Vec<_>>().join(" | ")
    };
    let rows =
        |columns: Vec<Vec<String>>, count: usize| (0..count).map(|index| row(&columns, index)).collect::<Vec<_>>();
    batches.iter().flat_map(|batch| rows(batch.columns().iter().map(cells).collect(), batch.num_rows())).collect()
}

/// The values of a column as text.
pub fn cells(array: &ArrayRef) -> Vec<String> {
    let options = FormatOptions::default();
    let formatter = ArrayFormatter::try_new(array.as_ref(), &options).expect("every type has a text form");
    (0..array.len()).map(|row| formatter.value(row).to_string()).collect()
}

fn relative(folder: &Path, file: &Path) -> String {
    file.strip_prefix(folder).expect("it lies in the folder").to_str().expect("a plain name").to_string()
}

/// Fails with the first place where `found` is not `expected`; `how` says how it came about.
#[track_caller]
pub fn assert_same(found: &BTreeMap<String, Vec<String>>, expected: &BTreeMap<String, Vec<String>>, how: &str) {
    let names = |results: &BTreeMap<String, Vec<String>>| results.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected), "{how}");
    for (name, rows) in expected {
        let other = &found[name];
        assert_eq!(other.len(), rows.len(), "{how}: rows of {name}");
        let first = rows.iter().zip(other).position(|(row, other)| row != other);
        assert!(first.is_none(), "{how}: {name} differs from row {first:?} on");
    }
}

/// Stages of the ledger of the lake at `folder`, sorted; fails unless each has one reservation, settled once.
#[track_caller]
pub fn settled(folder: &Path) -> Vec<String> {
    let entries: Vec<Value> = files(&folder.join("private/ledger"))
        .iter()
        .filter(|file| file.extension().is_some_and(|end| end == "json"))
        .map(|file| serde_json::from_slice(&std::fs::read(file).expect("an entry")).expect("JSON"))
        .collect();
    let of_kind = |kind: &str| entries.iter().filter(|entry| entry["body"]["kind"] == kind).collect::<Vec<_>>();
    let mut reserved: Vec<&Value> = of_kind("reserve").iter().map(|entry| &entry["sequence"]).collect();
    let mut settled: Vec<&Value> = of_kind("settle").iter().map(|entry| &entry["body"]["reservation"]).collect();
    reserved.sort_by_key(|number| number.as_u64());
    settled.sort_by_key(|number| number.as_u64());
    assert_eq!(settled, reserved, "reservations that are not settled once");
    let mut stages: Vec<String> = of_kind("reserve")
        .iter()
        .map(|entry| entry["body"]["stage"].as_str().unwrap_or_default().to_string())
        .collect();
    stages.sort();
    let count = stages.len();
    stages.dedup();
    assert_eq!(stages.len(), count, "a stage reserved twice");
    stages
}
