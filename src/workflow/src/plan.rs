//! A workflow with every value known: the jobs to run and what each waits for.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::counter::Format;
use crate::decode::RETRY_OF_DAG;
use crate::finding::{Findings, Position, suggestion};
use crate::model::*;
use crate::quantity;
use crate::retry::{Retry, parsed, resolve};
use crate::substitute::{self, Scope, written};

/// More jobs than this are refused: a typing error in a count, not a workflow for one machine.
const MAX_JOBS: usize = 10_000;

/// All jobs of a workflow, in the order of the file; a job only waits for jobs before or after it by index.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Name of the workflow.
    pub name: String,
    /// Most jobs at a time.
    pub parallelism: Option<usize>,
    /// Values of the workflow's parameters.
    pub parameters: BTreeMap<String, String>,
    /// Jobs.
    pub jobs: Vec<Job>,
    /// DAGs that jobs belong to.
    pub dags: Vec<DagScope>,
    /// Tasks that others wait for, but that expanded to no job.
    pub empty: Vec<String>,
}

/// One instance of a DAG.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DagScope {
    /// Whether a failed job keeps the others from starting.
    pub fail_fast: bool,
    /// The DAG that this one is a task of.
    pub parent: Option<usize>,
}

/// One command to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Unique name, such as `synthesize(3:3)`.
    pub name: String,
    /// The task that it is an instance of, without the item.
    pub task: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Environment on top of the runner's.
    pub env: Vec<(String, String)>,
    /// Variables that the runner's environment must have.
    pub required_env: Vec<String>,
    /// Working folder; the runner's where absent.
    pub working_dir: Option<String>,
    /// Folders that must exist.
    pub mounts: Vec<String>,
    /// Thousandths of a CPU to hold; `None` where nothing is declared.
    pub cpu: Option<u64>,
    /// Thousandths of a CPU that it may use at most.
    pub cpu_limit: Option<u64>,
    /// GPUs to hold.
    pub gpus: u32,
    /// Bytes of memory to hold.
    pub memory: u64,
    /// Bytes of local disk wanted.
    pub disk: u64,
    /// When to try again.
    pub retry: Retry,
    /// Indices of the jobs that must succeed before.
    pub after: Vec<usize>,
    /// Index of its DAG, if it is in one.
    pub dag: Option<usize>,
    /// Where its template stands.
    pub at: Position,
}

/// Expands `workflow` with the parameters given on the command line.
pub fn expand_parameters(
    workflow: &Workflow,
    given: &[(String, String)],
    findings: &mut Findings,
) -> BTreeMap<String, String> {
    let names = || workflow.parameters.iter().map(|parameter| parameter.name.raw.as_str());
    let start = Position { line: 1, column: 1 };
    for (name, _) in given {
        if !names().any(|known| known == name) {
            let hint = suggestion(name, names());
            findings.add(start, "", format!("-p {name}=…: the workflow has no parameter `{name}`{hint}"));
        }
    }
    let mut values = BTreeMap::new();
    for parameter in &workflow.parameters {
        let name = &parameter.name.raw;
        let given = given.iter().rev().find(|(other, _)| other == name).map(|(_, value)| value.clone());
        let declared = || parameter.value.as_ref().or(parameter.default.as_ref()).map(|text| text.raw.clone());
        let Some(value) = given.or_else(declared) else {
            let message = format!("the parameter `{name}` has no value; give one with -p {name}=…");
            findings.add(parameter.name.at, &parameter.name.path, message);
            continue;
        };
        if !parameter.choices.is_empty() && !parameter.choices.contains(&value) {
            let message = format!("`{value}` is none of the allowed values: {}", parameter.choices.join(", "));
            findings.add(parameter.name.at, &parameter.name.path, message);
        }
        values.insert(name.clone(), value);
    }
    values
}

