//! Notes the commit that is built, for manifests and `--version`. Without git, or outside a checkout, there is none.

// Standard output is how a build script talks to cargo.
#![allow(clippy::print_stdout)]

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=DOPPEL_COMMIT");
    let commit = std::env::var("DOPPEL_COMMIT").ok().or_else(|| {
        // The log of HEAD changes with every commit and every checkout; watching a path that is not there would
        // rebuild each time.
        let git = git(&["rev-parse", "--git-dir"])?;
        let watched = [Path::new(&git).join("logs/HEAD"), Path::new(&git).join("HEAD")];
        if let Some(path) = watched.iter().find(|path| path.exists()) {
            println!("cargo::rerun-if-changed={}", path.display());
        }
        git_commit()
    });
    if let Some(commit) = commit.filter(|commit| !commit.is_empty()) {
        println!("cargo::rustc-env=DOPPEL_BUILD_COMMIT={commit}");
    }
}

fn git_commit() -> Option<String> {
    git(&["rev-parse", "--short=12", "HEAD"])
}

fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_string())
}
