//! The command line contract of doppel-partition: exit codes, messages, and what is in the private root afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int64Array, ListArray, RecordBatch, StringArray, StructArray,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field};
use lake::{PrivateRoot, StorageOptions, Zone};
use tempfile::TempDir;

/// A private root and inputs in a temporary folder.
struct Setting {
    folder: TempDir,
}

struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// A row of the corpus: id, unit, text, split.
type Row = (String, String, String, String);

impl Setting {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    fn private(&self) -> PathBuf {
        self.folder.path().join("private")
    }

    fn input(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.folder.path().join(name);
        fs::write(&path, content).expect("an input");
        path.display().to_string()
    }

    /// Runs partition as run `r` on corpus `c`; later flags win.
    fn run(&self, flags: &[&str]) -> Ran {
        self.run_as("r", "c", flags)
    }

    fn run_as(&self, run: &str, corpus: &str, flags: &[&str]) -> Ran {
        let mut command = Command::new(env!("CARGO_BIN_EXE_doppel-partition"));
        command.env_clear().args(["--run", run, "--corpus", corpus]);
        if !flags.contains(&"--private") {
            command.arg("--private").arg(self.private());
        }
        let output = command.args(flags).output().expect("the binary runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ran { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }

    fn rows(&self, corpus: &str) -> Vec<Row> {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let batches = runtime.block_on(async {
            let root = PrivateRoot::open(&self.private().display().to_string(), &StorageOptions::default()).await?;
            let table = root.table(&format!("corpora/{corpus}"));
            table.read(table.pin().await?, &["record_id", "unit", "text", "split"]).await
        });
        let mut rows = Vec::new();
        for batch in batches.expect("a corpus") {
            let value = |column: usize, row: usize| batch.column(column).as_string::<i32>().value(row).to_owned();
            rows.extend((0..batch.num_rows()).map(|row| (value(0, row), value(1, row), value(2, row), value(3, row))));
        }
        rows
    }

    fn texts(&self) -> Vec<String> {
        self.rows("c").into_iter().map(|row| row.2).collect()
    }

    /// All files below the private root, except the noise key.
    fn left_behind(&self) -> Vec<String> {
        fn walk(folder: &Path, found: &mut Vec<String>) {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() { walk(&path, found) } else { found.push(path.display().to_string()) }
            }
        }
        let mut found = Vec::new();
        walk(&self.private(), &mut found);
        found.retain(|path| !path.ends_with("noise.key"));
        found
    }
}

impl Ran {
    #[track_caller]
    fn check(self, code: i32, messages: &[&str]) -> Self {
        let shown = format!("{}\n{}", self.stdout, self.stderr);
        assert_eq!(self.code, Some(code), "{shown}");
        messages.iter().for_each(|message| assert!(shown.contains(message), "no `{message}` in\n{shown}"));
        self
    }