/// Expands a checked workflow into its jobs.
pub fn expand(workflow: &Workflow, given: &[(String, String)], findings: &mut Findings) -> Option<Plan> {
    let parameters = expand_parameters(workflow, given, findings);
    if !findings.list().is_empty() {
        return None;
    }
    let scope = Scope { workflow: workflow.name.clone(), parameters: parameters.clone(), ..Scope::default() };
    let parallelism = workflow.parallelism.as_ref().and_then(|text| {
        let value = self::value(text, &scope, findings);
        parsed(Some(value), "a whole number above 0", |n| n.parse().ok().filter(|n| *n > 0), findings)
    });
    let entry = workflow.templates.iter().find(|template| template.name.raw == workflow.entrypoint.raw)?;
    let mut builder = Builder { workflow, jobs: Vec::new(), dags: Vec::new(), empty: Vec::new(), findings };
    // As in Argo, the entry template's inputs take the workflow's arguments of the same name.
    let inputs = builder.inputs(entry, &parameters, &scope);
    let scope = Scope { inputs, ..scope };
    builder.template(entry, &scope, Place { name: &entry.name.raw, task: &entry.name.raw, after: &[], dag: None });
    let Builder { jobs, dags, empty, .. } = builder;
    if jobs.len() > MAX_JOBS {
        let message = format!("expands to more than {MAX_JOBS} jobs");
        findings.add(workflow.entrypoint.at, &workflow.entrypoint.path, message);
    }
    Some(Plan { name: workflow.name.clone(), parallelism, parameters, jobs, dags, empty })
}

fn value(text: &Text, scope: &Scope, findings: &mut Findings) -> (Text, String) {
    (text.clone(), expand_text(text, scope, findings))
}

fn expand_text(text: &Text, scope: &Scope, findings: &mut Findings) -> String {
    substitute::expand(text, scope, findings)
}

/// Where an instance of a template belongs.
#[derive(Clone, Copy)]
struct Place<'a> {
    name: &'a str,
    task: &'a str,
    after: &'a [usize],
    dag: Option<usize>,
}

struct Builder<'a, 'f> {
    workflow: &'a Workflow,
    jobs: Vec<Job>,
    dags: Vec<DagScope>,
    empty: Vec<String>,
    findings: &'f mut Findings,
}

