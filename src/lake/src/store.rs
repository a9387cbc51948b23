//! One object store behind a root: how it is reached, and the operations both zones share.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions};
use serde::Deserialize;
use tokio::sync::OnceCell;
use tokio::time::Instant;
use url::Url;

use crate::backoff::Backoff;
use crate::connect::{StorageOptions, connect, request_timeout};
use crate::error::{LakeError, explain, explain_io, is_transient};
use crate::location::{Location, StoreKind};
use crate::overlay::{Overlay, OverlayStore, Place};
use crate::steady::{Failures, Steady};

/// Size of one range read and of one part of a multipart upload: large enough to hide latency, small enough that one of
/// them ends within [`request_timeout`] on a slow line, and that a few in flight stay within tens of megabytes.
pub(crate) const PART: usize = 8 << 20;

/// Parts in flight at the same time.
const IN_FLIGHT: usize = 4;

/// A store, and a place in it. Public for the sealed trait of the roots, but in a private module: nobody can name it.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    location: Location,
    options: StorageOptions,
    objects: Arc<dyn ObjectStore>,
    failures: Failures,
    /// The same store without retries, for conditional puts: see [`Store::put_if_absent`].
    once: OnceLock<Arc<dyn ObjectStore>>,
    conditional: AtomicBool,
    /// The zone that the first conditional put tells beforehand; see [`Store::tell_zone`].
    zone: OnceLock<&'static str>,
    told: OnceCell<()>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The store's own `Debug` holds its whole configuration.
        f.debug_tuple("Store").field(&self.url()).finish()
    }
}

impl Store {
    pub(crate) fn open(url: &str, options: &StorageOptions) -> Result<Self, LakeError> {
        Self::noting(url, options, Failures::default())
    }

    /// A store that notes in `failures`.
    fn noting(url: &str, options: &StorageOptions, failures: Failures) -> Result<Self, LakeError> {
        let location = Location::parse(url)?;
        let mut objects = connect(&location, options, true)?;
        if location.store != StoreKind::Local {
            objects = Arc::new(Steady::new(objects, location.clone(), options.timeout, failures.clone()));
        }
        Ok(Self(Arc::new(Inner {
            conditional: AtomicBool::new(location.store == StoreKind::Local),
            location,
            options: options.clone(),
            objects,
            failures,
            once: OnceLock::new(),
            zone: OnceLock::new(),
            told: OnceCell::new(),
        })))
    }

    /// This store as seen through `overlay`.
    pub(crate) fn under(&self, overlay: &Overlay) -> Result<Self, LakeError> {
        let scratch = Self::noting(&overlay.scratch, &self.0.options, self.0.failures.clone())?;
        let hidden = overlay.hidden.iter().map(|path| self.0.location.join(path)).collect::<Result<Vec<_>, _>>()?;
        let over = |scratch_objects: &Arc<dyn ObjectStore>| -> Arc<dyn ObjectStore> {
            let place = |store: &Self, objects: &Arc<dyn ObjectStore>| Place {
                objects: objects.clone(),
                root: store.0.location.path.clone(),
            };
            Arc::new(OverlayStore {
                origin: place(self, &self.0.objects),
                scratch: place(&scratch, scratch_objects),
                hidden: hidden.clone(),
            })
        };
        Ok(Self(Arc::new(Inner {
            location: self.0.location.clone(),
            options: self.0.options.clone(),
            objects: over(&scratch.0.objects),
            failures: self.0.failures.clone(),
            once: OnceLock::from(over(scratch.once()?)),
            conditional: AtomicBool::new(scratch.0.conditional.load(Ordering::Relaxed)),
            // The scratch area is no root.
            zone: OnceLock::new(),
            told: OnceCell::new(),
        })))
    }

    pub(crate) fn location(&self) -> &Location {
        &self.0.location
    }

    pub(crate) fn url(&self) -> &str {
        self.0.location.url.as_str()
    }

    pub(crate) fn url_of(&self, path: &str) -> Url {
        self.0.location.url_of(path)
    }

    pub(crate) fn objects(&self) -> Arc<dyn ObjectStore> {
        self.0.objects.clone()
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.0.options.timeout
    }

    /// What storage or network failed last, unless it was before `start`: for errors that libraries made texts of.
    pub(crate) fn failure_since(&self, start: impl Into<Option<Instant>>) -> Option<LakeError> {
        self.0.failures.since(start.into())
    }