    #[track_caller]
    fn lacks(self, word: &str) -> Self {
        assert!(!self.stdout.contains(word) && !self.stderr.contains(word), "{}\n{}", self.stdout, self.stderr);
        self
    }
}

fn lmsys(id: &str, text: &str, language: &str, redacted: bool, flagged: bool) -> String {
    serde_json::json!({
        "conversation_id": id, "model": "m", "turn": 1, "language": language, "redacted": redacted,
        "conversation": [{"content": text, "role": "user"}, {"content": "answer", "role": "assistant"}],
        "openai_moderation": [{"categories": {"hate": false}, "flagged": false}, {"flagged": flagged}],
    })
    .to_string()
}

fn sharegpt(id: &str, turns: &[(&str, &str)]) -> serde_json::Value {
    let turns: Vec<_> = turns.iter().map(|(from, value)| serde_json::json!({"from": from, "value": value})).collect();
    serde_json::json!({"id": id, "conversations": turns})
}

/// English sentences that share no ten words.
fn sentence(index: usize) -> String {
    format!("Please write a short story number {index} about the number {index} and what it means to you.")
}

#[test]
fn the_steps_of_appendix_e_on_lmsys() {
    let setting = Setting::new();
    let long = "one two three four five six seven eight nine ten eleven";
    let lines = [
        lmsys("a", "Tell me about whales.", "English", false, false),
        lmsys("b", "Erzähl mir von Walen.", "German", false, false),
        lmsys("c", "My name is NAME_1.", "English", true, false),
        lmsys("d", "Something flagged.", "English", false, true),
        lmsys("e", "Tell me about whales.", "English", false, false),
        lmsys("f", &format!("Count: {long}"), "English", false, false),
        lmsys("g", &format!("Again {long} twelve"), "English", false, false),
        lmsys("h", "  ", "English", false, false),
    ];
    let input = setting.input("in.jsonl", lines.join("\n"));
    setting.run(&["--input", &input]).check(0, &["corpus `c`"]).lacks("records of");
    assert_eq!(setting.texts(), ["Tell me about whales.".to_owned(), format!("Count: {long}")]);
    let counts = fs::read_to_string(setting.private().join("runs/r/partition-counts.json")).expect("counts");
    let counts: serde_json::Value = serde_json::from_str(&counts).expect("JSON");
    let steps = &counts["steps"];
    for (step, count) in [
        ("read", 8),
        ("without_user_turn", 1),
        ("redacted", 1),
        ("flagged", 1),
        ("other_language", 1),
        ("exact_duplicates", 1),
        ("ngram_duplicates", 1),
        ("over_bound", 0),
        ("units", 2),
        ("kept", 2),
    ] {
        assert_eq!(steps[step], count, "{step} in {counts}");
    }
    let terms = fs::read_to_string(setting.private().join("corpora/c.terms.json")).expect("terms");
    assert!(terms.contains("conversation_id") && terms.contains("not for the raw data"), "{terms}");
}

#[test]
fn dedup_can_be_turned_off_and_then_nothing_conditions_the_guarantee() {
    let setting = Setting::new();
    let lines =
        [lmsys("a", "Tell me more.", "English", false, false), lmsys("b", "Tell me more.", "English", false, false)];
    let input = setting.input("in.jsonl", lines.join("\n"));
    setting.run(&["--input", &input, "--dedup", "none"]).check(0, &[]);
    assert_eq!(setting.texts().len(), 2);
    let terms = fs::read_to_string(setting.private().join("corpora/c.terms.json")).expect("terms");
    assert!(!terms.contains("raw data"), "{terms}");
}

#[test]
fn first_user_turns_of_sharegpt_with_a_prefix_as_unit() {
    let setting = Setting::new();
    let records = serde_json::json!([
        sharegpt("a_0", &[("human", &sentence(0)), ("gpt", "x"), ("human", "second turn")]),
        sharegpt("a_1", &[("gpt", "x"), ("human", &sentence(1))]),
        sharegpt("a_2", &[("human", &sentence(2))]),
        sharegpt("a_3", &[("system", "be kind"), ("user", &sentence(3))]),
        sharegpt("b_0", &[]),
        sharegpt("c_0", &[("human", &sentence(4))]),
    ]);
    let input = setting.input("in.json", records.to_string());
    let flags = ["--input", &input, "--unit-rule", "prefix:_", "--max-per-unit", "2"];
    setting.run(&flags).check(0, &[]);
    let rows = setting.rows("c");
    let of = |unit: &str| rows.iter().filter(|row| row.1 == unit).collect::<Vec<_>>();
    assert_eq!((of("a").len(), of("c").len(), rows.len()), (2, 1, 3));
    assert_eq!(of("a")[0].3, of("a")[1].3, "a unit lies in one split");
}

#[test]
fn the_same_conversations_in_every_format_give_the_same_corpus() {
    let messages = |index: usize| serde_json::json!([{"role": "user", "content": sentence(index)}]);
    let objects: Vec<_> = (0..40).map(|i| serde_json::json!({"id": i, "messages": messages(i)})).collect();
    let lines = objects.iter().map(ToString::to_string).collect::<Vec<_>>().join("\r\n");
    let setting = Setting::new();
    let array = setting.input("a.json", format!("\u{FEFF}  {}", serde_json::json!(objects)));
    let inputs = [array, setting.input("b.jsonl", lines), write_parquet(&setting, "c.parquet", 40)];
    for (index, input) in inputs.iter().enumerate() {
        let corpus = format!("c{index}");
        setting.run_as(&corpus, &corpus, &["--input", input, "--split", "1,0,0"]).check(0, &[]);
    }
    assert_eq!(setting.rows("c0").len(), 40);
    assert_eq!(setting.rows("c0"), setting.rows("c1"));
    assert_eq!(setting.rows("c0"), setting.rows("c2"));
}

/// OpenAI messages with integer ids, in Parquet.
fn write_parquet(setting: &Setting, name: &str, rows: usize) -> String {
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values((0..rows).map(sentence)));
    let roles: ArrayRef = Arc::new(StringArray::from(vec!["user"; rows]));
    let field = |name: &str| Arc::new(Field::new(name, DataType::Utf8, true));
    let turns = StructArray::from(vec![(field("role"), roles), (field("content"), texts)]);
    let item = Arc::new(Field::new("item", turns.data_type().clone(), true));
    let offsets = OffsetBuffer::from_lengths(vec![1; rows]);
    let batch = RecordBatch::try_from_iter([
        ("id", Arc::new(Int64Array::from_iter_values(0..rows as i64)) as ArrayRef),
        ("messages", Arc::new(ListArray::new(item, offsets, Arc::new(turns), None)) as ArrayRef),
        ("redacted", Arc::new(BooleanArray::from(vec![false; rows])) as ArrayRef),
    ]);
    let batch = batch.expect("a batch");
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), None).expect("a writer");
    writer.write(&batch).expect("rows");
    writer.close().expect("a file");
    setting.input(name, bytes)
}

