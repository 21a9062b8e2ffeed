"""README and ARCHITECTURE say what is so: their commands run, their paths exist, their pictures are new."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from plait import layout
from plait.cli.main import STAGES

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "ARCHITECTURE.md", "docs/LLAVA.md", "profiles/README.md")
BLOCK = re.compile(r"(?:<!-- (\w+) -->\n *)?```(\w+)\n(.*?)```", re.DOTALL)


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page, kind):
    found = BLOCK.findall(text(page))
    return [(mark, textwrap.dedent(body)) for mark, of_kind, body in found if of_kind == kind]


CONSOLE = [(page, mark, body) for page in PAGES for mark, body in blocks(page, "console")]


def commands(body):
    """Each command of a block with the lines that follow it."""
    return [
        (first, rest.splitlines())
        for first, _, rest in (c.partition("\n") for c in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:])
    ]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a fresh clone has, the environment made, and the folders that the README's config names."""
    folder = tmp_path_factory.mktemp("docs") / "clone"
    folder.mkdir()
    shutil.copy(ROOT / "Snakefile", folder)
    for name in ("workflow", "profiles", "config"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "slurm").symlink_to("profiles/slurm")
    for _, body in (block for page in PAGES for block in blocks(page, "yaml")):
        (folder / body.split()[1]).write_text(body)
        for path in re.findall(r"path: ([^ ,}]+)", body):
            (folder / path).mkdir(parents=True, exist_ok=True)
    return folder


def run(command, folder):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "110"}
    return subprocess.run(
        shlex.split(command),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def follows(lines, said):
    """The first line that is not said in this order; where no ``...`` stands between two, they adjoin."""
    said, place, anywhere = said.splitlines(), 0, True
    for line in lines:
        if line == "...":
            anywhere = True
            continue
        places = range(place, len(said)) if anywhere else range(place, min(place + 1, len(said)))
        found = next((number for number in places if said[number].rstrip() == line), None)
        if found is None:
            return line
        place, anywhere = found + 1, False
    return None


@pytest.mark.parametrize(
    ("page", "mark", "body"), CONSOLE, ids=[body.splitlines()[0] for *_, body in CONSOLE]
)
def test_console_blocks_say_what_is_said(page, mark, body, clone):
    for command, lines in commands(body) if mark != "elsewhere" else ():
        if mark == "long":
            assert_known(command)
            continue
        done = run(command, clone)
        said = done.stdout + done.stderr

        assert (done.returncode != 0) == (mark == "refused"), said
        assert follows(lines, said) is None, said


def assert_known(command):
    program, first, *_ = [*command.split(), ""]
    if program == "make":
        assert re.search(rf"^{first}:", text("Makefile"), re.MULTILINE), command
    elif program == "plait":
        assert first in STAGES, command
    else:
        assert shutil.which(program), command


def test_there_are_console_blocks_of_each_kind():
    assert {mark for _, mark, _ in CONSOLE} == {"", "long", "refused", "elsewhere"}


@pytest.mark.parametrize("page", PAGES[:2])
def test_named_files_and_links_exist(page):
    plain = BLOCK.sub("", text(page))
    named = re.findall(r"\]\(([^)#]+)\)", plain)
    named += re.findall(r"`((?:src|tests|docs|config|envs|profiles|workflow|\.ci)/[^`* ]*)`", plain)

    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_grammar_is_that_of_the_layout():
    table = re.findall(r"^\| `(data/[^`]+)` \|", text("README.md"), re.MULTILINE)
    patterns = {kind.PATTERN for kind in layout.KINDS} - {layout.Run.PATTERN}
    patterns -= {kind.PATTERN for kind in layout.BATCHES.values()}  # nobody asks for them

    assert {path.removesuffix(f"/{layout.MANIFEST}") for path in table} == patterns | {
        "data/verify/.../parity.json"
    }


def test_the_readmes_config_is_whole():
    ((_, body),) = blocks("README.md", "yaml")

    assert set(yaml.safe_load(body)) == set(yaml.safe_load(text("config/config.yaml")))


def tree():
    """The folders of the README's tree and the columns in which their comments begin."""
    body = next(body for _, body in blocks("README.md", "text") if "src/" in body)
    parents, folders, columns = [], set(), set()
    for line in body.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name.rstrip("/")]
        folders.add("/".join(parents))
        columns.add(re.match(r" *\S+ +", line).end())
    return folders, columns


def test_the_tree_is_that_of_the_disk():
    listed, columns = tree()
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    there = {str(folder) for file in files for folder in Path(file).parents} - {"."}
    opened = {str(Path(folder).parent) for folder in listed}

    assert len(columns) == 1
    assert listed == {folder for folder in there if str(Path(folder).parent) in opened}


def messages():
    """What the code may say: one pattern for each text in it that is long enough to be a sentence."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if isinstance(node, ast.JoinedStr) and sum(len(part) for part in texts if part) > 12:
                yield re.compile("".join(".+" if part is None else re.escape(part) for part in texts))


def test_what_can_go_wrong_is_what_is_said():
    table = text("README.md").partition("## What can go wrong")[2].partition("\n## ")[0]
    sentences = [one for one in re.findall(r"^\| `([^`]+)`", table, re.MULTILINE) if "python3.11" not in one]
    known = list(messages())

    assert len(sentences) >= 8
    assert not [one for one in sentences if not any(pattern.match(one) for pattern in known)]
    assert "error: no $(PYTHON) on PATH" in text("Makefile")


def test_the_picture_is_drawn_from_the_rules(clone):
    spec = importlib.util.spec_from_file_location("draw_dag", ROOT / "docs/draw_dag.py")
    draw_dag = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw_dag)

    drawn = draw_dag.draw(run("snakemake --rulegraph", clone).stdout)

    assert drawn == text("docs/dag.svg"), "snakemake --rulegraph | python docs/draw_dag.py > docs/dag.svg"


def test_pages_are_short():
    assert len(text("README.md").splitlines()) <= 330
    assert len(text("ARCHITECTURE.md").splitlines()) <= 125
