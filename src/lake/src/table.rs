//! Delta tables: pinned reads, exactly-once appends.
//!
//! An append reads the latest version, looks whether its application transaction is there, and commits exactly the next
//! version with a conditional put; whoever loses the race looks again. So the look and the commit are one atomic step,
//! and neither a lost answer nor a second copy of the same shard can write rows twice.
//!
//! Data files are named after their transaction, so that rows come in the order of (run, stage, shard, chunk) however
//! the writers raced.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use datafusion::error::DataFusionError;
use deltalake::kernel::engine::arrow_conversion::{TryIntoArrow, TryIntoKernel};
use deltalake::kernel::transaction::{CommitBuilder, CommitProperties};
use deltalake::kernel::{Action, Add, StructType, Transaction};
use deltalake::logstore::{LogStoreRef, StorageConfig, default_logstore};
use deltalake::operations::create::CreateBuilder;
use deltalake::protocol::{DeltaOperation, SaveMode};
use deltalake::{DeltaTable, DeltaTableError, TableProperty};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::prefix::PrefixStore;
use tokio::sync::Mutex;
use tokio::time::Instant;
use url::Url;

use crate::LakeError;
use crate::backoff::Backoff;
use crate::delta::{self, Commit};
use crate::files::{DataFile, file_name, files, logged_paths, random_part_of};
use crate::rows;
use crate::store::Store;

/// Identifies one append so that a retry cannot write it twice: `id` is (run, stage, shard), `version` the chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AppTransaction {
    /// Application id, such as `demo/synthesize/3-of-8`.
    pub id: String,
    /// Chunk number, from 0.
    pub version: i64,
}

/// A data file that is written and waits for its commit; without one it stays unreferenced.
#[derive(Debug)]
pub struct Uploaded(Add);

/// Commits between two checkpoints of a log. Each look for a transaction reads the commits since the last one, a request
/// for each, so sharded appends pay for a longer interval.
const CHECKPOINT_INTERVAL: &str = "10";

/// A Delta table at a path of a root; it may not exist yet.
#[derive(Clone)]
pub struct Table {
    pub(crate) store: Store,
    pub(crate) path: String,
    url: Url,
    /// The version that [`Table::pin`] gives, where one was asked for.
    asked: Option<i64>,
    is_private: bool,
    /// The latest version seen, so that the next look reads only newer commits.
    latest: Arc<Mutex<Option<DeltaTable>>>,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Table").field(&self.url()).finish()
    }
}

impl Table {
    pub(crate) fn new(store: Store, path: &str, asked: Option<i64>, is_private: bool) -> Self {
        let url = store.url_of(path);
        Self { store, path: path.to_string(), url, asked, is_private, latest: Arc::default() }
    }

    /// The table's URL without credentials.
    pub fn url(&self) -> &str {
        self.url.as_str()
    }

