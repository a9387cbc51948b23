//! What can be said about a workflow before any value is known: names that resolve, graphs without cycles.

use std::collections::{BTreeMap, HashSet};

use crate::finding::{Findings, suggestion};
use crate::model::*;
use crate::substitute::{Piece, pieces, refusal};

/// Adds a finding for everything in `workflow` that refers to nothing, twice the same or in a circle.
pub fn check(workflow: &Workflow, findings: &mut Findings) {
    unique(workflow.parameters.iter().map(|parameter| &parameter.name), "parameter", findings);
    unique(workflow.templates.iter().map(|template| &template.name), "template", findings);
    for parameter in &workflow.parameters {
        for text in [&parameter.value, &parameter.default].into_iter().flatten() {
            if text.raw.contains("{{") {
                findings.add(text.at, &text.path, "the value of a workflow parameter cannot hold `{{…}}`");
            }
        }
    }
    let names = Names {
        templates: workflow.templates.iter().map(|template| (template.name.raw.as_str(), template)).collect(),
        parameters: workflow.parameters.iter().map(|parameter| parameter.name.raw.as_str()).collect(),
    };
    names.template(&workflow.entrypoint, findings);
    names.tags(workflow.parallelism.iter(), &[], false, findings);
    names.tags(retry_texts(&workflow.retry), &[], false, findings);
    for template in &workflow.templates {
        names.check_template(template, findings);
    }
    names.recursion(&workflow.templates, findings);
}

fn unique<'a>(names: impl Iterator<Item = &'a Text>, what: &str, findings: &mut Findings) {
    let mut seen = HashSet::new();
    for name in names {
        if !seen.insert(name.raw.as_str()) {
            findings.add(name.at, &name.path, format!("a second {what} named `{}`", name.raw));
        }
    }
}

struct Names<'a> {
    templates: BTreeMap<&'a str, &'a Template>,
    parameters: Vec<&'a str>,
}

impl<'a> Names<'a> {
    fn template(&self, name: &Text, findings: &mut Findings) -> Option<&'a Template> {
        let found = self.templates.get(name.raw.as_str()).copied();
        if found.is_none() {
            let hint = suggestion(&name.raw, self.templates.keys().copied());
            findings.add(name.at, &name.path, format!("no template is named `{}`{hint}", name.raw));
        }
        found
    }

    fn check_template(&self, template: &'a Template, findings: &mut Findings) {
        unique(template.inputs.iter().map(|input| &input.name), "input parameter", findings);
        let inputs: Vec<&str> = template.inputs.iter().map(|input| input.name.raw.as_str()).collect();
        let defaults = template.inputs.iter().flat_map(|input| [&input.value, &input.default]).flatten();
        self.tags(defaults, &[], false, findings);
        self.tags(retry_texts(&template.retry), &inputs, false, findings);
        match &template.body {
            Body::Container(container) => self.tags(container_texts(container), &inputs, false, findings),
            Body::Dag(dag) => self.check_dag(dag, &inputs, findings),
        }
    }

    fn check_dag(&self, dag: &'a Dag, inputs: &[&str], findings: &mut Findings) {
        unique(dag.tasks.iter().map(|task| &task.name), "task", findings);
        let tasks: Vec<&str> = dag.tasks.iter().map(|task| task.name.raw.as_str()).collect();
        for task in &dag.tasks {
            for dependency in &task.dependencies {
                if !tasks.contains(&dependency.raw.as_str()) {
                    let hint = suggestion(&dependency.raw, tasks.iter().copied());
                    let message = format!("no task of this dag is named `{}`{hint}", dependency.raw);
                    findings.add(dependency.at, &dependency.path, message);
                }
            }
            self.tags(fan_out_texts(&task.fan_out).into_iter(), inputs, false, findings);
            let values = task.arguments.iter().map(|argument| &argument.value);
            self.tags(values, inputs, task.fan_out.is_some(), findings);
            if let Some(template) = self.template(&task.template, findings) {
                arguments_fit(task, template, findings);
            }
        }
        let edges = |name: &str| {
            let task = dag.tasks.iter().find(|task| task.name.raw == name);
            task.map(|task| task.dependencies.iter().map(|d| d.raw.as_str()).collect()).unwrap_or_default()
        };
        if let Some(circle) = circle(&tasks, edges)
            && let Some(task) = dag.tasks.iter().find(|task| task.name.raw == circle[0])
        {
            let message = format!("these tasks wait for each other in a cycle: {}", circle.join(" → "));
            findings.add(task.name.at, &task.name.path, message);
        }
    }

    /// Templates that call themselves.
    fn recursion(&self, templates: &'a [Template], findings: &mut Findings) {
        let names: Vec<&str> = templates.iter().map(|template| template.name.raw.as_str()).collect();
        let edges = |name: &str| match self.templates.get(name).map(|template| &template.body) {
            Some(Body::Dag(dag)) => dag.tasks.iter().map(|task| task.template.raw.as_str()).collect(),
            _ => Vec::new(),
        };
        if let Some(circle) = circle(&names, edges)
            && let Some(template) = self.templates.get(circle[0])
        {
            let message = format!("these templates call each other in a cycle: {}", circle.join(" → "));
            findings.add(template.name.at, &template.name.path, message);
        }
    }

    fn tags<'t>(&self, texts: impl Iterator<Item = &'t Text>, inputs: &[&str], item: bool, findings: &mut Findings) {
        for text in texts {
            match pieces(&text.raw) {
                Err(message) => findings.add(text.at, &text.path, message),
                Ok(pieces) => {
                    for piece in pieces {
                        if let Piece::Tag(tag) = piece
                            && let Some(message) = self.tag(tag, inputs, item)
                        {
                            findings.add(text.at, &text.path, message);
                        }
                    }
                }
            }
        }
    }

    /// Why `tag` refers to nothing here, if so.
    fn tag(&self, tag: &str, inputs: &[&str], item: bool) -> Option<String> {
        let known = |name: &str, names: &[&str], otherwise: &str| {
            let hint = suggestion(name, names.iter().copied());
            (!names.contains(&name)).then(|| format!("{otherwise} `{name}`{hint}"))
        };
        if let Some(name) = tag.strip_prefix("workflow.parameters.") {
            known(name, &self.parameters, "the workflow has no parameter")
        } else if let Some(name) = tag.strip_prefix("inputs.parameters.") {
            known(name, inputs, "this template has no input parameter")
        } else if tag == "item" || tag.starts_with("item.") {
            (!item).then(|| format!("`{{{{{tag}}}}}` stands outside of the arguments of a task with items"))
        } else {
            (tag != "workflow.name").then(|| refusal(tag))
        }
    }
}

