//! Workflow files: what is understood, what is refused and how it is told.

use workflow::Plan;

/// A workflow with `tasks` and `templates`, indented as they stand in the file.
fn file(spec: &str, tasks: &str, templates: &str) -> String {
    format!(
        "apiVersion: argoproj.io/v1alpha1\nkind: Workflow\nmetadata: {{generateName: demo-}}\nspec:\n  entrypoint: main\n\
         {spec}  templates:\n  - name: main\n    dag:\n      tasks:\n{tasks}{templates}"
    )
}

const ECHO: &str = "  - name: echo
    inputs:
      parameters:
      - name: text
        default: none
    container:
      image: doppel:1
      command: [echo]
      args: ['{{inputs.parameters.text}}', 'x={{workflow.parameters.x}}', '{{workflow.name}}']
";

const X: &str = "  arguments:\n    parameters:\n    - name: x\n      value: 1\n";

fn load(text: &str, parameters: &[(&str, &str)]) -> Result<Plan, String> {
    let parameters: Vec<_> = parameters.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    workflow::load("w.yaml", text, &parameters).map_err(|findings| findings.to_string())
}

fn commands(plan: &Plan) -> Vec<String> {
    plan.jobs.iter().map(|job| format!("{}: {}", job.name, job.command.join(" "))).collect()
}

#[test]
fn tasks_get_parameters_items_and_defaults() {
    let tasks = "      - {name: plain, template: echo}
      - name: items
        template: echo
        arguments: {parameters: [{name: text, value: '{{item.of}}-{{item.k}}'}]}
        withItems: [{of: a, k: 1}, {of: '{{workflow.parameters.x}}', k: 2.5}]
      - name: sequence
        template: echo
        depends: plain && items
        arguments: {parameters: [{name: text, value: '{{item}}'}]}
        withSequence: {start: 3, count: '{{workflow.parameters.x}}', format: shard-%03d}
      - name: down
        template: echo
        depends: sequence && plain.Succeeded
        arguments: {parameters: [{name: text, value: '{{item}}'}]}
        withSequence: {start: '1', end: '0'}
      - name: param
        template: echo
        arguments: {parameters: [{name: text, value: '{{item}}'}]}
        withParam: '[\"p{{workflow.parameters.x}}\", 7]'
";
    let plan = load(&file(X, tasks, ECHO), &[("x", "2")]).unwrap();
    assert_eq!(
        commands(&plan),
        [
            "plain: echo none x=2 demo",
            "items(0:k:1,of:a): echo a-1 x=2 demo",
            "items(1:k:2.5,of:2): echo 2-2.5 x=2 demo",
            "sequence(0:shard-003): echo shard-003 x=2 demo",
            "sequence(1:shard-004): echo shard-004 x=2 demo",
            "down(0:1): echo 1 x=2 demo",
            "down(1:0): echo 0 x=2 demo",
            "param(0:p2): echo p2 x=2 demo",
            "param(1:7): echo 7 x=2 demo",
        ]
    );
    assert_eq!(plan.jobs[3].after, [0, 1, 2]);
    assert_eq!(plan.jobs[6].after, [0, 3, 4]);
}

#[test]
fn nested_dags_join_the_graph_around_them() {
    let tasks = "      - {name: last, template: echo, dependencies: [inner]}
      - {name: inner, template: pair, dependencies: [none]}
      - {name: none, template: echo, dependencies: [first], withItems: []}
      - {name: first, template: echo}
";
    let pair = "  - name: pair
    dag:
      failFast: false
      tasks:
      - {name: a, template: echo}
      - {name: b, template: echo, dependencies: [a]}
";
    let plan = load(&file(X, tasks, &format!("{pair}{ECHO}")), &[]).unwrap();
    let jobs: Vec<_> = plan.jobs.iter().map(|job| (job.name.as_str(), job.after.clone(), job.dag)).collect();
    assert_eq!(
        jobs,
        [
            ("first", vec![], Some(0)),
            ("inner.a", vec![0], Some(1)),
            ("inner.b", vec![0, 1], Some(1)),
            ("last", vec![2], Some(0)),
        ]
    );
    assert_eq!((plan.dags[0].fail_fast, plan.dags[1].fail_fast), (true, false));
}

