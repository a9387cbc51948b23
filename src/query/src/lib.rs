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
pub use error::QueryError;
pub use session::{Options, Session};

use stage::{Failure, Summary};

/// Runs one query and writes its rows.
pub async fn run(args: Args) -> Result<Summary, Failure> {
    let sql = args.sql_text()?;
    let target = args.target()?;
    let root = args.release_root().await?;
    let session = Session::new(root, args.options()?);
    let rows = session.query(&sql).await?;
    output::write(rows, &target).await?;
    Ok(Summary::silent())
}
