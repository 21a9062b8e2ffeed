"""MIGRATION.md has a row for whatever the guides of other systems name; what a row points at exists."""

import ast
import contextlib
import re
import types
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

import pytest
import yaml
from hub_configs import OWN, PLANS
from pydantic import BaseModel, TypeAdapter, ValidationError
from snakemake.cli import get_argument_parser

from plait import layout
from plait.cli.main import parser
from plait.config import Plan
from plait.config.model import Config, load, load_file
from plait.errors import LayoutError, PlaitError
from plait.train.hardware import check_hardware

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "MIGRATION.md").read_text(encoding="utf-8")
GUIDES = yaml.safe_load((Path(__file__).parent / "guides.yaml").read_text(encoding="utf-8"))
CODE = re.compile(r"`([^`]+)`")
REFUSED = re.compile(r"^`([\w.-]+): ([^`]+)` gives[^`]* `([^`]+)`$")
CONSOLE = re.compile(r"^\$ (snakemake .*)$", re.MULTILINE)


class Row(NamedTuple):
    """One row: a system, what it is called there, what it is here, and what is said of that."""

    system: str
    theirs: tuple[str, ...]
    ours: str
    note: str


def section(title):
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def cells(title):
    """The rows of the tables of a section, without their heads."""
    lines = [line for line in section(title).splitlines() if line.startswith("| ")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in split if row[0] not in {"theirs", "system", "---"}]


def names(cell):
    return tuple(CODE.findall(cell))


ROWS = [
    Row(system, names(theirs), ours, note)
    for system in GUIDES
    for theirs, ours, note in cells(system)
]  # fmt: skip
MEGATRONS = [Row("", names(theirs), ours, note) for theirs, ours, note in cells("Megatron's own")]
BEYOND = [Row(system, names(theirs), "", note) for system, theirs, note in cells("Out of scope")]


# What exists


def inside(annotation):
    """The types that a value may have, without None and without what only constrains them."""
    if get_origin(annotation) is Annotated:
        return inside(get_args(annotation)[0])
    if get_origin(annotation) in {Union, types.UnionType}:
        return [one for part in get_args(annotation) for one in inside(part)]
    return [annotation]


def below(annotation, part):
    """The types of a key of a section, or of an entry whose name is anyone's to choose."""
    for one in inside(annotation):
        if get_origin(one) is dict and part == "*":
            yield get_args(one)[1]
        elif isinstance(one, type) and issubclass(one, BaseModel) and part in one.model_fields:
            field = one.model_fields[part]
            yield Annotated[(field.annotation, *field.metadata, None)]


def types_of(key):
    found: list[Any] = [Config]
    for part in key.split("."):
        found = [inner for one in found for inner in below(one, part)]
    return found


def anywhere(name, within=Config):
    """The types of all keys of a name."""
    found = []
    for one in inside(within):
        if get_origin(one) is dict:
            found += anywhere(name, get_args(one)[1])
        elif get_origin(one) is tuple:
            found += [key for part in get_args(one) for key in anywhere(name, part)]
        elif isinstance(one, type) and issubclass(one, BaseModel):
            found += below(one, name)
            found += [key for field in one.model_fields.values() for key in anywhere(name, field.annotation)]
    return found


def takes(annotation, value):
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError:
        return False
    return True


def is_key(text):
    key, given, value = text.partition(": ")
    found = types_of(key) if "." in key or key in Config.model_fields else anywhere(key)
    return bool(found) and (not given or any(takes(one, yaml.safe_load(value)) for one in found))


@cache
def stages():
    (commands,) = parser()._subparsers._group_actions
    return commands.choices


@cache
def snakemake_options():
    return set(get_argument_parser()._option_string_actions)


def is_command(words):
    stage = stages().get(words[1])
    return stage is not None and all(word in stage._option_string_actions for word in words[2:])


