//! Plain inputs from any URL: model folders on this machine, raw files as streams.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::stream::BoxStream;
use tempfile::TempDir;

use crate::error::{LakeError, explain_io};
use crate::root::StorageOptions;
use crate::store::Store;

/// A folder or file on this machine; a downloaded copy is deleted when this is dropped.
#[derive(Debug)]
pub struct LocalFolder {
    path: PathBuf,
    _temporary: Option<TempDir>,
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
    let temporary = tempfile::Builder::new().prefix("doppel-").tempdir();
    let temporary = temporary.map_err(|error| explain_io("the temporary folder", &error))?;
    let path = if store.download("", temporary.path()).await? > 0 {
        temporary.path().to_path_buf()
    } else {
        let file = temporary.path().join(store.location().path.filename().unwrap_or("object"));
        store.download_one("", &file).await?;
        file
    };
    Ok(LocalFolder { path, _temporary: Some(temporary) })
}

/// An object as a stream.
pub struct ByteStream {
    /// Bytes in all.
    pub size: u64,
    /// The content in order, in pieces of a few megabytes.
    pub bytes: BoxStream<'static, Result<Bytes, LakeError>>,
}

/// Streams the object at `url`, with memory bounded by a few pieces; an object that is replaced meanwhile is an error.
pub async fn read_stream(url: &str, options: &StorageOptions) -> Result<ByteStream, LakeError> {
    let (size, bytes) = Store::open(url, options)?.stream("").await?;
    Ok(ByteStream { size, bytes })
}
