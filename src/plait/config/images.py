"""The images that rules run in, and the environment that makes a machine's files visible in them.

Apptainer takes everything here from its environment: no argument of a rule changes, tokens stand in no
command line, and what a job starts itself (training, on every node) finds the same. A run without images
never looks at it.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

import plait
from plait.config.base import Strict
from plait.config.paths import HOME, local
from plait.errors import ConfigError

Kind = Literal["io", "cpu", "gpu"]
# Snakemake puts it into a shell command as it stands.
ImagePath = Annotated[str, StringConstraints(pattern=r"^[\w./~+@-]+$")]
TOKENS = ("HF_TOKEN", "WANDB_API_KEY")
"""What an image learns by environment alone."""
BIND = "APPTAINER_BIND"
INSIDE = "APPTAINERENV_"
"""What begins so in the environment is set in an image."""
CACHE = ".snakemake/cache"


class Images(Strict):
    """Images by class of rule, a .sif or a sandbox folder; only `--sdm apptainer` reads them."""

    io: ImagePath = Field("envs/cpu.sif", description="raw sources, downloads, models, reports, schedules")
    cpu: ImagePath = Field("envs/cpu.sif", description="all that is neither: data, conversion, proofs")
    gpu: ImagePath = Field("envs/gpu.sif", description="training, on every node")

    def path(self, kind: Kind) -> str:
        """The image of a class of rules.

        Raises:
            ConfigError: it is not there.
        """
        image = local(getattr(self, kind))
        if not image.exists():
            raise ConfigError(
                f"images.{kind}: {image} does not exist",
                hint="`make image` builds or pulls envs/cpu.sif and envs/gpu.sif; or name another in images",
            )
        return str(image)


def environment(named: Any = (), given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What Apptainer must find in its environment, so that an image sees what this machine sees.

    Args:
        named: values of the config; the paths among them are bound, as far as they lie elsewhere.
        given: the environment as it is; binds in it stay.
    """
    home, cwd = Path.home(), Path.cwd()
    hub = Path(given.get("HF_HOME") or Path(given.get("XDG_CACHE_HOME") or home / ".cache", "huggingface"))
    source = Path(plait.__file__).parents[1]
    hubs = [given[name] for name in ("HF_HUB_CACHE", "HF_TOKEN_PATH") if name in given]
    folders = [*_strings(named)]
    seen: list[Path | str] = [*hubs, *folders, *_behind(folders)]
    wanted: list[Path | str] = [cwd, *_links(cwd), tempfile.gettempdir(), hub, *seen]
    found = {
        BIND: ",".join(_binds(given.get(BIND, ""), wanted, cwd)),
        "APPTAINER_NV": "true",
        # Snakemake mounts the working folder as home: `~` in config/ and the hub's files are elsewhere.
        f"{INSIDE}{HOME}": given.get(HOME, str(home)),
        f"{INSIDE}HF_HOME": str(hub if hub.is_dir() else cwd / CACHE / "huggingface"),
        f"{INSIDE}XDG_CACHE_HOME": str(cwd / CACHE),
        # Packages of ~/.local are no part of an image.
        f"{INSIDE}PYTHONNOUSERSITE": "1",
        **{f"{INSIDE}{name}": given[name] for name in TOKENS if name in given},
    }
    if (source.parent / "pyproject.toml").is_file():
        # A checkout: the stages that planning knows are those that run, whatever the image was built with.
        found[f"{INSIDE}PYTHONPATH"] = str(source)
        found[BIND] = ",".join(_binds(found[BIND], [source], cwd))
    return found


def _binds(given: str, wanted: Iterable[Path | str], cwd: Path) -> list[str]:
    """Binds as Apptainer reads them: those that are given, then each real path that no other one holds.

    Raises:
        ConfigError: a path has a comma or a colon, which divide binds.
    """
    kept = [bind for bind in given.split(",") if bind]
    real = {local(str(path)).resolve() for path in wanted if local(str(path)).exists()} - {Path("/")}
    for path in sorted(real):
        inside = not (real | {cwd}).isdisjoint(path.parents)
        if inside or str(path) in kept:
            continue
        if set(",:") & set(str(path)):
            raise ConfigError(f"{path}: no image can see a path with a comma or a colon", hint="rename it")
        kept.append(str(path))
    return kept


def _links(cwd: Path) -> list[Path]:
    """data/ where it is a link, and where the links lead that lie in it as deep as artifacts do."""
    data = cwd / "data"
    found = (path for depth in range(1, 5) for path in data.glob("/".join("*" * depth)))
    links = [path for path in found if path.is_symlink() and path.exists()]
    return [data, *_places(links)] if data.is_symlink() else [*_places(links)]


def _behind(folders: Iterable[str]) -> Iterator[Path]:
    """Where the links in folders lead: a snapshot of the hub's cache is links to its blobs."""
    for folder in map(local, folders):
        if folder.is_dir() and folder != Path("/"):
            yield from _places(path for path in folder.iterdir() if path.is_symlink() and path.exists())


def _places(links: Iterable[Path]) -> Iterator[Path]:
    """The folders that links lead to, or that hold the files which they lead to."""
    for real in {link.resolve() for link in links}:
        yield real if real.is_dir() else real.parent


def _strings(value: Any) -> Iterator[str]:
    """Every text of a config that could be a path of this machine."""
    if isinstance(value, str) and value and "\0" not in value and len(value) < 4096:
        if value.startswith(("/", "~/")) or Path(value).is_symlink():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