def is_make(words):
    return bool(re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def is_snakemake(words):
    option, *values = words[1:]
    there = option != "--profile" or all((ROOT / "profiles" / value).is_dir() for value in values)
    return option in snakemake_options() and there


@cache
def written():
    """Every text in the code: a file inside of an artifact has its name there."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@cache
def rules():
    return "".join(path.read_text(encoding="utf-8") for path in (ROOT / "workflow/rules").glob("*.smk"))


def kind_of(text):
    """The kind of artifact that a pattern is of, or lies in."""
    kinds = [kind for kind in layout.KINDS if text == kind.PATTERN or text.startswith(f"{kind.PATTERN}/")]
    return max(kinds, key=lambda kind: len(kind.PATTERN), default=None)


def is_target(text):
    if text.startswith("data/logs/"):
        return f'"{text}"' in rules()
    kind = kind_of(text)
    if kind is None:
        return False
    file = text.removeprefix(kind.PATTERN).removeprefix("/")
    return not file or bool({file, f"/{file}"} & written())


def exists(text):
    words = text.split()
    if text.partition(":")[0].partition(".")[0] in Config.model_fields:
        return is_key(text)
    if text.startswith("data/"):
        return is_target(text)
    check = {"plait": is_command, "make": is_make, "snakemake": is_snakemake}.get(words[0])
    return check(words) if check else (ROOT / text).is_file()


# What is refused


def answer(key, value):
    """What planning and training say on this machine to the default plan with one key changed."""
    plan = yaml.safe_load((ROOT / "config/config.yaml").read_text(encoding="utf-8"))
    *sections, last = key.split(".")
    place = plan
    for part in sections:
        place = place.setdefault(part, {})
    place[last] = yaml.safe_load(value)
    try:
        for run in load(plan).runs.values():
            check_hardware(run.model_dump(), gpu=False)
    except PlaitError as error:
        return str(error)
    return ""


def fault(row):
    """What is wrong with where a row points."""
    if row.ours == "dropped":
        return "" if row.note else "no reason"
    if row.ours == "refused":
        key, value, sentence = REFUSED.match(row.note).groups()
        return "" if sentence in answer(key, value) else f"{key}: {value} gives {answer(key, value)!r}"
    missing = [one for one in names(row.ours) if not exists(one)]
    return f"no {missing}" if missing or not names(row.ours) else ""


def misses(note):
    """What a note names and nothing knows; where it names a word of theirs, nobody can say."""
    for said in names(note):
        if re.split(r"[ :./]", said)[0] in {*Config.model_fields, "plait", "make"} or said[:5] == "data/":
            known = said == "data/" or exists(said)
        elif re.fullmatch(r"[a-z]+(_[a-z]+)*: .+", said):
            known = is_key(said)
        elif re.fullmatch(r"[a-z]+(_[a-z]+)+", said):
            known = is_key(said) or any(said in text for text in written())
        else:
            known = True
        if not known:
            yield said


def other_kinds(row):
    """Paths of theirs that plait reads as another kind of artifact than their row says."""
    kinds = {kind_of(one) for one in names(row.ours)} - {None}
    for path in row.theirs if kinds else ():
        with contextlib.suppress(LayoutError):
            if {type(layout.parse(path))} != kinds:
                yield path


# The tests


@pytest.mark.parametrize("system", GUIDES)
def test_what_a_row_points_at_exists(system):
    rows = [row for row in ROWS if row.system == system]

    assert len(rows) > 60
    assert not [f"{row.theirs[0]}: {fault(row)}" for row in rows if fault(row)]


def test_what_a_row_of_megatrons_own_points_at_exists():
    assert MEGATRONS
    assert not [f"{row.theirs[0]}: {fault(row)}" for row in MEGATRONS if fault(row)]


@pytest.mark.parametrize("system", GUIDES)
def test_a_path_of_theirs_is_of_the_kind_that_its_row_says(system):
    assert not [path for row in ROWS if row.system == system for path in other_kinds(row)]


def test_what_a_note_names_exists():
    rows = [row for row in (*ROWS, *MEGATRONS) if row.ours != "refused"]

    assert not [(row.theirs[0], said) for row in rows for said in misses(row.note)]


@pytest.mark.parametrize("system", GUIDES)
def test_each_name_of_a_guide_has_one_row(system):
    listed = Counter(name for row in (*ROWS, *BEYOND) if row.system == system for name in row.theirs)
    wanted = Counter(name for kind in GUIDES[system].values() for name in kind)

    assert sorted((wanted - listed).elements()) == [], "no row"
    assert sorted((listed - wanted).elements()) == [], "a row too many"


def test_every_gap_has_a_reason():
    assert BEYOND
    assert not [row for row in BEYOND if not row.note or row.system not in GUIDES]


def test_the_command_of_each_guide_ends_in_an_export_of_its_preset():
    found = set()
    for command in CONSOLE.findall(PAGE):
        path, plan = re.fullmatch(
            r"snakemake --profile slurm (ckpts/\S+) --config plan=(\S+)", command
        ).groups()
        export = layout.Export.parse(f"data/{path}")
        assert export in Plan(load_file(ROOT / f"config/plans/{plan}.yaml")).exports()
        found.add(plan)

    assert found == {path.stem for path in PLANS.glob("*.yaml")} - OWN


@pytest.mark.parametrize(
    "text",
    [
        "runs.*.learning_rate", "runs.lr", "runs.*.lr: fast", "datasets.*.source.kind: mongodb",
        "jobs.classes.*.slurm_extra: [--output=log]", "plait shrad", "plait shell --podman", "make nothing",
        "snakemake --cluster-of-mine", "snakemake --profile pbs", "data/models/{model}",
        "data/ckpts/{run}/nothing.json", "data/processed/{dataset}", "data/logs/train/{run}.log",
        "config/plans/none.yaml",
    ],
)  # fmt: skip
def test_what_does_not_exist_is_found_out(text):
    assert not exists(text)


def test_a_plan_as_it_is_gets_no_answer():
    assert answer("runs.chat-tiny.seed", "7") == ""
