//! The roots that a command was given, and what their claims and manifests say.

use std::time::Duration;

use clap::Args;
use lake::{Claim, Manifest, PrivateRoot, ReleaseRoot, StorageOptions, Zone, manifest};
use stage::{Failure, Format, Verbosity};

/// Where the private zone is.
#[derive(Args, Clone, Debug)]
pub struct PrivateArgs {
    /// Private root: a path, file://, s3://, gs:// or az:// URL.
    #[arg(long, env = "DOPPEL_PRIVATE", value_name = "URL", hide_env_values = true, global = true)]
    pub private: Option<String>,
    /// Deadline of one storage operation with its retries, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 180, global = true,
          value_parser = stage::common::storage_timeout())]
    pub storage_timeout: u64,
}

impl PrivateArgs {
    /// Opens the private root.
    pub async fn open(&self) -> Result<PrivateRoot, Failure> {
        let url = self.private.as_deref().filter(|url| !url.is_empty());
        let url = url.ok_or_else(|| {
            Failure::Usage("no private root is given\nhelp: pass --private URL, or set DOPPEL_PRIVATE".to_owned())
        })?;
        let options = StorageOptions { timeout: Duration::from_secs(self.storage_timeout) };
        Ok(PrivateRoot::open(url, &options).await?)
    }
}

/// Where the roots are; one is enough.
#[derive(Args, Clone, Debug)]
pub struct RootsArgs {
    /// Private root.
    #[arg(long, env = "DOPPEL_PRIVATE", value_name = "URL", hide_env_values = true)]
    pub private: Option<String>,
    /// Release root.
    #[arg(long, env = "DOPPEL_RELEASE", value_name = "URL", hide_env_values = true)]
    pub release: Option<String>,
    /// Deadline of one storage operation with its retries, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 180, value_parser = stage::common::storage_timeout())]
    pub storage_timeout: u64,
    /// What standard output carries.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    /// Which flags shape the log.
    #[command(flatten)]
    pub verbosity: Verbosity,
}

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

    /// The zones whose roots were given.
    pub fn zones(&self) -> Vec<&'static str> {
        let private = self.private.iter().map(|_| PrivateRoot::NAME);
        private.chain(self.release.iter().map(|_| ReleaseRoot::NAME)).collect()
    }

    /// The latest version of a table, where the root of `zone` was given and has it.
    pub async fn version(&self, zone: &str, path: &str) -> Result<Option<i64>, Failure> {
        match (zone, &self.private, &self.release) {
            (PrivateRoot::NAME, Some(root), _) => Ok(root.table(path).version().await?),
            (ReleaseRoot::NAME, _, Some(root)) => Ok(root.table(path).version().await?),
            _ => Ok(None),
        }
    }

    /// Their URLs, for messages.
    pub fn names(&self) -> String {
        let private = self.private.iter().map(|root| root.url().to_owned());
        private.chain(self.release.iter().map(|root| root.url().to_owned())).collect::<Vec<_>>().join(" and ")
    }

    /// Ids of all runs.
    pub async fn ids(&self) -> Result<Vec<String>, Failure> {
        let mut ids = Vec::new();
        if let Some(root) = &self.private {
            ids.extend(manifest::list_runs(root).await?);
        }
        if let Some(root) = &self.release {
            ids.extend(manifest::list_runs(root).await?);
        }
        ids.sort();
        ids.dedup();
        Ok(ids)
    }

    /// Fails where nothing lies in any root, as where a URL is mistyped: an empty answer would say that nothing was run.
    pub async fn refuse_nothing(&self) -> Result<(), Failure> {
        let mut is_empty = true;
        if let Some(root) = &self.private {
            is_empty &= root.is_empty().await?;
        }
        if let Some(root) = &self.release {
            is_empty &= root.is_empty().await?;
        }
        if is_empty { Err(nothing(&self.names())) } else { Ok(()) }
    }

    /// What each root knows of `run`; that none knows it is an error.
    pub async fn run(&self, run: &str) -> Result<Vec<Known>, Failure> {
        let known = self.known(run).await?;
        match known.iter().all(|known| known.claims.is_empty() && known.manifests.is_empty()) {
            true => Err(self.unknown(run)),
            false => Ok(known),
        }
    }

    /// The failure that no root knows `run`.
    pub fn unknown(&self, run: &str) -> Failure {
        let roots = self.names();
        Failure::Input(format!("the run `{run}` left nothing in {roots}\nhelp: `doppel runs` lists runs"))
    }

    /// What each root knows of `run`.
    pub async fn known(&self, run: &str) -> Result<Vec<Known>, Failure> {
        let mut all = Vec::new();
        if let Some(root) = &self.private {
            all.push(known(root, run).await?);
        }
        if let Some(root) = &self.release {
            all.push(known(root, run).await?);
        }
        Ok(all)
    }
}

/// What one root knows of a run.
pub struct Known {
    /// The root's zone.
    pub zone: &'static str,
    /// Run id.
    pub run: String,
    /// Whether its results were removed for good.
    pub dropped: bool,
    /// Claims of finished and unfinished stages.
    pub claims: Vec<Claim>,
    /// Manifests of finished stages.
    pub manifests: Vec<Manifest>,
}

impl Known {
    /// The manifest of the stage that `claim` began.
    pub fn manifest_of(&self, claim: &Claim) -> Option<&Manifest> {
        self.manifests
            .iter()
            .find(|manifest| (&manifest.claim.stage, manifest.claim.shard) == (&claim.stage, claim.shard))
    }
}

/// The failure that nothing lies below the roots of these names.
pub fn nothing(names: &str) -> Failure {
    Failure::Input(format!("{names}: nothing is there\nhelp: correct the URL, or let a stage write there first"))
}

/// What `root` knows of every run, by run id.
pub async fn all<Z: Zone>(root: &Z) -> Result<Vec<Known>, Failure> {
    let mut all = Vec::new();
    for run in manifest::list_runs(root).await? {
        all.push(known(root, &run).await?);
    }
    Ok(all)
}

async fn known<Z: Zone>(root: &Z, run: &str) -> Result<Known, Failure> {
    let claims = manifest::claims_of(root, run).await?;
    let manifests = manifest::manifests_of(root, run).await?;
    let dropped = manifest::is_dropped(root, run).await?;
    Ok(Known { zone: Z::NAME, run: run.to_owned(), dropped, claims, manifests })
}

/// Storage options for a check: whoever waits wants to know soon.
pub fn impatient() -> StorageOptions {
    StorageOptions { timeout: Duration::from_secs(30) }
}