    /// Latest version, or `None` where there is no table.
    pub async fn version(&self) -> Result<Option<i64>, LakeError> {
        match self.refresh().await {
            Ok(table) => Ok(version_of(&table)),
            Err(LakeError::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Version to pin: the one that was asked for, else the latest; a missing table is [`LakeError::NotFound`].
    pub async fn pin(&self) -> Result<i64, LakeError> {
        let latest = self.version().await?.ok_or_else(|| self.missing())?;
        match self.asked {
            Some(asked) if asked > latest => Err(self.discreet(LakeError::NotFound(format!(
                "{}: version {asked} is pinned, and the latest is _delta_log/{latest:020}.json\nhelp: correct --pin",
                self.url
            )))),
            asked => Ok(asked.unwrap_or(latest)),
        }
    }

    /// Columns of `version`, as readers of the table see them.
    pub async fn schema(&self, version: i64) -> Result<SchemaRef, LakeError> {
        self.arrow_schema(&self.at(version).await?)
    }

    /// Creates the table with `schema` unless it exists; an existing one must have that schema.
    pub async fn create(&self, schema: SchemaRef) -> Result<(), LakeError> {
        let wanted: StructType = schema
            .as_ref()
            .try_into_kernel()
            .map_err(|_| LakeError::Usage(format!("{}: a column has a type that Delta tables lack", self.url)))?;
        let deadline = Instant::now() + self.store.timeout();
        let mut wait = Backoff::default();
        loop {
            match self.refresh().await {
                Ok(table) => return self.check_schema(&table, &wanted),
                Err(LakeError::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
            self.store.require_conditional_puts().await?;
            let failed = self.blame_commit();
            let create = CreateBuilder::new()
                .with_log_store(self.log_store_as(&self.nameless()?)?)
                .with_columns(wanted.fields().cloned())
                .with_save_mode(SaveMode::ErrorIfExists)
                .with_configuration_property(TableProperty::CheckpointInterval, Some(CHECKPOINT_INTERVAL))
                .with_commit_properties(properties());
            match create.await {
                Ok(_) => return Ok(()),
                Err(error) => match failed(error).of_creation(self.url()) {
                    Commit::LookAgain(error) if Instant::now() >= deadline => return Err(error),
                    Commit::LookAgain(_) => wait.sleep(deadline).await,
                    Commit::Failed(error) => return Err(error),
                },
            }
        }
    }

    /// Appends `batches` in one commit carrying `transaction`; `false` when it was there already.
    ///
    /// The batches are encoded in memory, so a chunk should stay within some hundreds of megabytes.
    pub async fn append(&self, batches: Vec<RecordBatch>, transaction: AppTransaction) -> Result<bool, LakeError> {
        let table = self.latest().await?;
        if self.committed(&table, &transaction.id).await? >= Some(transaction.version) {
            return Ok(false);
        }
        let file = self.write_file(&table, batches, &transaction).await?;
        self.commit_files(table, vec![file], transaction).await
    }

    /// Writes `batches` as a data file that no version of the table has yet: see [`Table::append_uploaded`]. `part`
    /// gives the rows their place.
    pub async fn upload(&self, batches: Vec<RecordBatch>, part: &AppTransaction) -> Result<Uploaded, LakeError> {
        let table = self.latest().await?;
        Ok(Uploaded(self.write_file(&table, batches, part).await?))
    }

    /// Appends all of `files` in one commit carrying `transaction`; `false` when it was there already.
    ///
    /// For data that should appear whole or not at all, and whose number of commits must not tell how much there is.
    pub async fn append_uploaded(&self, files: Vec<Uploaded>, transaction: AppTransaction) -> Result<bool, LakeError> {
        let table = self.latest().await?;
        if self.committed(&table, &transaction.id).await? >= Some(transaction.version) {
            return Ok(false);
        }
        self.commit_files(table, files.into_iter().map(|file| file.0).collect(), transaction).await
    }

    /// Commits `adds` on top of `table`, again and again until no other writer came between.
    async fn commit_files(
        &self,
        mut table: DeltaTable,
        adds: Vec<Add>,
        transaction: AppTransaction,
    ) -> Result<bool, LakeError> {
        self.store.require_conditional_puts().await?;
        let deadline = Instant::now() + self.store.timeout();
        let mut wait = Backoff::default();
        loop {
            match self.commit(&table, &adds, &transaction).await {
                Ok(()) => return Ok(true),
                Err(Commit::Failed(error)) => return Err(error),
                Err(Commit::LookAgain(error)) if Instant::now() >= deadline => return Err(error),
                Err(Commit::LookAgain(_)) => wait.sleep(deadline).await,
            }
            table = self.latest().await?;
            if self.committed(&table, &transaction.id).await? >= Some(transaction.version) {
                // Ours, if the answer to our commit was lost; else another copy of this shard was first, and our files
                // stay unreferenced.
                return Ok(files(&table)?.iter().any(|file| adds.iter().any(|add| add.path == file.path)));
            }
        }
    }

    /// Last chunk committed under application id `id`, or `None`: where a killed shard goes on.
    pub async fn last_chunk(&self, id: &str) -> Result<Option<i64>, LakeError> {
        match self.version().await? {
            None => Ok(None),
            Some(_) => self.committed(&self.latest().await?, id).await,
        }
    }

    /// Streams the rows of `version`, `columns` only and in that order, in a stable order of files and rows.
    ///
    /// Columns that doppel's own tables have ([`crate::schema::expected_type`]) come with exactly that Arrow type and
    /// without nulls. A missing or wrongly typed column is [`LakeError::Malformed`] naming it.
    pub async fn scan(
        &self,
        version: i64,
        columns: &[&str],
    ) -> Result<BoxStream<'static, Result<RecordBatch, LakeError>>, LakeError> {
        let table = self.at(version).await?;
        let wanted = rows::wanted(self.url(), &*self.arrow_schema(&table)?, columns)?;
        if self.needs_engine(&table, columns)? {
            return self.scan_by_engine(&table, wanted).await;
        }
        let files: Vec<rows::File> =
            files(&table)?.iter().map(|file| self.data_file(file)).collect::<Result<_, LakeError>>()?;
        let files = futures::stream::iter(files);
        let open = move |file| rows::open(file, wanted.clone());
        // The next file's footer is read while rows of this one are consumed.
        Ok(files.map(open).buffered(2).try_flatten().boxed())
    }

    /// All rows of `version` in memory; for tables that a stage must hold anyway.
    pub async fn read(&self, version: i64, columns: &[&str]) -> Result<Vec<RecordBatch>, LakeError> {
        self.scan(version, columns).await?.try_collect().await
    }

    /// Number of rows of `version`, from the log where it says so.
    pub async fn count(&self, version: i64) -> Result<u64, LakeError> {
        let table = self.at(version).await?;
        let known: Option<Vec<u64>> = match self.needs_engine(&table, &[])? {
            true => None,
            false => files(&table)?.into_iter().map(|file| file.rows).collect(),
        };
        if let Some(known) = known {
            return Ok(known.iter().sum());
        }
        let schema = self.arrow_schema(&table)?;
        let first = schema.fields().first().map(|field| field.name().clone()).unwrap_or_default();
        let mut batches = self.scan(version, &[&first]).await?;
        let mut rows = 0;
        while let Some(batch) = batches.try_next().await? {
            rows += batch.num_rows() as u64;
        }
        Ok(rows)
    }

    /// BLAKE3 over schema and the content of the data files of `version` in the order of rows, in hex: it changes with
    /// any byte of the data, and is the same for a table that was written again from the same rows in the same chunks.
    /// PRIVACY: for a private table the digest is private.
    pub async fn digest(&self, version: i64) -> Result<String, LakeError> {
        let table = self.at(version).await?;
        let mut digest = blake3::Hasher::new();
        let mut field = |bytes: &[u8]| {
            digest.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        };
        let schema = self.arrow_schema(&table)?;
        for column in schema.fields() {
            field(column.name().as_bytes());
            field(column.data_type().to_string().as_bytes());
        }
        for file in files(&table)? {
            field(self.digest_file(&file).await?.as_bytes());
            field(file.deletions.unwrap_or_default().as_bytes());
            field(file.partition.as_bytes());
        }
        Ok(digest.finalize().to_hex().to_string())
    }

    /// The table at `version` as a DataFusion table provider, for SQL.
    pub async fn provider(
        &self,
        version: i64,
    ) -> Result<std::sync::Arc<dyn datafusion::catalog::TableProvider>, LakeError> {
        let table = self.at(version).await?;
        let failed = self.blame_engine();
        table.table_provider().await.map_err(failed)
    }

    /// `file` as it is opened.
    pub(crate) fn data_file(&self, file: &DataFile) -> Result<rows::File, LakeError> {
        let path = format!("{}/{}", self.path, file.path);
        let at = self.store.location().join(&path)?;
        Ok(rows::File { store: self.store.clone(), at, size: file.size, url: self.told(&file.path) })
    }

    /// The data file at `path` as messages name it.
    ///
    /// PRIVACY: our names have the number of a chunk, which counts the records of a private table; the random part alone
    /// leads to the file, too.
    fn told(&self, path: &str) -> String {
        match random_part_of(path) {
            Some(random) if self.is_private => format!("{}/*-{random}", self.url),
            _ => self.store.url_of(&format!("{}/{path}", self.path)).to_string(),
        }
    }

    /// An error of the store about the data file at `path`, which it names as messages may.
    fn veiled(&self, path: &str, error: LakeError) -> LakeError {
        error.map(|text| text.replace(self.store.url_of(&format!("{}/{path}", self.path)).as_str(), &self.told(path)))
    }

    async fn digest_file(&self, file: &DataFile) -> Result<blake3::Hash, LakeError> {
        let mut digest = blake3::Hasher::new();
        let (_, mut parts) = self.store.stream(&format!("{}/{}", self.path, file.path)).await.map_err(|error| {
            match self.veiled(&file.path, error) {
                LakeError::NotFound(message) => LakeError::Malformed(format!(
                    "{message}, though the table's log names it\n\
                     help: restore the file, or write the table again; or, for an older version, take a newer one: \
                     doppel gc removes what nothing pins"
                )),
                other => other,
            }
        })?;
        while let Some(part) = parts.try_next().await.map_err(|error| self.veiled(&file.path, error))? {
            digest.update(&part);
        }
        Ok(digest.finalize())
    }

    /// Whether reading needs more than the columns of plain Parquet files, as some tables of other programs do.
    pub(crate) fn needs_engine(&self, table: &DeltaTable, columns: &[&str]) -> Result<bool, LakeError> {
        let state = table.snapshot().map_err(|error| delta::explain(self.url(), &error))?;
        let partitioned = state.metadata().partition_columns().iter().any(|name| columns.contains(&name.as_str()));
        let mapped =
            state.metadata().configuration().get("delta.columnMapping.mode").is_some_and(|mode| mode != "none");
        Ok(partitioned || mapped || files(table)?.iter().any(|file| file.deletions.is_some()))
    }

    async fn scan_by_engine(
        &self,
        table: &DeltaTable,
        wanted: rows::Wanted,
    ) -> Result<BoxStream<'static, Result<RecordBatch, LakeError>>, LakeError> {
        let files = futures::stream::iter(logged_paths(table)?);
        let (scan, table) = (self.clone(), table.clone());
        let open = move |file: (String, String)| {
            let (scan, table, wanted) = (scan.clone(), table.clone(), wanted.clone());
            async move { scan.scan_file_by_engine(&table, file, wanted).await }
        };
        // Of several files the engine would take the order in which the log lists them, and a checkpoint of the same version
        // lists them in another.
        Ok(files.then(open).try_flatten().boxed())
    }

    async fn scan_file_by_engine(
        &self,
        table: &DeltaTable,
        (path, logged): (String, String),
        wanted: rows::Wanted,
    ) -> Result<BoxStream<'static, Result<RecordBatch, LakeError>>, LakeError> {
        use datafusion::prelude::{SessionConfig, SessionContext};
        let (this, blame) = (self.clone(), self.blame_engine());
        let failed = move |error| this.veiled(&path, blame(error));
        // One partition, so that rows keep their order.
        let session = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(1));
        let provider = table.table_provider().with_file_paths([logged]).await.map_err(&failed)?;
        let columns = wanted.names();
        let frame = session.read_table(provider).and_then(|frame| frame.select_columns(&columns)).map_err(&failed)?;
        let rows = frame.execute_stream().await.map_err(&failed)?;
        let url = self.url.to_string();
        Ok(rows.map(move |batch| wanted.convert(&url, &batch.map_err(&failed)?)).boxed())
    }

    /// Encodes and uploads `batches` as one new data file.
    async fn write_file(
        &self,
        table: &DeltaTable,
        batches: Vec<RecordBatch>,
        transaction: &AppTransaction,
    ) -> Result<Add, LakeError> {
        self.store.require_conditional_puts().await?;
        let schema = self.arrow_schema(table)?;
        let url = self.url.to_string();
        let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
        let encode = tokio::task::spawn_blocking(move || rows::encode(&url, &schema, &batches));
        let body = encode.await.map_err(|error| match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => LakeError::Transient(format!("{}: encoding was cut short\nhelp: run again", self.url)),
        })??;
        self.put_file(file_name(&transaction.id, transaction.version), body, rows, true).await
    }

