//! A store on a network that repeats what its client gives up too early, and remembers what failed in the end.
//!
//! The client of `object_store` repeats requests that get no answer or one of 5xx, and reads on where the body of an
//! object is cut short. It does not repeat a listing whose answer is cut short, a deletion whose answer is lost, or a
//! request that is refused because a clock is wrong.
//!
//! The libraries above keep only the text of some storage errors, which repeats what the server sent and does not tell
//! what the caller can do. Who gets such an error asks here what it was about.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::error::{LakeError, explain, is_transient, status, text};
use crate::location::Location;

/// What storage or network failed last, retries and all, or refused; and when.
#[derive(Clone, Debug, Default)]
pub(crate) struct Failures(Arc<Mutex<Option<(Instant, LakeError)>>>);

impl Failures {
    /// The last failure, unless it was before `start`.
    pub fn since(&self, start: Option<Instant>) -> Option<LakeError> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().filter(|(at, _)| start.is_none_or(|start| *at >= start)).map(|(_, failure)| failure.clone())
    }

    fn note(&self, failure: LakeError) {
        if matches!(failure, LakeError::Transient(_) | LakeError::Forbidden(_)) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), failure));
        }
    }
}

/// The store.
#[derive(Clone, Debug)]
pub(crate) struct Steady {
    inner: Arc<dyn ObjectStore>,
    location: Location,
    timeout: Duration,
    failures: Failures,
}

impl Steady {
    /// Stands before `inner`, the client of the store of `location`.
    pub fn new(inner: Arc<dyn ObjectStore>, location: Location, timeout: Duration, failures: Failures) -> Self {
        Self { inner, location, timeout, failures }
    }

    /// Makes `request`, which may be carried out twice without harm, until it succeeds, its error is final, or the
    /// deadline has passed.
    async fn repeat<T, F: Future<Output = Result<T>>>(&self, at: &Path, request: impl Fn() -> F) -> Result<T> {
        let deadline = Instant::now() + self.timeout;
        let mut wait = Backoff::default();
        loop {
            match request().await {
                Err(error) if is_worth_repeating(&error) && Instant::now() < deadline => wait.sleep(deadline).await,
                result => return result.map_err(|error| self.note(at, error)),
            }
        }
    }

    /// A refused HEAD comes without a body, and so without its reason; a GET tells it.
    async fn ask(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        match self.inner.get_opts(at, options.clone()).await {
            Err(error) if options.head && is_refusal(&error) => {
                self.inner.get_opts(at, GetOptions { head: false, ..options }).await
            }
            found => found,
        }
    }

    fn note(&self, at: &Path, error: object_store::Error) -> object_store::Error {
        let below = at.prefix_match(&self.location.path);
        let below = below.map(|parts| parts.map(|part| part.as_ref().to_string()).collect::<Vec<_>>().join("/"));
        let url = self.location.url_of(&below.unwrap_or_default());
        self.failures.note(explain(url.as_str(), &error));
        error
    }

    fn listing(&self, prefix: Option<&Path>, after: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let listing = Listing { store: self.clone(), prefix: prefix.cloned(), after: after.cloned(), open: None };
        let next = |mut listing: Listing| async move { Ok(listing.next().await?.map(|found| (found, listing))) };
        futures::stream::try_unfold(listing, next).boxed()
    }
}

fn is_refusal(error: &object_store::Error) -> bool {
    matches!(error, object_store::Error::PermissionDenied { .. }) || status(&text(error)) == Some(400)
}

/// Only what the client or the network failed at, not what the store decided.
fn is_worth_repeating(error: &object_store::Error) -> bool {
    use object_store::Error as E;
    matches!(error, E::Generic { .. } | E::PermissionDenied { .. }) && is_transient(error)
}

/// A listing that goes on after the last name it gave.
struct Listing {
    store: Steady,
    prefix: Option<Path>,
    after: Option<Path>,
    open: Option<BoxStream<'static, Result<ObjectMeta>>>,
}

impl Listing {
    async fn next(&mut self) -> Result<Option<ObjectMeta>> {
        let deadline = Instant::now() + self.store.timeout;
        let mut wait = Backoff::default();
        loop {
            let (inner, prefix) = (&self.store.inner, self.prefix.as_ref());
            let open = self.open.get_or_insert_with(|| match &self.after {
                Some(after) => inner.list_with_offset(prefix, after),
                None => inner.list(prefix),
            });
            match open.try_next().await {
                Ok(found) => {
                    self.after = found.as_ref().map(|found| found.location.clone());
                    return Ok(found);
                }
                Err(error) if is_worth_repeating(&error) && Instant::now() < deadline => {
                    self.open = None;
                    wait.sleep(deadline).await;
                }
                Err(error) => return Err(self.store.note(prefix.unwrap_or(&Path::default()), error)),
            }
        }
    }
}

