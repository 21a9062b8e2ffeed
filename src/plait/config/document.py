"""``make config``: the table of keys and the JSON Schema of config/, from its types.

Run as ``python -m plait.config.document [--check]``; ``--check`` writes nothing and fails where a file
differs from what it would write.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plait.config.model import Config

FOLDER = Path("config")
SCHEMA_URL = "https://json-schema.org/draft/2020-12/schema"
WORDS = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "true, false",
    "object": "number by name",
}
HEAD = """\
# config/

`config.yaml` is the default plan. Write your own file with the keys that differ and add it to any command:

    snakemake --cores 2 data/ckpts/RUN/hf/model_iter_100 --configfile mine.yaml

`--config plan=NAME` takes `config/plans/NAME.yaml` in place of the default plan; yours goes over that.
Unknown keys are errors, and planning says so before anything runs. `schema.json` lets an editor complete and
check the keys. A name (of a dataset, a run, ...) is made of letters, digits and `. _ + -`; it stands in the
paths of its artifacts.

This page and `schema.json` are written by `make config` from `src/plait/config/model.py`.
"""


def schema() -> dict[str, Any]:
    """The JSON Schema of config/."""
    found = Config.model_json_schema()
    return {"$schema": SCHEMA_URL, "title": "plait", **{k: v for k, v in found.items() if k != "title"}}


def readme() -> str:
    """The page: one table a section, in the order of the config."""
    found = schema()
    parts = [HEAD, *_sections(found)]
    return "\n".join(parts)


def documents() -> dict[Path, str]:
    """What ``make config`` writes, by path."""
    return {
        FOLDER / "README.md": readme(),
        FOLDER / "schema.json": json.dumps(schema(), indent=1, ensure_ascii=False) + "\n",
    }


def _sections(found: dict[str, Any]) -> Iterator[str]:
    definitions = found["$defs"]
    for section, entry in found["properties"].items():
        if whole := _references(entry):
            yield f"\n## {section}"
            yield from (line for name in whole for line in _table(definitions[name], definitions, set()))
            continue
        yield f"\n## {section}\n\nBy name: {entry['description']}."
        entries = entry.get("additionalProperties") or next(iter(entry["patternProperties"].values()))
        shown: set[str] = set()
        for name in _models(entries):
            yield from _table(definitions[name], definitions, shown)


def _models(entry: dict[str, Any]) -> list[str]:
    variants = entry.get("oneOf", [entry])
    return [variant["$ref"].rpartition("/")[2] for variant in variants if "$ref" in variant]


def _table(model: dict[str, Any], definitions: dict[str, Any], shown: set[str]) -> Iterator[str]:
    """The keys of a model, and the tables of its values' models that the section has not shown yet."""
    yield f"\n{model['description']}\n"
    yield "| key | value | default | meaning |\n| --- | --- | --- | --- |"
    required = set(model.get("required", ()))
    nested: list[str] = []
    for key, entry in model["properties"].items():
        default = "" if key in required else f"`{json.dumps(entry.get('default'), ensure_ascii=False)}`"
        inner = [ref for ref in _references(entry) if definitions[ref].get("properties")]
        nested += inner
        if inner:
            default = ""
        meaning = entry.get("description", "")
        yield f"| `{key}` | {_kind(entry)} | {default} | {meaning} |"
    for name in [one for one in dict.fromkeys(nested) if one not in shown]:
        shown.add(name)
        yield from _table(definitions[name], definitions, shown)


def _references(entry: dict[str, Any]) -> list[str]:
    """The models that a key's value may be."""
    entries = [entry, *entry.get("anyOf", ()), *entry.get("oneOf", ())]
    entries += [inner for one in entries for inner in one.get("oneOf", ())]
    entries += [one["additionalProperties"] for one in entries if _by_name(one)]
    names = [one["$ref"].rpartition("/")[2] for one in entries if "$ref" in one]
    return list(dict.fromkeys(names))


def _by_name(entry: dict[str, Any]) -> bool:
    return isinstance(entry.get("additionalProperties"), dict) and "$ref" in entry["additionalProperties"]


def _kind(entry: dict[str, Any]) -> str:
    if "const" in entry or "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry.get("enum", [entry.get("const")]))
    if _references(entry):
        return "by name, see below" if _by_name(entry) else "see below"
    if "anyOf" in entry:
        return " or ".join(_kind(one) for one in entry["anyOf"] if one.get("type") != "null")
    if entry["type"] == "array":
        if "prefixItems" in entry:
            return ", ".join(_kind(item) for item in entry["prefixItems"])
        return f"list of {_kind(entry['items'])}"
    bounds = [
        f"{sign} {entry[key]:g}"
        for key, sign in (("exclusiveMinimum", ">"), ("minimum", ">="), ("maximum", "<="))
        if key in entry
    ]
    return " ".join([WORDS[entry["type"]], ", ".join(bounds)]).strip()


def main(argv: list[str]) -> int:
    """Write the documents, or with ``--check`` name those that are stale."""
    stale = [
        path
        for path, text in documents().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    for path in stale:
        if "--check" in argv:
            sys.stderr.write(f"error: {path} is not what the types say\nhint:  make config\n")
        else:
            path.write_text(documents()[path], encoding="utf-8")
    return 2 if stale and "--check" in argv else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