    /// Reads a range of the object at `at`, `url` for messages; a long one in parts, each under the deadline.
    pub(crate) async fn range(&self, at: &Path, url: &str, range: Range<u64>) -> Result<Bytes, LakeError> {
        if range.end - range.start <= 2 * PART as u64 {
            return self.within(url, self.0.objects.get_range(at, range)).await;
        }
        let starts = range.clone().step_by(PART);
        let parts = starts.map(|from| {
            let part = from..(from + PART as u64).min(range.end);
            self.within(url, self.0.objects.get_range(at, part))
        });
        let parts: Vec<Bytes> = futures::stream::iter(parts).buffered(IN_FLIGHT).try_collect().await?;
        Ok(parts.concat().into())
    }

    /// Reads several ranges of one object, those that lie together in one request.
    pub(crate) async fn ranges(&self, at: &Path, url: &str, ranges: Vec<Range<u64>>) -> Result<Vec<Bytes>, LakeError> {
        let size = |range: &Range<u64>| range.end - range.start;
        if ranges.iter().map(size).sum::<u64>() <= 2 * PART as u64 {
            return self.within(url, self.0.objects.get_ranges(at, &ranges)).await;
        }
        let parts = ranges.into_iter().map(|range| self.range(at, url, range));
        futures::stream::iter(parts).buffered(IN_FLIGHT).try_collect().await
    }

    /// Reads one object whole.
    pub(crate) async fn get(&self, path: &str) -> Result<Bytes, LakeError> {
        let at = self.0.location.join(path)?;
        let url = self.url_of(path).to_string();
        let read = async {
            let found = self.0.objects.get(&at).await?;
            // A large object goes range by range, so that the deadline holds for each of them.
            if found.meta.size > 2 * PART as u64 { Ok(None) } else { found.bytes().await.map(Some) }
        };
        if let Some(body) = self.within(&url, read).await? {
            return Ok(body);
        }
        let (size, mut parts) = self.stream(path).await?;
        let mut body = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
        while let Some(part) = parts.try_next().await? {
            body.extend_from_slice(&part);
        }
        Ok(body.into())
    }

    /// Finds one object and holds on to what it is now.
    pub(crate) async fn pin(&self, path: &str) -> Result<Pinned, LakeError> {
        let at = self.0.location.join(path)?;
        let url = self.url_of(path).to_string();
        let meta = self.within(&url, self.0.objects.head(&at)).await?;
        Ok(Pinned { store: self.clone(), at, url, size: meta.size, tag: meta.e_tag })
    }

    /// Streams one object in ranges: see [`Pinned`].
    pub(crate) async fn stream(
        &self,
        path: &str,
    ) -> Result<(u64, BoxStream<'static, Result<Bytes, LakeError>>), LakeError> {
        let object = self.pin(path).await?;
        Ok((object.size, object.stream()))
    }

    /// Writes one object, replacing what was there.
    pub(crate) async fn put(&self, path: &str, body: Bytes) -> Result<(), LakeError> {
        let at = self.0.location.join(path)?;
        let url = self.url_of(path).to_string();
        if body.len() > 2 * PART {
            return self.put_parts(&at, &url, body).await;
        }
        self.within(&url, self.0.objects.put(&at, body.into())).await.map(drop)
    }

    /// Writes one object in parts, visible only when whole; what fails is aborted.
    async fn put_parts(&self, at: &Path, url: &str, body: Bytes) -> Result<(), LakeError> {
        let mut upload = self.within(url, self.0.objects.put_multipart(at)).await?;
        let mut sent = futures::stream::FuturesUnordered::new();
        let result = async {
            for from in (0..body.len()).step_by(PART) {
                while sent.len() >= IN_FLIGHT {
                    sent.try_next().await?;
                }
                let part = body.slice(from..(from + PART).min(body.len()));
                sent.push(self.within(url, upload.put_part(part.into())));
            }
            while sent.try_next().await?.is_some() {}
            Ok::<(), LakeError>(())
        };
        let mut result = result.await;
        drop(sent);
        if result.is_ok() {
            result = self.within(url, upload.complete()).await.map(drop);
        }
        if result.is_err() {
            // The store drops parts of aborted uploads; that the abort fails too changes nothing for the caller.
            let _ = tokio::time::timeout(Duration::from_secs(5), upload.abort()).await;
        }
        result
    }