    /// Uploads a data file, and says how a commit adds it.
    pub(crate) async fn put_file(
        &self,
        path: String,
        body: Vec<u8>,
        rows: usize,
        data_change: bool,
    ) -> Result<Add, LakeError> {
        let size = i64::try_from(body.len()).unwrap_or(i64::MAX);
        let put = self.store.put(&format!("{}/{path}", self.path), body.into()).await;
        put.map_err(|error| self.veiled(&path, error))?;
        Ok(Add {
            path,
            partition_values: HashMap::new(),
            size,
            modification_time: chrono::Utc::now().timestamp_millis(),
            data_change,
            // The count alone: smallest and largest values of private texts have no place in a log.
            stats: Some(format!("{{\"numRecords\":{rows}}}")),
            tags: None,
            deletion_vector: None,
            base_row_id: None,
            default_row_commit_version: None,
            clustering_provider: None,
        })
    }

    /// Commits `adds` as exactly the version after `table`.
    async fn commit(&self, table: &DeltaTable, adds: &[Add], transaction: &AppTransaction) -> Result<(), Commit> {
        let failed = self.blame_commit();
        let state = table.snapshot().map_err(|error| Commit::Failed(delta::explain(self.url(), &error)))?;
        let transaction = Transaction::new(&transaction.id, transaction.version);
        let operation = DeltaOperation::Write { mode: SaveMode::Append, partition_by: None, predicate: None };
        let commit = CommitBuilder::from(properties().with_application_transaction(transaction))
            .with_actions(adds.iter().cloned().map(Action::Add).collect())
            .build(Some(state), self.log_store().map_err(Commit::Failed)?, operation);
        commit.await.map(drop).map_err(failed)
    }

