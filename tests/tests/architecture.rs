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