#[test]
fn an_array_that_was_cut_off_gives_its_whole_records_and_a_warning() {
    let setting = Setting::new();
    let records =
        serde_json::json!((0..7).map(|i| sharegpt(&format!("u{i}"), &[("human", &sentence(i))])).collect::<Vec<_>>());
    let text = records.to_string();
    let input = setting.input("in.json", &text[..text.len() - 20]);
    setting.run(&["--input", &input, "--strict"]).check(3, &["in.json", "cut off", "--strict"]);
    assert!(setting.left_behind().is_empty(), "{:?}", setting.left_behind());
    // The number is private unless declared.
    setting.run(&["--input", &input]).check(0, &["cut off"]).lacks("6 ");
    assert_eq!(setting.texts().len(), 6);
    let declared = ["--input", input.as_str(), "--declare-public-counts"];
    setting.run_as("r2", "c2", &declared).check(0, &["its 6 whole records", "6 records of 6 units"]);
}

#[test]
fn a_second_run_finds_it_done_and_other_settings_are_refused() {
    let setting = Setting::new();
    let input = setting.input("in.jsonl", lmsys("a", "Tell me about whales.", "English", false, false));
    setting.run(&["--input", &input]).check(0, &[]);
    let before = setting.left_behind();
    setting.run(&["--input", &input]).check(0, &["corpus `c`"]);
    assert_eq!(setting.left_behind(), before);
    setting.run(&["--input", &input, "--dedup", "none"]).check(2, &["dedup"]);
    setting.run_as("other", "c", &["--input", &input]).check(2, &["exists already", "run `r`", "help:"]);
}

#[test]
fn killed_before_the_manifest_then_rerun_gives_the_same_corpus() {
    let setting = Setting::new();
    let lines: Vec<_> = (0..30).map(|i| lmsys(&format!("u{i}"), &sentence(i), "English", false, false)).collect();
    let input = setting.input("in.jsonl", lines.join("\n"));
    setting.run(&["--input", &input]).check(0, &[]);
    let rows = setting.rows("c");
    let manifest = setting.private().join("runs/r/stages/partition.json");
    fs::remove_file(&manifest).expect("a manifest");
    setting.run(&["--input", &input]).check(0, &[]);
    assert!(manifest.exists());
    assert_eq!(setting.rows("c"), rows);
    // Killed before the first row.
    fs::remove_file(&manifest).expect("a manifest");
    fs::remove_dir_all(setting.private().join("corpora/c")).expect("a table");
    setting.run(&["--input", &input]).check(0, &[]);
    assert_eq!(setting.rows("c"), rows);
    // An input that changed in between must not be mixed with what was written.
    fs::remove_file(&manifest).expect("a manifest");
    setting.input("in.jsonl", lines[..29].join("\n"));
    setting.run(&["--input", &input]).check(3, &["changed since an earlier attempt"]);
}

#[test]
fn ids_and_splits_stay_when_others_come_and_go() {
    let setting = Setting::new();
    let lines: Vec<_> = (0..60).map(|i| lmsys(&format!("u{i}"), &sentence(i), "English", false, false)).collect();
    let all = setting.input("all.jsonl", lines.join("\n"));
    let mut some = lines[20..].to_vec();
    some.reverse();
    let some = setting.input("some.jsonl", some.join("\n"));
    let split = ["--split", "0.5,0.25,0.25"];
    setting.run(&[&["--input", &all], &split[..]].concat()).check(0, &[]);
    let by_id = |rows: Vec<Row>| rows.into_iter().map(|row| (row.0.clone(), row)).collect::<BTreeMap<_, _>>();
    let with_all = by_id(setting.rows("c"));
    fs::remove_dir_all(setting.private().join("corpora")).expect("corpora");
    fs::remove_dir_all(setting.private().join("runs")).expect("runs");
    setting.run(&[&["--input", &some], &split[..]].concat()).check(0, &[]);
    let with_some = by_id(setting.rows("c"));
    assert_eq!((with_all.len(), with_some.len()), (60, 40));
    with_some.iter().for_each(|(id, row)| assert_eq!(with_all.get(id), Some(row)));
}

