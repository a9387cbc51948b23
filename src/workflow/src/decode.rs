//! YAML nodes → [`crate::model`]. Every field of Argo's schema is named here once: decoded, passed over because it only
//! concerns a cluster, or refused.

use crate::fields::{Fields, Known, below, entry, place, scalar, text};
use crate::finding::Findings;
use crate::model::*;
use crate::yaml::{Node, Value};

const WORKFLOW: Known = Known { cluster: &["status"], unsupported: &[] };
const METADATA: Known = Known {
    cluster: &[
        "annotations",
        "creationTimestamp",
        "finalizers",
        "generation",
        "labels",
        "managedFields",
        "namespace",
        "ownerReferences",
        "resourceVersion",
        "selfLink",
        "uid",
    ],
    unsupported: &[],
};
const SPEC: Known = Known {
    cluster: &[
        "affinity",
        "archiveLogs",
        "automountServiceAccountToken",
        "dnsConfig",
        "dnsPolicy",
        "executor",
        "hostAliases",
        "hostNetwork",
        "imagePullSecrets",
        "metrics",
        "nodeSelector",
        "podDisruptionBudget",
        "podGC",
        "podMetadata",
        "podPriorityClassName",
        "podResources",
        "priority",
        "resourceClaims",
        "schedulerName",
        "securityContext",
        "serviceAccountName",
        "tolerations",
        "ttlStrategy",
        "volumeClaimGC",
        "volumeClaimTemplates",
        "volumes",
        "workflowMetadata",
    ],
    unsupported: &[
        "activeDeadlineSeconds",
        "artifactGC",
        "artifactRepositoryRef",
        "executorPlugins",
        "hooks",
        "onExit",
        "podSpecPatch",
        "shutdown",
        "suspend",
        "synchronization",
        "templateDefaults",
        "workflowTemplateRef",
    ],
};
const ARGUMENTS: Known = Known { cluster: &[], unsupported: &["artifacts"] };
const PARAMETER: Known = Known { cluster: &[], unsupported: &["globalName", "valueFrom"] };
const TEMPLATE: Known = Known {
    cluster: &[
        "affinity",
        "annotations",
        "automountServiceAccountToken",
        "executor",
        "hostAliases",
        "metadata",
        "metrics",
        "nodeSelector",
        "pendingTimeout",
        "podResources",
        "priorityClassName",
        "resourceClaims",
        "schedulerName",
        "securityContext",
        "serviceAccountName",
        "tolerations",
        "volumes",
    ],
    unsupported: &[
        "activeDeadlineSeconds",
        "archiveLocation",
        "containerSet",
        "daemon",
        "data",
        "failFast",
        "http",
        "initContainers",
        "memoize",
        "outputs",
        "parallelism",
        "plugin",
        "podSpecPatch",
        "resource",
        "script",
        "sidecars",
        "steps",
        "suspend",
        "synchronization",
        "timeout",
    ],
};
const DAG: Known = Known { cluster: &[], unsupported: &["target"] };
const TASK: Known =
    Known { cluster: &[], unsupported: &["continueOn", "hooks", "inline", "onExit", "templateRef", "when"] };
const SEQUENCE: Known = Known { cluster: &[], unsupported: &[] };
const CONTAINER: Known = Known {
    cluster: &[
        // Credentials of the cluster: here the runner's environment is handed on.
        "envFrom",
        "image",
        "imagePullPolicy",
        "livenessProbe",
        "name",
        "ports",
        "readinessProbe",
        "resizePolicy",
        "securityContext",
        "startupProbe",
        "terminationMessagePath",
        "terminationMessagePolicy",
    ],
    unsupported: &["lifecycle", "restartPolicy", "restartPolicyRules", "stdin", "stdinOnce", "tty", "volumeDevices"],
};
const VARIABLE: Known = Known { cluster: &[], unsupported: &[] };
const VALUE_FROM: Known = Known { cluster: &[], unsupported: &["fieldRef", "fileKeyRef", "resourceFieldRef"] };
const KEY_REF: Known = Known { cluster: &["key", "name"], unsupported: &[] };
const RESOURCES: Known = Known { cluster: &["claims"], unsupported: &[] };
const MOUNT: Known = Known {
    cluster: &["mountPropagation", "name", "readOnly", "recursiveReadOnly"],
    unsupported: &["subPath", "subPathExpr"],
};
const RETRY: Known = Known { cluster: &["affinity"], unsupported: &[] };
// A cluster measures from the first attempt, and ends a later one that runs at that time, too.
const BACKOFF: Known = Known { cluster: &[], unsupported: &["maxDuration"] };

