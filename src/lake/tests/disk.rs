//! The promises of a root, on a local disk.

use std::path::Path;
use std::time::Duration;

use lake::{
    AppTransaction, LakeError, PrivateRoot, ReleaseRoot, StorageOptions, Zone, check_disjoint, promises, schema,
};

async fn root(path: &Path) -> PrivateRoot {
    PrivateRoot::open(&path.display().to_string(), &StorageOptions::default()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_keeps_all_promises() {
    let folder = tempfile::tempdir().unwrap();
    promises::all(&root(folder.path()).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_with_an_odd_name_keeps_all_promises() {
    let folder = tempfile::tempdir().unwrap();
    promises::all(&root(&folder.path().join("my läke 100% #1/certificate bucket/private")).await).await;
}

#[tokio::test]
async fn an_error_about_a_private_table_does_not_count_records() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let open = |name: &str| at(name).display().to_string();
    let private = PrivateRoot::open(&open("private"), &StorageOptions::default()).await.unwrap();
    let release = ReleaseRoot::open(&open("release"), &StorageOptions::default()).await.unwrap();
    let (private, release) = (broken(&private, &at("private")).await, broken(&release, &at("release")).await);
    for (told, name) in private.iter().zip(["runs/demo/loss/*-", "runs/demo/loss/*-", LOG, LOG, LOG]) {
        assert!(!told.contains("0000") && told.contains(&name.replace(COMMIT, "*")), "{told}");
    }
    let file = "runs/demo/loss/demo.train-00000007-";
    for (told, name) in release.iter().zip([file, file, LOG, LOG, LOG]) {
        assert!(told.contains(name), "{told}");
    }
}

const COMMIT: &str = "00000000000000000001";
const LOG: &str = "_delta_log/00000000000000000001.json";

/// What a table of one file says: of its digest and rows once the file is gone, of a version that is not there, and of
/// its last commit once that is empty, and once it is no JSON.
async fn broken<Z: Zone>(root: &Z, folder: &Path) -> [String; 5] {
    let table = root.table("runs/demo/loss");
    table.create(schema::loss()).await.unwrap();
    let transaction = AppTransaction { id: "demo/train".into(), version: 7 };
    assert!(table.append(vec![arrow::array::RecordBatch::new_empty(schema::loss())], transaction).await.unwrap());
    let mut files = std::fs::read_dir(folder.join("runs/demo/loss")).unwrap().map(|entry| entry.unwrap().path());
    std::fs::remove_file(files.find(|path| path.extension().is_some_and(|end| end == "parquet")).unwrap()).unwrap();
    let says =
        async |version| root.table("runs/demo/loss").read(version, &["step"]).await.map(drop).unwrap_err().to_string();
    let (digest, rows) = (table.digest(1).await.map(drop).unwrap_err().to_string(), says(1).await);
    let beyond = says(2).await;
    let commit = folder.join("runs/demo/loss").join(LOG);
    std::fs::write(&commit, "").unwrap();
    let empty = says(1).await;
    std::fs::write(&commit, "{").unwrap();
    [digest, rows, beyond, empty, says(1).await]
}

#[tokio::test]
async fn nested_and_equal_roots_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let options = StorageOptions::default();
    std::fs::create_dir(folder.path().join("private")).unwrap();
    std::os::unix::fs::symlink(folder.path().join("private"), folder.path().join("link")).unwrap();
    let private = PrivateRoot::open(&at("private"), &options).await.unwrap();
    for (release, disjoint) in
        [("private", false), ("private/release", false), ("link", false), ("", false), ("release", true)]
    {
        let release = ReleaseRoot::open(&at(release), &options).await.unwrap();
        assert_eq!(check_disjoint(&private, &release).is_ok(), disjoint, "{release:?}");
    }
}

#[tokio::test]
async fn a_root_that_is_marked_as_the_other_zone_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, options) = (folder.path().join("private"), StorageOptions::default());
    let (url, mark) = (path.display().to_string(), path.join("zone.json"));
    let private = PrivateRoot::open(&url, &options).await.unwrap().marked();
    assert!(!path.exists(), "opening wrote something");
    let scratch = folder.path().join("scratch");
    let overlay = lake::Overlay { scratch: scratch.display().to_string(), hidden: Vec::new() };
    assert!(private.under(&overlay).unwrap().put_if_absent("claim", "text".into()).await.unwrap());
    assert!(scratch.join("claim").exists() && !scratch.join("zone.json").exists() && !path.exists());

    assert!(private.put_if_absent("claim", "text".into()).await.unwrap());
    assert_eq!(std::fs::read_to_string(&mark).unwrap(), "{\"zone\": \"private\"}\n");
    let found = ReleaseRoot::open(&url, &options).await.map(drop);
    let words = ["is marked as the private root", "help: were --private and --release swapped?"];
    assert!(matches!(&found, Err(LakeError::Usage(text)) if words.iter().all(|word| text.contains(word))), "{found:?}");
    let again = PrivateRoot::open(&url, &options).await.unwrap().marked();
    assert!(again.put_if_absent("another", "text".into()).await.unwrap());

    // Neither a listing nor gc sees it.
    assert_eq!(again.list("").await.unwrap(), ["another", "claim"]);
    let retained = lake::gc::Retained { before: chrono::Utc::now() + Duration::from_secs(3600), ..Default::default() };
    lake::gc::remove(&again, &lake::gc::plan(&again, &retained).await.unwrap()).await.unwrap();
    assert!(mark.exists());

    // What is left of a mark is not none.
    for broken in ["", "{\"zone\": \"rel", "[]"] {
        std::fs::write(&mark, broken).unwrap();
        let found = ReleaseRoot::open(&url, &options).await.map(drop);
        assert!(matches!(&found, Err(LakeError::Malformed(text)) if text.contains("zone.json: expected")), "{found:?}");
    }

    // Of two that mark a root at once as different zones, the second is refused before it writes.
    std::fs::remove_file(&mark).unwrap();
    let release = ReleaseRoot::open(&url, &options).await.unwrap().marked();
    std::fs::write(&mark, "{\"zone\": \"private\"}").unwrap();
    let found = release.put_if_absent("release", "text".into()).await;
    assert!(matches!(found, Err(LakeError::Usage(_))), "{found:?}");
    assert!(!path.join("release").exists());
}

