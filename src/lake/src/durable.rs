//! Local files that a loss of power does not take back once their write was answered.
//!
//! The client of `object_store` leaves what it writes to the system's cache. Whoever is told that a reservation, a claim
//! or a commit is there acts on it, so here it is on the disk first, together with the entries of the folders that lead
//! to it.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

/// The store.
#[derive(Clone, Debug, Default)]
pub(crate) struct Durable {
    files: LocalFileSystem,
    /// Folders that are on the disk with all that lead to them.
    folders: Arc<Mutex<HashSet<PathBuf>>>,
}

impl Durable {
    /// Returns when the object at `location` and the way to it are on the disk.
    async fn sync(&self, location: &Path) -> Result<()> {
        let (this, path) = (self.clone(), self.files.path_to_filesystem(location)?);
        let synced = tokio::task::spawn_blocking(move || this.sync_path(path)).await?;
        synced.map_err(|error| Error::Generic { store: "LocalFileSystem", source: error.into() })
    }

    fn sync_path(&self, path: PathBuf) -> io::Result<()> {
        sync(&path)?;
        let mut new = Vec::new();
        // Another process may have made a folder and not have come to this yet, so that each is looked at once.
        for folder in path.ancestors().skip(1) {
            sync(folder)?;
            if self.folders().contains(folder) {
                break;
            }
            new.push(folder.to_path_buf());
        }
        self.folders().extend(new);
        Ok(())
    }

    fn folders(&self) -> MutexGuard<'_, HashSet<PathBuf>> {
        self.folders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Puts a file or a folder on the disk. What is gone again, is not ours to read, or lies on no disk needs none of it.
fn sync(path: &std::path::Path) -> io::Result<()> {
    use ErrorKind::{InvalidInput, NotFound, PermissionDenied, ReadOnlyFilesystem, Unsupported};
    match File::open(path).and_then(|file| file.sync_all()) {
        Err(error)
            if matches!(
                error.kind(),
                NotFound | PermissionDenied | ReadOnlyFilesystem | InvalidInput | Unsupported
            ) =>
        {
            Ok(())
        }
        synced => synced,
    }
}

/// An upload in parts that is on the disk when it is complete.
#[derive(Debug)]
struct Upload {
    parts: Box<dyn MultipartUpload>,
    store: Durable,
    location: Path,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, part: PutPayload) -> UploadPart {
        self.parts.put_part(part)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let done = self.parts.complete().await?;
        self.store.sync(&self.location).await?;
        Ok(done)
    }

    async fn abort(&mut self) -> Result<()> {
        self.parts.abort().await
    }
}

impl std::fmt::Display for Durable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.files.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for Durable {
    async fn put_opts(&self, location: &Path, body: PutPayload, options: PutOptions) -> Result<PutResult> {
        let result = self.files.put_opts(location, body, options).await;
        // The caller acts on what another writer put there as on what it put there itself.
        if matches!(result, Ok(_) | Err(Error::AlreadyExists { .. })) {
            self.sync(location).await?;
        }
        result
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let parts = self.files.put_multipart_opts(location, options).await?;
        Ok(Box::new(Upload { parts, store: self.clone(), location: location.clone() }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.files.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.files.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.files.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.files.list(prefix)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.files.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.files.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.files.copy_opts(from, to, options).await?;
        self.sync(to).await
    }
}

#[cfg(test)]
mod tests {
    use object_store::{ObjectStoreExt, PutMode};

    use super::*;

    /// The folders below `folder` that `store` knows to be on the disk.
    fn synced(folder: &std::path::Path, store: &Durable) -> Vec<String> {
        let root = folder.canonicalize().unwrap();
        let folders = store.folders();
        let below = folders.iter().filter_map(|synced| Some(synced.strip_prefix(&root).ok()?.display().to_string()));
        let mut below: Vec<String> = below.collect();
        below.sort();
        below
    }

    fn at(folder: &std::path::Path, path: &str) -> Path {
        Path::from_absolute_path(folder.canonicalize().unwrap().join(path)).unwrap()
    }

    #[tokio::test]
    async fn a_write_makes_sure_of_all_folders_that_lead_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (Durable::default(), Durable::default());
        let location = at(folder.path(), "ledger/chats/0.json");
        let create = || PutOptions::from(PutMode::Create);
        first.put_opts(&location, "a".into(), create()).await.unwrap();
        assert_eq!(synced(folder.path(), &first), ["", "ledger", "ledger/chats"]);
        // Who finds it there cannot know whether the writer came to that.
        let refused = second.put_opts(&location, "b".into(), create()).await;
        assert!(matches!(refused, Err(Error::AlreadyExists { .. })), "{refused:?}");
        assert_eq!(synced(folder.path(), &second), ["", "ledger", "ledger/chats"]);
        let mut upload = second.put_multipart(&at(folder.path(), "large/part")).await.unwrap();
        upload.put_part("part".into()).await.unwrap();
        assert_eq!(synced(folder.path(), &second).len(), 3);
        upload.complete().await.unwrap();
        assert_eq!(synced(folder.path(), &second), ["", "large", "ledger", "ledger/chats"]);
    }

    #[test]
    fn what_is_not_ours_to_put_on_a_disk_is_no_failure() {
        for path in ["/nowhere/at/all", "/proc/self", "/proc/self/stat"] {
            sync(std::path::Path::new(path)).unwrap();
        }
    }
}
