//! AWS profiles: `~/.aws/credentials` and `~/.aws/config`, which the object store client does not read by itself.

use std::collections::HashMap;
use std::path::PathBuf;

/// Settings of the chosen profile that the environment does not give.
pub(crate) type Profile = HashMap<String, String>;

/// Reads the profile named by `AWS_PROFILE` (or `default`) from the files named by `AWS_SHARED_CREDENTIALS_FILE` and
/// `AWS_CONFIG_FILE` (or those in the home folder). Missing files are empty.
pub(crate) fn load() -> Profile {
    let name = variable("AWS_PROFILE").or_else(|| variable("AWS_DEFAULT_PROFILE")).unwrap_or("default".into());
    let file = |name: &str, fallback: &str| {
        let path = variable(name).map(PathBuf::from).or_else(|| Some(PathBuf::from(variable("HOME")?).join(fallback)));
        path.and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default()
    };
    let mut profile = section(&file("AWS_CONFIG_FILE", ".aws/config"), &["profile ", ""], &name);
    profile.extend(section(&file("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials"), &[""], &name));
    profile
}

pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The settings of the section `name` of an INI file; `prefixes` are what may stand before the name.
fn section(text: &str, prefixes: &[&str], name: &str) -> Profile {
    let mut inside = false;
    let mut found = Profile::new();
    for line in text.lines() {
        let trimmed = line.trim();
        if let Some(header) = trimmed.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            inside = prefixes.iter().any(|prefix| header.trim().strip_prefix(prefix) == Some(name));
        } else if inside
            && !trimmed.starts_with(['#', ';'])
            && !line.starts_with(char::is_whitespace)
            && let Some((key, value)) = trimmed.split_once('=')
        {
            found.insert(key.trim().to_ascii_lowercase(), value.trim().to_string());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_named_section_is_read() {
        let text =
            "[default]\naws_access_key_id = A\n# note\n[profile lake]\nregion=eu-west-1\ns3 =\n  addressing = path\n";
        let found = section(text, &["profile ", ""], "lake");
        assert_eq!(found.get("region").map(String::as_str), Some("eu-west-1"));
        assert_eq!(found.get("addressing"), None);
        assert_eq!(section(text, &[""], "default")["aws_access_key_id"], "A");
    }
}