#[test]
fn resources_and_retries_are_read_and_cluster_fields_passed_over() {
    let template = "  - name: big
    nodeSelector: {gpu: h200}
    tolerations: [{key: gpu, operator: Exists}]
    retryStrategy:
      limit: '{{workflow.parameters.x}}'
      retryPolicy: Always
      backoff: {duration: 10s, factor: '2', cap: 1h}
      expression: asInt(lastRetry.exitCode) == 5
    container:
      command: [sh, -c]
      args: [exit 5]
      envFrom: [{secretRef: {name: storage, optional: true}}]
      env:
      - {name: A, value: '{{workflow.parameters.x}}'}
      - {name: TOKEN, valueFrom: {secretKeyRef: {name: s, key: k}}}
      - {name: MAYBE, valueFrom: {secretKeyRef: {name: s, key: k, optional: true}}}
      volumeMounts: [{name: shm, mountPath: /dev/shm}]
      resources:
        requests: {cpu: 500m, memory: 1Gi, ephemeral-storage: 10Mi}
        limits: {cpu: '4', nvidia.com/gpu: 2}
";
    let plan = load(&file(X, "      - {name: big, template: big}\n", template), &[("x", "3")]).unwrap();
    let job = &plan.jobs[0];
    assert_eq!((job.cpu, job.gpus, job.memory, job.disk), (Some(500), 2, 1 << 30, 10 << 20));
    assert_eq!(job.env, [("A".to_owned(), "3".to_owned())]);
    assert_eq!(
        (job.required_env.as_slice(), job.mounts.as_slice()),
        (&["TOKEN".to_owned()][..], &["/dev/shm".to_owned()][..])
    );
    assert_eq!((job.retry.limit, job.retry.factor, job.retry.pause.as_secs()), (Some(3), 2, 10));
    assert!(job.retry.condition.is_some());
}

