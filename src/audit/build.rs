//! Lets this binary find libtorch where it was when it was linked, without `LD_LIBRARY_PATH`.
//!
//! A library cannot do this for the binaries that use it: its link arguments do not reach them.

fn main() {
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    let Some(libtorch) = std::env::var_os("LIBTORCH").map(std::path::PathBuf::from) else {
        // Without LIBTORCH, torch-sys looks in the system's folders, which the loader knows too.
        return;
    };
    let libraries = libtorch.join("lib");
    if libraries.join("libtorch_cpu.so").is_file() {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{}", libraries.display());
    } else {
        println!(
            "cargo::error=LIBTORCH={}: no lib/libtorch_cpu.so there; `make setup` fetches libtorch, \
             or set LIBTORCH to a libtorch 2.11 folder",
            libtorch.display()
        );
    }
}
