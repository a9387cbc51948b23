//! Rules about the repository as a whole: which crate may reach which, and what every file of a kind must have.
//!
//! The table of crates stands in ARCHITECTURE.md; a dependency that breaks it compiles, so a test must say no.

use std::collections::BTreeSet;
use std::process::Command;

use scenarios::repository;

/// Names of all crates that `package` links, itself included.
fn reached(package: &str) -> BTreeSet<String> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["tree", "--offline", "--locked", "--package", package, "--edges", "normal"])
        .args(["--prefix", "none", "--format", "{p}"])
        .current_dir(repository::root())
        // With this setting, cargo answers for the whole workspace whatever the package.
        .env_remove("CARGO_RESOLVER_FEATURE_UNIFICATION")
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
    let names = String::from_utf8_lossy(&output.stdout);
    names.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_string).collect()
}

#[track_caller]
fn check(package: &str, forbidden: &[&str]) {
    let reached = reached(package);
    assert!(reached.contains(package), "{package} is not a package of this workspace");
    for name in forbidden {
        assert!(
            !reached.contains(*name),
            "{package} must not reach {name}; `cargo tree -p {package} -i {name}` says how"
        );
    }
}

const LIBTORCH: [&str; 3] = ["tch", "torch-sys", "lm"];
const OURS: [&str; 6] = ["privacy", "lake", "ledger", "stage", "lm", "workflow"];

fn ours_except(allowed: &[&str]) -> Vec<&'static str> {
    OURS.into_iter().filter(|name| !allowed.contains(name)).collect()
}

#[test]
fn privacy_is_mathematics_alone() {
    check("privacy", &ours_except(&["privacy"]));
    check("privacy", &["tokio", "object_store", "tch", "torch-sys", "deltalake", "reqwest"]);
}

#[test]
fn storage_models_and_workflows_know_no_privacy_and_not_each_other() {
    for package in ["lake", "lm", "workflow"] {
        check(package, &ours_except(&[package]));
    }
}

#[test]
fn the_shell_of_every_binary_knows_no_mechanism() {
    check("stage", &["tch", "torch-sys", "lm", "privacy", "ledger"]);
}

#[test]
fn the_ledger_does_not_link_libtorch() {
    check("ledger", &LIBTORCH);
}

#[test]
fn stages_that_need_no_libtorch_do_not_link_it() {
    for package in ["doppel-partition", "doppel-vote", "doppel-query", "doppel"] {
        check(package, &LIBTORCH);
    }
}

#[test]
fn stages_without_a_mechanism_cannot_reach_one() {
    for package in ["doppel-synthesize", "doppel-embed", "doppel-query"] {
        check(package, &["privacy", "ledger"]);
    }
}

#[test]
fn stages_of_the_release_zone_do_not_name_the_private_root() {
    for folder in ["src/synthesize/src", "src/query/src"] {
        let files = repository::files(folder, "rs");
        assert!(!files.is_empty(), "{folder}");
        for path in files {
            let source = repository::read(&path);
            for name in ["PrivateRoot", "private_root", ".roots(", ".private"] {
                assert!(!source.contains(name), "{}: {name}", path.display());
            }
        }
    }
}

#[test]
fn nothing_of_the_product_rests_on_the_audit() {
    for package in OURS {
        check(package, &["doppel-audit"]);
    }
    for stage in ["partition", "train", "synthesize", "embed", "vote", "query"] {
        check(&format!("doppel-{stage}"), &["doppel-audit"]);
    }
}

#[test]
fn the_front_starts_stages_and_links_none() {
    let stages =
        ["partition", "train", "synthesize", "embed", "vote", "query", "audit"].map(|stage| format!("doppel-{stage}"));
    check("doppel", &stages.each_ref().map(String::as_str));
}

/// What tells something, by a line of log, a stream or telemetry, when it stands before a bracket.
const OUTLETS: [&str; 22] = [
    "trace!",
    "debug!",
    "info!",
    "warn!",
    "error!",
    "event!",
    "span!",
    "trace_span!",
    "debug_span!",
    "info_span!",
    "warn_span!",
    "error_span!",
    "print!",
    "println!",
    "eprint!",
    "eprintln!",
    "stdout",
    "stderr",
    "tell",
    "instrument",
    "set_attribute",
    "Progress::public",
];

/// Every place where a crate that holds private records tells something: file, call, and why it may.
const TOLD: [(&str, &str, &str); 6] = [
    (
        "src/partition/src/lib.rs",
        r#"warn!(object, records, "the input is cut off; its {records} whole records are taken")"#,
        "only where the operator declared the counts public",
    ),
    (
        "src/partition/src/lib.rs",
        r#"warn!(object,
            "the input is cut off; its whole records are taken (--declare-public-counts tells how many)")"#,
        "the operator named the object; that it is cut off is told instead of failing without a reason",
    ),
    (
        "src/train/src/run.rs",
        r#"Progress::public("train", "steps", mechanism.steps())"#,
        "the steps of the mechanism are planned before it reads anything",
    ),
    ("src/train/src/run.rs", r#"Progress::public("train without privacy", "steps", steps)"#, "the steps are a setting"),
    (
        "src/vote/src/run.rs",
        r#"info!(components = pca.output_columns(), iterations = clustering.iterations, inertia = clustering.inertia,
            "clustered")"#,
        "clusters are made from public vectors alone",
    ),
    (
        "src/embed/src/table.rs",
        r#"Progress::public("embed", "rows", rows)"#,
        "Meter::public is for texts of the release zone",
    ),
];

