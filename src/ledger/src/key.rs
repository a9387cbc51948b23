//! The noise key: a 256-bit secret of the private root, from which all noise and sampling derive.
//!
//! Stored as 64 hexadecimal digits and a line end.
//!
//! PRIVACY: whoever has it and a release can subtract the noise. It is never printed, logged or copied elsewhere.

use bytes::Bytes;
use lake::{LakeError, PrivateRoot, Zone};
use privacy::keyed::NoiseKey;

use crate::LedgerError;

const FOLDER: &str = "keys";
const PATH: &str = "keys/noise.key";

/// The noise key as it is stored, if there is one.
pub(crate) async fn stored(root: &PrivateRoot) -> Result<Option<NoiseKey>, LedgerError> {
    let stored = match root.get(PATH).await {
        Ok(stored) => stored,
        Err(LakeError::NotFound(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    parse(&stored).map(Some).ok_or_else(|| {
        LedgerError::Malformed(format!(
            "{}/{PATH}: not a noise key; expected 64 hexadecimal digits, found {} bytes that are not\n\
             help: {RESTORE}",
            root.url(),
            stored.len()
        ))
    })
}

/// The error of a private root whose noise key is gone.
pub(crate) fn lost(root: &PrivateRoot) -> LedgerError {
    LedgerError::Malformed(format!(
        "{}/{PATH}: is missing, though mechanisms were reserved under this root\nhelp: {RESTORE}",
        root.url()
    ))
}

/// The way out where the key that reservations were made under is not there.
const RESTORE: &str = "restore it from the store's versions or a backup. With another key a repeated run would draw a \
                       second sample of its noise, so none is drawn in its place; if it is lost for good, begin a new \
                       private root, with a budget that is smaller by what was spent";

/// Draws a key and stores it, unless there is one by then.
pub(crate) async fn draw(root: &PrivateRoot) -> Result<(), LedgerError> {
    let mut secret = [0u8; 32];
    getrandom::fill(&mut secret).map_err(|error| {
        LakeError::Transient(format!("noise key: the operating system gave no randomness: {error}"))
    })?;
    shut(root)?;
    root.put_if_absent(PATH, Bytes::from(format!("{}\n", hex::encode(secret)))).await?;
    Ok(())
}

fn parse(stored: &[u8]) -> Option<NoiseKey> {
    let mut secret = [0u8; 32];
    hex::decode_to_slice(stored.trim_ascii_end(), &mut secret).ok()?;
    Some(NoiseKey::new(secret))
}

/// On a local disk, makes a folder for the key that other users cannot enter; on an object store that is for the bucket's
/// policy. It comes before the key, so that there is no moment at which others could read it.
fn shut(root: &PrivateRoot) -> Result<(), LedgerError> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};

    let url = url::Url::parse(root.url()).ok().filter(|url| url.scheme() == "file");
    let Some(root) = url.and_then(|url| url.to_file_path().ok()) else {
        return Ok(());
    };
    let folder = root.join(FOLDER);
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    made.and_then(|()| std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o700))).map_err(|error| {
        LakeError::Forbidden(format!(
            "{}: it cannot be closed to other users: {}\nhelp: the private root should belong to the user who runs the \
             stage",
            folder.display(),
            error.kind()
        ))
        .into()
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::tests::{Fixture, votes};
    use crate::{noise_key, read, reserve};

    #[tokio::test]
    async fn the_noise_key_is_drawn_once_and_kept_from_other_users() {
        use std::os::unix::fs::PermissionsExt;
        let fixture = Fixture::new().await;
        let first = noise_key(&fixture.root).await.unwrap();
        let again = noise_key(&fixture.root).await.unwrap();
        assert_eq!(first.expose(), again.expose());
        let other = Fixture::new().await;
        assert_ne!(first.expose(), noise_key(&other.root).await.unwrap().expose());
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&fixture.folder.path().join("keys")), 0o700);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn stages_that_start_at_once_get_the_same_noise_key() {
        let fixture = Fixture::new().await;
        let racers = (0..8).map(|_| {
            let root = fixture.root.clone();
            tokio::spawn(async move { noise_key(&root).await.map(|key| *key.expose()) })
        });
        let keys = futures::future::join_all(racers.collect::<Vec<_>>()).await;
        let keys: Vec<_> = keys.into_iter().map(|key| key.unwrap().unwrap()).collect();
        assert!(keys.iter().all(|key| *key == keys[0]));
    }

    #[tokio::test]
    async fn a_lost_noise_key_is_not_replaced_once_anything_was_reserved() {
        let fixture = Fixture::with_budget(8.0).await;
        let (root, path) = (&fixture.root, fixture.folder.path().join("keys/noise.key"));
        noise_key(root).await.unwrap();
        // Nothing was reserved yet, so no noise was drawn from the first key.
        std::fs::remove_file(&path).unwrap();
        reserve(root, &votes("a")).await.unwrap();
        let original = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let refusals = [
            noise_key(root).await.map(|_| ()),
            reserve(root, &votes("a")).await.map(|_| ()),
            reserve(root, &votes("b")).await.map(|_| ()),
            read(root, "chats").await.map(|_| ()),
        ];
        for refusal in refusals {
            let error = refusal.unwrap_err();
            assert_eq!(error.exit_code(), 3);
            let text = error.to_string();
            assert!(text.contains("keys/noise.key: is missing") && text.contains("help: restore it"), "{text}");
        }
        assert!(!path.exists(), "a new key was drawn");
        std::fs::write(&path, original).unwrap();
        reserve(root, &votes("a")).await.unwrap();
    }

    #[tokio::test]
    async fn another_noise_key_does_not_open_a_ledger_with_reservations() {
        let (fixture, other) = (Fixture::with_budget(8.0).await, Fixture::with_budget(8.0).await);
        reserve(&fixture.root, &votes("a")).await.unwrap();
        reserve(&other.root, &votes("a")).await.unwrap();
        let key = |fixture: &Fixture| fixture.folder.path().join("keys/noise.key");
        std::fs::copy(key(&other), key(&fixture)).unwrap();
        let error = reserve(&fixture.root, &votes("a")).await.unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains("or the noise key is not the one it was written under"), "{error}");
    }

    #[tokio::test]
    async fn a_malformed_noise_key_is_an_error_that_does_not_quote_it() {
        let fixture = Fixture::new().await;
        let path = fixture.folder.path().join("keys/noise.key");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        for content in
            ["", "5ec2e7", "not hexadecimal at all, but sixty-four characters long, exactly.", "5ec2e7\n5ec2e7\n"]
        {
            std::fs::write(&path, content).unwrap();
            let error = noise_key(&fixture.root).await.map(|_| ()).unwrap_err();
            assert_eq!(error.exit_code(), 3);
            assert!(error.to_string().contains("keys/noise.key: not a noise key"), "{error}");
            assert!(content.is_empty() || !error.to_string().contains(content.trim()), "{error}");
        }
    }
}
