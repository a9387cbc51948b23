//! Compiles the few operations of libtorch that tch does not pass on.

mod rpath;

use std::path::PathBuf;

fn main() {
    rpath::main();
    println!("cargo::rerun-if-env-changed=LIBTORCH_INCLUDE");
    println!("cargo::rerun-if-changed=src/cuda.cpp");
    // Without LIBTORCH, torch-sys looks in the system's folders, which the compiler knows too.
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let headers = folder("LIBTORCH_INCLUDE").or_else(|| folder("LIBTORCH")).map(|root| root.join("include"));
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .includes(headers)
        .file("src/cuda.cpp")
        .compile("doppel_cuda");
}
