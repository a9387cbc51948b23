//! A root that is read through a scratch area: whatever is written stays there, and the root itself does not change.
//!
//! For reruns. A stage that is repeated reads its pinned inputs, its claim, the ledger and the noise key where they
//! are, while the outputs of the first time are hidden from it; what it writes lies in the scratch area, from where it
//! can be compared. A stage needs no change for it: every table and object of a root is reached through one store.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use serde::{Deserialize, Serialize};

/// What lies over a root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overlay {
    /// URL of the scratch area: all writes go there.
    pub scratch: String,
    /// Paths below the root, of objects or of folders, that are not to be seen.
    pub hidden: Vec<String>,
}

/// The store of a root under an overlay. Locations are those of the root.
#[derive(Clone, Debug)]
pub(crate) struct OverlayStore {
    pub origin: Place,
    pub scratch: Place,
    pub hidden: Vec<Path>,
}

/// A store and a place in it.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub objects: Arc<dyn ObjectStore>,
    pub root: Path,
}

impl std::fmt::Display for OverlayStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} over {}", self.scratch.objects, self.origin.objects)
    }
}

/// `location` below `to` instead of `from`. One that does not lie below `from` stays what it is.
fn moved(location: &Path, from: &Path, to: &Path) -> Path {
    match location.prefix_match(from) {
        Some(below) => to.parts().chain(below).collect(),
        None => location.clone(),
    }
}

fn not_found(location: &Path) -> Error {
    Error::NotFound { path: location.to_string(), source: "hidden from a rerun".into() }
}

/// Nothing instead of an object, or of a folder, that is not there.
fn if_there<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Err(Error::NotFound { .. }) => Ok(None),
        found => found.map(Some),
    }
}

impl OverlayStore {
    fn in_scratch(&self, location: &Path) -> Path {
        moved(location, &self.origin.root, &self.scratch.root)
    }

    /// `meta` of an object in the scratch area, as an object of the root.
    fn of_scratch(&self, meta: ObjectMeta) -> ObjectMeta {
        ObjectMeta { location: moved(&meta.location, &self.scratch.root, &self.origin.root), ..meta }
    }

    fn is_hidden(&self, location: &Path) -> bool {
        self.hidden.iter().any(|hidden| location.prefix_matches(hidden))
    }

    /// Whether the root shows an object at `location`.
    async fn is_in_origin(&self, location: &Path) -> Result<bool> {
        Ok(!self.is_hidden(location) && if_there(self.origin.objects.head(location).await)?.is_some())
    }

    /// Both listings as one, sorted, since readers of table logs rely on the order that object stores list in.
    async fn merged(&self, prefix: Option<Path>) -> Result<Vec<ObjectMeta>> {
        let below = prefix.as_ref().map(|prefix| self.in_scratch(prefix));
        let all = |place: &Place, prefix: Option<&Path>| place.objects.list(prefix).try_collect::<Vec<_>>();
        let origin = if_there(all(&self.origin, prefix.as_ref()).await)?.unwrap_or_default();
        let scratch = if_there(all(&self.scratch, below.as_ref()).await)?.unwrap_or_default();
        let origin = origin.into_iter().filter(|meta| !self.is_hidden(&meta.location));
        let merged = origin.chain(scratch.into_iter().map(|meta| self.of_scratch(meta)));
        Ok(merged.map(|meta| (meta.location.clone(), meta)).collect::<BTreeMap<_, _>>().into_values().collect())
    }
}

