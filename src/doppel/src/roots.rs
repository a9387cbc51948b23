//! The roots that a command was given, and what their claims and manifests say.

use std::time::Duration;

use lake::{Claim, Manifest, PrivateRoot, ReleaseRoot, StorageOptions, Zone, manifest};
use stage::Failure;

use crate::cli::RootsArgs;

/// One or both roots.
pub struct Roots {
    /// The private zone, where it was given.
    pub private: Option<PrivateRoot>,
    /// The release zone, where it was given.
    pub release: Option<ReleaseRoot>,
}

impl Roots {
    /// Opens what `args` name; neither, or two that overlap, are refused.
    pub async fn open(args: &RootsArgs) -> Result<Self, Failure> {
        let options = StorageOptions { timeout: Duration::from_secs(args.storage_timeout) };
        let given = |url: &Option<String>| url.clone().filter(|url| !url.is_empty());
        let private = match given(&args.private) {
            Some(url) => Some(PrivateRoot::open(&url, &options).await?),
            None => None,
        };
        let release = match given(&args.release) {
            Some(url) => Some(ReleaseRoot::open(&url, &options).await?),
            None => None,
        };
        match (&private, &release) {
            (None, None) => {
                return Err(Failure::Usage(
                    "no root is given\nhelp: pass --release URL, --private URL, or both".to_owned(),
                ));
            }
            (Some(private), Some(release)) => lake::check_disjoint(private, release)?,
            _ => {}
        }
        Ok(Self { private, release })
    }
}

/// What one run left in one zone.
pub struct Told {
    /// Run id.
    pub run: String,
    /// Claims of finished and unfinished stages.
    pub claims: Vec<Claim>,
    /// Manifests of finished stages.
    pub manifests: Vec<Manifest>,
}

impl Told {
    /// The manifest of the stage that `claim` began.
    pub fn manifest_of(&self, claim: &Claim) -> Option<&Manifest> {
        self.manifests
            .iter()
            .find(|manifest| (&manifest.claim.stage, manifest.claim.shard) == (&claim.stage, claim.shard))
    }
}

/// What every run of `zone` left, by run id.
pub async fn told<Z: Zone>(zone: &Z) -> Result<Vec<Told>, Failure> {
    let mut all = Vec::new();
    for run in manifest::list_runs(zone).await? {
        let claims = manifest::claims_of(zone, &run).await?;
        let manifests = manifest::manifests_of(zone, &run).await?;
        all.push(Told { run, claims, manifests });
    }
    Ok(all)
}