#[test]
fn every_line_that_private_code_tells_was_looked_at() {
    let mut missing: Vec<_> = TOLD.iter().map(|(file, call, reason)| (*file, bare(call), *reason)).collect();
    for folder in ["src/partition/src", "src/train/src", "src/vote/src", "src/embed/src"] {
        for path in repository::files(folder, "rs") {
            let file = path.strip_prefix(repository::root()).expect("a file of the checkout").display().to_string();
            for call in told(&repository::read(&path)) {
                let allowed = missing.iter().position(|(place, known, _)| (*place, known) == (&*file, &call));
                let known = allowed.map(|place| missing.swap_remove(place));
                assert!(known.is_some(), "{file}: {call}\ntells something; add it to TOLD with the reason why it may");
            }
        }
    }
    assert!(missing.is_empty(), "TOLD names calls that are not there: {missing:#?}");
}

/// The calls of [`OUTLETS`] in a source file, comments left out, in the form that [`bare`] gives.
fn told(source: &str) -> Vec<String> {
    let code: String =
        source.lines().filter(|line| !line.trim_start().starts_with("//")).map(|line| format!("{line}\n")).collect();
    let mut found = Vec::new();
    for outlet in OUTLETS {
        for (at, _) in code.match_indices(outlet) {
            let goes_on = |c: char| c.is_alphanumeric() || c == '_';
            let (before, after) = (&code[..at], &code[at + outlet.len()..]);
            if !before.ends_with(goes_on) && after.trim_start().starts_with(['(', '[', '{']) {
                found.push(bare(&format!("{outlet}{}", bracketed(after))));
            }
        }
    }
    found
}

/// What stands from the first bracket to the one that closes it.
fn bracketed(code: &str) -> &str {
    let (mut depth, mut in_text, mut escaped) = (0, false, false);
    for (at, c) in code.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => in_text = !in_text,
            '(' | '[' | '{' if !in_text => depth += 1,
            ')' | ']' | '}' if !in_text => depth -= 1,
            _ => continue,
        }
        if depth == 0 && !in_text {
            return &code[..=at];
        }
    }
    code
}

/// A call without what a formatter may change.
fn bare(call: &str) -> String {
    let bare: String = call.split_whitespace().collect();
    bare.replace(",)", ")")
}

#[test]
fn every_published_query_says_what_it_answers_and_is_tested() {
    let queries = repository::files("sql", "sql");
    assert!(queries.len() >= 8, "found {} queries", queries.len());
    for query in queries {
        let name = query.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        assert!(repository::read(&query).starts_with("-- "), "sql/{name}.sql: its first line must say what it answers");
        let test = repository::root().join(format!("tests/sql/{name}.slt"));
        assert!(test.exists(), "sql/{name}.sql has no tests/sql/{name}.slt");
        assert!(repository::read(&test).contains(&format!("@{name}\n")), "tests/sql/{name}.slt does not run @{name}");
    }
}

#[test]
fn every_source_file_opens_by_saying_why_it_exists() {
    for folder in ["src", "tests"] {
        for file in repository::files(folder, "rs") {
            // Unit tests in a file of their own belong to the file that they test, which says it.
            let is_unit_test = file.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests"));
            let says_why = is_unit_test || repository::read(&file).starts_with("//! ");
            assert!(says_why, "{}: no module doc", file.display());
        }
    }
}

#[test]
fn nothing_is_left_to_do() {
    // Written in two parts, so that this file does not find itself.
    let marks = [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("dbg", "!("), concat!("TO", "DO")];
    for file in repository::files("src", "rs") {
        let text = repository::read(&file);
        for mark in marks {
            assert!(!text.contains(mark), "{}: {mark}", file.display());
        }
    }
}

#[test]
fn no_path_of_somebodys_machine_is_committed() {
    let homes = [concat!("/ro", "ot/"), concat!("/ho", "me/"), concat!("/Us", "ers/")];
    for (folder, extension) in [
        ("src", "rs"),
        ("src", "toml"),
        ("tests", "rs"),
        ("tests", "py"),
        ("infra", "sh"),
        ("infra", "py"),
        ("workflows", "yaml"),
    ] {
        for file in repository::files(folder, extension) {
            let text = repository::read(&file);
            for home in homes {
                assert!(!text.contains(home), "{}: {home}", file.display());
            }
        }
    }
}
