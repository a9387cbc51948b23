"""Checks that workflow files are valid Argo Workflows.

    check_workflows.py [--schema SCHEMA.json] FILES

With --schema: against Argo's own JSON schema, which allows unknown fields, so the models below are asked as well.
Without: against the models of hera, a Python client of Argo. Packages are pinned in downloads-python.txt.
"""

import argparse
import json
import sys

import yaml
from hera.workflows.models import Workflow
from jsonschema import Draft7Validator


def unknown_fields(document, model, path=""):
    """Fields of `document` that its pydantic `model` does not keep: hera ignores them when it reads."""
    kept = model.model_dump(by_alias=True, exclude_unset=True, mode="json") if hasattr(model, "model_dump") else model
    if isinstance(document, dict) and isinstance(kept, dict):
        for key, value in document.items():
            if key not in kept:
                yield f"{path}.{key}".lstrip(".")
            else:
                yield from unknown_fields(value, kept[key], f"{path}.{key}")
    elif isinstance(document, list) and isinstance(kept, list):
        for i, (value, other) in enumerate(zip(document, kept)):
            yield from unknown_fields(value, other, f"{path}[{i}]")


def findings(document, schema):
    if schema is not None:
        for error in Draft7Validator(schema).iter_errors(document):
            yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
    try:
        model = Workflow.model_validate(document)
    except ValueError as error:
        yield f"hera: {error}"
        return
    for path in unknown_fields(document, model):
        yield f"{path}: no field of Argo's"


def workflow_schema(path):
    """The schema's top is `oneOf` many kinds, whose errors are unreadable: a workflow is checked as one."""
    with open(path, encoding="utf-8") as file:
        schema = json.load(file)
    return {"$ref": "#/definitions/io.argoproj.workflow.v1alpha1.Workflow", "definitions": schema["definitions"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schema")
    parser.add_argument("files", nargs="+")
    args = parser.parse_args()
    schema = workflow_schema(args.schema) if args.schema else None
    failed = False
    for path in args.files:
        with open(path, encoding="utf-8") as file:
            document = yaml.safe_load(file)
        found = list(findings(document, schema))
        failed = failed or bool(found)
        for line in found:
            print(f"{path}: {line}", file=sys.stderr)
        if not found:
            print(f"{path}: valid")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
