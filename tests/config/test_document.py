"""config/README.md and config/schema.json are what the types say."""

import difflib
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from plait.config import load
from plait.config.document import documents, readme, schema

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", documents(), ids=str)
def test_documents_are_in_step_with_the_types(path):
    written, wanted = (ROOT / path).read_text(), documents()[path]

    diff = "".join(difflib.unified_diff(written.splitlines(True), wanted.splitlines(True), "is", "should be"))
    assert not diff, f"{diff}\nmake config"


def test_every_key_of_the_default_plan_is_in_the_table():
    table = readme()

    def keys(value, depth=0):
        if isinstance(value, dict):
            for key, inner in value.items():
                if depth != 1:
                    yield key
                yield from keys(inner, depth + 1)

    for key in set(keys(yaml.safe_load((ROOT / "config/config.yaml").read_text()))):
        assert f"`{key}`" in table or f"## {key}\n" in table, key


def test_the_schema_accepts_the_default_plan_and_refuses_unknown_keys():
    plan = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    validator = Draft202012Validator(schema())

    assert load(plan)
    assert not list(validator.iter_errors(plan))
    plan["runs"]["chat-tiny"]["learning_rate"] = 1
    assert [error.validator for error in validator.iter_errors(plan)] == ["additionalProperties"]