/// A dag that is tried again begins with new tasks, each with all its attempts.
pub(crate) const RETRY_OF_DAG: &str =
    "the local runner tries a container again, not a dag; declare it in the templates of its tasks";

/// Decodes a whole file.
pub(crate) fn workflow(root: &Node, findings: &mut Findings) -> Option<Workflow> {
    let mut fields = Fields::open(root, "", findings)?;
    expect(&mut fields, "apiVersion", "argoproj.io/v1alpha1");
    expect(&mut fields, "kind", "Workflow");
    let metadata = fields.required("metadata");
    let spec = fields.required("spec");
    fields.finish(&WORKFLOW);
    let name = metadata.and_then(|node| self::name(node, findings));
    let spec = spec.and_then(|node| self::spec(node, findings));
    spec.map(|spec| Workflow { name: name.unwrap_or_default(), ..spec })
}

fn expect(fields: &mut Fields, key: &'static str, expected: &str) {
    if let Some(found) = fields.required_text(key)
        && found.raw != expected
    {
        fields.findings.add(found.at, &found.path, format!("must be `{expected}`, not `{}`", found.raw));
    }
}

fn name(node: &Node, findings: &mut Findings) -> Option<String> {
    let mut fields = Fields::open(node, "metadata", findings)?;
    let name = fields.text("name").map(|name| name.raw);
    let stem = fields.text("generateName").map(|name| name.raw.trim_end_matches('-').to_owned());
    if name.is_none() && stem.is_none() {
        fields.findings.add(node.at, "metadata", "the field `name` or `generateName` is missing");
    }
    fields.finish(&METADATA);
    name.or(stem)
}

fn spec(node: &Node, findings: &mut Findings) -> Option<Workflow> {
    let mut fields = Fields::open(node, "spec", findings)?;
    let entrypoint = fields.required_text("entrypoint");
    let parallelism = fields.scalar("parallelism");
    let arguments = fields.get("arguments");
    let retry_node = fields.get("retryStrategy");
    fields.required("templates");
    let nodes = fields.list("templates");
    fields.finish(&SPEC);
    let parameters = arguments.map(|node| self::parameters(node, "spec.arguments", findings)).unwrap_or_default();
    let retry = retry_node.and_then(|node| self::retry(node, "spec.retryStrategy", findings));
    let templates = nodes.into_iter().filter_map(|(node, path)| template(node, &path, findings)).collect();
    Some(Workflow { name: String::new(), entrypoint: entrypoint?, parallelism, parameters, templates, retry })
}

/// `parameters` of `spec.arguments` or of a template's `inputs`.
fn parameters(node: &Node, path: &str, findings: &mut Findings) -> Vec<Parameter> {
    let Some(mut fields) = Fields::open(node, path, findings) else {
        return Vec::new();
    };
    let nodes = fields.list("parameters");
    fields.finish(&ARGUMENTS);
    nodes.into_iter().filter_map(|(node, path)| parameter(node, &path, findings)).collect()
}

fn parameter(node: &Node, path: &str, findings: &mut Findings) -> Option<Parameter> {
    let mut fields = Fields::open(node, path, findings)?;
    let name = fields.required_text("name");
    let value = fields.scalar("value");
    let default = fields.scalar("default");
    let description = fields.text("description").map(|text| text.raw);
    let choices = fields.list("enum");
    let choices = choices.into_iter().filter_map(|(node, path)| scalar(node, &path, fields.findings));
    let choices = choices.map(|text| text.raw).collect();
    fields.finish(&PARAMETER);
    Some(Parameter { name: name?, value, default, description, choices })
}