/// https://kubernetes.io/docs/tasks/inject-data-application/define-interdependent-environment-variables/
#[test]
fn references_to_variables_are_replaced_as_kubernetes_does() {
    let template = "  - name: say
    container:
      command: [echo, $(HOST)]
      args: ['$(URL)/{{workflow.parameters.x}}', $$(HOST), $(OTHER), '$$$$']
      env:
      - {name: URL_BEFORE, value: http://$(HOST)}
      - {name: HOST, value: 'h{{workflow.parameters.x}}'}
      - {name: URL, value: http://$(HOST)}
";
    let say = "      - {name: say, template: say}\n";
    let plan = load(&file(X, say, template), &[("x", "2")]).unwrap();
    assert_eq!(commands(&plan), ["say: echo h2 http://h2/2 $(HOST) $(OTHER) $$"]);
    let values: Vec<&str> = plan.jobs[0].env.iter().map(|(_, value)| value.as_str()).collect();
    assert_eq!(values, ["http://$(HOST)", "h2", "http://h2"]);

    let secret =
        template.replace("value: 'h{{workflow.parameters.x}}'", "valueFrom: {secretKeyRef: {name: s, key: k}}");
    let told = load(&file(X, say, &secret), &[]).unwrap_err();
    for place in ["container.command[1]", "container.env[0].value", "container.env[2].value"] {
        assert!(told.contains(&format!("{place}: `$(HOST)` is kept in the cluster")), "{told}");
    }
}

#[test]
fn a_task_without_items_that_others_wait_for_is_noted() {
    let tasks = "      - {name: shards, template: echo, withSequence: {count: '{{workflow.parameters.x}}'}}
      - {name: vote, template: echo, dependencies: [shards]}
      - {name: idle, template: echo, withItems: []}
";
    let empty = |x| load(&file(X, tasks, ECHO), &[("x", x)]).unwrap().empty;
    assert_eq!(empty("0"), ["shards"]);
    assert!(empty("1").is_empty());
}

#[test]
fn retries_of_a_whole_dag_are_refused() {
    let dag = "  - name: inner
    retryStrategy: {limit: 2}
    dag: {tasks: [{name: a, template: echo}]}
";
    let told = load(&file(X, "      - {name: b, template: inner}\n", &format!("{dag}{ECHO}")), &[]).unwrap_err();
    assert!(told.contains("spec.templates[1].retryStrategy: the local runner tries a container again"), "{told}");

    // That of the workflow is one of its dags, too: nine attempts of a task instead of three.
    let retry = "  retryStrategy: {limit: 2}\n";
    let told = load(&file(&format!("{retry}{X}"), "      - {name: b, template: echo}\n", ECHO), &[]).unwrap_err();
    assert!(told.starts_with("w.yaml: 1 finding\n"), "{told}");
    assert!(told.contains("spec.retryStrategy: the local runner tries a container again"), "{told}");
    let container = file(&format!("{retry}{X}"), "      - {name: b, template: echo}\n", ECHO);
    let plan = load(&container.replace("entrypoint: main", "entrypoint: echo"), &[]).unwrap();
    assert_eq!(plan.jobs[0].retry.limit, Some(2));
}

/// Argo's `maxDuration` also ends an attempt that runs, which nothing here does.
#[test]
fn a_longest_time_for_all_attempts_is_refused() {
    let echo = ECHO.replace(
        "    container:",
        "    retryStrategy: {limit: 2, backoff: {duration: 1s, maxDuration: 1h}}\n    container:",
    );
    let told = load(&file(X, "      - {name: a, template: echo}\n", &echo), &[]).unwrap_err();
    assert!(told.contains("retryStrategy.backoff.maxDuration: the local runner does not support this field"), "{told}");
}

/// `validateDAG` in Argo's workflow/validate/validate.go.
#[test]
fn a_dag_that_a_cluster_refuses_is_refused() {
    let told = |fields: [&str; 2]| {
        let [b, c] = fields;
        let tasks = format!(
            "      - {{name: a, template: echo}}\n      - {{name: b, template: echo{b}}}\n      - {{name: 2c, template: echo{c}}}\n"
        );
        load(&file(X, &tasks, ECHO), &[]).map(|plan| plan.jobs.len())
    };
    let digit = "tasks[2].name: begins with a digit";
    for (fields, expected) in [
        ([", dependencies: [a]", ", depends: a"], &["tasks[1].dependencies: stands beside `depends`", digit][..]),
        ([", depends: a, dependencies: [a]", ""], &["tasks[1].dependencies: stands beside `depends`", digit]),
        ([", depends: a", ""], &[digit]),
        (["", ", dependencies: [a]"], &[digit]),
    ] {
        let told = told(fields).unwrap_err();
        assert!(expected.iter().all(|expected| told.contains(expected)), "{fields:?}: {told}");
        assert_eq!(told.lines().count(), expected.len() + 1, "{fields:?}: {told}");
    }
    for fields in [[", dependencies: [a]", ""], [", dependencies: []", ""], ["", ""]] {
        assert_eq!(told(fields), Ok(3), "{fields:?}");
    }
}

#[test]
fn everything_that_is_wrong_is_told_at_once_with_its_place() {
    let tasks = "      - name: a
        template: ecko
        when: 'true'
        dependancies: [b]
      - {name: b, template: echo, dependencies: [c]}
";
    let template = "  - name: echo
    script: {image: x, source: y}
  - name: other
    container: {image: x, args: [1]}
";
    let told = load(&file("  onExit: echo\n", tasks, template), &[]).unwrap_err();
    assert_eq!(
        told,
        "w.yaml: 6 findings
  w.yaml:6:3: spec.onExit: the local runner does not support this field, and it would change what happens
  w.yaml:13:9: spec.templates[0].dag.tasks[0].when: the local runner does not support this field, and it would change what happens
  w.yaml:14:9: spec.templates[0].dag.tasks[0].dependancies: unknown field; did you mean `dependencies`?
  w.yaml:17:5: spec.templates[1].script: the local runner does not support this field, and it would change what happens
  w.yaml:19:16: spec.templates[2].container: the field `command` is missing: the local runner has no image whose entry point it could take
  w.yaml:19:34: spec.templates[2].container.args[0]: must be a string, not a number; write \"1\""
    );
}

/// Each of these is refused with a message that contains the text.
#[test]
fn mistakes_in_names_and_graphs_are_refused() {
    let task = |rest: &str| format!("      - {{name: a, template: echo{rest}}}\n");
    let cycle = "      - {name: a, template: echo, dependencies: [c]}
      - {name: b, template: echo, dependencies: [a]}
      - {name: c, template: echo, dependencies: [b]}
";
    for (tasks, expected) in [
        (cycle.to_owned(), "wait for each other in a cycle: a → c → b → a"),
        (task(", dependencies: [a]"), "in a cycle: a → a"),
        (task(", dependencies: [b]"), "no task of this dag is named `b`"),
        (task("").replace("echo", "ecko"), "no template is named `ecko`; did you mean `echo`?"),
        (task(", arguments: {parameters: [{name: txt, value: v}]}"), "no input parameter `txt`; did you mean `text`?"),
        (task(", arguments: {parameters: [{name: text}]}"), "an argument needs a `value`"),
        (task(", arguments: {parameters: [{name: text, value: '{{item}}'}]}"), "outside of the arguments"),
        (task(", arguments: {parameters: [{name: text, value: '{{tasks.b.outputs.result}}'}]}"), "nothing the local"),
        (task(", arguments: {parameters: [{name: text, value: '{{workflow.parameters.y}}'}]}"), "no parameter `y`"),
        (task(", withItems: [1], withParam: '[]'"), "more than one of"),
        (task(", withSequence: {start: 1}"), "needs one of `count` and `end`"),
        (task(", withSequence: {count: x}"), "must be a whole number of 0 or more, not `x`"),
        (task(", withSequence: {count: -1}"), "must be a whole number of 0 or more, not `-1`"),
        (task(", withSequence: {count: 1, format: '%s'}"), "one %d"),
        (task(", withSequence: {count: 20000}"), "more than 10000"),
        (task(", withParam: '{}'"), "must be a JSON list"),
        (task(", depends: 'b || c'"), "only task names joined by `&&`"),
        (task("").repeat(2), "a second task named `a`"),
        (task("").replace("echo", "main"), "templates call each other in a cycle: main → main"),
    ] {
        let told = load(&file(X, &tasks, ECHO), &[]).unwrap_err();
        assert!(told.contains(expected), "{tasks}\n{told}");
        assert!(told.starts_with("w.yaml: 1 finding\n"), "{told}");
    }
}

#[test]
fn parameters_are_checked() {
    let spec = "  arguments:\n    parameters:\n    - {name: x, enum: [1, '2']}\n";
    let text = file(spec, "      - {name: a, template: echo}\n", ECHO);
    for (given, expected) in [
        (&[][..], "the parameter `x` has no value; give one with -p x=…"),
        (&[("x", "3")], "`3` is none of the allowed values: 1, 2"),
        (&[("x", "1"), ("xx", "1")], "no parameter `xx`; did you mean `x`?"),
    ] {
        let told = load(&text, given).unwrap_err();
        assert!(told.contains(expected), "{told}");
    }
    assert!(load(&text, &[("x", "2")]).is_ok());
}

#[test]
fn what_is_no_workflow_is_refused() {
    for (text, expected) in [
        ("", "the file is empty"),
        ("a: [", "not valid YAML"),
        ("[]", "must be a mapping, not a list"),
        ("kind: CronWorkflow", "must be `Workflow`, not `CronWorkflow`"),
        (
            "apiVersion: argoproj.io/v1alpha1\nkind: Workflow\nmetadata: {name: x}\nspec: {entrypoint: m}",
            "`templates` is missing",
        ),
    ] {
        let told = load(text, &[]).unwrap_err();
        assert!(told.contains(expected), "{text}: {told}");
    }
}