async fn table_with_three_commits(root: &PrivateRoot) -> lake::Table {
    let table = root.table("corpora/demo");
    table.create(schema::loss()).await.unwrap();
    for step in 0..3 {
        let columns: Vec<arrow::array::ArrayRef> = vec![
            std::sync::Arc::new(arrow::array::Int64Array::from(vec![step])),
            std::sync::Arc::new(arrow::array::StringArray::from(vec!["validation"])),
            std::sync::Arc::new(arrow::array::Float64Array::from(vec![0.5])),
        ];
        let batch = arrow::array::RecordBatch::try_new(schema::loss(), columns).unwrap();
        let transaction = AppTransaction { id: "demo/train".into(), version: step };
        assert!(table.append(vec![batch], transaction).await.unwrap());
    }
    table
}

#[track_caller]
fn check_malformed<T>(result: Result<T, LakeError>, words: &[&str]) {
    match result {
        Err(LakeError::Malformed(text)) => {
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("expected an error"),
    }
}

#[tokio::test]
async fn a_table_does_not_tell_where_its_root_is() {
    let folder = tempfile::tempdir().unwrap();
    table_with_three_commits(&root(folder.path()).await).await;
    let name = folder.path().file_name().unwrap().to_str().unwrap();
    let log = folder.path().join("corpora/demo/_delta_log");
    for commit in std::fs::read_dir(log).unwrap() {
        let text = String::from_utf8_lossy(&std::fs::read(commit.unwrap().path()).unwrap()).into_owned();
        assert!(!text.contains(name), "{text}");
    }
}

#[tokio::test]
async fn a_log_with_a_missing_commit_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let root = root(folder.path()).await;
    table_with_three_commits(&root).await;
    let log = folder.path().join("corpora/demo/_delta_log");
    std::fs::remove_file(log.join("00000000000000000002.json")).unwrap();
    check_malformed(
        root.table("corpora/demo").pin().await,
        &["corpora/demo", "a commit is missing", "_delta_log/*.json"],
    );
    check_malformed(
        root.table("corpora/demo").scan(3, &["loss"]).await.map(drop),
        &["a commit is missing", "_delta_log/*.json"],
    );
}