    /// Writes one object unless it exists.
    ///
    /// A conditional put whose answer is lost may have succeeded, and a blind retry would then report that somebody else
    /// was first. So the client's own retries are off here: after an ambiguous failure, an object that exists with
    /// exactly our content counts as ours.
    pub(crate) async fn put_if_absent(&self, path: &str, body: Bytes) -> Result<bool, LakeError> {
        if let Some(&zone) = self.0.zone.get() {
            self.0.told.get_or_try_init(|| self.mark(zone)).await?;
        }
        self.put_absent(path, body).await
    }

    async fn put_absent(&self, path: &str, body: Bytes) -> Result<bool, LakeError> {
        let at = self.0.location.join(path)?;
        let url = self.url_of(path).to_string();
        let created = self.create(path, &at, &url, &body).await?;
        if !self.0.conditional.load(Ordering::Relaxed) {
            if created {
                self.prove_conditional(&at, &url, &body).await?;
            }
            self.0.conditional.store(true, Ordering::Relaxed);
        }
        Ok(created)
    }

    /// Makes sure, once, that the store honours conditional puts: without them two writers would overwrite each other.
    pub(crate) async fn require_conditional_puts(&self) -> Result<(), LakeError> {
        if !self.0.conditional.load(Ordering::Relaxed) {
            self.put_if_absent(MARKER, Bytes::from_static(b"doppel\n")).await?;
        }
        Ok(())
    }

    /// Writes the mark of `zone`, as which the root is opened.
    async fn mark(&self, zone: &'static str) -> Result<(), LakeError> {
        match self.put_absent(ZONE, format!("{{\"zone\": \"{zone}\"}}\n").into()).await? {
            true => Ok(()),
            false => self.refuse_other_zone(zone).await,
        }
    }

    /// From now on, the first conditional put is preceded by the mark of `zone`. Each stage begins to write with one, so
    /// that one which fails before leaves nothing behind.
    pub(crate) fn tell_zone(&self, zone: &'static str) {
        // A store is of one zone.
        let _ = self.0.zone.set(zone);
    }

    /// Refuses a root that is marked as another zone than `zone`. One without a mark is any zone.
    pub(crate) async fn refuse_other_zone(&self, zone: &str) -> Result<(), LakeError> {
        // PRIVACY: without this, one mistake in a command puts private records where everybody reads. So what is left of a
        // mark is not none.
        let body = match self.get(ZONE).await {
            Ok(body) => body,
            Err(error @ LakeError::Transient(_)) => return Err(error),
            // Whatever else keeps it from being read is told where it keeps from what is needed.
            Err(_) => return Ok(()),
        };
        let mark: Mark = serde_json::from_slice(&body).map_err(|_| {
            LakeError::Malformed(format!(
                "{}: expected {{\"zone\": \"private\"}} or {{\"zone\": \"release\"}}\n\
                 help: restore the object, which keeps the roots from being swapped; where doppel did not write it, choose another \
                 root",
                self.url_of(ZONE)
            ))
        })?;
        if mark.zone != zone {
            return Err(LakeError::Usage(format!(
                "{} is marked as the {} root ({ZONE}), and given as the {zone} root\n\
                 help: were --private and --release swapped?",
                self.url(),
                mark.zone
            )));
        }
        // Who looks while marking knows that anyway.
        let _ = self.0.told.set(());
        Ok(())
    }

    async fn create(&self, path: &str, at: &Path, url: &str, body: &Bytes) -> Result<bool, LakeError> {
        let deadline = Instant::now() + self.timeout();
        let (mut wait, mut ambiguous) = (Backoff::default(), false);
        loop {
            let error = match self.try_create(at, body, deadline).await? {
                Some(Ok(())) => return Ok(true),
                Some(Err(object_store::Error::AlreadyExists { .. })) => match self.existing(path).await? {
                    Some(existing) => return Ok(ambiguous && existing == *body),
                    // Refused because of a race, such as with a delete: nothing is there, so try again.
                    None => LakeError::Transient(format!("{url}: others keep writing it\nhelp: run again")),
                },
                Some(Err(error)) if is_transient(&error) && !unsupported(&error) => explain(url, &error),
                Some(Err(error)) => return Err(refused_condition(url, &error)),
                None => late(url, self.timeout()),
            };
            ambiguous = true;
            if Instant::now() >= deadline {
                return Err(error);
            }
            wait.sleep(deadline).await;
        }
    }

