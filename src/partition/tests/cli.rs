//! The command line contract of doppel-partition: exit codes, messages, and what is in the private root afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::builder::{BooleanBuilder, LargeListBuilder, ListBuilder, StringBuilder, StructBuilder};
use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Int64Array, LargeStringArray, ListArray, NullArray, RecordBatch,
    StringArray, StructArray,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field};
use lake::{PrivateRoot, StorageOptions, Zone};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
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
        let output = self.command(run, corpus, flags).output().expect("the binary runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ran { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }

    fn command(&self, run: &str, corpus: &str, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_doppel-partition"));
        command.env_clear().args(["--run", run, "--corpus", corpus]);
        if !flags.contains(&"--private") {
            command.arg("--private").arg(self.private());
        }
        command.args(flags);
        command
    }

    fn rows(&self, corpus: &str) -> Vec<Row> {
        rows_below(&self.private(), corpus)
    }

    fn texts(&self) -> Vec<String> {
        self.rows("c").into_iter().map(|row| row.2).collect()
    }

    /// All files below the private root, except the noise key and the mark of the zone.
    fn left_behind(&self) -> Vec<String> {
        fn walk(folder: &Path, found: &mut Vec<String>) {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() { walk(&path, found) } else { found.push(path.display().to_string()) }
            }
        }
        let mut found = Vec::new();
        walk(&self.private(), &mut found);
        found.retain(|path| !path.ends_with("noise.key") && !path.ends_with("zone.json"));
        found.sort();
        found
    }
}

