//! The noise key: a 256-bit secret of the private root, from which all noise and sampling derive.
//!
//! PRIVACY: whoever has it and a release can subtract the noise. It is never printed, logged or copied elsewhere.

use bytes::Bytes;
use lake::{LakeError, PrivateRoot, Zone};
use privacy::keyed::NoiseKey;

use crate::LedgerError;

const PATH: &str = "keys/noise.key";

/// The noise key of the private root, drawn from the operating system at first use (put-if-absent).
///
/// Stored as 64 hexadecimal digits and a line end. What counts is what is stored: of two stages that start at once, both
/// read back the winner's key.
pub async fn noise_key(root: &PrivateRoot) -> Result<NoiseKey, LedgerError> {
    let stored = match root.get(PATH).await {
        Ok(stored) => stored,
        Err(LakeError::NotFound(_)) => {
            root.put_if_absent(PATH, draw()?).await?;
            restrict(root)?;
            root.get(PATH).await?
        }
        Err(error) => return Err(error.into()),
    };
    parse(&stored).ok_or_else(|| {
        LedgerError::Malformed(format!(
            "{}/{PATH}: not a noise key; expected 64 hexadecimal digits, found {} bytes that are not\n\
             help: restore it from a backup. With another key, a repeated run would draw a second sample of its noise, \
             so remove it only if no run under this root will be continued or repeated",
            root.url(),
            stored.len()
        ))
    })
}

fn draw() -> Result<Bytes, LedgerError> {
    let mut secret = [0u8; 32];
    getrandom::fill(&mut secret).map_err(|error| {
        LakeError::Transient(format!("noise key: the operating system gave no randomness: {error}"))
    })?;
    Ok(Bytes::from(format!("{}\n", hex::encode(secret))))
}

fn parse(stored: &[u8]) -> Option<NoiseKey> {
    let mut secret = [0u8; 32];
    hex::decode_to_slice(stored.trim_ascii_end(), &mut secret).ok()?;
    Some(NoiseKey::new(secret))
}

/// On a local disk, takes the key away from other users; on an object store that is for the bucket's policy.
fn restrict(root: &PrivateRoot) -> Result<(), LedgerError> {
    use std::os::unix::fs::PermissionsExt;

    let url = url::Url::parse(root.url()).ok().filter(|url| url.scheme() == "file");
    let Some(folder) = url.and_then(|url| url.to_file_path().ok()) else {
        return Ok(());
    };
    let path = folder.join(PATH);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(|error| {
        LakeError::Forbidden(format!(
            "{}: its permissions cannot be restricted: {}\nhelp: the private root should belong to the user who runs \
             the stage",
            path.display(),
            error.kind()
        ))
        .into()
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::noise_key;
    use crate::tests::Fixture;

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
        assert_eq!(mode(&fixture.folder.path().join("keys/noise.key")), 0o600);
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