#[tokio::test]
async fn a_damaged_commit_is_named_without_its_content() {
    let folder = tempfile::tempdir().unwrap();
    let root = root(folder.path()).await;
    table_with_three_commits(&root).await;
    let log = folder.path().join("corpora/demo/_delta_log/00000000000000000001.json");
    std::fs::write(log, "{\"add\": \"a secret").unwrap();
    let found = root.table("corpora/demo").pin().await;
    assert!(!format!("{found:?}").contains("secret"), "{found:?}");
    check_malformed(found, &["line 1 of _delta_log/*.json"]);
}

#[tokio::test]
async fn an_empty_commit_is_no_commit() {
    let folder = tempfile::tempdir().unwrap();
    let root = root(folder.path()).await;
    let table = table_with_three_commits(&root).await;
    assert_eq!(table.pin().await.unwrap(), 3);
    let log = folder.path().join("corpora/demo/_delta_log");
    let words = ["corpora/demo: a commit is empty (_delta_log/*.json)", "help:"];
    // Behind what is known already, and to who sees the table for the first time.
    std::fs::write(log.join("00000000000000000004.json"), "").unwrap();
    check_malformed(table.pin().await, &words);
    check_malformed(root.table("corpora/demo").pin().await, &words);
    assert_eq!(root.table("corpora/demo").count(3).await.unwrap(), 3);
    std::fs::remove_file(log.join("00000000000000000004.json")).unwrap();
    assert_eq!(table.pin().await.unwrap(), 3);
    std::fs::write(log.join("00000000000000000002.json"), "").unwrap();
    check_malformed(root.table("corpora/demo").scan(2, &["loss"]).await.map(drop), &["a commit is empty"]);
    check_malformed(root.table("corpora/demo").scan(3, &["loss"]).await.map(drop), &["a commit is empty"]);
}

#[tokio::test]
async fn a_damaged_or_missing_data_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let root = root(folder.path()).await;
    let table = table_with_three_commits(&root).await;
    let files = || std::fs::read_dir(folder.path().join("corpora/demo")).unwrap().map(|entry| entry.unwrap().path());
    let file = files().find(|path| path.extension().is_some_and(|kind| kind == "parquet")).unwrap();
    let name = file.file_name().unwrap().to_str().unwrap().rsplit('-').next().unwrap().to_string();
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    check_malformed(table.read(3, &["loss"]).await, &[&name, "damaged or cut short"]);
    std::fs::write(&file, "").unwrap();
    check_malformed(table.read(3, &["loss"]).await, &[&name, "shorter than the log says"]);
    std::fs::remove_file(&file).unwrap();
    check_malformed(table.read(3, &["loss"]).await, &[&name, "not there"]);
    check_malformed(table.digest(3).await, &[&name, "the table's log names it"]);
}

#[tokio::test]
async fn a_table_of_another_program_with_another_type_is_refused_by_column() {
    use arrow::datatypes::{DataType, Field, Schema};
    let folder = tempfile::tempdir().unwrap();
    let root = root(folder.path()).await;
    let table = root.table("candidates");
    let fields = vec![Field::new("id", DataType::Int64, true), Field::new("bin", DataType::Int64, true)];
    table.create(std::sync::Arc::new(Schema::new(fields.clone()))).await.unwrap();
    let found = table.scan(0, &["id"]).await.map(drop);
    check_malformed(found, &["column `id` has type long (64 bits), expected string"]);

    // Another width of the same kind is taken over as long as the values fit; nulls are not.
    let append = |values: Vec<Option<i64>>, version| {
        let columns: Vec<arrow::array::ArrayRef> =
            (0..2).map(|_| std::sync::Arc::new(arrow::array::Int64Array::from(values.clone())) as _).collect();
        let batch = arrow::array::RecordBatch::try_new(std::sync::Arc::new(Schema::new(fields.clone())), columns);
        table.append(vec![batch.unwrap()], AppTransaction { id: "x".into(), version })
    };
    append(vec![Some(7)], 0).await.unwrap();
    assert_eq!(table.read(1, &["bin"]).await.unwrap()[0].column(0).data_type(), &DataType::Int32);
    append(vec![Some(1 << 40)], 1).await.unwrap();
    check_malformed(table.read(2, &["bin"]).await, &["`bin`", "does not fit"]);
    append(vec![None], 2).await.unwrap();
    check_malformed(table.read(3, &["bin"]).await.and(table.read(3, &["bin"]).await), &["`bin`"]);
}