    /// Tries a conditional put once; `None` where it takes too long. A small body that is not taken soon never will be,
    /// while a large one may need all of the time on a slow line.
    async fn try_create(
        &self,
        at: &Path,
        body: &Bytes,
        deadline: Instant,
    ) -> Result<Option<object_store::Result<()>>, LakeError> {
        let patience = if body.len() > 2 * PART { self.timeout() } else { request_timeout(self.timeout()) };
        let put = self.once()?.put_opts(at, body.clone().into(), PutOptions::from(PutMode::Create));
        let put = tokio::time::timeout_at(deadline.min(Instant::now() + patience), put).await;
        Ok(put.ok().map(|put| put.map(drop)))
    }

    async fn existing(&self, path: &str) -> Result<Option<Bytes>, LakeError> {
        match self.get(path).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(LakeError::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Repeats a conditional put that succeeded: a store that accepts it again ignores the condition. Only that it
    /// refuses shows that it does not; other errors show nothing.
    async fn prove_conditional(&self, at: &Path, url: &str, body: &Bytes) -> Result<(), LakeError> {
        let deadline = Instant::now() + self.timeout();
        let mut wait = Backoff::default();
        loop {
            match self.try_create(at, body, deadline).await? {
                Some(Ok(())) => return Err(LakeError::Usage(no_conditional_puts(url))),
                Some(Err(object_store::Error::AlreadyExists { .. })) => return Ok(()),
                Some(Err(error)) if !is_transient(&error) || Instant::now() >= deadline => {
                    return Err(refused_condition(url, &error));
                }
                None if Instant::now() >= deadline => return Err(late(url, self.timeout())),
                Some(Err(_)) | None => wait.sleep(deadline).await,
            }
        }
    }

    fn once(&self) -> Result<&Arc<dyn ObjectStore>, LakeError> {
        if let Some(once) = self.0.once.get() {
            return Ok(once);
        }
        let once = match self.0.location.store {
            StoreKind::Local => self.objects(),
            _ => connect(&self.0.location, &self.0.options, false)?,
        };
        Ok(self.0.once.get_or_init(|| once))
    }

    /// Paths of all objects below `prefix`, relative to this store's place, sorted.
    pub(crate) async fn list(&self, prefix: &str) -> Result<Vec<String>, LakeError> {
        Ok(self.list_stored(prefix).await?.into_iter().map(|object| object.path).collect())
    }

    /// All objects below `prefix`, by path.
    pub(crate) async fn list_stored(&self, prefix: &str) -> Result<Vec<Stored>, LakeError> {
        self.list_behind(prefix, None).await
    }

    /// [`Store::list_stored`] without what comes before `after` and itself.
    pub(crate) async fn list_behind(&self, prefix: &str, after: Option<&str>) -> Result<Vec<Stored>, LakeError> {
        let at = self.0.location.join(prefix)?;
        let url = self.url_of(prefix).to_string();
        let mut found = Vec::new();
        let mut objects = match after {
            Some(after) => self.0.objects.list_with_offset(Some(&at), &self.0.location.join(after)?),
            None => self.0.objects.list(Some(&at)),
        };
        loop {
            match self.within(&url, objects.try_next()).await {
                Ok(Some(meta)) => found.extend(self.relative(&meta.location).map(|path| Stored {
                    path,
                    size: meta.size,
                    modified: meta.last_modified,
                })),
                Ok(None) => break,
                Err(LakeError::NotFound(_)) => break,
                Err(error) => return Err(error),
            }
        }
        found.sort_by(|a, b| a.path.cmp(&b.path));
        let folders: Vec<bool> = found.iter().map(|object| is_folder(object, prefix, &found)).collect();
        let mut folders = folders.into_iter();
        found.retain(|object| !folders.next().unwrap_or(false) && !OURS.contains(&object.path.as_str()));
        Ok(found)
    }

    /// Whether nothing is below the root, as the first object that is listed tells.
    pub(crate) async fn is_empty(&self) -> Result<bool, LakeError> {
        let mut objects = self.0.objects.list(Some(&self.0.location.path));
        match self.within(self.url(), objects.try_next()).await {
            Ok(first) => Ok(first.is_none()),
            Err(LakeError::NotFound(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }

    fn relative(&self, path: &Path) -> Option<String> {
        let parts: Vec<_> = path.prefix_match(&self.0.location.path)?.map(|part| part.as_ref().to_string()).collect();
        Some(parts.join("/"))
    }

    /// Removes one object; absent is fine.
    pub(crate) async fn delete(&self, path: &str) -> Result<(), LakeError> {
        let at = self.0.location.join(path)?;
        let url = self.url_of(path).to_string();
        match self.within(&url, self.0.objects.delete(&at)).await {
            Err(LakeError::NotFound(_)) => Ok(()),
            other => other,
        }
    }

    /// Files that a write to a local folder left behind when it was killed: the client writes to `<name>#<number>` and
    /// renames. Such names are no objects, so nothing else sees them.
    pub(crate) fn list_unfinished(&self) -> Result<Vec<Stored>, LakeError> {
        let Some(root) = self.0.location.local_path() else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        let mut folders = vec![root.clone()];
        while let Some(folder) = folders.pop() {
            let name = folder.display().to_string();
            let failed = |error: &std::io::Error| explain_io(&name, error);
            let entries = match std::fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(&error)),
            };
            for entry in entries {
                let entry = entry.map_err(|error| failed(&error))?;
                // A file that is gone by now was finished.
                let Ok(meta) = entry.metadata() else { continue };
                let path = entry.path();
                if meta.is_dir() {
                    folders.push(path);
                } else if let (Ok(below), Ok(modified)) = (path.strip_prefix(&root), meta.modified())
                    && is_unfinished(&path)
                {
                    let path = below.display().to_string();
                    found.push(Stored { path, size: meta.len(), modified: modified.into() });
                }
            }
        }
        Ok(found)
    }

    /// Removes one of [`Store::list_unfinished`].
    pub(crate) async fn delete_unfinished(&self, path: &str) -> Result<(), LakeError> {
        let Some(root) = self.0.location.local_path() else { return Ok(()) };
        match tokio::fs::remove_file(root.join(path)).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(explain_io(path, &error)),
            _ => Ok(()),
        }
    }

    /// Copies all objects below `prefix` to the local folder `to`; returns how many.
    pub(crate) async fn download(&self, prefix: &str, to: &std::path::Path) -> Result<usize, LakeError> {
        let paths = self.list(prefix).await?;
        let count = paths.len();
        for path in paths {
            let below = path.strip_prefix(prefix.trim_matches('/')).unwrap_or(&path).trim_start_matches('/');
            self.download_one(&path, &to.join(below)).await?;
        }
        Ok(count)
    }

    /// Copies one object to the local file `to`.
    pub(crate) async fn download_one(&self, path: &str, to: &std::path::Path) -> Result<(), LakeError> {
        use tokio::io::AsyncWriteExt;
        let name = to.display().to_string();
        let local = |error: std::io::Error| explain_io(&name, &error);
        if let Some(folder) = to.parent() {
            tokio::fs::create_dir_all(folder).await.map_err(local)?;
        }
        let (_, mut parts) = self.stream(path).await?;
        let mut file = tokio::fs::File::create(to).await.map_err(local)?;
        while let Some(part) = parts.try_next().await? {
            file.write_all(&part).await.map_err(local)?;
        }
        file.flush().await.map_err(local)
    }

    /// Runs one request with its retries under the deadline.
    pub(crate) async fn within<T>(
        &self,
        url: &str,
        request: impl Future<Output = object_store::Result<T>> + Send,
    ) -> Result<T, LakeError> {
        // The client stops retrying at the deadline; the last attempt may end a little later.
        let limit = self.timeout() + request_timeout(self.timeout());
        match tokio::time::timeout(limit, request).await {
            Ok(result) => result.map_err(|error| explain(url, &error)),
            Err(_) => Err(late(url, self.timeout())),
        }
    }
}

/// An object as a listing shows it, its path relative to the store's place.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub path: String,
    pub size: u64,
    pub modified: chrono::DateTime<chrono::Utc>,
}

/// Whether an object of a listing below `prefix` only stands for a folder, as consoles of stores make them.
fn is_folder(object: &Stored, prefix: &str, sorted: &[Stored]) -> bool {
    let below = format!("{}/", object.path);
    let first = sorted.partition_point(|other| other.path < below);
    let holds_others = sorted.get(first).is_some_and(|other| other.path.starts_with(&below));
    object.size == 0 && (holds_others || object.path == prefix.trim_matches('/'))
}

/// One object as it was when it was found: one that is replaced meanwhile is an error, never a mixture.
#[derive(Clone)]
pub(crate) struct Pinned {
    store: Store,
    at: Path,
    url: String,
    pub size: u64,
    pub tag: Option<String>,
}

impl Pinned {
    /// Reads a range of at most a few parts, which is read again by itself when it stalls or is cut short.
    pub async fn range(&self, range: Range<u64>) -> Result<Bytes, LakeError> {
        let expected = range.end - range.start;
        let options =
            GetOptions { range: Some(GetRange::Bounded(range)), if_match: self.tag.clone(), ..GetOptions::default() };
        let read = async { self.store.0.objects.get_opts(&self.at, options).await?.bytes().await };
        let part = self.store.within(&self.url, read).await?;
        if part.len() as u64 != expected {
            return Err(LakeError::Transient(format!("{}: the answer was cut short\nhelp: run again", self.url)));
        }
        Ok(part)
    }

