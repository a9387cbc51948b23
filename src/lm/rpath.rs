//! Lets what is linked to libtorch find it where it was then, without `LD_LIBRARY_PATH`.
//!
//! A library's link arguments do not reach the binaries that use it, so this is the build script of each of those, and a
//! part of this crate's, for its tests.

// Standard output is how a build script talks to cargo.
#![allow(clippy::print_stdout)]

/// Writes the link argument, or an error that says what to do.
pub fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    let Some(libtorch) = std::env::var_os("LIBTORCH").map(std::path::PathBuf::from) else {
        // Without LIBTORCH, torch-sys looks in the system's folders, which the loader knows too.
        return;
    };
    let libraries = libtorch.join("lib");
    if !libraries.join("libtorch_cpu.so").is_file() {
        println!(
            "cargo::error=LIBTORCH={}: no lib/libtorch_cpu.so there; `make setup` fetches libtorch, \
             or set LIBTORCH to a libtorch 2.11 folder",
            libtorch.display()
        );
        std::process::exit(1);
    }
    println!("cargo::rustc-link-arg=-Wl,-rpath,{}", libraries.display());
}