/// Every argument is an input of the template, and every input without a value gets one.
fn arguments_fit(task: &Task, template: &Template, findings: &mut Findings) {
    unique(task.arguments.iter().map(|argument| &argument.name), "argument", findings);
    let inputs = || template.inputs.iter().map(|input| input.name.raw.as_str());
    for argument in &task.arguments {
        let name = argument.name.raw.as_str();
        if !inputs().any(|input| input == name) {
            let hint = suggestion(name, inputs());
            let message = format!("the template `{}` has no input parameter `{name}`{hint}", template.name.raw);
            findings.add(argument.name.at, &argument.name.path, message);
        }
    }
    for input in &template.inputs {
        let given = task.arguments.iter().any(|argument| argument.name.raw == input.name.raw);
        if !given && input.value.is_none() && input.default.is_none() {
            let message = format!("the template `{}` needs the argument `{}`", template.name.raw, input.name.raw);
            findings.add(task.name.at, &task.name.path, message);
        }
    }
}

fn retry_texts(retry: &Option<Retry>) -> impl Iterator<Item = &Text> {
    let texts =
        retry.iter().flat_map(|retry| [&retry.limit, &retry.policy, &retry.duration, &retry.factor, &retry.cap]);
    texts.flatten()
}

fn container_texts(container: &Container) -> impl Iterator<Item = &Text> {
    let Container { working_dir, cpu, cpu_limit, memory, gpu, disk, .. } = container;
    let optional = [working_dir, cpu, cpu_limit, memory, gpu, disk];
    let variables = container.env.iter().filter_map(|variable| match &variable.value {
        VariableValue::Text(text) => Some(text),
        VariableValue::Inherited { .. } => None,
    });
    container
        .command
        .iter()
        .chain(&container.args)
        .chain(optional.into_iter().flatten())
        .chain(variables)
        .chain(&container.mounts)
}

fn fan_out_texts(fan_out: &Option<FanOut>) -> Vec<&Text> {
    match fan_out {
        Some(FanOut::Sequence(sequence)) => {
            [&sequence.count, &sequence.start, &sequence.end, &sequence.format].into_iter().flatten().collect()
        }
        Some(FanOut::Param(text)) => vec![text],
        // The strings inside of items are looked at when they are expanded.
        Some(FanOut::Items(_)) | None => Vec::new(),
    }
}

/// A path that ends where it began, if the graph has one.
fn circle<'a>(nodes: &[&'a str], edges: impl Fn(&str) -> Vec<&'a str>) -> Option<Vec<&'a str>> {
    let mut finished = HashSet::new();
    for start in nodes {
        // (node, edges left to follow): depth first with an explicit stack, since a file may hold a long chain.
        let mut stack = vec![(*start, edges(start))];
        while let Some((node, left)) = stack.last_mut() {
            let Some(next) = left.pop() else {
                finished.insert(*node);
                stack.pop();
                continue;
            };
            if let Some(first) = stack.iter().position(|(node, _)| *node == next) {
                let mut circle: Vec<&str> = stack[first..].iter().map(|(node, _)| *node).collect();
                circle.push(next);
                return Some(circle);
            }
            if !finished.contains(next) {
                stack.push((next, edges(next)));
            }
        }
    }
    None
}
