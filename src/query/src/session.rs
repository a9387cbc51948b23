//! The session: names that resolve to released tables, and a gate that lets only queries pass.
//!
//! The gate has two parts: an allow-list over the parsed statement, which gives a message that helps, and DataFusion's
//! check of the plan, which would also stop a writing node that hides inside a query.

use std::ops::ControlFlow;
use std::sync::Arc;

use datafusion::execution::SendableRecordBatchStream;
use datafusion::execution::context::SQLOptions;
use datafusion::prelude::{SessionConfig, SessionContext};
use datafusion::sql::parser::Statement;
use datafusion::sql::sqlparser::ast::{Query, Select, Statement as SqlStatement, Visit, Visitor};
use lake::ReleaseRoot;

use crate::catalog::{CATALOG, NO_RUN, Options, ReleaseCatalog};
use crate::error::QueryError;
use crate::functions;

/// What `SHOW TABLES` means here.
const SHOW_TABLES: &str = "SELECT run, name, version FROM tables ORDER BY run, name";

/// A session over one release root.
pub struct Session {
    context: SessionContext,
    catalog: Arc<ReleaseCatalog>,
}

impl Session {
    /// Opens a session; touches no storage.
    pub fn new(root: ReleaseRoot, options: Options) -> Self {
        let schema = options.run.clone().unwrap_or_else(|| NO_RUN.to_string());
        let config = SessionConfig::new()
            .with_create_default_catalog_and_schema(false)
            .with_default_catalog_and_schema(CATALOG, schema);
        let context = SessionContext::new_with_config(config);
        let table_functions = context.state().table_functions().keys().cloned().collect();
        let catalog = Arc::new(ReleaseCatalog::new(root, options, table_functions));
        context.register_catalog(CATALOG, catalog.clone());
        functions::register(&context);
        Self { context, catalog }
    }

    /// Plans and starts one query. Anything but a query is [`QueryError::ReadOnly`]; a pin of a table that the query
    /// does not read is refused, since whoever gave it believes that it holds, and so is an alias that is a run's id.
    pub async fn query(&self, sql: &str) -> Result<SendableRecordBatchStream, QueryError> {
        let state = self.context.state();
        let dialect = state.config().options().sql_parser.dialect;
        let mut statement = state.sql_to_statement(sql, &dialect)?;
        // With a condition it is another statement, which is refused below.
        if matches!(&statement, Statement::Statement(inner) if inner.to_string() == "SHOW TABLES") {
            statement = state.sql_to_statement(SHOW_TABLES, &dialect)?;
        }
        check_read_only(&statement)?;
        self.catalog.refuse_aliases_of_runs().await?;
        let plan = state.statement_to_plan(statement).await?;
        SQLOptions::new()
            .with_allow_ddl(false)
            .with_allow_dml(false)
            .with_allow_statements(false)
            .verify_plan(&plan)?;
        self.catalog.refuse_unused_pins()?;
        Ok(self.context.execute_logical_plan(plan).await?.execute_stream().await?)
    }
}

fn check_read_only(statement: &Statement) -> Result<(), QueryError> {
    match statement {
        Statement::Explain(explain) => check_read_only(&explain.statement),
        Statement::Statement(inner) => check_sql_read_only(inner),
        other => Err(refused(&other.to_string())),
    }
}

fn check_sql_read_only(statement: &SqlStatement) -> Result<(), QueryError> {
    match statement {
        SqlStatement::Query(query) => check_reads_throughout(query),
        SqlStatement::ExplainTable { .. } => Ok(()),
        SqlStatement::Explain { statement, .. } => check_sql_read_only(statement),
        other => Err(refused(&other.to_string())),
    }
}

fn check_reads_throughout(query: &Query) -> Result<(), QueryError> {
    match query.visit(&mut Writes) {
        ControlFlow::Break(statement) => Err(refused(&statement)),
        ControlFlow::Continue(()) => Ok(()),
    }
}

/// Looks through a query, its set operations, subqueries and WITH, for what would write. The engine passes over some
/// INTOs without a word, so the check of the plan would not see them.
struct Writes;

impl Visitor for Writes {
    /// What was found.
    type Break = String;

    fn pre_visit_select(&mut self, select: &Select) -> ControlFlow<String> {
        match select.into {
            Some(_) => ControlFlow::Break("SELECT INTO".into()),
            None => ControlFlow::Continue(()),
        }
    }

    /// A statement inside a query is no query: `WITH … INSERT`, for one.
    fn pre_visit_statement(&mut self, statement: &SqlStatement) -> ControlFlow<String> {
        ControlFlow::Break(statement.to_string())
    }
}

fn refused(statement: &str) -> QueryError {
    let words: Vec<&str> = statement.split_whitespace().take_while(|word| is_keyword(word)).take(3).collect();
    QueryError::ReadOnly(words.join(" "))
}

fn is_keyword(word: &str) -> bool {
    word.chars().all(|c| c.is_ascii_uppercase())
}
