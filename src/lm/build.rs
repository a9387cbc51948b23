//! Compiles the few operations of libtorch that tch does not pass on, and lets the tests of this crate find libtorch where
//! it was when they were linked, without `LD_LIBRARY_PATH`.
//!
//! A library's link arguments do not reach the binaries that use it, so each of those has the same lines.

use std::path::PathBuf;

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    println!("cargo::rerun-if-env-changed=LIBTORCH_INCLUDE");
    println!("cargo::rerun-if-changed=src/cuda.cpp");
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from);
    // Without LIBTORCH, torch-sys looks in the system's folders, which the compiler and the loader know too.
    if let Some(libtorch) = folder("LIBTORCH") {
        let libraries = libtorch.join("lib");
        if !libraries.join("libtorch_cpu.so").is_file() {
            println!(
                "cargo::error=LIBTORCH={}: no lib/libtorch_cpu.so there; `make setup` fetches libtorch, \
                 or set LIBTORCH to a libtorch 2.11 folder",
                libtorch.display()
            );
            return;
        }
        println!("cargo::rustc-link-arg=-Wl,-rpath,{}", libraries.display());
    }
    let headers = folder("LIBTORCH_INCLUDE").or_else(|| folder("LIBTORCH")).map(|root| root.join("include"));
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .includes(headers)
        .file("src/cuda.cpp")
        .compile("doppel_cuda");
}