#[test]
fn bad_input_is_named_and_leaves_nothing_behind() {
    let setting = Setting::new();
    let parquet = write_parquet(&setting, "good.parquet", 40);
    let bytes = fs::read(&parquet).expect("a file");
    let cut = setting.input("cut.parquet", &bytes[..bytes.len() - 9]);
    let mut damaged = bytes.clone();
    damaged[8..60].fill(0xA5);
    let damaged = setting.input("damaged.parquet", damaged);
    let good = lmsys("a", "secret", "English", false, false);
    let invalid = setting.input("invalid.jsonl", [good.as_bytes(), b"\n{\"text\":\"secret\xFF\"}"].concat());
    let typed =
        setting.input("typed.jsonl", r#"{"conversation_id":"secret","conversation":[{"role":"user","content":7}]}"#);
    let no_unit = setting.input("unit.jsonl", r#"{"text":"secret is what this text says"}"#);
    let german = setting.input("german.jsonl", lmsys("a", "secret", "German", false, false));
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["--input", "/no/such/file.json"], 3, &["/no/such/file.json"]),
        (&["--input", &setting.input("empty.json", "")], 3, &["empty.json", "empty"]),
        (&["--input", &setting.input("none.json", "[ ]")], 3, &["would be empty", "no record"]),
        (&["--input", &setting.input("words.txt", "hello secret")], 3, &["words.txt", "JSON"]),
        (&["--input", &invalid], 3, &["row 1", "invalid UTF-8", "byte"]),
        (&["--input", &typed], 3, &["row 0", "conversation[0].content", "an integer", "a string", "help:"]),
        (&["--input", &no_unit], 3, &["field `id` is missing", "--unit-rule record"]),
        (&["--input", &german], 3, &["would be empty", "--language"]),
        (&["--input", &cut], 3, &["cut.parquet", "corrupt"]),
        (&["--input", &damaged], 3, &["damaged.parquet", "corrupt"]),
        (&["--input", &parquet, "--text-column", "text"], 3, &["no column `text`", "help:"]),
        (&["--input", &parquet, "--unit-column", "user"], 3, &["no column `user`", "id, messages, redacted"]),
        (&["--input", &setting.input("gap.json", "[{\"text\":1} {\"text\":2}]")], 3, &["byte", "`,`"]),
        (&["--input", &parquet, "--max-per-unit", "0", "--ngram", "1"], 2, &["--max-per-unit", "--ngram"]),
        (&["--input", &parquet, "--split", "0.5,0.6,0"], 2, &["--split"]),
        (&["--input", &parquet, "--unit-rule", "suffix:_"], 2, &["--unit-rule"]),
        (&["--input", &parquet, "--private", ""], 2, &["private root"]),
        (&[], 2, &["--input"]),
    ];
    for (flags, code, messages) in cases {
        setting.run(flags).check(*code, messages).lacks("secret is").lacks("\"secret");
        assert!(setting.left_behind().is_empty(), "{flags:?}: {:?}", setting.left_behind());
    }
}

#[test]
fn records_without_ids_can_be_units_of_their_own() {
    let setting = Setting::new();
    let lines = (0..5).map(|i| serde_json::json!({"prompt": sentence(i)}).to_string()).collect::<Vec<_>>().join("\n");
    let input = setting.input("in.jsonl", lines);
    let flags = ["--input", &input, "--text-column", "prompt", "--unit-rule", "record", "--language", "any"];
    setting.run(&flags).check(0, &[]);
    let rows = setting.rows("c");
    assert!(rows.len() == 5 && rows.iter().all(|row| row.0 == row.1));
}

/// ShareGPT as the demo has it: 17,671 whole records, then cut off.
#[test]
fn the_real_sharegpt_gives_enough_to_train_on() {
    let cache = std::env::var_os("DOPPEL_CACHE").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/doppel")));
    let Some(input) = cache.map(|cache| cache.join("data/sharegpt.json")).filter(|path| path.exists()) else {
        // Without set-up there is no such file; `make test` sets up first.
        return;
    };
    let setting = Setting::new();
    let input = input.display().to_string();
    let flags = ["--input", &input, "--unit-rule", "prefix:_", "--declare-public-counts", "--format", "json"];
    let ran = setting.run(&flags).check(0, &["cut off", "its 17671 whole records"]);
    let summary: serde_json::Value = serde_json::from_str(&ran.stdout).expect("JSON");
    let (steps, splits) = (&summary["counts"]["steps"], &summary["counts"]["splits"]);
    assert_eq!(steps["read"], 17_671);
    let train = splits["train"].as_u64().expect("a count");
    assert!(train >= 7_000, "{summary}");
    assert_eq!(steps["kept"], steps["units"], "one record of each unit");
}
