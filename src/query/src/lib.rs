//! SQL over the release zone, for analysts and auditors.
//!
//! Reads Delta tables and run manifests below one [`lake::ReleaseRoot`] and writes rows to standard output or to a
//! file. It must never know the private root, and it must never write to a root or read a file that a query names: an
//! analyst who may run it may see what was released, and nothing else. [`session`] holds that line.
//!
//! Tables resolve when a query names them ([`catalog`]), so starting costs nothing per table or run. [`audit`] turns
//! manifests into tables; [`functions`] adds what SQL lacks for embeddings and text.

pub mod args;
pub mod audit;
pub mod catalog;
pub mod error;
pub mod functions;
pub mod output;
pub mod session;

pub use args::Args;
pub use catalog::Options;
pub use error::QueryError;
pub use session::Session;

use lake::Zone;
use stage::{Failure, Summary};

use crate::output::Target;

/// Runs one query and writes its rows.
pub async fn run(args: Args) -> Result<Summary, Failure> {
    let sql = args.sql_text()?;
    let target = args.target()?;
    let root = args.release_root().await?;
    let session = Session::new(root.clone(), args.options()?);
    match answer(&session, &sql, &target).await {
        Ok(()) => Ok(Summary::silent()),
        // The engine keeps only the text of some storage errors; what it says then, and how, does not help.
        Err(error @ (QueryError::Data(_) | QueryError::Computation(_) | QueryError::Bug(_))) => {
            match root.last_failure() {
                Some(failure) => Err(failure.into()),
                None => Err(error.into()),
            }
        }
        Err(error) => Err(error.into()),
    }
}

async fn answer(session: &Session, sql: &str, target: &Target) -> Result<(), QueryError> {
    output::write(session.query(sql).await?, target).await
}
