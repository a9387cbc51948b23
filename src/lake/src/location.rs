//! Where a URL points: which store, and which path in it.

use std::path::{Component, Path as LocalPath, PathBuf};

use object_store::path::Path;
use url::Url;

use crate::LakeError;

/// A parsed storage URL. Credentials in URLs are refused, so that it can be shown and written down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Location {
    /// Canonical URL, percent-encoded, without a slash at the end.
    pub url: Url,
    /// Path below the root of the store.
    pub path: Path,
    pub store: StoreKind,
}

/// Which store a URL names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StoreKind {
    Local,
    S3 { bucket: String },
    Gcs { bucket: String },
    Azure { container: String },
}

impl Location {
    /// Parses a path, `file://`, `s3://`, `gs://` or `az://` URL.
    pub fn parse(text: &str) -> Result<Self, LakeError> {
        if text.trim().is_empty() {
            return Err(LakeError::Usage(
                "an empty storage URL\nhelp: give a path, or a file://, s3://, gs:// or az:// URL".into(),
            ));
        }
        match text.split_once("://") {
            None => Self::local(LocalPath::new(text), text),
            Some(("file", _)) => Self::file_url(text),
            Some((scheme, rest)) => Self::remote(scheme, rest),
        }
    }

    /// The local path, for a local location.
    pub fn local_path(&self) -> Option<PathBuf> {
        match self.store {
            StoreKind::Local => self.url.to_file_path().ok(),
            _ => None,
        }
    }

    /// The location of `relative` below this one; refuses paths that would leave it.
    pub fn join(&self, relative: &str) -> Result<Path, LakeError> {
        let refuse = |why: &str| LakeError::Usage(format!("{}: `{relative}`: {why}", self.url));
        if relative.split('/').any(|part| part == ".." || part == ".") {
            return Err(refuse("a path inside a root has no `.` or `..`"));
        }
        let below = Path::parse(relative.trim_matches('/')).map_err(|_| refuse("not a valid object path"))?;
        Ok(self.path.parts().chain(below.parts()).collect())
    }

    /// The location of a table at `relative`, or of those below it. Readers of logs decode paths once more than they were
    /// encoded, so that a folder which is really called `lake%20one` is not found again.
    pub fn join_table(&self, relative: &str) -> Result<Path, LakeError> {
        let path = self.join(relative)?;
        match path.parts().find(|part| has_code(part.as_ref())) {
            Some(part) => Err(LakeError::Usage(format!(
                "{}: no table can be in `{}`, where two hexadecimal digits follow a `%`: its readers take that for a \
                 code\nhelp: choose a name without it",
                self.url_of(relative),
                part.as_ref()
            ))),
            None => Ok(path),
        }
    }

    /// The URL of `relative` below this location.
    pub fn url_of(&self, relative: &str) -> Url {
        let mut url = self.url.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(relative.split('/').filter(|part| !part.is_empty()));
        }
        url
    }

    /// Whether the two are the same, or one lies within the other.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.store == other.store && (self.path.prefix_matches(&other.path) || other.path.prefix_matches(&self.path))
    }

    fn file_url(text: &str) -> Result<Self, LakeError> {
        let refuse = || LakeError::Usage("not a valid file:// URL\nhelp: write file:///absolute/path".into());
        let raw = text.trim_start_matches("file://");
        refuse_parents(raw)?;
        let url = Url::parse(text).map_err(|_| refuse())?;
        if url.query().is_some() || url.fragment().is_some() {
            return Err(LakeError::Usage(
                "a file:// URL with `?` or `#`\nhelp: write %3F or %23, or give the path alone".into(),
            ));
        }
        Self::local(&url.to_file_path().map_err(|()| refuse())?, text)
    }

    fn local(path: &LocalPath, text: &str) -> Result<Self, LakeError> {
        refuse_parents(text)?;
        let path = canonical(path).map_err(|error| crate::error::explain_io(text, &error))?;
        let url = Url::from_file_path(&path)
            .map_err(|()| LakeError::Usage(format!("{text}: not a path that can be written as a URL")))?;
        let path = Path::from_url_path(url.path())
            .map_err(|_| LakeError::Usage(format!("{text}: not a valid path\nhelp: choose a plainer name")))?;
        Ok(Self { url, path, store: StoreKind::Local })
    }

    fn remote(scheme: &str, rest: &str) -> Result<Self, LakeError> {
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.contains('@') || bucket.contains(':') && !bucket.starts_with('[') {
            return Err(LakeError::Usage(format!(
                "a {scheme}:// URL with credentials or a port\nhelp: credentials and AWS_ENDPOINT_URL belong in the environment"
            )));
        }
        let (scheme, store) = match scheme {
            "s3" | "s3a" => ("s3", StoreKind::S3 { bucket: bucket.into() }),
            "gs" => ("gs", StoreKind::Gcs { bucket: bucket.into() }),
            "az" | "azure" => ("az", StoreKind::Azure { container: bucket.into() }),
            other => {
                return Err(LakeError::Usage(format!(
                    "`{other}://` is no storage that doppel knows\nhelp: use a path, file://, s3://, gs:// or az://"
                )));
            }
        };
        if bucket.is_empty() {
            return Err(LakeError::Usage(format!("a {scheme}:// URL without a bucket")));
        }
        refuse_parents(prefix)?;
        let refuse = || LakeError::Usage(format!("{scheme}://{rest}: not a valid storage URL"));
        let mut url = Url::parse(&format!("{scheme}://{bucket}/{}", prefix.trim_matches('/'))).map_err(|_| refuse())?;
        if url.query().is_some() || url.fragment().is_some() {
            return Err(LakeError::Usage(format!("{scheme}://{rest}: a storage URL has no `?` and no `#`")));
        }
        let path = Path::from_url_path(url.path()).map_err(|_| refuse())?;
        let trimmed = url.path().trim_end_matches('/').to_string();
        url.set_path(&trimmed);
        Ok(Self { url, path, store })
    }
}

