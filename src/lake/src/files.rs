//! Data files of a table: their names, and their order, which is the order of rows.

use std::collections::HashMap;

use arrow::array::AsArray;
use arrow::compute::cast;
use arrow::datatypes::DataType;
use deltalake::DeltaTable;
use object_store::path::Path;

use crate::delta;
use crate::error::LakeError;

/// Bytes that a transaction id may take of a file's name: most file systems take 255 in all, of which chunk, ending, two
/// random parts and the number of an unfinished write need some.
const LONGEST: usize = 200;

/// `<transaction id>-<chunk>-<random>.parquet`: sorts by shard and chunk; the random part keeps a second writer of the
/// same chunk from replacing a file that is committed already.
pub(crate) fn file_name(transaction: &str, chunk: i64) -> String {
    let mut id = padded(transaction);
    if id.len() > LONGEST {
        // All files of a table have the run in common, so that its numbers order nothing.
        let (run, rest) = transaction.split_at(transaction.find('/').unwrap_or(0));
        id = format!("{run}{}", padded(rest));
    }
    format!("{}-{:08}-{}.parquet", id.trim_start_matches(['.', '_']), chunk, random_part())
}

/// `text` in plain characters, its numbers padded, so that shard 10 follows shard 9.
fn padded(text: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '.' };
    let mut id = String::new();
    let mut digits = String::new();
    for c in text.chars().map(plain).chain(['\0']) {
        if c.is_ascii_digit() {
            digits.push(c);
            continue;
        }
        if !digits.is_empty() {
            id.push_str(&format!("{digits:0>6}"));
            digits.clear();
        }
        if c != '\0' {
            id.push(c);
        }
    }
    id
}

/// What the files of one writer, the shard of a stage, have in common: their names without chunk and random part.
pub(crate) fn writer(name: &str) -> &str {
    name.rsplitn(3, '-').nth(2).unwrap_or_default()
}

/// The name of a file that takes the place of `first` and of files behind it: it sorts as `first` does among all others.
pub(crate) fn merged_name(first: &str) -> String {
    let stem = first.strip_suffix(".parquet").unwrap_or(first);
    // A file that was merged before has a random part more, which is replaced.
    let random = |part: &str| part.len() == 12 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    let stem = stem.rsplit_once('.').filter(|(_, part)| random(part)).map_or(stem, |(stem, _)| stem);
    format!("{stem}.{}.parquet", random_part())
}

/// What follows the chunk's number in a name of ours.
pub(crate) fn random_part_of(name: &str) -> Option<&str> {
    let (rest, random) = name.rsplit_once('-')?;
    let (_, chunk) = rest.rsplit_once('-')?;
    let is_ours = chunk.len() >= 8 && chunk.bytes().all(|byte| byte.is_ascii_digit()) && random.ends_with(".parquet");
    is_ours.then_some(random)
}

fn random_part() -> String {
    uuid::Uuid::new_v4().simple().to_string()[..12].to_string()
}

/// A data file of a version.
pub(crate) struct DataFile {
    pub path: String,
    pub size: u64,
    pub rows: Option<u64>,
    pub deletions: Option<String>,
    pub partition: String,
}

/// The data files of a version, in the order of their names: the log may list them in any order.
pub(crate) fn files(table: &DeltaTable) -> Result<Vec<DataFile>, LakeError> {
    let state = table.snapshot().map_err(|error| delta::explain(table.table_url().as_str(), &error))?;
    let mut files: Vec<DataFile> = state
        .log_data()
        .iter()
        .map(|file| DataFile {
            path: file.object_store_path().to_string(),
            size: u64::try_from(file.size()).unwrap_or(0),
            rows: file.num_records().map(|rows| rows as u64),
            deletions: file
                .deletion_vector_descriptor()
                .map(|deletions| format!("{}@{:?}", deletions.path_or_inline_dv, deletions.offset)),
            partition: partition(file.partition_values_map()),
        })
        .collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// The data files of a version in the order of [`files`], as `(path, path as the log writes it)`: programs differ in what they
/// encode, and the engine compares letters.
pub(crate) fn logged_paths(table: &DeltaTable) -> Result<Vec<(String, String)>, LakeError> {
    let failed = |error| delta::explain(table.table_url().as_str(), &error);
    let batches = table.snapshot().and_then(|state| state.add_actions_batches(false)).map_err(failed)?;
    let mut paths = Vec::new();
    for batch in &batches {
        let column = batch.column_by_name("path").map(|column| cast(column, &DataType::Utf8));
        let Some(Ok(column)) = column else {
            return Err(LakeError::Malformed(format!("{}: the log's file names are no texts", table.table_url())));
        };
        paths.extend(column.as_string::<i32>().iter().flatten().map(|raw| (decoded(raw), raw.to_owned())));
    }
    paths.sort();
    Ok(paths)
}

/// Logs hold paths as parts of URLs.
pub(crate) fn decoded(path: &str) -> String {
    Path::from_url_path(path).map_or(path.to_owned(), |path| path.to_string())
}

fn partition(values: HashMap<String, Option<String>>) -> String {
    let mut values: Vec<String> = values.into_iter().map(|(name, value)| format!("{name}={value:?}")).collect();
    values.sort();
    values.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_sort_by_shard_and_chunk() {
        let name = |id: &str, version| file_name(id, version);
        assert!(name("demo/synthesize/9-of-16", 3) < name("demo/synthesize/10-of-16", 0));
        assert!(name("demo/synthesize/9-of-16", 9) < name("demo/synthesize/9-of-16", 10));
        assert!(!name("_demo/ü", 0).contains(['/', 'ü']));
        assert!(!name("_demo", 0).starts_with('_'));
    }

    #[test]
    fn the_longest_run_id_makes_a_name_that_file_systems_take() {
        let run = "1a".repeat(50);
        let name = |shard: &str, version| file_name(&format!("{run}/synthesize/{shard}"), version);
        assert!(merged_name(&name("100-of-128", 3)).len() + "#12".len() <= 255);
        assert!(name("9-of-16", 3) < name("10-of-16", 0));
    }

    #[test]
    fn a_merged_file_takes_the_place_of_the_first() {
        let name = |id: &str, version| file_name(id, version);
        let (before, first, behind) = (name("demo/a", 3), name("demo/a", 4), name("demo/a", 5));
        let merged = merged_name(&first);
        let again = merged_name(&merged);
        for merged in [&merged, &again] {
            assert!(before < *merged && *merged < behind, "{merged}");
            assert_eq!(writer(merged), writer(&first));
            assert_eq!(merged.len(), first.len() + 13);
        }
        assert_ne!(merged, again);
        assert_ne!(writer(&first), writer(&name("demo/b", 4)));
    }
}