    async fn committed(&self, table: &DeltaTable, id: &str) -> Result<Option<i64>, LakeError> {
        let failed = self.blame();
        let state = table.snapshot().map_err(&failed)?;
        state.transaction_version(table.log_store().as_ref(), id).await.map_err(failed)
    }

    fn check_schema(&self, table: &DeltaTable, wanted: &StructType) -> Result<(), LakeError> {
        let state = table.snapshot().map_err(|error| delta::explain(self.url(), &error))?;
        let found = state.schema();
        let show = |schema: &StructType| {
            let columns = schema.fields().map(|field| {
                let null = if field.is_nullable() { " null" } else { "" };
                format!("{} {}{null}", field.name(), field.data_type())
            });
            columns.collect::<Vec<_>>().join(", ")
        };
        let same = found
            .fields()
            .map(|field| (field.name(), field.data_type(), field.is_nullable()))
            .eq(wanted.fields().map(|field| (field.name(), field.data_type(), field.is_nullable())));
        if same {
            return Ok(());
        }
        Err(LakeError::Malformed(format!(
            "{}: the table exists with other columns\n  found:    {}\n  expected: {}\n\
             help: remove the table, or use another run id or name",
            self.url,
            show(&found),
            show(wanted)
        )))
    }

    pub(crate) fn arrow_schema(&self, table: &DeltaTable) -> Result<SchemaRef, LakeError> {
        let state = table.snapshot().map_err(|error| delta::explain(self.url(), &error))?;
        let schema: arrow::datatypes::Schema =
            state.schema().as_ref().try_into_arrow().map_err(|_| {
                LakeError::Malformed(format!("{}: a column has a type that doppel cannot read", self.url))
            })?;
        Ok(Arc::new(schema))
    }