impl std::fmt::Display for Steady {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
impl ObjectStore for Steady {
    async fn put_opts(&self, at: &Path, body: PutPayload, options: PutOptions) -> Result<PutResult> {
        let put = || self.inner.put_opts(at, body.clone(), options.clone());
        match options.mode {
            PutMode::Overwrite => self.repeat(at, put).await,
            // One that was carried out and lost its answer would fail the second time: the caller looks first.
            _ => put().await.map_err(|error| self.note(at, error)),
        }
    }

    async fn put_multipart_opts(&self, at: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.repeat(at, || self.inner.put_multipart_opts(at, options.clone())).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        let mut found = self.repeat(at, || self.ask(at, options.clone())).await?;
        if let GetResultPayload::Stream(body) = found.payload {
            let (this, at) = (self.clone(), at.clone());
            found.payload = GetResultPayload::Stream(body.map_err(move |error| this.note(&at, error)).boxed());
        }
        Ok(found)
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        let delete = move |path: Path| {
            let this = this.clone();
            async move {
                this.repeat(&path, || this.inner.delete(&path)).await?;
                Ok(path)
            }
        };
        paths.and_then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.listing(prefix, None)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.listing(prefix, Some(offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.repeat(prefix.unwrap_or(&Path::default()), || self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await.map_err(|error| self.note(to, error))
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    /// A store whose listings break off after two names, and whose deletions lose every answer but the last.
    #[derive(Debug, Default)]
    struct Flaky {
        inner: InMemory,
        lost_answers: Mutex<usize>,
    }

    fn broken() -> object_store::Error {
        object_store::Error::Generic { store: "S3", source: "error decoding response body".into() }
    }

    fn cut<T: Send + 'static>(listing: BoxStream<'static, Result<T>>) -> BoxStream<'static, Result<T>> {
        let parts = listing.enumerate().map(|(number, found)| if number < 2 { found } else { Err(broken()) });
        parts.boxed()
    }

    impl std::fmt::Display for Flaky {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "Flaky")
        }
    }

    #[async_trait]
    impl ObjectStore for Flaky {
        async fn put_opts(&self, at: &Path, body: PutPayload, options: PutOptions) -> Result<PutResult> {
            self.inner.put_opts(at, body, options).await
        }

        async fn put_multipart_opts(&self, at: &Path, o: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
            self.inner.put_multipart_opts(at, o).await
        }

        async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
            self.inner.get_opts(at, options).await
        }

        fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
            let mut lost = self.lost_answers.lock().unwrap();
            let is_lost = *lost > 0;
            *lost = lost.saturating_sub(1);
            self.inner.delete_stream(paths).map(move |done| if is_lost { Err(broken()) } else { done }).boxed()
        }

        fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
            cut(self.inner.list(prefix))
        }

        fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
            cut(self.inner.list_with_offset(prefix, offset))
        }

        async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
            self.inner.list_with_delimiter(prefix).await
        }

        async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
            self.inner.copy_opts(from, to, options).await
        }
    }

    fn steady(flaky: Flaky, timeout: Duration) -> Steady {
        let location = Location::parse("s3://lake/zone").unwrap();
        Steady::new(Arc::new(flaky), location, timeout, Failures::default())
    }

    async fn with_objects(count: usize) -> Flaky {
        let flaky = Flaky::default();
        for number in 0..count {
            flaky.put(&Path::from(format!("zone/{number}")), "text".into()).await.unwrap();
        }
        flaky
    }

    #[tokio::test]
    async fn a_listing_goes_on_after_the_last_name_it_gave() {
        let store = steady(with_objects(7).await, Duration::from_secs(30));
        let found: Vec<String> =
            store.list(None).map_ok(|found| found.location.to_string()).try_collect().await.unwrap();
        assert_eq!(found, (0..7).map(|number| format!("zone/{number}")).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_deletion_whose_answer_is_lost_is_done_again() {
        let flaky = with_objects(1).await;
        *flaky.lost_answers.lock().unwrap() = 2;
        let store = steady(flaky, Duration::from_secs(30));
        store.delete(&Path::from("zone/0")).await.unwrap();
        assert_eq!(store.list(None).count().await, 0);
    }

    #[tokio::test]
    async fn what_failed_in_the_end_is_remembered_by_its_object() {
        let flaky = with_objects(1).await;
        *flaky.lost_answers.lock().unwrap() = usize::MAX;
        let store = steady(flaky, Duration::ZERO);
        let before = Instant::now();
        store.delete(&Path::from("zone/0")).await.unwrap_err();
        let failure = store.failures.since(Some(before)).unwrap();
        assert!(matches!(&failure, LakeError::Transient(text) if text.starts_with("s3://lake/zone/0: ")), "{failure}");
        assert!(store.failures.since(Some(Instant::now())).is_none());
    }
}
