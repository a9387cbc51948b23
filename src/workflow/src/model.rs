//! A workflow as declared: decoded and typed, with `{{…}}` still in its texts.

use crate::finding::Position;

/// A text that may hold `{{…}}`, and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Text {
    /// As written.
    pub raw: String,
    /// Where in the file.
    pub at: Position,
    /// Where in the document.
    pub path: String,
}

/// A workflow.
#[derive(Clone, Debug, PartialEq)]
pub struct Workflow {
    /// `metadata.name`, or `metadata.generateName` without its final dash.
    pub name: String,
    /// Template to start with.
    pub entrypoint: Text,
    /// Most jobs at a time.
    pub parallelism: Option<Text>,
    /// `spec.arguments.parameters`.
    pub parameters: Vec<Parameter>,
    /// Templates.
    pub templates: Vec<Template>,
    /// `spec.retryStrategy`: for templates that declare none.
    pub retry: Option<Retry>,
}

/// A declared parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// Name.
    pub name: Text,
    /// Value, if it has one.
    pub value: Option<Text>,
    /// Value where none is given.
    pub default: Option<Text>,
    /// What it means, for people.
    pub description: Option<String>,
    /// The only values allowed; empty when any is.
    pub choices: Vec<String>,
}

/// A template.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    /// Name.
    pub name: Text,
    /// `inputs.parameters`.
    pub inputs: Vec<Parameter>,
    /// What it does.
    pub body: Body,
    /// `retryStrategy`.
    pub retry: Option<Retry>,
}

/// What a template does.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// Runs one command.
    Container(Box<Container>),
    /// Runs tasks in the order of their dependencies.
    Dag(Dag),
}

/// `dag`.
#[derive(Clone, Debug, PartialEq)]
pub struct Dag {
    /// Tasks.
    pub tasks: Vec<Task>,
    /// Whether a failed task keeps the others from starting.
    pub fail_fast: bool,
}

/// A task of a DAG.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// Name.
    pub name: Text,
    /// Name of the template to run.
    pub template: Text,
    /// `arguments.parameters`.
    pub arguments: Vec<Argument>,
    /// Names of the tasks to wait for.
    pub dependencies: Vec<Text>,
    /// Run once per item.
    pub fan_out: Option<FanOut>,
}

/// An argument handed to a template.
#[derive(Clone, Debug, PartialEq)]
pub struct Argument {
    /// Name of the input.
    pub name: Text,
    /// Value.
    pub value: Text,
}

/// How a task multiplies.
#[derive(Clone, Debug, PartialEq)]
pub enum FanOut {
    /// `withItems`.
    Items(Vec<Item>),
    /// `withSequence`.
    Sequence(Box<Sequence>),
    /// `withParam`: a JSON list.
    Param(Text),
}

/// One item of `withItems`; the strings in it may hold `{{…}}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// The item.
    pub value: serde_json::Value,
    /// Where it stands; `raw` is unused.
    pub place: Text,
}

/// `withSequence`.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Where it stands; `raw` is unused.
    pub place: Text,
    /// How many numbers.
    pub count: Option<Text>,
    /// First number, 0 where absent.
    pub start: Option<Text>,
    /// Last number, instead of `count`.
    pub end: Option<Text>,
    /// How a number is written, such as `%03d`.
    pub format: Option<Text>,
}

/// `container`.
#[derive(Clone, Debug, PartialEq)]
pub struct Container {
    /// Program and first arguments.
    pub command: Vec<Text>,
    /// Further arguments.
    pub args: Vec<Text>,
    /// Environment.
    pub env: Vec<Variable>,
    /// Working folder.
    pub working_dir: Option<Text>,
    /// CPUs to hold while it runs.
    pub cpu: Option<Text>,
    /// CPUs that it may use at most.
    pub cpu_limit: Option<Text>,
    /// Memory to hold while it runs.
    pub memory: Option<Text>,
    /// GPUs to hold while it runs.
    pub gpu: Option<Text>,
    /// Local disk that it wants free.
    pub disk: Option<Text>,
    /// Folders that it expects at these paths.
    pub mounts: Vec<Text>,
}

/// One environment variable.
#[derive(Clone, Debug, PartialEq)]
pub struct Variable {
    /// Name.
    pub name: Text,
    /// Value.
    pub value: VariableValue,
}

/// Where the value of a variable comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum VariableValue {
    /// The file.
    Text(Text),
    /// A secret or config map of the cluster; here, the environment of the runner.
    Inherited {
        /// Whether it may be unset.
        optional: bool,
    },
}

/// `retryStrategy`.
#[derive(Clone, Debug, PartialEq)]
pub struct Retry {
    /// Where it stands; `raw` is unused.
    pub place: Text,
    /// Retries after the first attempt; without it there is no limit.
    pub limit: Option<Text>,
    /// `Always`, `OnFailure`, `OnError` or `OnTransientError`.
    pub policy: Option<Text>,
    /// First pause.
    pub duration: Option<Text>,
    /// What each pause multiplies by.
    pub factor: Option<Text>,
    /// Longest pause.
    pub cap: Option<Text>,
    /// Condition on the last exit code.
    pub expression: Option<Text>,
}
