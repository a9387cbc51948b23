//! What can go wrong with a query, by what the caller can do about it.

use std::io::{self, ErrorKind};

use arrow::error::ArrowError;
use datafusion::error::DataFusionError;
use datafusion::object_store;
use datafusion::sql::sqlparser::parser::ParserError;
use lake::LakeError;
use stage::Failure;

/// What can go wrong with a query.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueryError {
    /// The SQL is malformed, or names a column or function that is not there: exit code 2.
    #[error("{0}")]
    Sql(String),
    /// The SQL computes what some value does not allow, such as a division by zero: exit code 2.
    #[error("{0}\nhelp: correct the expression, or guard it: nullif(divisor, 0), try_cast(value AS type)")]
    Computation(String),
    /// A statement that is not a query: exit code 2.
    #[error("{0} is refused: query is read-only\nhelp: use SELECT, and --output with --to FILE to keep the rows")]
    ReadOnly(String),
    /// A table or run that is not there: exit code 3.
    #[error("{0}")]
    Missing(String),
    /// A data file that cannot be read, or what else the engine says of the data: exit code 3.
    #[error("{0}")]
    Data(String),
    /// Storage.
    #[error(transparent)]
    Lake(#[from] LakeError),
    /// The rows could not be written where they should go: exit code 2, 3 or 5 by the kind of fault.
    #[error("{target}: {fault}\nhelp: is the folder there and writable, and the disk not full?")]
    Output {
        /// The file, or standard output.
        target: String,
        /// What the operating system says.
        fault: io::Error,
    },
    /// A broken invariant, ours or the engine's: exit code 1.
    #[error("{0}")]
    Bug(String),
}

impl From<QueryError> for Failure {
    fn from(error: QueryError) -> Self {
        let message = error.to_string();
        match error {
            QueryError::Sql(_) | QueryError::Computation(_) | QueryError::ReadOnly(_) => Failure::Usage(message),
            QueryError::Missing(_) | QueryError::Data(_) => Failure::Input(message),
            QueryError::Lake(error) => error.into(),
            QueryError::Output { fault, .. } => match fault.kind() {
                ErrorKind::NotADirectory | ErrorKind::IsADirectory => Failure::Usage(message),
                ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                    Failure::Input(message)
                }
                _ => Failure::Transient(message),
            },
            QueryError::Bug(_) => Failure::Bug(message),
        }
    }
}

impl From<DataFusionError> for QueryError {
    /// Unwraps what the engine wrapped around our own errors, and sorts its own by remedy.
    fn from(error: DataFusionError) -> Self {
        let message = error.strip_backtrace();
        match error {
            DataFusionError::External(inner) => match inner.downcast::<QueryError>() {
                Ok(ours) => *ours,
                Err(inner) => match inner.downcast::<LakeError>() {
                    Ok(lake) => QueryError::Lake(*lake),
                    Err(inner) => foreign(&*inner, message),
                },
            },
            DataFusionError::Context(_, inner) | DataFusionError::Diagnostic(_, inner) => (*inner).into(),
            DataFusionError::Shared(inner) => match std::sync::Arc::try_unwrap(inner) {
                Ok(inner) => inner.into(),
                Err(shared) => sort(&shared, message),
            },
            DataFusionError::Collection(mut errors) if !errors.is_empty() => errors.swap_remove(0).into(),
            other => sort(&other, message),
        }
    }
}