fn rows_below(private: &Path, corpus: &str) -> Vec<Row> {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let batches = runtime.block_on(async {
        let root = PrivateRoot::open(&private.display().to_string(), &StorageOptions::default()).await?;
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
}

/// 50 units of three records each.
fn three_records_each(setting: &Setting) -> String {
    let record = |i: usize| sharegpt(&format!("u{}_{}", i / 3, i % 3), &[("human", &sentence(i))]);
    setting.input("in.json", serde_json::json!((0..150).map(record).collect::<Vec<_>>()).to_string())
}

#[test]
fn a_unit_never_straddles_splits() {
    let setting = Setting::new();
    let input = three_records_each(&setting);
    let flags = ["--input", &input, "--unit-rule", "prefix:_", "--max-per-unit", "3", "--split", "0.5,0.25,0.25"];
    setting.run(&flags).check(0, &[]);
    let mut splits: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (_, unit, _, split) in setting.rows("c") {
        splits.entry(unit).or_default().push(split);
    }
    assert!(splits.len() == 50 && splits.values().all(|splits| splits.len() == 3));
    assert!(splits.values().all(|splits| splits.iter().all(|split| *split == splits[0])));
    let seen: BTreeSet<&String> = splits.values().flatten().collect();
    assert!(seen.len() >= 2, "{seen:?}");
}

#[test]
fn a_unit_keeps_one_record_unless_told_otherwise() {
    let setting = Setting::new();
    let input = three_records_each(&setting);
    setting.run(&["--input", &input, "--unit-rule", "prefix:_"]).check(0, &[]);
    let rows = setting.rows("c");
    let units: BTreeSet<&String> = rows.iter().map(|row| &row.1).collect();
    assert_eq!((rows.len(), units.len()), (50, 50));
}

#[test]
fn a_detector_judges_what_no_column_does() {
    let (english, german) = (sentence(0), "Schreibe bitte eine kurze Geschichte über einen Drachen, der malen lernt.");
    let with = |id: &str, text: &str, fields: serde_json::Value| {
        let mut record = sharegpt(id, &[("human", text)]);
        fields.as_object().expect("fields").iter().for_each(|(name, value)| record[name] = value.clone());
        record.to_string()
    };
    let check = |records: &[String], flags: &[&str], expected: &[&str]| {
        let setting = Setting::new();
        let input = setting.input("in.jsonl", records.join("\n"));
        setting.run(&[&["--input", &input], flags].concat()).check(0, &[]);
        assert_eq!(setting.texts(), expected, "{flags:?}");
    };
    let (none, null) = (serde_json::json!({}), serde_json::json!({"language": null}));
    let named = |language: &str| serde_json::json!({"language": language, "lang": language});
    check(&[with("a", &english, none.clone()), with("b", german, none.clone())], &[], &[&english]);
    check(&[with("a", &english, null.clone()), with("b", german, null)], &[], &[&english]);
    check(&[with("a", &english, named("German")), with("b", german, named("English"))], &[], &[german]);
    check(&[with("a", &english, named("")), with("b", german, named("en_US"))], &[], &[&english, german]);
    check(&[with("a", &english, named("eng_Latn")), with("b", german, named(""))], &[], &[&english]);
    let by_name = ["--language-column", "lang"];
    check(&[with("a", &english, named("de")), with("b", german, named("en"))], &by_name, &[german]);
    check(&[with("a", &english, named("")), with("b", german, named(""))], &by_name, &[&english]);
    check(
        &[with("a", &english, none.clone()), with("b", german, none.clone())],
        &["--language", "any"],
        &[&english, german],
    );

    let setting = Setting::new();
    let input = setting.input("in.jsonl", [with("a", &english, named("en")), with("b", german, none)].join("\n"));
    let missing = ["--input", &input, "--language-column", "lang"];
    setting.run(&missing).check(3, &["row 2", "field `lang` is missing", "help:"]);
    assert!(setting.left_behind().is_empty());
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

#[test]
fn a_byte_order_mark_counts_in_the_place_of_a_bad_record() {
    let setting = Setting::new();
    let good = serde_json::json!({"id": 1, "messages": [{"role": "user", "content": sentence(1)}]});
    let place = |name: &str, mark: &str| -> u64 {
        let input = setting.input(name, format!("{mark}{good}\n{{\"id\": oops}}\n{good}\n"));
        let told = setting.run(&["--input", &input]).check(3, &["row 2", "byte "]).stderr;
        let number = told.split_once("byte ").unwrap().1;
        number.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    };
    assert_eq!(place("marked.jsonl", "\u{FEFF}"), place("plain.jsonl", "") + 3);
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
    setting.input(name, parquet_of(&batch.expect("a batch")))
}

/// Plain pages, so that what a test looks for in the bytes stands there as it is.
fn parquet_of(batch: &RecordBatch) -> Vec<u8> {
    let properties = WriterProperties::builder().set_dictionary_enabled(false).build();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).expect("a writer");
    writer.write(batch).expect("rows");
    writer.into_inner().expect("a file")
}

/// Turns as (content, role), with offsets of 64 bits as LMSYS-Chat-1M comes.
type Turn<'a> = Option<(&'a str, &'a str)>;

fn turns(rows: &[Option<&[Turn]>]) -> ArrayRef {
    let field = |name: &str| Field::new(name, DataType::Utf8, true);
    let mut lists = LargeListBuilder::new(StructBuilder::from_fields(vec![field("content"), field("role")], 0));
    for row in rows {
        for turn in row.iter().copied().flatten() {
            let (content, role) = turn.unzip();
            for (index, value) in [content, role].into_iter().enumerate() {
                lists.values().field_builder::<StringBuilder>(index).expect("a string").append_option(value);
            }
            lists.values().append(turn.is_some());
        }
        lists.append(row.is_some());
    }
    Arc::new(lists.finish())
}

fn moderation(rows: &[&[bool]]) -> ArrayRef {
    let flagged = Field::new("flagged", DataType::Boolean, true);
    let mut lists = ListBuilder::new(StructBuilder::from_fields(vec![flagged], 0));
    for row in rows {
        for &flagged in *row {
            lists.values().field_builder::<BooleanBuilder>(0).expect("a truth value").append_value(flagged);
            lists.values().append(true);
        }
        lists.append(true);
    }
    Arc::new(lists.finish())
}

fn strings<'a>(values: impl IntoIterator<Item = &'a str>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

#[test]
fn the_marks_of_lmsys_in_parquet() {
    let setting = Setting::new();
    let texts: Vec<String> = (0..4).map(sentence).collect();
    let conversations: Vec<[Turn; 2]> =
        texts.iter().map(|text| [Some((text.as_str(), "user")), Some(("answer", "assistant"))]).collect();
    let conversations: Vec<Option<&[Turn]>> = conversations.iter().map(|turns| Some(turns.as_slice())).collect();
    let batch = RecordBatch::try_from_iter([
        ("conversation_id", strings(["a", "b", "c", "d"])),
        ("conversation", turns(&conversations)),
        ("language", strings(["English", "English", "English", "German"])),
        ("redacted", Arc::new(BooleanArray::from(vec![false, true, false, false])) as ArrayRef),
        ("openai_moderation", moderation(&[&[false, false], &[], &[false, true], &[false]])),
    ]);
    let input = setting.input("lmsys.parquet", parquet_of(&batch.expect("a batch")));
    setting.run(&["--input", &input]).check(0, &[]);
    assert_eq!(setting.texts(), texts[..1]);
    let counts = fs::read_to_string(setting.private().join("runs/r/partition-counts.json")).expect("counts");
    let counts: serde_json::Value = serde_json::from_str(&counts).expect("JSON");
    for step in ["redacted", "flagged", "other_language"] {
        assert_eq!(counts["steps"][step], 1, "{step} in {counts}");
    }
}

#[test]
fn moderation_of_another_shape_is_refused_in_parquet() {
    let setting = Setting::new();
    let list = |values: ArrayRef| -> ArrayRef {
        let item = Arc::new(Field::new("item", values.data_type().clone(), true));
        Arc::new(ListArray::new(item, OffsetBuffer::from_lengths([1]), values, None))
    };
    let mark: ArrayRef = Arc::new(BooleanArray::from(vec![true]));
    let hate = Arc::new(Field::new("hate", DataType::Boolean, true));
    let unflagged: ArrayRef = Arc::new(StructArray::from(vec![(hate, mark.clone())]));
    let flag = Arc::new(Field::new("flagged", DataType::Boolean, true));
    let flagged_twice: ArrayRef = Arc::new(StructArray::from(vec![(flag.clone(), mark.clone()), (flag, mark.clone())]));
    let file = |moderation: ArrayRef| {
        let (id, text) = (strings(["a"]), strings(["Tell me about whales."]));
        let batch = RecordBatch::try_from_iter([("id", id), ("text", text), ("openai_moderation", moderation)]);
        setting.input("in.parquet", parquet_of(&batch.expect("a batch")))
    };
    for (moderation, found) in [
        (strings(["flagged"]), "is a string,"),
        (mark.clone(), "is a truth value,"),
        (unflagged.clone(), "is a struct,"),
        (list(mark.clone()), "is a list of other values,"),
        (list(unflagged), "[].flagged` is missing,"),
        (list(flagged_twice), "[].flagged` is given twice,"),
    ] {
        let messages = ["row 1", "`openai_moderation", found, "expected", "help:"];
        setting.run(&["--input", &file(moderation)]).check(3, &messages);
        assert!(setting.left_behind().is_empty(), "{found}: {:?}", setting.left_behind());
    }
    // Nulls mark nothing.
    setting.run(&["--input", &file(Arc::new(NullArray::new(1)))]).check(0, &[]);
    assert_eq!(setting.texts(), ["Tell me about whales."]);
}

#[test]
fn a_unit_that_is_empty_is_refused() {
    let setting = Setting::new();
    let text = "Tell me about hush.";
    let line = |id: &str| serde_json::json!({"id": id, "text": text}).to_string();
    for (id, found) in [("", "is empty,"), (" ", "is empty,"), ("_hush", "is empty before its first separator,")] {
        let lines = setting.input("in.jsonl", [line("a_0"), line(id)].join("\n"));
        let batch = RecordBatch::try_from_iter([("id", strings(["a_0", id])), ("text", strings([text, text]))]);
        let parquet = setting.input("in.parquet", parquet_of(&batch.expect("a batch")));
        for input in [lines, parquet] {
            let messages = ["row 2", "field `id`", found, "--unit-rule record"];
            setting.run(&["--input", &input, "--unit-rule", "prefix:_"]).check(3, &messages).lacks("hush");
        }
    }
    assert!(setting.left_behind().is_empty(), "{:?}", setting.left_behind());
}

#[test]
fn nulls_in_parquet_are_named_by_row_and_turn() {
    let setting = Setting::new();
    let (whole, text) = ([Some(("hush", "user"))], sentence(0));
    let cases: [(&[Turn], &str); 4] = [
        (&[None], "`conversation[0]` is null"),
        (&[Some(("be kind", "system")), None], "`conversation[1]` is null"),
        (&[], "would be empty"),
        (&[Some((&text, "assistant"))], "would be empty"),
    ];
    let file = |rows: &[Option<&[Turn]>]| {
        let ids = strings(["a", "b"].into_iter().take(rows.len()));
        let batch = RecordBatch::try_from_iter([("conversation_id", ids), ("conversation", turns(rows))]);
        setting.input("in.parquet", parquet_of(&batch.expect("a batch")))
    };
    for (turns, message) in cases {
        setting.run(&["--input", &file(&[Some(turns)])]).check(3, &["help:", message]).lacks("hush");
    }
    let input = file(&[Some(&whole), None]);
    setting.run(&["--input", &input]).check(3, &["row 2", "`conversation` is null", "help:"]).lacks("hush");
    assert!(setting.left_behind().is_empty(), "{:?}", setting.left_behind());
}

#[test]
fn a_text_column_in_parquet() {
    let setting = Setting::new();
    let texts: Vec<String> = (0..3).map(sentence).collect();
    let batch = RecordBatch::try_from_iter([
        ("id", strings(["a", "b", "c"])),
        ("prompt", Arc::new(LargeStringArray::from(texts.clone())) as ArrayRef),
    ]);
    let bytes = parquet_of(&batch.expect("a batch"));
    let input = setting.input("in.parquet", &bytes);
    setting.run(&["--input", &input, "--text-column", "prompt"]).check(0, &[]);
    assert_eq!(setting.texts(), texts);
}

#[test]
fn two_columns_of_one_name_in_parquet() {
    let setting = Setting::new();
    let columns = [("id", strings(["a"])), ("id", strings(["b"])), ("text", strings(["hush, a zebra sleeps"]))];
    let batch = RecordBatch::try_from_iter(columns).expect("a batch");
    let input = setting.input("in.parquet", parquet_of(&batch));
    setting.run(&["--input", &input]).check(3, &["in.parquet", "more than one column `id`", "help:"]).lacks("hush");
    setting.run(&["--input", &input, "--unit-rule", "record"]).check(0, &[]);
}

#[test]
fn invalid_utf8_in_parquet_is_corrupt() {
    let setting = Setting::new();
    let batch = RecordBatch::try_from_iter([("id", strings(["a"])), ("text", strings(["hush, a zebra sleeps"]))]);
    let mut bytes = parquet_of(&batch.expect("a batch"));
    while let Some(at) = bytes.windows(5).position(|window| window == b"zebra") {
        bytes[at] = 0xFF;
    }
    let input = setting.input("in.parquet", bytes);
    setting.run(&["--input", &input]).check(3, &["in.parquet", "corrupt", "help:"]).lacks("hush");
    assert!(setting.left_behind().is_empty());
}

#[test]
fn no_damage_to_a_parquet_file_is_taken_for_a_bug() {
    let setting = Setting::new();
    let bytes = fs::read(write_parquet(&setting, "good.parquet", 6)).expect("a file");
    let step = bytes.len().div_ceil(160);
    let mut seen = BTreeSet::new();
    for (index, at) in (4..bytes.len()).step_by(step).enumerate() {
        let mut damaged = bytes.clone();
        damaged[at] ^= [0xFF, 0x80, 0x01][index % 3];
        let input = setting.input("damaged.parquet", damaged);
        let ran = setting.run_as(&format!("r{at}"), &format!("c{at}"), &["--input", &input]);
        assert!(matches!(ran.code, Some(0 | 3)), "byte {at}: {:?}\n{}", ran.code, ran.stderr);
        seen.insert(ran.code);
    }
    assert!(seen.contains(&Some(3)), "no damage was noticed");
}

/// The peak of resident memory of a run, in KiB. The process waits to be measured, since the one pipe that it writes to
/// at its end is full.
fn peak_memory(setting: &Setting, run: &str, input: &str) -> u64 {
    let (mut reader, writer) = UnixStream::pair().expect("a pair of sockets");
    writer.set_nonblocking(true).expect("a flag");
    let full = (&writer).write_all(&vec![0; 64 << 20]).expect_err("no socket takes so much");
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    writer.set_nonblocking(false).expect("a flag");
    let flags = ["--input", input, "--dedup", "none", "--language", "any"];
    let mut command = setting.command(run, run, &flags);
    let mut child = command.stdout(OwnedFd::from(writer)).stderr(Stdio::null()).spawn().expect("the binary runs");
    let manifest = setting.private().join(format!("runs/{run}/stages/partition.json"));
    while !manifest.exists() {
        assert!(child.try_wait().expect("a child").is_none(), "partition ended early");
        std::thread::sleep(Duration::from_millis(10));
    }
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).expect("a running process");
    // Now it may write; the socket ends with the last of its owners.
    drop(command);
    std::io::copy(&mut reader, &mut std::io::sink()).expect("a summary");
    assert!(child.wait().expect("a child").success());
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    peak.trim().trim_end_matches("kB").trim().parse().expect("a number")
}

/// Records whose first turn is short and whose answer has ten thousand bytes.
const LONG: usize = 10_000;

fn write_long_json(path: &Path, records: usize) {
    let mut file = std::io::BufWriter::new(fs::File::create(path).expect("a file"));
    let answer = "x".repeat(LONG);
    for index in 0..records {
        let turns = [("human", sentence(index)), ("gpt", answer.clone())]
            .map(|(from, value)| serde_json::json!({"from": from, "value": value}));
        let record = serde_json::json!({"id": index, "conversations": turns});
        writeln!(file, "{record}").expect("a record");
    }
    file.flush().expect("a file");
}

/// One row group, however many rows there are.
fn write_long_parquet(path: &Path, records: usize) {
    let (answer, texts) = ("x".repeat(LONG), (0..records).map(sentence).collect::<Vec<_>>());
    let batch = |rows: std::ops::Range<usize>| {
        let conversations: Vec<[Turn; 2]> = texts[rows.clone()]
            .iter()
            .map(|text| [Some((text.as_str(), "user")), Some((answer.as_str(), "x"))])
            .collect();
        let conversations: Vec<Option<&[Turn]>> = conversations.iter().map(|turns| Some(turns.as_slice())).collect();
        let ids = Arc::new(Int64Array::from_iter_values(rows.map(|row| row as i64))) as ArrayRef;
        RecordBatch::try_from_iter([("id", ids), ("messages", turns(&conversations))]).expect("a batch")
    };
    let properties = WriterProperties::builder().set_dictionary_enabled(false).build();
    let file = fs::File::create(path).expect("a file");
    let mut writer = ArrowWriter::try_new(file, batch(0..1).schema(), Some(properties)).expect("a writer");
    for first in (0..records).step_by(500) {
        writer.write(&batch(first..(first + 500).min(records))).expect("rows");
    }
    assert_eq!(writer.close().expect("a file").num_row_groups(), 1);
}

#[test]
fn memory_does_not_grow_with_the_input() {
    type Write = fn(&Path, usize);
    for (format, write) in [("json", write_long_json as Write), ("parquet", write_long_parquet)] {
        let setting = Setting::new();
        let path = setting.folder.path().join(format!("in.{format}"));
        let peaks = [6_000, 20_000].map(|records| {
            write(&path, records);
            peak_memory(&setting, &format!("r{records}"), &path.display().to_string())
        });
        // Rows that wait to be written, up to a chunk, and threads that hold a batch or two more make some 15 MB of
        // difference, and twice that on a busy machine. The input would make 140.
        assert!(peaks[1] < peaks[0] + (70 << 10), "{format}: {peaks:?} KiB for 60 and 200 MB");
    }
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
fn lines_that_were_cut_off_give_the_whole_ones_and_a_warning() {
    let setting = Setting::new();
    let lines: Vec<_> = (0..4).map(|i| lmsys(&format!("u{i}"), &sentence(i), "English", false, false)).collect();
    let text = lines.join("\n");
    let input = setting.input("in.jsonl", &text[..text.len() - 40]);
    setting.run(&["--input", &input, "--strict"]).check(3, &["in.jsonl", "cut off", "--strict"]);
    assert!(setting.left_behind().is_empty(), "{:?}", setting.left_behind());
    setting.run(&["--input", &input]).check(0, &["cut off"]);
    assert_eq!(setting.texts(), (0..3).map(sentence).collect::<Vec<_>>());
    // A last line without a line break is whole.
    let whole = setting.input("whole.jsonl", &text);
    setting.run_as("s", "d", &["--input", &whole, "--strict"]).check(0, &[]).lacks("cut off");
    assert_eq!(setting.rows("d").len(), 4);
}

#[test]
fn a_second_run_finds_it_done_and_other_settings_are_refused() {
    let setting = Setting::new();
    let input = setting.input("in.jsonl", lmsys("a", "Tell me about whales.", "English", false, false));
    setting.run(&["--input", &input]).check(0, &[]);
    let before = setting.left_behind();
    setting.run(&["--input", &input]).check(0, &["done already", "corpus `c`"]);
    assert_eq!(setting.left_behind(), before);
    setting.run(&["--input", &input, "--dedup", "none"]).check(2, &["dedup"]);
    let same = format!("file://{input}");
    setting.run(&["--input", &same, "--format", "json"]).check(0, &["\"already_done\":true"]);
}

#[test]
fn a_corpus_of_another_run_is_refused_before_anything_is_left_behind() {
    let setting = Setting::new();
    let input = setting.input("in.jsonl", lmsys("a", "Tell me about whales.", "English", false, false));
    setting.run(&["--input", &input]).check(0, &[]);
    let before = setting.left_behind();
    let refused = ["exists already", "run `r`", "choose another --corpus"];
    setting.run_as("other", "c", &["--input", &input]).check(2, &refused);
    assert_eq!(setting.left_behind(), before);
    setting.run_as("other", "d", &["--input", &input]).check(0, &[]);
}

#[test]
fn an_input_that_holds_something_else_by_now_is_not_done_already() {
    let setting = Setting::new();
    let input = setting.input("in.jsonl", lmsys("a", "Tell me about whales.", "English", false, false));
    setting.run(&["--input", &input]).check(0, &[]);
    let before = setting.left_behind();
    setting.input("in.jsonl", lmsys("a", "Tell me about hush.", "English", false, false));
    setting.run(&["--input", &input]).check(2, &["in.jsonl changed", "run `r`", "help:"]).lacks("hush");
    setting.input("in.jsonl", lmsys("a", "Tell me about wolves.", "English", false, false));
    setting.run(&["--input", &input]).check(2, &["in.jsonl changed", "its content is another"]);
    setting.input("in.jsonl", "");
    setting.run(&["--input", &input]).check(2, &["in.jsonl changed", "its size is another"]);
    assert_eq!(setting.left_behind(), before);
    // What was made of an input does not go with it.
    fs::remove_file(&input).expect("an input");
    setting.run(&["--input", &input]).check(0, &["done already"]);
}

#[test]
fn a_copy_of_an_input_is_the_same_input() {
    let setting = Setting::new();
    let text = lmsys("a", "Tell me about whales.", "English", false, false);
    let input = setting.input("in.jsonl", &text);
    setting.run(&["--input", &input]).check(0, &[]);
    let rows = setting.rows("c");
    fs::rename(setting.input("copy.jsonl", &text), &input).expect("a copy in its place");
    setting.run(&["--input", &input]).check(0, &["done already"]);
    fs::remove_file(setting.private().join("runs/r/stages/partition.json")).expect("a manifest");
    setting.run(&["--input", &input]).check(0, &[]);
    assert_eq!(setting.rows("c"), rows);

    // Earlier versions kept no digest: what they read is known by size and tag alone.
    let owner = setting.private().join("corpora/c.owner.json");
    let mut record: serde_json::Value =
        serde_json::from_slice(&fs::read(&owner).expect("an owner record")).expect("JSON");
    record["inputs"][0].as_object_mut().expect("an input").remove("digest").expect("a digest");
    fs::write(&owner, record.to_string()).expect("an owner record");
    let refused = ["in.jsonl changed", "its size is the same, its time stamp", "no digest", "help: put back"];
    setting.run(&["--input", &input]).check(2, &refused);
}

#[test]
fn an_input_may_be_named_by_way_of_a_parent_folder() {
    let setting = Setting::new();
    let input = setting.input("in.jsonl", lmsys("a", "Tell me about whales.", "English", false, false));
    fs::create_dir(setting.folder.path().join("below")).expect("a folder");
    let parent = setting.folder.path().join("below/..").display().to_string();
    setting.run(&["--input", &format!("{parent}/in.jsonl")]).check(0, &[]);
    setting.run(&["--input", &input]).check(0, &["done already"]);
    setting.run_as("s", "d", &["--input", &format!("{parent}/none.jsonl")]).check(3, &["none.jsonl: not found"]);
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
    setting.run(&["--input", &input]).check(2, &["in.jsonl changed", "help:"]);
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
    let good = lmsys("hush-1", "Please hush.", "English", false, false);
    let invalid = setting.input("invalid.jsonl", [good.as_bytes(), b"\n{\"text\":\"hush\xFF\"}"].concat());
    let typed =
        setting.input("typed.jsonl", r#"{"conversation_id":"hush-2","conversation":[{"role":"user","content":7}]}"#);
    let no_unit = setting.input("unit.jsonl", r#"{"text":"hush is what this text says"}"#);
    let german = setting.input("german.jsonl", lmsys("hush-1", "Please hush.", "German", false, false));
    let around = setting.folder.path().display().to_string();
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["--input", "/no/such/file.json"], 3, &["/no/such/file.json"]),
        (&["--input", &setting.input("empty.json", "")], 3, &["empty.json", "empty"]),
        (&["--input", &setting.input("none.json", "[ ]")], 3, &["would be empty", "no record"]),
        (&["--input", &setting.input("words.txt", "hello hush")], 3, &["words.txt", "JSON"]),
        (&["--input", &invalid], 3, &["row 2", "invalid UTF-8", "byte"]),
        (&["--input", &typed], 3, &["row 1", "conversation[0].content", "an integer", "a string", "help:"]),
        (&["--input", &no_unit], 3, &["field `id` is missing", "--unit-rule record"]),
        (&["--input", &german], 3, &["would be empty", "--language"]),
        (&["--input", &cut], 3, &["cut.parquet", "corrupt"]),
        (&["--input", &damaged], 3, &["damaged.parquet", "corrupt"]),
        (&["--input", &parquet, "--text-column", "text"], 3, &["no column `text`", "help:"]),
        (&["--input", &german, "--language-column", "conversation_id"], 3, &["`conversation_id` cannot be two of"]),
        (&["--input", &parquet, "--language-column", "messages"], 3, &["`messages` cannot be two of", "help:"]),
        (&["--input", &parquet, "--unit-column", "user"], 3, &["no column `user`", "id, messages, redacted"]),
        (&["--input", &setting.input("gap.json", "[{\"text\":1} {\"text\":2}]")], 3, &["byte", "`,`"]),
        (&["--input", &parquet, "--max-per-unit", "0", "--ngram", "1"], 2, &["--max-per-unit", "--ngram"]),
        (&["--input", &parquet, "--ngram", "1000000000000"], 2, &["--ngram", "2 to 1000"]),
        (&["--input", &parquet, "--release", &around], 2, &["the same or nested", "help:"]),
        (&["--input", &parquet, "--split", "0.5,0.6,0"], 2, &["--split"]),
        (&["--input", &parquet, "--unit-rule", "suffix:_"], 2, &["--unit-rule"]),
        (&["--input", &parquet, "--private", ""], 2, &["private root"]),
        (&["--input", &parquet, "--private", "/sys/doppel"], 3, &["/sys/doppel", "help:"]),
        (&["--input", &around], 2, &["is a folder", "--input is repeatable"]),
        (&["--input", "ftp://host/file"], 2, &["ftp://", "help:"]),
        (&[], 2, &["--input"]),
    ];
    for (flags, code, messages) in cases {
        setting.run(flags).check(*code, messages).lacks("hush");
        assert!(setting.left_behind().is_empty(), "{flags:?}: {:?}", setting.left_behind());
    }
}

#[test]
fn a_corpus_that_could_not_get_a_budget_is_refused() {
    let setting = Setting::new();
    let input = setting.input("in.jsonl", lmsys("a", "Tell me about whales.", "English", false, false));
    for corpus in ["", "_c", ".c", "c d", &"c".repeat(101)] {
        setting.run_as("r", corpus, &["--input", &input]).check(2, &["--corpus: expected 1 to 100 letters"]);
    }
    let longest = "c".repeat(100);
    setting.run_as("r", &longest, &["--input", &input]).check(0, &[]);
}

#[test]
fn a_corpus_of_several_chunks_is_one_version() {
    let setting = Setting::new();
    let lines: Vec<_> = (0..60_000).map(|i| format!(r#"{{"id":{i},"text":"{i}"}}"#)).collect();
    let input = setting.input("in.jsonl", lines.join("\n"));
    setting.run(&["--input", &input, "--dedup", "none", "--language", "any"]).check(0, &[]);
    let rows = setting.rows("c");
    let ids: BTreeSet<&String> = rows.iter().map(|row| &row.0).collect();
    assert_eq!((rows.len(), ids.len()), (60_000, 60_000));
    let manifest = fs::read(setting.private().join("runs/r/stages/partition.json")).expect("a manifest");
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).expect("JSON");
    assert_eq!(manifest["outputs"][0]["version"], 1);
    let files = setting.left_behind().into_iter().filter(|path| path.ends_with(".parquet")).count();
    assert!(files > 1, "one chunk has 50,000 rows at most");
}

/// Runs partition twice below a disk of 256 KiB, the second time with more room; returns what the script says and what
/// the private root holds afterwards. `None` where this user may not have a disk of its own.
fn on_a_small_disk(setting: &Setting, flags: &[&str]) -> Option<(String, PathBuf)> {
    let allowed = Command::new("unshare").args(["-Urm", "true"]).status();
    if !allowed.is_ok_and(|status| status.success()) {
        return None;
    }
    let kept = setting.folder.path().join("kept");
    fs::create_dir(setting.private()).expect("a folder");
    let script = r#"
        private=$1 kept=$2; shift 2
        mount -t tmpfs -o size=256k tmpfs "$private" || exit 99
        "$@"; echo "full: $?"
        find "$private" -name '*.terms.json' -o -name partition.json
        mount -o remount,size=64m "$private" || exit 99
        "$@"; echo "roomy: $?"
        cp -a "$private" "$kept""#;
    let command = setting.command("r", "c", flags);
    let output = Command::new("unshare")
        .args(["-Urm", "sh", "-c", script, "sh"])
        .args([&setting.private(), &kept])
        .arg(command.get_program())
        .args(command.get_args())
        .output()
        .expect("unshare runs");
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert_ne!(output.status.code(), Some(99), "{text}");
    Some((text, kept))
}

#[test]
#[allow(clippy::print_stderr)]
fn a_disk_that_is_full_may_be_tried_again_with_more_room() {
    let setting = Setting::new();
    // Digits of a hash, so that Parquet cannot make them small.
    let digits = |i: usize| {
        (0..20).map(|j| format!("{:016x}", (i * 20 + j).wrapping_mul(0x9E37_79B9_7F4A_7C15))).collect::<String>()
    };
    let record = |i: usize| serde_json::json!({"id": i, "text": format!("{} {}", sentence(i), digits(i))}).to_string();
    let input = setting.input("in.jsonl", (0..3000).map(record).collect::<Vec<_>>().join("\n"));
    let Some((told, kept)) = on_a_small_disk(&setting, &["--input", &input, "--language", "any"]) else {
        eprintln!("skipped: this user may not mount a disk of its own (unshare -Urm)");
        return;
    };
    for expected in ["disk is full", "help:", "full: 5", "roomy: 0"] {
        assert!(told.contains(expected), "no `{expected}` in\n{told}");
    }
    assert!(!told.contains("terms.json") && !told.contains("partition.json"), "{told}");
    assert_eq!(rows_below(&kept, "c").len(), 3000);
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

#[test]
fn of_equal_texts_each_is_a_unit_where_records_are() {
    let setting = Setting::new();
    let rows = |texts: &[&str]| {
        let lines: Vec<_> = texts.iter().map(|text| serde_json::json!({"text": text}).to_string()).collect();
        let input = setting.input("in.jsonl", lines.join("\n"));
        let flags = ["--input", &input, "--unit-rule", "record", "--dedup", "none", "--split", "0.4,0.3,0.3"];
        setting.run(&flags).check(0, &[]);
        let rows: BTreeSet<Row> = setting.rows("c").into_iter().collect();
        let units: BTreeSet<&String> = rows.iter().map(|row| &row.1).collect();
        assert_eq!((rows.len(), units.len()), (texts.len(), texts.len()));
        for folder in ["corpora", "runs"] {
            fs::remove_dir_all(setting.private().join(folder)).expect("a folder");
        }
        rows
    };
    let (whales, squids) = ("Tell me about whales.", "Tell me about squids.");
    let fewer = rows(&[whales, squids, whales]);
    let more = rows(&[whales, whales, whales, squids]);
    assert!(fewer.is_subset(&more), "one record more changed others");
}

#[test]
fn an_input_that_is_named_twice_is_refused() {
    let setting = Setting::new();
    let input = setting.input("in.jsonl", r#"{"id":1,"text":"Tell me about whales."}"#);
    let by_folder = format!("{}/./in.jsonl", setting.folder.path().display());
    for again in [&input, &by_folder, &format!("file://{input}")] {
        let flags = ["--input", &input, "--input", again, "--max-per-unit", "0"];
        setting.run(&flags).check(2, &["in.jsonl: is named twice", "--max-per-unit"]);
    }
    assert!(setting.left_behind().is_empty(), "{:?}", setting.left_behind());
}

#[test]
fn a_copy_of_an_input_makes_no_units_of_its_own() {
    let setting = Setting::new();
    let text = r#"{"id":1,"text":"Tell me about whales."}"#;
    let (one, other) = (setting.input("one.jsonl", text), setting.input("other.jsonl", text));
    let both = ["--input", one.as_str(), "--input", &other];
    let records = [&both[..], &["--unit-rule", "record", "--dedup", "none"]].concat();
    let refused = ["one.jsonl and", "other.jsonl have the same content", "help: name one of the two"];
    setting.run(&records).check(2, &refused).lacks("whales");
    assert!(setting.left_behind().is_empty(), "{:?}", setting.left_behind());
    // Where equal records are one, a copy adds nothing.
    for (corpus, flags) in [("d", ["--unit-rule", "record"]), ("e", ["--dedup", "none"])] {
        setting.run_as(corpus, corpus, &[&both[..], &flags].concat()).check(0, &[]);
        assert_eq!(setting.rows(corpus).len(), 1, "{flags:?}");
    }
}

#[test]
fn a_language_that_tells_nothing_is_passed_over() {
    let texts = [sentence(0), "Schreibe bitte eine kurze Geschichte über einen Drachen, der malen lernt.".to_owned()];
    let setting = Setting::new();
    let parquet = |name: &str, language: ArrayRef| {
        let (ids, text) = (strings(["a", "b"]), strings(texts.iter().map(String::as_str)));
        let batch = RecordBatch::try_from_iter_with_nullable([
            ("id", ids, false),
            ("text", text, false),
            ("language", language, true),
        ]);
        setting.input(name, parquet_of(&batch.expect("a batch")))
    };
    let lines = |name: &str, languages: [serde_json::Value; 2]| {
        let line = |index: usize, language: &serde_json::Value| {
            serde_json::json!({"id": index, "text": texts[index], "language": language}).to_string()
        };
        setting.input(name, [line(0, &languages[0]), line(1, &languages[1])].join("\n"))
    };
    let check = |corpus: &str, input: &str, flags: &[&str], expected: &[String]| {
        setting.run_as(corpus, corpus, &[&["--input", input], flags].concat()).check(0, &[]);
        let found: Vec<String> = setting.rows(corpus).into_iter().map(|row| row.2).collect();
        assert_eq!(found, expected, "{corpus}");
    };
    let nulls = parquet("nulls.parquet", Arc::new(NullArray::new(2)));
    let numbers = parquet("numbers.parquet", Arc::new(Int64Array::from(vec![1, 2])));
    let mixed = lines("mixed.jsonl", [serde_json::json!(["en"]), serde_json::json!(7)]);
    // A detector judges, as it does of nulls in JSON.
    check("c", &nulls, &[], &texts[..1]);
    check("d", &lines("nulls.jsonl", [serde_json::Value::Null, serde_json::Value::Null]), &[], &texts[..1]);
    for (corpus, input) in [("e", &nulls), ("f", &numbers), ("g", &mixed)] {
        check(corpus, input, &["--language", "any"], &texts);
    }

    // Where it tells something, or should, it is still looked at.
    setting.run_as("r", "h", &["--input", &numbers]).check(3, &["field `language` is an integer"]);
    setting.run_as("r", "h", &["--input", &mixed]).check(3, &["row 1", "field `language` is an array"]);
    for input in [&nulls, &numbers] {
        let named = ["--input", input.as_str(), "--language", "any", "--language-column", "language"];
        setting.run_as("r", "h", &named).check(3, &["field `language` is"]);
    }
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