/// Whether decoding changes `text`.
fn has_code(text: &str) -> bool {
    text.as_bytes().windows(3).any(|code| code[0] == b'%' && code[1..].iter().all(u8::is_ascii_hexdigit))
}

fn refuse_parents(text: &str) -> Result<(), LakeError> {
    let parent = |part: &str| matches!(part.to_ascii_lowercase().replace("%2e", ".").as_str(), "..");
    if text.split(['/', '\\']).any(parent) {
        return Err(LakeError::Usage(format!(
            "{text}: `..` in a storage URL\nhelp: write the path without it, so that zones cannot be left"
        )));
    }
    Ok(())
}

/// The absolute path with symlinks resolved as far as it exists: two names of one folder must compare equal.
fn canonical(path: &LocalPath) -> std::io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    let mut missing = Vec::new();
    let mut existing = absolute.as_path();
    loop {
        match existing.canonicalize() {
            Ok(resolved) => return Ok(missing.iter().rev().fold(resolved, |path, part| path.join(part))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        match (existing.components().next_back(), existing.parent()) {
            (Some(Component::Normal(name)), Some(parent)) => {
                missing.push(name.to_os_string());
                existing = parent;
            }
            _ => return Ok(absolute),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(text: &str) -> String {
        match Location::parse(text) {
            Err(LakeError::Usage(message)) => message,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn odd_urls_are_refused_with_a_reason() {
        for (text, reason) in [
            ("", "empty"),
            ("  ", "empty"),
            ("s3://bucket/a/../b", "`..`"),
            ("s3://bucket/a/%2E%2e/b", "`..`"),
            ("data/../private", "`..`"),
            ("file:///tmp/../etc", "`..`"),
            ("s3://", "without a bucket"),
            ("s3://key:secret@bucket/a", "credentials"),
            ("ftp://host/a", "no storage"),
            ("s3://bucket/a?b", "`?`"),
        ] {
            let message = usage(text);
            assert!(message.contains(reason), "{text}: {message}");
            assert!(!message.contains("secret"), "{message}");
        }
    }

    #[test]
    fn spaces_and_unicode_survive() {
        let location = Location::parse("s3://bucket/my lake/ünï").unwrap();
        assert_eq!(location.path.as_ref(), "my lake/ünï");
        assert_eq!(Location::parse(location.url.as_str()).unwrap(), location);
        let folder = tempfile::tempdir().unwrap();
        let text = folder.path().join("my läke 100%").display().to_string();
        let local = Location::parse(&text).unwrap();
        assert_eq!(local.local_path().unwrap(), folder.path().canonicalize().unwrap().join("my läke 100%"));
        assert_eq!(Location::parse(local.url.as_str()).unwrap(), local);
    }

    #[test]
    fn a_name_that_decodes_to_another_holds_no_table() {
        let folder = tempfile::tempdir().unwrap();
        let local = |name: &str| folder.path().join(name).display().to_string();
        let root = |text: &str| Location::parse(text).unwrap().join_table("runs/demo/loss");
        for text in [local("lake%20one"), local("a/100%25/b"), "s3://bucket/my%2520lake".into()] {
            let refused = root(&text);
            assert!(matches!(&refused, Err(LakeError::Usage(told)) if told.contains("help:")), "{text}: {refused:?}");
        }
        let encoded = format!("file://{}", local("my%20lake"));
        for text in [local("my lake 100% #1"), encoded, "s3://bucket/my%20lake".into(), "s3://bucket/my lake".into()] {
            root(&text).unwrap();
        }
        let plain = Location::parse("s3://bucket/lake").unwrap();
        plain.join_table("corpora/a%2Fb").unwrap_err();
        assert_eq!(plain.join("corpora/a%2Fb").unwrap().as_ref(), "lake/corpora/a%2Fb");
    }

    #[test]
    fn symlinks_and_nesting_are_seen() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| Location::parse(&folder.path().join(name).display().to_string()).unwrap();
        std::fs::create_dir(folder.path().join("a")).unwrap();
        std::os::unix::fs::symlink(folder.path().join("a"), folder.path().join("link")).unwrap();
        assert!(at("a").overlaps(&at("link")));
        assert!(at("a").overlaps(&at("link/below/it")));
        assert!(at("a/b").overlaps(&at("a")));
        assert!(!at("a").overlaps(&at("ab")));
        let s3 = |text: &str| Location::parse(text).unwrap();
        assert!(s3("s3://b").overlaps(&s3("s3://b/c")));
        assert!(!s3("s3://b/c").overlaps(&s3("s3://b/d")));
        assert!(!s3("s3://b/c").overlaps(&s3("gs://b/c")));
    }

    #[test]
    fn a_relative_path_is_taken_from_the_working_directory() {
        let here = std::env::current_dir().unwrap().canonicalize().unwrap();
        assert_eq!(Location::parse("lake/private").unwrap().local_path().unwrap(), here.join("lake/private"));
    }
}
