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
use datafusion::sql::sqlparser::ast::{Expr, ObjectName, Query, Select, Statement as SqlStatement, Visit, Visitor};
use lake::ReleaseRoot;

use crate::audit::TABLES;
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
        let is_show = |inner: &SqlStatement| matches!(inner, SqlStatement::ShowTables { .. });
        if matches!(&statement, Statement::Statement(inner) if is_show(inner) && inner.to_string() == "SHOW TABLES") {
            statement = state.sql_to_statement(SHOW_TABLES, &dialect)?;
        }
        if let Err(error) = check_read_only(&statement) {
            // To drop it is to descend as deep as it nests.
            std::mem::forget(statement);
            return Err(error);
        }
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
        SqlStatement::ExplainTable { table_name, .. } => check_is_of_one_run(table_name),
        SqlStatement::Explain { statement, .. } => check_sql_read_only(statement),
        other => Err(refused(&other.to_string())),
    }
}

fn check_reads_throughout(query: &Query) -> Result<(), QueryError> {
    match query.visit(&mut Gate::default()) {
        ControlFlow::Break(error) => Err(error),
        ControlFlow::Continue(()) => Ok(()),
    }
}

/// Looks through a query, its set operations, subqueries and WITH, for what would write, which the engine passes over in
/// some INTOs without a word, for what would read something else than it says, and for what the engine would take too long
/// over or break its stack.
#[derive(Default)]
struct Gate {
    /// Expressions around the one that is looked at.
    depth: usize,
    /// SELECTs so far.
    selects: usize,
    /// Values in lists of `IN` so far.
    values: usize,
}

/// Expressions that may stand within each other, as each `OR` of a row of them holds those before it, and SELECTs of one
/// query. The engine takes some seconds for so many, growing with the square.
const MOST: usize = 1000;
/// Values in lists of `IN` of one query: the engine descends once for each.
pub const MOST_VALUES: usize = 50_000;

impl Visitor for Gate {
    /// What was found.
    type Break = QueryError;

    fn pre_visit_select(&mut self, select: &Select) -> ControlFlow<QueryError> {
        self.selects += 1;
        match select.into {
            Some(_) => ControlFlow::Break(refused("SELECT INTO")),
            None if self.selects > MOST => {
                ControlFlow::Break(QueryError::Sql(format!("more than {MOST} SELECTs\nhelp: run several queries")))
            }
            None => ControlFlow::Continue(()),
        }
    }

    fn pre_visit_expr(&mut self, expression: &Expr) -> ControlFlow<QueryError> {
        self.depth += 1;
        if let Expr::InList { list, .. } = expression {
            self.values += list.len();
        }
        if self.depth > MOST {
            return ControlFlow::Break(QueryError::Sql(format!(
                "more than {MOST} expressions within each other, as in a row of so many ORs\n\
                 help: use column IN ('a', 'b', …), or text ~ 'a|b|…' in place of many LIKEs"
            )));
        }
        if self.values > MOST_VALUES {
            return ControlFlow::Break(QueryError::Sql(format!(
                "more than {MOST_VALUES} values in lists of IN\nhelp: run several queries"
            )));
        }
        ControlFlow::Continue(())
    }

    fn post_visit_expr(&mut self, _: &Expr) -> ControlFlow<QueryError> {
        self.depth -= 1;
        ControlFlow::Continue(())
    }

    /// A statement inside a query is no query: `WITH … INSERT`, for one.
    fn pre_visit_statement(&mut self, statement: &SqlStatement) -> ControlFlow<QueryError> {
        ControlFlow::Break(refused(&statement.to_string()))
    }

    fn pre_visit_relation(&mut self, name: &ObjectName) -> ControlFlow<QueryError> {
        match check_is_of_one_run(name) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => ControlFlow::Break(error),
        }
    }
}

/// Refuses a table of all runs that is written as one of a single run.
fn check_is_of_one_run(name: &ObjectName) -> Result<(), QueryError> {
    let parts: Vec<&str> = name.0.iter().filter_map(|part| Some(part.as_ident()?.value.as_str())).collect();
    match parts.as_slice() {
        [.., _, table] if TABLES.iter().any(|own| own.eq_ignore_ascii_case(table)) => Err(QueryError::Sql(format!(
            "{name}: `{table}` tells of all runs\nhelp: write {table} alone, and choose by its column `run`"
        ))),
        _ => Ok(()),
    }
}

fn refused(statement: &str) -> QueryError {
    let words: Vec<&str> = statement.split_whitespace().take_while(|word| is_keyword(word)).take(3).collect();
    QueryError::ReadOnly(words.join(" "))
}

fn is_keyword(word: &str) -> bool {
    word.chars().all(|c| c.is_ascii_uppercase())
}