    /// The content in order, in parts with a deadline each: an object may take longer than any one request.
    pub fn stream(self) -> BoxStream<'static, Result<Bytes, LakeError>> {
        let size = self.size;
        let ranges = (0..size).step_by(PART).map(move |from| from..(from + PART as u64).min(size));
        let parts = futures::stream::iter(ranges).map(move |range| {
            let this = self.clone();
            async move { this.range(range).await }
        });
        parts.buffered(IN_FLIGHT).boxed()
    }
}

/// Shows that the store at a root honours conditional puts; written once where nothing else has shown it.
const MARKER: &str = "_doppel_root";

/// Says which zone a root is.
const ZONE: &str = "zone.json";

/// What is about a root rather than in it: no listing has it, so that nothing copies or removes it.
const OURS: [&str; 2] = [MARKER, ZONE];

/// The content of [`ZONE`].
#[derive(Deserialize)]
struct Mark {
    zone: String,
}

fn late(url: &str, timeout: Duration) -> LakeError {
    LakeError::Transient(format!(
        "{url}: no answer within {} s\nhelp: check the endpoint and the network, or raise --storage-timeout; then run again",
        timeout.as_secs()
    ))
}

fn no_conditional_puts(url: &str) -> String {
    format!(
        "{url}: this store has no conditional puts (`If-None-Match: *`), so two writers could overwrite each other\n\
         help: use a store that has them (Amazon S3, Google Cloud Storage, Azure Blob Storage, MinIO, SeaweedFS, …), \
         and do not set AWS_CONDITIONAL_PUT=disabled"
    )
}

