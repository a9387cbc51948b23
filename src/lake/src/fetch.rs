//! Plain inputs from any URL: model folders on this machine, raw files as streams.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tempfile::TempDir;

use crate::connect::StorageOptions;
use crate::error::{LakeError, explain_io};
use crate::store::Store;

/// A folder or file on this machine; a downloaded copy is deleted when this is dropped.
#[derive(Debug)]
pub struct LocalFolder {
    path: PathBuf,
    _temporary: Option<TemporaryFolder>,
}

impl LocalFolder {
    /// Where it lies. A URL that names a single object, such as a GGUF file, gives the path of a file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Makes the folder (or single object) at `url` available on this machine: a local path stays as it is, anything else
/// is downloaded to a temporary folder.
pub async fn fetch_folder(url: &str, options: &StorageOptions) -> Result<LocalFolder, LakeError> {
    let store = Store::open(url, options)?;
    if let Some(path) = store.location().local_path() {
        return match path.try_exists() {
            Ok(true) => Ok(LocalFolder { path, _temporary: None }),
            Ok(false) => Err(LakeError::NotFound(format!("{}: not found", path.display()))),
            Err(error) => Err(explain_io(&path.display().to_string(), &error)),
        };
    }
    let temporary = TemporaryFolder::new()?;
    let path = if store.download("", temporary.path()).await? > 0 {
        temporary.path().to_path_buf()
    } else {
        let file = temporary.path().join(store.location().path.filename().unwrap_or("object"));
        store.download_one("", &file).await?;
        file
    };
    Ok(LocalFolder { path, _temporary: Some(temporary) })
}

/// A folder for copies on this machine, deleted when this is dropped or by [`delete_temporary_folders`].
#[derive(Debug)]
pub struct TemporaryFolder(TempDir);

impl TemporaryFolder {
    /// A new, empty one, where `TMPDIR` says.
    pub fn new() -> Result<Self, LakeError> {
        let folder = tempfile::Builder::new().prefix("doppel-").tempdir();
        let folder = folder.map_err(|error| explain_io("the temporary folder", &error))?;
        temporary_folders().push(folder.path().to_path_buf());
        Ok(Self(folder))
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        temporary_folders().retain(|path| path != self.path());
    }
}

/// Deletes what [`TemporaryFolder`]s there are: for a process that ends without dropping them. A copy of a model takes
/// gigabytes of a disk that others share.
pub fn delete_temporary_folders() {
    for path in temporary_folders().drain(..) {
        // A download that goes on meanwhile may add a file behind the first pass.
        let _ = std::fs::remove_dir_all(&path).or_else(|_| std::fs::remove_dir_all(&path));
    }
}

fn temporary_folders() -> MutexGuard<'static, Vec<PathBuf>> {
    static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
    FOLDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An object as it was when it was found: one that is replaced meanwhile is an error, never a mixture.
pub struct ByteStream {
    /// Bytes in all.
    pub size: u64,
    /// The store's entity tag, which changes with the content.
    pub etag: Option<String>,
    /// The content in order, in pieces of a few megabytes; nothing is read before it is polled.
    pub bytes: BoxStream<'static, Result<Bytes, LakeError>>,
    /// Reads a range, for formats that are not read in order.
    pub range: ReadRange,
}

/// Reads a range of one object, of a few megabytes at most.
pub type ReadRange = Arc<dyn Fn(Range<u64>) -> BoxFuture<'static, Result<Bytes, LakeError>> + Send + Sync>;

/// Finds the object at `url`; memory is bounded by a few pieces, and a deadline holds for each of them.
pub async fn read_stream(url: &str, options: &StorageOptions) -> Result<ByteStream, LakeError> {
    let object = Store::open(url, options)?.pin("").await?;
    let by_range = object.clone();
    let range: ReadRange = Arc::new(move |range| {
        let object = by_range.clone();
        async move { object.range(range).await }.boxed()
    });
    Ok(ByteStream { size: object.size, etag: object.tag.clone(), bytes: object.stream(), range })
}
