//! What runs: name, version and commit.

/// `name version commit` of the running binary, for manifests. Takes a stage's name or that of its binary.
pub fn binary(stage: &str) -> String {
    format!("{} {}", binary_name(stage), version())
}

pub(crate) fn binary_name(stage: &str) -> String {
    if stage.starts_with("doppel") { stage.to_string() } else { format!("doppel-{stage}") }
}

/// Version, and commit where it was known to the build.
pub(crate) fn version() -> &'static str {
    const VERSION: &str = env!("CARGO_PKG_VERSION");
    static WITH_COMMIT: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    match option_env!("DOPPEL_BUILD_COMMIT") {
        Some(commit) => WITH_COMMIT.get_or_init(|| format!("{VERSION} {commit}")),
        None => VERSION,
    }
}