fn unsupported(error: &object_store::Error) -> bool {
    use object_store::Error as E;
    let hard_link = matches!(error, E::Generic { store: "LocalFileSystem", .. })
        && matches!(crate::error::io_kind(error), Some(std::io::ErrorKind::Unsupported));
    hard_link || matches!(error, E::NotImplemented { .. } | E::NotSupported { .. })
}

fn refused_condition(url: &str, error: &object_store::Error) -> LakeError {
    let not_implemented = crate::error::text(error).contains("status code: 501");
    if unsupported(error) || not_implemented {
        return LakeError::Usage(no_conditional_puts(url));
    }
    explain(url, error)
}

/// Whether a file is what the client writes to before it renames it. All objects that we leave have an extension, but for
/// Delta's pointer; what else has none, such as `issue#42`, is somebody else's.
fn is_unfinished(path: &std::path::Path) -> bool {
    let parts = path.file_name().and_then(|name| name.to_str()?.rsplit_once('#'));
    parts.is_some_and(|(name, number)| {
        let is_object = std::path::Path::new(name).extension().is_some() || name == "_last_checkpoint";
        is_object && !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_for_a_folder_is_no_object() {
        let object = |path: &str, size: u64| Stored { path: path.into(), size, modified: chrono::DateTime::UNIX_EPOCH };
        let listed = [object("ledger/a", 0), object("ledger/a-b", 0), object("ledger/a/0.json", 9)];
        let folders = |prefix: &str| listed.each_ref().map(|object| is_folder(object, prefix, &listed));
        assert_eq!(folders("ledger"), [true, false, false]);
        assert_eq!(folders("/ledger/a-b/"), [true, true, false]);
        let root = [object("", 0), object("config.json", 2)];
        assert_eq!(root.each_ref().map(|object| is_folder(object, "", &root)), [true, false]);
    }
}