    /// The latest version; a missing table is an error.
    pub(crate) async fn latest(&self) -> Result<DeltaTable, LakeError> {
        self.refresh().await.map_err(|error| match error {
            LakeError::NotFound(_) => self.missing(),
            other => other,
        })
    }

    async fn refresh(&self) -> Result<DeltaTable, LakeError> {
        let mut latest = self.latest.lock().await;
        let mut table = match latest.take() {
            Some(table) => table,
            None => DeltaTable::new(self.log_store()?),
        };
        let known = version_of(&table);
        if let Err(error) = self.load(table.update_state()).await {
            return Err(self.discreet(delta::diagnose(&self.store, &self.path, None, error).await));
        }
        if let Some(now) = version_of(&table).filter(|now| Some(*now) != known) {
            self.refuse_empty_commits(known, now).await?;
        }
        *latest = Some(table.clone());
        Ok(table)
    }

    /// The table at `version`.
    async fn at(&self, version: i64) -> Result<DeltaTable, LakeError> {
        if let Some(table) = self.latest.lock().await.as_ref().filter(|table| version_of(table) == Some(version)) {
            return Ok(table.clone());
        }
        let number = u64::try_from(version)
            .map_err(|_| LakeError::Usage(format!("{}: there is no version {version}", self.url)))?;
        let mut table = DeltaTable::new(self.log_store()?);
        match self.load(table.load_version(number)).await {
            Ok(()) => self.refuse_empty_commits(None, version).await.map(|()| table),
            Err(error) => Err(self.discreet(delta::diagnose(&self.store, &self.path, Some(number), error).await)),
        }
    }

