//! Local files that a loss of power does not take back once their write was answered.
//!
//! Whoever is told that a reservation, a claim or a commit is there acts on it, and whoever finds one there does so too.
//! So a file is on the disk before it gets its name, and the entries of the folders that lead to it are there before the
//! write is answered. The client of `object_store`, which reads, leaves what it writes to the system's cache: a name
//! could outlive its data, and an empty entry would block its place for good.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path as LocalPath, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};
use tempfile::TempPath;
use tokio::task::spawn_blocking;

/// The store.
#[derive(Clone, Debug, Default)]
pub(crate) struct Durable {
    files: LocalFileSystem,
    /// Folders that are on the disk with all that lead to them.
    folders: Arc<Mutex<HashSet<PathBuf>>>,
}

/// What was written is there, and a loss of power may take it back. No later look tells, since a system reports such a
/// failure once: so it is nothing to try again by itself.
#[derive(Debug, thiserror::Error)]
#[error("not sure to be on the disk: {0}")]
pub(crate) struct Unsure(io::Error);

impl Durable {
    /// Gives `staged` its name, once it is on the disk.
    fn publish(&self, staged: Staged, mode: &PutMode) -> Result<PutResult> {
        let Staged { file, path, to } = staged;
        sync_file(&file).map_err(failed)?;
        // Some file systems write a file when it is closed.
        drop(file);
        let named = match mode {
            // The other name is gone with `path`.
            PutMode::Create => std::fs::hard_link(path, &to),
            _ => path.persist(&to).map_err(|error| error.error),
        };
        match named {
            Ok(()) => self.sync_folders(&to).map(|()| PutResult { e_tag: None, version: None }),
            Err(source) if source.kind() == ErrorKind::AlreadyExists => {
                // The caller acts on what another writer put there as on what it put there itself.
                self.sync(&to)?;
                Err(Error::AlreadyExists { path: to.display().to_string(), source: source.into() })
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Returns when the file at `path` and the way to it are on the disk.
    fn sync(&self, path: &LocalPath) -> Result<()> {
        sync(path)?;
        self.sync_folders(path)
    }

    fn sync_folders(&self, path: &LocalPath) -> Result<()> {
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
fn sync(path: &LocalPath) -> Result<()> {
    use ErrorKind::{NotFound, PermissionDenied, ReadOnlyFilesystem};
    match File::open(path).and_then(|file| sync_file(&file)) {
        Err(error) if !matches!(error.kind(), NotFound | PermissionDenied | ReadOnlyFilesystem) => {
            Err(Error::Generic { store: "LocalFileSystem", source: Unsure(error).into() })
        }
        _ => Ok(()),
    }
}

fn sync_file(file: &File) -> io::Result<()> {
    match file.sync_all() {
        Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        synced => synced,
    }
}

/// An error in the form that the client gives it.
fn failed(error: io::Error) -> Error {
    Error::Generic { store: "LocalFileSystem", source: error.into() }
}

/// A file that has not got its name `to` yet; removed where it never gets it.
#[derive(Debug)]
struct Staged {
    file: Arc<File>,
    path: TempPath,
    to: PathBuf,
}

impl Staged {
    /// A new file `<to>#<number>`: what has such a name is no object to the client, and [`crate::gc`] knows it.
    fn new(to: PathBuf) -> io::Result<Self> {
        let mut number = 1_u64;
        loop {
            let mut path = to.clone().into_os_string();
            path.push(format!("#{number}"));
            let error = match File::create_new(&path) {
                Ok(file) => return Ok(Self { file: Arc::new(file), path: TempPath::try_from_path(path)?, to }),
                Err(error) => error,
            };
            match (error.kind(), to.parent()) {
                (ErrorKind::AlreadyExists, _) => number += 1,
                (ErrorKind::NotFound, Some(folder)) => std::fs::create_dir_all(folder)?,
                _ => return Err(error),
            }
        }
    }
}

fn write(file: &File, mut at: u64, body: &PutPayload) -> Result<()> {
    for bytes in body.iter() {
        file.write_all_at(bytes, at).map_err(failed)?;
        at += bytes.len() as u64;
    }
    Ok(())
}

/// An upload in parts, which gets its name when it is complete.
#[derive(Debug)]
struct Upload {
    store: Durable,
    /// `None` once it is complete or aborted.
    staged: Option<Staged>,
    /// Where the next part goes.
    end: u64,
}

impl Upload {
    fn over() -> Error {
        failed(io::Error::other("the upload is over"))
    }
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, part: PutPayload) -> UploadPart {
        let Some(staged) = &self.staged else { return std::future::ready(Err(Self::over())).boxed() };
        let (file, at) = (staged.file.clone(), self.end);
        self.end += part.content_length() as u64;
        async move { spawn_blocking(move || write(&file, at, &part)).await? }.boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let (store, staged) = (self.store.clone(), self.staged.take().ok_or_else(Self::over)?);
        spawn_blocking(move || store.publish(staged, &PutMode::Overwrite)).await?
    }

    async fn abort(&mut self) -> Result<()> {
        let staged = self.staged.take();
        Ok(spawn_blocking(move || drop(staged)).await?)
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
        if matches!(options.mode, PutMode::Update(_)) || !options.attributes.is_empty() {
            // The client refuses these.
            return self.files.put_opts(location, body, options).await;
        }
        let (store, path) = (self.clone(), self.files.path_to_filesystem(location)?);
        let put = move || {
            let staged = Staged::new(path).map_err(failed)?;
            write(&staged.file, 0, &body)?;
            store.publish(staged, &options.mode)
        };
        spawn_blocking(put).await?
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        if !options.attributes.is_empty() {
            return self.files.put_multipart_opts(location, options).await;
        }
        let path = self.files.path_to_filesystem(location)?;
        let staged = spawn_blocking(move || Staged::new(path).map_err(failed)).await??;
        Ok(Box::new(Upload { store: self.clone(), staged: Some(staged), end: 0 }))
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
        let (store, path) = (self.clone(), self.files.path_to_filesystem(to)?);
        spawn_blocking(move || store.sync(&path)).await?
    }
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;

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

    /// The names and contents of the files in `folder`.
    fn files(folder: &std::path::Path) -> Vec<(String, String)> {
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
        let file = |entry: std::fs::DirEntry| {
            (entry.file_name().into_string().unwrap(), std::fs::read_to_string(entry.path()).unwrap())
        };
        let mut files: Vec<_> = entries.map(file).collect();
        files.sort();
        files
    }

    fn file(name: &str, content: &str) -> (String, String) {
        (name.into(), content.into())
    }

    #[tokio::test]
    async fn a_write_leaves_nothing_but_the_object() {
        let (folder, store) = (tempfile::tempdir().unwrap(), Durable::default());
        let location = at(folder.path(), "0.json");
        // A write that was killed left this.
        std::fs::write(folder.path().join("0.json#1"), "half").unwrap();
        let create = |body: &'static str| store.put_opts(&location, body.into(), PutOptions::from(PutMode::Create));
        create("first").await.unwrap();
        let refused = create("second").await;
        assert!(matches!(refused, Err(Error::AlreadyExists { .. })), "{refused:?}");
        assert_eq!(files(folder.path()), [file("0.json", "first"), file("0.json#1", "half")]);
        store.put(&location, "third".into()).await.unwrap();
        assert_eq!(files(folder.path()), [file("0.json", "third"), file("0.json#1", "half")]);
        let below = store.put(&at(folder.path(), "0.json/below"), "fourth".into()).await;
        assert!(matches!(below, Err(Error::Generic { store: "LocalFileSystem", .. })), "{below:?}");
        assert_eq!(files(folder.path()).len(), 2);
    }

    #[tokio::test]
    async fn an_upload_has_its_name_only_when_it_is_complete() {
        let (folder, store) = (tempfile::tempdir().unwrap(), Durable::default());
        let location = at(folder.path(), "large.bin");
        let mut upload = store.put_multipart(&location).await.unwrap();
        let (first, second) = (upload.put_part("first, ".into()), upload.put_part("second".into()));
        second.await.unwrap();
        first.await.unwrap();
        assert_eq!(files(folder.path()), [file("large.bin#1", "first, second")]);
        upload.complete().await.unwrap();
        assert_eq!(files(folder.path()), [file("large.bin", "first, second")]);
        upload.put_part("third".into()).await.unwrap_err();
        upload.complete().await.unwrap_err();
        upload.abort().await.unwrap();

        let mut aborted = store.put_multipart(&location).await.unwrap();
        aborted.put_part("other".into()).await.unwrap();
        aborted.abort().await.unwrap();
        drop(store.put_multipart(&location).await.unwrap());
        assert_eq!(files(folder.path()), [file("large.bin", "first, second")]);
    }

    #[test]
    fn what_may_not_be_on_the_disk_is_not_tried_again() {
        let source = Unsure(ErrorKind::StorageFull.into()).into();
        assert!(!crate::error::is_transient(&Error::Generic { store: "LocalFileSystem", source }));
        assert!(crate::error::is_transient(&failed(ErrorKind::StorageFull.into())));
    }

    #[test]
    fn what_is_not_ours_to_put_on_a_disk_is_no_failure() {
        for path in ["/nowhere/at/all", "/proc/self", "/proc/self/stat"] {
            sync(std::path::Path::new(path)).unwrap();
        }
    }
}
