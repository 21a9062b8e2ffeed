"""The recipes of the images: one pinned list, written out for Apptainer and for Docker.

An image holds the packages of ``cpu.lock`` and the code of the day it was built; jobs that the workflow
starts take the code of its checkout instead, so that planning and stages are always of one version.
"""

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from plait import files
from plait.config.base import Strict
from plait.envs.registry import REFERENCE, Reference
from plait.errors import ConfigError

LIST, LOCK, DIGESTS = "images.yaml", "cpu.lock", "images.lock.json"
HOME = "/opt/plait"
COMMAND = r"#!/bin/sh\nexec python -m plait.cli.main \"$@\"\n"
NOTE = "# Written by `plait env render` from envs/images.yaml and envs/images.lock.json: edit those."


class Recipe(Strict):
    """What an image is made of."""

    base: str = Field(pattern=REFERENCE.pattern, description="registry/repository:tag")
    index: str | None = Field(None, pattern=r"^https://[\w./-]+$", description="another package index")
    given: tuple[str, ...] = Field((), description="packages of the lock that the base has, and keeps")
    expected: dict[str, str] = Field({}, description="how versions must begin, by package")

    def source(self, digest: str | None) -> str:
        """What is pulled: the digest where it is known, for a tag can move."""
        reference = Reference.parse(self.base)
        return f"{reference.name}@{digest}" if digest else self.base

    @property
    def install(self) -> list[str]:
        """The commands that fill the image."""
        lock = f"{HOME}/{LOCK}"
        left_out = "|".join(self.given)
        wanted = (
            f"grep -vE '^({left_out})==' {lock} > {lock}.wanted" if left_out else f"cp {lock} {lock}.wanted"
        )
        index = f" --extra-index-url {self.index}" if self.index else ""
        # The base may hold pip to versions of its own; those of the lock were tested together.
        pip = "PIP_CONSTRAINT= PIP_BREAK_SYSTEM_PACKAGES=1 python -m pip install --no-cache-dir --no-deps"
        command = f"printf '{COMMAND}' > /usr/local/bin/plait && chmod 755 /usr/local/bin/plait"
        return [wanted, f"{pip}{index} -r {lock}.wanted", command.replace('\\"', '"')]

    @property
    def test(self) -> str:
        """The command that says whether the image is what it should be."""
        checks = "; ".join(
            f"assert version('{name}').startswith('{start}'), '{name}'"
            for name, start in self.expected.items()
        )
        return f'python -c "from importlib.metadata import version; {checks}" && plait --version'


Name = Literal["cpu", "gpu"]


def read(folder: Path) -> dict[Name, Recipe]:
    """The recipes of a folder.

    Raises:
        ConfigError: the list is missing or wrong.
    """
    path = folder / LIST
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return TypeAdapter(dict[Name, Recipe]).validate_python(values)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist", hint="name the folder of the list: --folder") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    except ValidationError as error:
        found = error.errors()[0]
        raise ConfigError(f"{path}: {'.'.join(map(str, found['loc']))}: {found['msg']}") from error


def digests(folder: Path) -> dict[str, str]:
    """The digests that are known, by base."""
    path = folder / DIGESTS
    found: dict[str, str] = files.read_json(path) if path.is_file() else {}
    return found


def documents(folder: Path) -> dict[Path, str]:
    """What is written from the list, by path."""
    recipes, known = read(folder), digests(folder)
    found = {folder / f"{name}.def": definition(one, known.get(one.base)) for name, one in recipes.items()}
    stages = (docker_stage(name, one, known.get(one.base)) for name, one in recipes.items())
    found[folder / "Dockerfile"] = "\n".join(
        [NOTE, "# docker build -f envs/Dockerfile --target gpu .", *stages]
    )
    return found


def definition(recipe: Recipe, digest: str | None) -> str:
    """An image for Apptainer; it is built in the folder of the Snakefile."""
    post = "\n".join(f"    {command}" for command in recipe.install)
    return f"""\
{NOTE}
# base: {recipe.base}
Bootstrap: docker
From: {recipe.source(digest)}

%files
    envs/{LOCK} {HOME}/{LOCK}
    src/plait {HOME}/src/plait

%post
{post}

%environment
    export PYTHONPATH={HOME}/src

%test
    {recipe.test}
"""


def docker_stage(name: str, recipe: Recipe, digest: str | None) -> str:
    """The same image for Docker."""
    lines = [
        f"\n# base: {recipe.base}",
        f"FROM {recipe.source(digest)} AS {name}",
        f"COPY envs/{LOCK} {HOME}/{LOCK}",
        *(f"RUN {command}" for command in recipe.install),
        f"COPY src/plait {HOME}/src/plait",
        f"ENV PYTHONPATH={HOME}/src",
        f"RUN {recipe.test}",
    ]
    return "\n".join(lines) + "\n"


def lock(folder: Path, *, update: bool) -> dict[str, str]:
    """Ask the registries for the digests of the bases, and write them down.

    Args:
        folder: the folder of the list.
        update: ask for those too that are known.

    Returns:
        The digests that are new, by base.

    Raises:
        ConfigError: a registry does not know a base.
        DataError: a registry gives no digest.
    """
    known = digests(folder)
    bases = [recipe.base for recipe in read(folder).values()]
    asked = {base: Reference.parse(base).digest() for base in bases if update or base not in known}
    new = {base: digest for base, digest in asked.items() if known.get(base) != digest}
    if new or set(known) - set(bases):
        files.write_json(folder / DIGESTS, {base: (known | new)[base] for base in bases})
    return new