    async fn refuse_empty_commits(&self, known: Option<i64>, until: i64) -> Result<(), LakeError> {
        let refused = delta::refuse_empty_commits(&self.store, &self.path, known, until).await;
        refused.map_err(|error| self.discreet(error))
    }

    /// An error about the table's log as messages may have it.
    ///
    /// PRIVACY: a commit's number counts chunks of records where the table is private and grows by chunks.
    fn discreet(&self, error: LakeError) -> LakeError {
        discreet(self.is_private, error)
    }

    /// Explains an error of what begins now: by what storage failed at meanwhile, of which libraries keep but a text.
    fn blame(&self) -> impl Fn(DeltaTableError) -> LakeError + Send + Sync {
        let (failure, url) = (self.failure_from_now(), self.url.clone());
        move |error| failure().unwrap_or_else(|| delta::explain(url.as_str(), &error))
    }

    /// The same for an error of a commit.
    pub(crate) fn blame_commit(&self) -> impl Fn(DeltaTableError) -> Commit + Send + Sync {
        let (failure, url) = (self.failure_from_now(), self.url.clone());
        move |error| delta::after_commit(url.as_str(), &error, failure())
    }

    /// The same for an error of the engine.
    fn blame_engine(&self) -> impl Fn(DataFusionError) -> LakeError + Send + Sync + 'static {
        let (failure, url) = (self.failure_from_now(), self.url.clone());
        move |error| failure().unwrap_or_else(|| rows::engine_error(url.as_str(), &error))
    }

    /// What storage failed at since now.
    fn failure_from_now(&self) -> impl Fn() -> Option<LakeError> + Send + Sync + 'static {
        let (started, store, is_private) = (Instant::now(), self.store.clone(), self.is_private);
        move || store.failure_since(started).map(|error| discreet(is_private, error))
    }

    async fn load(&self, load: impl Future<Output = deltalake::DeltaResult<()>> + Send) -> Result<(), LakeError> {
        let failed = self.blame();
        // Two deadlines: a log is read in several requests, each of which may use its retries up.
        match tokio::time::timeout(self.store.timeout() * 2, load).await {
            Ok(result) => result.map_err(failed),
            Err(_) => Err(LakeError::Transient(format!(
                "{}: the log could not be read in time\nhelp: raise --storage-timeout, or run again",
                self.url
            ))),
        }
    }

    pub(crate) fn log_store(&self) -> Result<LogStoreRef, LakeError> {
        self.log_store_as(&self.url)
    }

    /// The table's log, which takes `url` for its place.
    fn log_store_as(&self, url: &Url) -> Result<LogStoreRef, LakeError> {
        let prefix = self.store.location().join_table(&self.path)?;
        let objects = self.store.objects();
        let prefixed = Arc::new(PrefixStore::new(objects.clone(), prefix));
        Ok(default_logstore(prefixed, objects, url, &StorageConfig::default()))
    }

    /// The table's place without the root: the first commit records it, and a release must not tell of one machine.
    fn nameless(&self) -> Result<Url, LakeError> {
        Url::parse("file:///")
            .and_then(|root| root.join(&self.path))
            .map_err(|_| LakeError::Usage(format!("{}: no path for a table", self.url)))
    }

    fn missing(&self) -> LakeError {
        LakeError::NotFound(format!(
            "{}: no table there\nhelp: run the stage that writes it first, with the same --run and roots",
            self.url
        ))
    }
}

/// One try for each commit, since the caller looks for its transaction before the next; and no clean-up of old logs, since
/// pinned versions must stay readable.
pub(crate) fn properties() -> CommitProperties {
    CommitProperties::default().with_max_retries(0).with_cleanup_expired_logs(Some(false))
}

fn discreet(is_private: bool, error: LakeError) -> LakeError {
    match is_private {
        true => error.map(|text| delta::without_commits(&text)),
        false => error,
    }
}

fn version_of(table: &DeltaTable) -> Option<i64> {
    table.version().and_then(|version| i64::try_from(version).ok())
}