fn template(node: &Node, path: &str, findings: &mut Findings) -> Option<Template> {
    let mut fields = Fields::open(node, path, findings)?;
    let name = fields.required_text("name");
    let inputs = fields.get("inputs");
    let container_node = fields.get("container");
    let dag_node = fields.get("dag");
    let retry_node = fields.get("retryStrategy");
    let before = fields.findings.list().len();
    fields.finish(&TEMPLATE);
    let refused = findings.list().len() > before;
    let inputs = inputs.map(|node| parameters(node, &below(path, "inputs"), findings)).unwrap_or_default();
    let retry = retry_node.and_then(|node| self::retry(node, &below(path, "retryStrategy"), findings));
    let container = container_node.and_then(|node| self::container(node, &below(path, "container"), findings));
    let dag = dag_node.and_then(|node| self::dag(node, &below(path, "dag"), findings));
    if let (Some(node), Some(_)) = (retry_node, dag_node) {
        findings.add(node.at, &below(path, "retryStrategy"), RETRY_OF_DAG);
    }
    if container_node.is_some() && dag_node.is_some() {
        findings.add(node.at, path, "has both `container` and `dag`; a template has one of them");
    } else if container_node.is_none() && dag_node.is_none() && !refused {
        findings.add(node.at, path, "has neither `container` nor `dag`");
    }
    let body = container.map(|container| Body::Container(Box::new(container))).or(dag.map(Body::Dag))?;
    Some(Template { name: name?, inputs, body, retry })
}

fn dag(node: &Node, path: &str, findings: &mut Findings) -> Option<Dag> {
    let mut fields = Fields::open(node, path, findings)?;
    let fail_fast = fields.flag("failFast").unwrap_or(true);
    fields.required("tasks");
    let nodes = fields.list("tasks");
    fields.finish(&DAG);
    waiting_as_a_cluster_takes_it(&nodes, findings);
    let tasks = nodes.into_iter().filter_map(|(node, path)| task(node, &path, findings)).collect();
    Some(Dag { tasks, fail_fast })
}

/// Findings for what a cluster refuses of a dag as a whole: two ways to wait, and names that begin with a digit where
/// tasks wait.
fn waiting_as_a_cluster_takes_it(tasks: &[(&Node, String)], findings: &mut Findings) {
    let by_depends = tasks.iter().any(|(task, _)| entry(task, "depends").is_some());
    for (task, path) in tasks {
        let dependencies = entry(task, "dependencies").filter(|node| node.value != Value::List(Vec::new()));
        if let Some(node) = dependencies.filter(|_| by_depends) {
            let message = "stands beside `depends`, which a cluster refuses; a dag has one of them";
            findings.add(node.at, &below(path, "dependencies"), message);
        }
        if (by_depends || dependencies.is_some())
            && let Some(Node { at, value: Value::String(name) }) = entry(task, "name")
            && name.starts_with(|c: char| c.is_ascii_digit())
        {
            let message = "begins with a digit, which a cluster refuses beside `depends` and `dependencies`";
            findings.add(*at, &below(path, "name"), message);
        }
    }
}

fn task(node: &Node, path: &str, findings: &mut Findings) -> Option<Task> {
    let mut fields = Fields::open(node, path, findings)?;
    let name = fields.required_text("name");
    let template = if fields.get("inline").is_none() && fields.get("templateRef").is_none() {
        fields.required_text("template")
    } else {
        refuse(&mut fields, &["inline", "templateRef"]);
        fields.text("template")
    };
    let mut dependencies = fields.texts("dependencies");
    if let Some(depends) = fields.text("depends") {
        dependencies.extend(self::depends(&depends, fields.findings));
    }
    let arguments = fields.get("arguments");
    let fan_outs = [fields.get("withItems"), fields.get("withParam"), fields.get("withSequence")];
    if fan_outs.iter().flatten().count() > 1 {
        let message = "more than one of `withItems`, `withParam` and `withSequence`; a task has one of them";
        fields.findings.add(node.at, path, message);
    }
    fields.finish(&TASK);
    let arguments = arguments.map(|node| self::arguments(node, &below(path, "arguments"), findings));
    let fan_out = fan_out(fan_outs, path, findings);
    Some(Task { name: name?, template: template?, arguments: arguments.unwrap_or_default(), dependencies, fan_out })
}