impl<'a> Builder<'a, '_> {
    /// Adds the jobs of one instance; returns those that whoever depends on it must wait for.
    fn template(&mut self, template: &'a Template, scope: &Scope, place: Place) -> Vec<usize> {
        if self.jobs.len() > MAX_JOBS {
            return Vec::new();
        }
        match &template.body {
            Body::Container(container) => self.container(template, container, scope, place),
            Body::Dag(dag) => self.dag(dag, scope, place),
        }
    }

    fn container(&mut self, template: &Template, container: &Container, scope: &Scope, place: Place) -> Vec<usize> {
        let retry = template.retry.as_ref().or(self.workflow.retry.as_ref());
        let retry = retry.map_or_else(Retry::never, |retry| resolve(retry, scope, self.findings));
        let (mut env, mut required_env) = (Vec::new(), Vec::new());
        for variable in &container.env {
            let name = variable.name.raw.clone();
            match &variable.value {
                VariableValue::Text(text) => {
                    let value = self.word(text, scope, container, &env);
                    env.push((name, value));
                }
                VariableValue::Inherited { optional: false } => required_env.push(name),
                VariableValue::Inherited { optional: true } => {}
            }
        }
        let words = container.command.iter().chain(&container.args);
        let command = words.map(|text| self.word(text, scope, container, &env)).collect();
        let mounts = container.mounts.iter().map(|text| expand_text(text, scope, self.findings)).collect();
        let working_dir = container.working_dir.as_ref().map(|text| expand_text(text, scope, self.findings));
        let mut cpus = |text| {
            self.quantity(text, scope, "a number of CPUs such as 2 or 500m", |text| {
                quantity::thousandths(text).and_then(|value| u64::try_from(value).ok())
            })
        };
        let (cpu, cpu_limit) = (cpus(&container.cpu), cpus(&container.cpu_limit));
        let bytes = "a quantity such as 16Gi";
        let memory = self.quantity(&container.memory, scope, bytes, quantity::units).unwrap_or(0);
        let disk = self.quantity(&container.disk, scope, bytes, quantity::units).unwrap_or(0);
        let gpus = self.quantity(&container.gpu, scope, "a whole number of GPUs", |text| text.parse().ok());
        self.jobs.push(Job {
            name: place.name.to_owned(),
            task: place.task.to_owned(),
            command,
            env,
            required_env,
            working_dir,
            mounts,
            cpu,
            cpu_limit,
            gpus: gpus.unwrap_or(0),
            memory,
            disk,
            retry,
            after: place.after.to_vec(),
            dag: place.dag,
            at: template.name.at,
        });
        vec![self.jobs.len() - 1]
    }

    /// `text` as the process gets it: its tags replaced as by Argo, then its `$(NAME)` as by Kubernetes, from the
    /// variables declared so far.
    fn word(&mut self, text: &Text, scope: &Scope, container: &Container, env: &[(String, String)]) -> String {
        let expanded = expand_text(text, scope, self.findings);
        substitute::references(&expanded, |name| {
            let known = env.iter().rev().find(|(other, _)| other == name).map(|(_, value)| value.as_str());
            let inherited = |variable: &Variable| {
                variable.name.raw == name && matches!(variable.value, VariableValue::Inherited { .. })
            };
            if known.is_none() && container.env.iter().any(inherited) {
                let message = format!(
                    "`$({name})` is kept in the cluster; the local runner writes no such value into a text, so let the \
                     command read its variable"
                );
                self.findings.add(text.at, &text.path, message);
            }
            known
        })
    }

    fn quantity<T>(
        &mut self,
        text: &Option<Text>,
        scope: &Scope,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let value = text.as_ref().map(|text| value(text, scope, self.findings));
        parsed(value, expected, parse, self.findings)
    }

    fn dag(&mut self, dag: &'a Dag, scope: &Scope, place: Place) -> Vec<usize> {
        if let Some(retry) = &self.workflow.retry {
            // On a cluster it is that of every template, of this dag as of the containers in it.
            self.findings.add(retry.place.at, &retry.place.path, RETRY_OF_DAG);
        }
        let index = self.dags.len();
        self.dags.push(DagScope { fail_fast: dag.fail_fast, parent: place.dag });
        let prefix = if place.dag.is_none() { String::new() } else { format!("{}.", place.name) };
        let mut ends: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        let (mut waited_for, mut empty) = (Vec::new(), Vec::new());
        for task in in_order(&dag.tasks) {
            let mut after = place.after.to_vec();
            for dependency in &task.dependencies {
                after.extend(ends.get(dependency.raw.as_str()).into_iter().flatten());
                waited_for.push(dependency.raw.as_str());
            }
            after.sort_unstable();
            after.dedup();
            let before = self.jobs.len();
            let end = self.task(task, scope, &prefix, &after, index);
            if self.jobs.len() == before {
                empty.push(task.name.raw.as_str());
            }
            ends.insert(task.name.raw.as_str(), end);
        }
        empty.retain(|name| waited_for.contains(name));
        self.empty.extend(empty.into_iter().map(|name| format!("{prefix}{name}")));
        let last = ends.into_iter().filter(|(name, _)| !waited_for.contains(name)).flat_map(|(_, end)| end);
        let mut last: Vec<usize> = last.collect();
        last.sort_unstable();
        last.dedup();
        last
    }

    /// Adds all instances of a task. One without items (an empty list) hands on what it would have waited for.
    fn task(&mut self, task: &'a Task, scope: &Scope, prefix: &str, after: &[usize], dag: usize) -> Vec<usize> {
        let template = self.workflow.templates.iter().find(|other| other.name.raw == task.template.raw);
        let Some(template) = template else {
            return Vec::new();
        };
        let base = format!("{prefix}{}", task.name.raw);
        let items: Vec<Option<Value>> = match &task.fan_out {
            None => vec![None],
            Some(fan_out) => self.items(fan_out, scope).into_iter().map(Some).collect(),
        };
        let mut ends = Vec::new();
        for (i, item) in items.iter().enumerate() {
            let name = match item {
                None => base.clone(),
                Some(item) => format!("{base}({i}:{})", label(item)),
            };
            let item_scope = Scope { item: item.clone(), ..scope.clone() };
            let arguments = task
                .arguments
                .iter()
                .map(|argument| (argument.name.raw.clone(), expand_text(&argument.value, &item_scope, self.findings)));
            let arguments: BTreeMap<String, String> = arguments.collect();
            let inputs = self.inputs(template, &arguments, scope);
            let inner = Scope { inputs, item: None, ..scope.clone() };
            ends.extend(self.template(template, &inner, Place { name: &name, task: &base, after, dag: Some(dag) }));
        }
        if ends.is_empty() { after.to_vec() } else { ends }
    }

    /// Values of a template's inputs: given, declared or default.
    fn inputs(
        &mut self,
        template: &Template,
        arguments: &BTreeMap<String, String>,
        scope: &Scope,
    ) -> BTreeMap<String, String> {
        let mut values = BTreeMap::new();
        for input in &template.inputs {
            let name = &input.name.raw;
            let declared = input.value.as_ref().or(input.default.as_ref());
            let value = match (arguments.get(name), declared) {
                (Some(value), _) => value.clone(),
                (None, Some(text)) => expand_text(text, scope, self.findings),
                (None, None) => {
                    let message = format!("the input parameter `{name}` has no value");
                    self.findings.add(input.name.at, &input.name.path, message);
                    continue;
                }
            };
            if !input.choices.is_empty() && !input.choices.contains(&value) {
                let message = format!("`{value}` is none of the allowed values: {}", input.choices.join(", "));
                self.findings.add(input.name.at, &input.name.path, message);
            }
            values.insert(name.clone(), value);
        }
        values
    }

    fn items(&mut self, fan_out: &FanOut, scope: &Scope) -> Vec<Value> {
        match fan_out {
            FanOut::Items(items) => items.iter().map(|item| self.item(&item.value, &item.place, scope)).collect(),
            FanOut::Sequence(sequence) => self.sequence(sequence, scope),
            FanOut::Param(text) => {
                let value = value(text, scope, self.findings);
                let list = |text: &str| serde_json::from_str::<Vec<Value>>(text).ok();
                parsed(Some(value), "a JSON list", list, self.findings).unwrap_or_default()
            }
        }
    }

    fn item(&mut self, value: &Value, place: &Text, scope: &Scope) -> Value {
        match value {
            Value::String(raw) => expand_text(&Text { raw: raw.clone(), ..place.clone() }, scope, self.findings).into(),
            Value::Array(list) => list.iter().map(|value| self.item(value, place, scope)).collect(),
            Value::Object(map) => {
                map.iter().map(|(key, value)| (key.clone(), self.item(value, place, scope))).collect()
            }
            other => other.clone(),
        }
    }

    fn sequence(&mut self, sequence: &Sequence, scope: &Scope) -> Vec<Value> {
        let count = sequence.count.as_ref().map(|text| value(text, scope, self.findings));
        let count = parsed(count, "a whole number of 0 or more", |text| text.parse::<u64>().ok(), self.findings);
        let mut number = |text: &Option<Text>| -> Option<i64> {
            let value = text.as_ref().map(|text| value(text, scope, self.findings));
            parsed(value, "a whole number", |text| text.parse().ok(), self.findings)
        };
        let start = number(&sequence.start).unwrap_or(0);
        let end = number(&sequence.end);
        let format = sequence.format.as_ref().map(|text| value(text, scope, self.findings));
        let format = parsed(format, "a format with one %d or %0Nd", Format::parse, self.findings);
        let format = format.unwrap_or_default();
        let (length, step) = match (count, end) {
            (Some(count), _) => (count, 1),
            (None, Some(end)) => (end.abs_diff(start).saturating_add(1), if end < start { -1 } else { 1 }),
            (None, None) => return Vec::new(),
        };
        if length > MAX_JOBS as u64 {
            let message = format!("expands to more than {MAX_JOBS} items");
            self.findings.add(sequence.place.at, &sequence.place.path, message);
            return Vec::new();
        }
        (0..length as i64).map(|i| format.write(start.saturating_add(step * i)).into()).collect()
    }
}

/// What Argo writes into a node's name for an item.
fn label(item: &Value) -> String {
    match item {
        Value::Object(map) => {
            map.iter().map(|(key, value)| format!("{key}:{}", written(value))).collect::<Vec<_>>().join(",")
        }
        other => written(other),
    }
}

/// Tasks so that each comes after those it depends on; otherwise in the order of the file. The graph has no cycle.
fn in_order(tasks: &[Task]) -> Vec<&Task> {
    let mut order: Vec<&Task> = Vec::with_capacity(tasks.len());
    let mut left: Vec<&Task> = tasks.iter().collect();
    while !left.is_empty() {
        let ready =
            |task: &&Task| task.dependencies.iter().all(|name| order.iter().any(|done| done.name.raw == name.raw));
        let Some(next) = left.iter().position(ready) else {
            break;
        };
        order.push(left.remove(next));
    }
    order
}