#[async_trait]
impl ObjectStore for OverlayStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        match options.mode {
            PutMode::Update(_) => {
                return Err(Error::NotImplemented { operation: "update".into(), implementer: self.to_string() });
            }
            // What the scratch area has, its own store refuses in one step.
            PutMode::Create if self.is_in_origin(location).await? => {
                return Err(Error::AlreadyExists { path: location.to_string(), source: "it is in the root".into() });
            }
            PutMode::Create | PutMode::Overwrite => {}
        }
        self.scratch.objects.put_opts(&self.in_scratch(location), payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.scratch.objects.put_multipart_opts(&self.in_scratch(location), options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let written = self.scratch.objects.get_opts(&self.in_scratch(location), options.clone()).await;
        match if_there(written)? {
            Some(found) => Ok(GetResult { meta: self.of_scratch(found.meta.clone()), ..found }),
            None if self.is_hidden(location) => Err(not_found(location)),
            None => self.origin.objects.get_opts(location, options).await,
        }
    }

    /// Removes from the scratch area alone; an object of the root stays, and stays to be seen.
    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (origin, scratch) = (self.origin.root.clone(), self.scratch.root.clone());
        let there = locations.map_ok(move |location| moved(&location, &origin, &scratch)).boxed();
        let (origin, scratch) = (self.origin.root.clone(), self.scratch.root.clone());
        self.scratch.objects.delete_stream(there).map_ok(move |path| moved(&path, &scratch, &origin)).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (this, prefix) = (self.clone(), prefix.cloned());
        let merged = async move { this.merged(prefix).await };
        futures::stream::once(merged).map_ok(|all| futures::stream::iter(all.into_iter().map(Ok))).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let depth = prefix.map_or(0, |prefix| prefix.parts().count());
        let (mut objects, mut folders) = (Vec::new(), Vec::new());
        for meta in self.merged(prefix.cloned()).await? {
            match meta.location.parts().count() - depth {
                1 => objects.push(meta),
                _ => folders.push(meta.location.parts().take(depth + 1).collect::<Path>()),
            }
        }
        folders.dedup();
        Ok(ListResult { objects, common_prefixes: folders })
    }

    async fn copy_opts(&self, _from: &Path, _to: &Path, _options: CopyOptions) -> Result<()> {
        Err(Error::NotImplemented { operation: "copy".into(), implementer: self.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AppTransaction, LakeError, PrivateRoot, ReleaseRoot, StorageOptions, Zone};

    struct Fixture {
        folder: tempfile::TempDir,
    }

    impl Fixture {
        fn new() -> Self {
            Self { folder: tempfile::tempdir().unwrap() }
        }

        async fn root(&self) -> ReleaseRoot {
            self.at("root").await
        }

        async fn scratch(&self) -> ReleaseRoot {
            self.at("scratch").await
        }

        async fn at(&self, name: &str) -> ReleaseRoot {
            let url = self.folder.path().join(name).display().to_string();
            ReleaseRoot::open(&url, &StorageOptions::default()).await.unwrap()
        }

        async fn over(&self, hidden: &[&str]) -> ReleaseRoot {
            let overlay = Overlay {
                scratch: self.folder.path().join("scratch").display().to_string(),
                hidden: hidden.iter().map(|path| (*path).to_owned()).collect(),
            };
            self.root().await.under(&overlay).unwrap()
        }
    }

    async fn body(root: &ReleaseRoot, path: &str) -> Option<String> {
        match root.get(path).await {
            Ok(body) => Some(String::from_utf8(body.to_vec()).unwrap()),
            Err(LakeError::NotFound(_)) => None,
            Err(error) => panic!("{path}: {error}"),
        }
    }

    #[tokio::test]
    async fn reads_see_both_and_writes_touch_the_scratch_alone() {
        let fixture = Fixture::new();
        let root = fixture.root().await;
        for path in ["a/kept", "a/replaced", "b/hidden", "b/hidden-not", "b/hidden.json"] {
            root.put(path, path.as_bytes().to_vec().into()).await.unwrap();
        }
        let over = fixture.over(&["b/hidden", "b/hidden.json"]).await;
        over.put("a/replaced", "new".into()).await.unwrap();
        over.put("b/hidden", "again".into()).await.unwrap();
        over.delete("a/kept").await.unwrap();
        assert_eq!(body(&over, "a/kept").await.as_deref(), Some("a/kept"));
        assert_eq!(body(&over, "a/replaced").await.as_deref(), Some("new"));
        assert_eq!(body(&over, "b/hidden").await.as_deref(), Some("again"));
        assert_eq!(body(&over, "b/hidden.json").await, None);
        assert_eq!(over.list("").await.unwrap(), ["a/kept", "a/replaced", "b/hidden", "b/hidden-not"]);
        assert_eq!(over.list("b").await.unwrap(), ["b/hidden", "b/hidden-not"]);
        over.delete("a/replaced").await.unwrap();
        assert_eq!(body(&over, "a/replaced").await.as_deref(), Some("a/replaced"));
        assert_eq!(root.list("").await.unwrap().len(), 5);
        assert_eq!(body(&root, "b/hidden").await.as_deref(), Some("b/hidden"));
        assert_eq!(fixture.scratch().await.list("").await.unwrap(), ["b/hidden"]);
    }

    #[tokio::test]
    async fn a_conditional_put_is_refused_by_either_and_not_by_what_is_hidden() {
        let fixture = Fixture::new();
        let root = fixture.root().await;
        root.put("claim", "first".into()).await.unwrap();
        root.put("manifest", "first".into()).await.unwrap();
        let over = fixture.over(&["manifest"]).await;
        assert!(!over.put_if_absent("claim", "second".into()).await.unwrap());
        assert!(over.put_if_absent("manifest", "second".into()).await.unwrap());
        assert!(!over.put_if_absent("manifest", "third".into()).await.unwrap());
        assert_eq!(body(&over, "manifest").await.as_deref(), Some("second"));
        assert_eq!(body(&root, "manifest").await.as_deref(), Some("first"));
    }

    #[tokio::test]
    async fn a_large_object_is_written_in_parts_and_read_in_ranges() {
        let fixture = Fixture::new();
        let over = fixture.over(&[]).await;
        let large: Vec<u8> = (0..20_000_000u32).map(|at| (at % 251) as u8).collect();
        over.put("large", large.clone().into()).await.unwrap();
        assert!(over.get("large").await.unwrap() == large);
        assert!(fixture.root().await.list("").await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_hidden_table_is_made_anew_and_a_shown_one_keeps_its_versions() {
        use arrow::array::{ArrayRef, Int64Array, RecordBatch};
        let batch = |value: i64| {
            let column: ArrayRef = Arc::new(Int64Array::from(vec![value]));
            RecordBatch::try_from_iter([("n", column)]).unwrap()
        };
        let fixture = Fixture::new();
        let root = fixture.root().await;
        for name in ["input", "output"] {
            let table = root.table(name);
            table.create(batch(0).schema()).await.unwrap();
            for chunk in 0..12 {
                let transaction = AppTransaction { id: "first".into(), version: chunk };
                table.append(vec![batch(chunk)], transaction).await.unwrap();
            }
        }
        let over = fixture.over(&["output"]).await;
        let (input, output) = (over.table("input"), over.table("output"));
        assert_eq!(input.version().await.unwrap(), Some(12));
        assert_eq!(input.count(7).await.unwrap(), 7);
        assert_eq!(output.version().await.unwrap(), None);
        output.create(batch(0).schema()).await.unwrap();
        for chunk in 0..2 {
            let transaction = AppTransaction { id: "first".into(), version: chunk };
            assert!(output.append(vec![batch(chunk)], transaction).await.unwrap());
        }
        assert_eq!(output.digest(2).await.unwrap(), root.table("output").digest(2).await.unwrap());
        assert_eq!(root.table("output").version().await.unwrap(), Some(12));
    }

    #[tokio::test]
    async fn a_scratch_area_that_cannot_be_reached_is_an_error() {
        let fixture = Fixture::new();
        let url = fixture.folder.path().join("root").display().to_string();
        let root = PrivateRoot::open(&url, &StorageOptions::default()).await.unwrap();
        let overlay = Overlay { scratch: "ftp://host/scratch".into(), hidden: Vec::new() };
        assert!(matches!(root.under(&overlay), Err(LakeError::Usage(_))));
    }
}