/// Findings for fields that had to be looked at before they could be refused.
fn refuse(fields: &mut Fields, keys: &[&'static str]) {
    for key in keys {
        if let Some(node) = fields.get(key) {
            let path = fields.at(key);
            fields.findings.add(node.at, &path, "the local runner does not support this field");
        }
    }
}

/// `depends` where it only says what `dependencies` could: names, or `name.Succeeded`, joined by `&&`.
fn depends(depends: &Text, findings: &mut Findings) -> Vec<Text> {
    let mut names = Vec::new();
    for part in depends.raw.split("&&").map(str::trim) {
        let name = part.strip_suffix(".Succeeded").unwrap_or(part);
        let plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
        if !plain {
            let message = format!("the local runner supports only task names joined by `&&` here, not `{part}`");
            findings.add(depends.at, &depends.path, message);
            continue;
        }
        names.push(Text { raw: name.to_owned(), ..depends.clone() });
    }
    names
}

/// `arguments.parameters` of a task.
fn arguments(node: &Node, path: &str, findings: &mut Findings) -> Vec<Argument> {
    let parameters = parameters(node, path, findings);
    let argument = |parameter: Parameter| match parameter.value {
        Some(value) => Some(Argument { name: parameter.name, value }),
        None => {
            findings.add(parameter.name.at, &parameter.name.path, "an argument needs a `value`");
            None
        }
    };
    parameters.into_iter().filter_map(argument).collect()
}

fn fan_out(nodes: [Option<&Node>; 3], path: &str, findings: &mut Findings) -> Option<FanOut> {
    let [items, param, sequence] = nodes;
    if let Some(node) = items {
        let path = below(path, "withItems");
        let Value::List(list) = &node.value else {
            findings.add(node.at, &path, format!("must be a list, not {}", node.kind()));
            return None;
        };
        let item = |(i, node): (usize, &Node)| Item { value: json(node), place: place(node, &format!("{path}[{i}]")) };
        return Some(FanOut::Items(list.iter().enumerate().map(item).collect()));
    }
    if let Some(node) = param {
        return text(node, &below(path, "withParam"), findings).map(FanOut::Param);
    }
    let path = below(path, "withSequence");
    let node = sequence?;
    let mut fields = Fields::open(node, &path, findings)?;
    let sequence = Sequence {
        place: place(node, &path),
        count: fields.scalar("count"),
        start: fields.scalar("start"),
        end: fields.scalar("end"),
        format: fields.text("format"),
    };
    if sequence.count.is_some() == sequence.end.is_some() {
        fields.findings.add(node.at, &path, "needs one of `count` and `end`");
    }
    fields.finish(&SEQUENCE);
    Some(FanOut::Sequence(Box::new(sequence)))
}

fn json(node: &Node) -> serde_json::Value {
    match &node.value {
        Value::Null => serde_json::Value::Null,
        Value::Bool(value) => (*value).into(),
        // A number that JSON cannot write (such as 0x1f) is handed on as it stands.
        Value::Number(raw) => serde_json::from_str(raw).unwrap_or_else(|_| raw.as_str().into()),
        Value::String(raw) => raw.as_str().into(),
        Value::List(list) => list.iter().map(json).collect(),
        Value::Map(entries) => entries.iter().map(|entry| (entry.key.clone(), json(&entry.value))).collect(),
    }
}

fn container(node: &Node, path: &str, findings: &mut Findings) -> Option<Container> {
    let mut fields = Fields::open(node, path, findings)?;
    let command = fields.texts("command");
    if command.is_empty() {
        let message = "the field `command` is missing: the local runner has no image whose entry point it could take";
        fields.findings.add(node.at, path, message);
    }
    let args = fields.texts("args");
    let working_dir = fields.text("workingDir");
    let env = fields.list("env");
    let resources = fields.get("resources");
    let mounts = fields.list("volumeMounts");
    fields.finish(&CONTAINER);
    let env = env.into_iter().filter_map(|(node, path)| variable(node, &path, findings)).collect();
    let mounts = mounts.into_iter().filter_map(|(node, path)| mount(node, &path, findings)).collect();
    let resources = resources.map(|node| self::resources(node, &below(path, "resources"), findings));
    let (held, cpu_limit) = resources.unwrap_or_default();
    let [cpu, memory, gpu, disk] = held;
    Some(Container { command, args, env, working_dir, cpu, cpu_limit, memory, gpu, disk, mounts })
}

fn variable(node: &Node, path: &str, findings: &mut Findings) -> Option<Variable> {
    let mut fields = Fields::open(node, path, findings)?;
    let name = fields.required_text("name");
    let value = fields.text("value");
    let from = fields.get("valueFrom");
    let path = fields.at("valueFrom");
    fields.finish(&VARIABLE);
    let value = match from {
        Some(node) => VariableValue::Inherited { optional: value_from(node, &path, findings) },
        None => VariableValue::Text(value.unwrap_or_else(|| place(node, &path))),
    };
    Some(Variable { name: name?, value })
}

/// Whether the secret or config map may be absent.
fn value_from(node: &Node, path: &str, findings: &mut Findings) -> bool {
    let Some(mut fields) = Fields::open(node, path, findings) else {
        return false;
    };
    let reference = fields.get("secretKeyRef").or(fields.get("configMapKeyRef"));
    fields.finish(&VALUE_FROM);
    let Some(mut fields) = reference.and_then(|node| Fields::open(node, path, findings)) else {
        return false;
    };
    let optional = fields.flag("optional").unwrap_or(false);
    fields.finish(&KEY_REF);
    optional
}

fn mount(node: &Node, path: &str, findings: &mut Findings) -> Option<Text> {
    let mut fields = Fields::open(node, path, findings)?;
    let mount = fields.required_text("mountPath");
    fields.finish(&MOUNT);
    mount
}

/// CPU, memory, GPUs and disk: what is requested, and where no request is made, the limit, as Kubernetes schedules.
/// Beside it the limit of CPUs.
fn resources(node: &Node, path: &str, findings: &mut Findings) -> ([Option<Text>; 4], Option<Text>) {
    let mut held = [const { None }; 4];
    let mut cpu_limit = None;
    let Some(mut fields) = Fields::open(node, path, findings) else {
        return (held, cpu_limit);
    };
    let groups = [fields.get("requests"), fields.get("limits")];
    fields.finish(&RESOURCES);
    for (node, group) in groups.into_iter().zip(["requests", "limits"]) {
        let Some(node) = node else { continue };
        let Some(mut fields) = Fields::open(node, &below(path, group), findings) else {
            continue;
        };
        for (slot, key) in held.iter_mut().zip(["cpu", "memory", "nvidia.com/gpu", "ephemeral-storage"]) {
            let found = fields.scalar(key);
            if (group, key) == ("limits", "cpu") {
                cpu_limit = found.clone();
            }
            *slot = slot.take().or(found);
        }
        fields.finish(&Known { cluster: &[], unsupported: &["amd.com/gpu", "google.com/tpu"] });
    }
    (held, cpu_limit)
}

fn retry(node: &Node, path: &str, findings: &mut Findings) -> Option<Retry> {
    let mut fields = Fields::open(node, path, findings)?;
    let limit = fields.scalar("limit");
    let policy = fields.text("retryPolicy");
    let expression = fields.text("expression");
    let backoff = fields.get("backoff");
    fields.finish(&RETRY);
    let place = place(node, path);
    let mut retry = Retry { place, limit, policy, expression, duration: None, factor: None, cap: None };
    if let Some(mut fields) = backoff.and_then(|node| Fields::open(node, &below(path, "backoff"), findings)) {
        retry.duration = fields.scalar("duration");
        retry.factor = fields.scalar("factor");
        retry.cap = fields.scalar("cap");
        fields.finish(&BACKOFF);
    }
    Some(retry)
}
