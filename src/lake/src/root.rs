//! The two roots of a deployment and the objects below them.
//!
//! Paths inside a root are relative, `/`-separated strings such as `runs/demo/adapter/adapter_config.json`.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use object_store::ObjectStore;

use crate::connect::StorageOptions;
pub use crate::error::LakeError;
use crate::location::Location;
use crate::overlay::Overlay;
use crate::store::Store;

/// Versions to read of tables, by their paths, in place of the latest.
pub type Pins = BTreeMap<String, i64>;

mod sealed {
    /// What tells the two roots apart, for the compiler: a function of one does not take the other.
    pub trait Kind: Clone + std::fmt::Debug + Send + Sync + 'static {
        /// `private` or `release`.
        const NAME: &'static str;
    }

    /// Keeps [`super::Zone`] to the two roots.
    pub trait Sealed {
        /// What the root stands on.
        fn store(&self) -> &crate::store::Store;
        /// Versions that were asked for.
        fn pins(&self) -> &super::Pins;
    }
}

use sealed::{Kind, Sealed};

/// What both zones can do. Sealed: the only implementations are [`PrivateRoot`] and [`ReleaseRoot`].
pub trait Zone: Sealed + Clone + std::fmt::Debug + Send + Sync + 'static {
    /// `private` or `release`, as manifests and messages name it.
    const NAME: &'static str;

    /// The root's URL without credentials.
    fn url(&self) -> &str {
        self.store().url()
    }

    /// The URL of the object at `path`, for messages and manifests.
    fn url_of(&self, path: &str) -> String {
        self.store().url_of(path).to_string()
    }

    /// What storage or network failed last below this root, retries and all, or refused: for errors of libraries that
    /// kept only its text.
    fn last_failure(&self) -> Option<LakeError> {
        self.store().failure_since(None)
    }

    /// Reads one object whole.
    fn get(&self, path: &str) -> impl Future<Output = Result<Bytes, LakeError>> + Send {
        self.store().get(path)
    }

    /// Writes one object, replacing what was there; large bodies go by multipart upload. Readers see the old object or
    /// the new one, never a part.
    fn put(&self, path: &str, body: Bytes) -> impl Future<Output = Result<(), LakeError>> + Send {
        self.store().put(path, body)
    }

    /// Writes one object unless it exists; `false` when it did. Of many writers at once, exactly one gets `true`.
    fn put_if_absent(&self, path: &str, body: Bytes) -> impl Future<Output = Result<bool, LakeError>> + Send {
        self.store().put_if_absent(path, body)
    }

    /// Paths of all objects below the folder `prefix`, sorted; empty where there is none.
    fn list(&self, prefix: &str) -> impl Future<Output = Result<Vec<String>, LakeError>> + Send {
        self.store().list(prefix)
    }

    /// Whether no object is below the root, and no mark of ours.
    fn is_empty(&self) -> impl Future<Output = Result<bool, LakeError>> + Send {
        self.store().is_empty()
    }

    /// Removes one object; absent is fine.
    fn delete(&self, path: &str) -> impl Future<Output = Result<(), LakeError>> + Send {
        self.store().delete(path)
    }

    /// The table at `path` (which may not exist yet).
    fn table(&self, path: &str) -> crate::Table {
        let path = path.trim_matches('/');
        crate::Table::new(self.store().clone(), path, self.pins().get(path).copied(), Self::NAME == IsPrivate::NAME)
    }

    /// Copies all objects below `prefix` to the local folder `to`, streaming; none at all is
    /// [`LakeError::NotFound`].
    fn download(&self, prefix: &str, to: &Path) -> impl Future<Output = Result<(), LakeError>> + Send {
        async move {
            match self.store().download(prefix, to).await? {
                0 => Err(LakeError::NotFound(format!("{}: no objects there", self.url_of(prefix)))),
                _ => Ok(()),
            }
        }
    }
}

/// What makes a root the [`PrivateRoot`].
#[derive(Clone, Debug)]
pub enum IsPrivate {}

/// What makes a root the [`ReleaseRoot`].
#[derive(Clone, Debug)]
pub enum IsRelease {}

impl Kind for IsPrivate {
    const NAME: &'static str = "private";
}

impl Kind for IsRelease {
    const NAME: &'static str = "release";
}

/// One of the two roots of a deployment; there are no others.
#[derive(Clone, Debug)]
pub struct Root<K: Kind> {
    store: Store,
    pins: Arc<Pins>,
    kind: PhantomData<K>,
}

/// Where everything computed from private records without a mechanism lives.
pub type PrivateRoot = Root<IsPrivate>;

/// Where outputs of mechanisms, and what follows from them alone, live.
pub type ReleaseRoot = Root<IsRelease>;

impl<K: Kind> Root<K> {
    /// Opens the root at `url`: a path, `file://`, `s3://`, `gs://` or `az://` URL. One that is marked as the other zone
    /// is refused; nothing else is read yet, and nothing written.
    pub async fn open(url: &str, options: &StorageOptions) -> Result<Self, LakeError> {
        let store = Store::open(url, options)?;
        store.location().join_table("")?;
        store.refuse_other_zone(K::NAME).await?;
        Ok(Self { store, pins: Arc::default(), kind: PhantomData })
    }

    /// The same root, which is marked as this zone with the first conditional put.
    pub fn marked(self) -> Self {
        self.store.tell_zone(K::NAME);
        self
    }

    /// The same root, where [`crate::Table::pin`] gives the versions of `pins`. A claim must be made of them:
    /// [`crate::manifest::begin`] refuses a pin that it does not use.
    pub fn pinned(self, pins: Pins) -> Self {
        Self { pins: Arc::new(pins), ..self }
    }

    /// The same root as seen through `overlay`, which takes all writes.
    pub fn under(&self, overlay: &Overlay) -> Result<Self, LakeError> {
        Ok(Self { store: self.store.under(overlay)?, ..self.clone() })
    }
}

impl<K: Kind> Sealed for Root<K> {
    fn store(&self) -> &Store {
        &self.store
    }

    fn pins(&self) -> &Pins {
        &self.pins
    }
}

impl<K: Kind> Zone for Root<K> {
    const NAME: &'static str = K::NAME;
}

/// Refuses two roots that are the same, or of which one lies within the other: the zones would mix.
pub fn check_disjoint(private: &PrivateRoot, release: &ReleaseRoot) -> Result<(), LakeError> {
    refuse_overlap(private.store.location(), release.store.location())
}

/// [`check_disjoint`] of two URLs, of which nothing is read.
pub fn check_disjoint_urls(private: &str, release: &str) -> Result<(), LakeError> {
    refuse_overlap(&Location::parse(private)?, &Location::parse(release)?)
}

fn refuse_overlap(private: &Location, release: &Location) -> Result<(), LakeError> {
    if private.overlaps(release) {
        return Err(LakeError::Usage(format!(
            "the private root {} and the release root {} are the same or nested, so private data would lie in the \
             release zone\nhelp: choose two folders, prefixes or buckets of which neither contains the other",
            private.url, release.url
        )));
    }
    Ok(())
}

/// The store that `url` names and the path in it, for plain inputs outside the roots.
pub fn open_url(
    url: &str,
    options: &StorageOptions,
) -> Result<(Arc<dyn ObjectStore>, object_store::path::Path), LakeError> {
    let store = Store::open(url, options)?;
    Ok((store.objects(), store.location().path.clone()))
}

/// `url` as it may be shown and written down: absolute, percent-encoded, credentials refused.
pub fn canonical_url(url: &str) -> Result<String, LakeError> {
    Location::parse(url).map(|location| location.url.to_string())
}