fn sort(error: &DataFusionError, message: String) -> QueryError {
    match error.find_root() {
        DataFusionError::SQL(error, _) => QueryError::Sql(syntax(error)),
        DataFusionError::Plan(text) | DataFusionError::NotImplemented(text) => QueryError::Sql(with_help(text)),
        DataFusionError::SchemaError(error, _) => QueryError::Sql(with_help(&error.to_string())),
        DataFusionError::Configuration(_) => QueryError::Sql(message),
        DataFusionError::ParquetError(_) => QueryError::Data(unreadable(&message)),
        DataFusionError::ArrowError(error, _) => match &**error {
            ArrowError::ParquetError(_) | ArrowError::IoError(..) => QueryError::Data(unreadable(&message)),
            ArrowError::ExternalError(inner) => foreign(&**inner, message),
            error => QueryError::Computation(error.to_string()),
        },
        DataFusionError::External(inner) => foreign(&**inner, message),
        DataFusionError::Execution(text) => QueryError::Computation(text.clone()),
        DataFusionError::Internal(_) | DataFusionError::ExecutionJoin(_) => QueryError::Bug(message),
        // The engine reads files through stores of the lake, which have retried already.
        DataFusionError::ObjectStore(error) => match &**error {
            // The table's log names the file, so no retry brings it back.
            object_store::Error::NotFound { path, .. } => QueryError::Data(gone(path)),
            _ => QueryError::Lake(LakeError::Transient(message)),
        },
        DataFusionError::IoError(_) => QueryError::Lake(LakeError::Transient(message)),
        _ => QueryError::Data(message),
    }
}

/// An error of a library below the engine: a pattern that is none, or what it says of the data.
fn foreign(error: &(dyn std::error::Error + 'static), message: String) -> QueryError {
    // Of several libraries, which share the words.
    match error.to_string() {
        text if text.starts_with("regex parse error") => QueryError::Computation(text),
        _ => QueryError::Data(message),
    }
}

/// What the engine keeps of the fault of a data file is a text, of which the file's name alone is of use.
fn unreadable(text: &str) -> String {
    let named = text.split_once("for file ").and_then(|(_, rest)| rest.split_once(": "));
    let file = named.map_or("a data file of a table that the query reads", |(file, _)| file);
    format!("{file}: not there, damaged or cut short\nhelp: restore the file, or write the table again")
}

fn gone(file: &str) -> String {
    format!("{file}: not there\nhelp: restore the file, or write the table again")
}

fn syntax(error: &ParserError) -> String {
    let (ParserError::TokenizerError(text) | ParserError::ParserError(text)) = error else {
        return "the query nests too deeply\nhelp: split it with WITH".into();
    };
    format!("not valid SQL: {text}\nhelp: quote names that hold `-` or capitals, such as \"my-run\".synthetic")
}

fn with_help(text: &str) -> String {
    format!("{}\nhelp: SHOW TABLES lists tables, DESCRIBE TABLE their columns", text.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn not_found(path: &str) -> object_store::Error {
        object_store::Error::NotFound { path: path.into(), source: "no such file".into() }
    }

    #[test]
    fn a_data_file_that_the_store_does_not_have_is_named() {
        let error = DataFusionError::ObjectStore(Box::new(not_found("runs/demo/synthetic/a.parquet")));
        let told = QueryError::from(error.context("while reading")).to_string();
        assert!(told.starts_with("runs/demo/synthetic/a.parquet: not there\nhelp: restore the file"), "{told}");
    }

    #[test]
    fn errors_keep_their_remedy_through_the_engine() {
        let check = |error: DataFusionError, code: u8| {
            let text = error.to_string();
            assert_eq!(Failure::from(QueryError::from(error)).exit_code(), code, "{text}");
        };
        let external = |error: QueryError| DataFusionError::External(Box::new(error));
        check(external(QueryError::Missing("no".into())), 3);
        check(external(QueryError::ReadOnly("DROP".into())), 2);
        check(DataFusionError::External(Box::new(LakeError::Transient("reset".into()))), 5);
        check(external(QueryError::Missing("no".into())).context("while planning"), 3);
        check(DataFusionError::Plan("no such column".into()), 2);
        check(DataFusionError::Execution("n is too small".into()), 2);
        check(DataFusionError::ArrowError(Box::new(ArrowError::DivideByZero), None), 2);
        check(DataFusionError::ArrowError(Box::new(ArrowError::ParquetError("cut".into())), None), 3);
        check(DataFusionError::Internal("?".into()), 1);
        check(DataFusionError::ObjectStore(Box::new(not_found("a.parquet"))), 3);
        let reset = object_store::Error::Generic { store: "S3", source: "reset".into() };
        check(DataFusionError::ObjectStore(Box::new(reset)), 5);
        check(DataFusionError::Shared(std::sync::Arc::new(external(QueryError::Missing("no".into())))), 3);
    }
}