#[tokio::test]
async fn a_read_only_root_says_so() {
    // Even root may not make a folder there.
    let found = root(Path::new("/sys/doppel")).await.put("a/b", "text".into()).await;
    assert!(matches!(&found, Err(LakeError::Forbidden(text)) if text.contains("help:")), "{found:?}");
}

#[tokio::test]
async fn a_name_that_is_too_long_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let found = root(folder.path()).await.put(&"x".repeat(300), "text".into()).await;
    assert!(matches!(&found, Err(LakeError::Usage(text)) if text.contains("shorter --run")), "{found:?}");
}

#[tokio::test]
async fn a_file_in_place_of_the_root_says_so() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), "").unwrap();
    let path = folder.path().join("file/below").display().to_string();
    let found = match PrivateRoot::open(&path, &StorageOptions::default()).await {
        Ok(root) => root.put("a", "text".into()).await,
        Err(error) => Err(error),
    };
    assert!(matches!(&found, Err(LakeError::Usage(text)) if text.contains("a file stands")), "{found:?}");
}

#[tokio::test]
async fn plain_inputs_are_read_from_paths_and_urls() {
    use futures::TryStreamExt;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("raw ü.json");
    let body = vec![7_u8; 9 << 20];
    std::fs::write(&file, &body).unwrap();
    for url in [file.display().to_string(), format!("file://{}", file.display())] {
        let stream = lake::read_stream(&url, &StorageOptions::default()).await.unwrap();
        let parts: Vec<_> = stream.bytes.try_collect().await.unwrap();
        assert_eq!(stream.size, body.len() as u64);
        assert!(parts.concat() == body && parts.len() == 2);
        let local = lake::fetch_folder(&url, &StorageOptions::default()).await.unwrap();
        assert_eq!(local.path(), file.canonicalize().unwrap());
    }
    let found = lake::fetch_folder("/nowhere/at/all", &StorageOptions::default()).await;
    assert!(matches!(found, Err(LakeError::NotFound(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_with_a_checkpoint_keeps_transactions_and_old_versions() {
    let folder = tempfile::tempdir().unwrap();
    let root = root(folder.path()).await;
    table_with_three_commits(&root).await;
    let table = root.table("corpora/demo");
    let rows = table.read(1, &["step", "split", "loss"]).await.unwrap();
    for step in 3..110 {
        assert!(table.append(rows.clone(), AppTransaction { id: "demo/train".into(), version: step }).await.unwrap());
    }
    let log = std::fs::read_dir(folder.path().join("corpora/demo/_delta_log")).unwrap();
    let names: Vec<String> = log.map(|entry| entry.unwrap().file_name().display().to_string()).collect();
    assert!(names.iter().any(|name| name.ends_with(".checkpoint.parquet")), "{names:?}");
    let again = root.table("corpora/demo");
    assert_eq!(again.last_chunk("demo/train").await.unwrap(), Some(109));
    assert!(!again.append(rows, AppTransaction { id: "demo/train".into(), version: 5 }).await.unwrap());
    assert_eq!(again.pin().await.unwrap(), 110);
    for (version, count) in [(0, 0), (1, 1), (50, 50), (110, 110)] {
        assert_eq!(again.count(version).await.unwrap(), count);
        let read = again.read(version, &["step"]).await.unwrap();
        assert_eq!(read.iter().map(arrow::array::RecordBatch::num_rows).sum::<usize>() as u64, count);
    }
}
