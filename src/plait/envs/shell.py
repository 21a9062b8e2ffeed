"""The command of an interactive shell in the training environment: here, in an image, on a node.

Tokens go by environment, also where a program has to be told their names.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from plait.config.images import BIND, INSIDE, TOKENS, environment

Way = Literal["here", "apptainer", "docker"]


def command(way: Way, image: str, *, slurm: bool, words: Sequence[str]) -> list[str]:
    """What is started.

    Args:
        way: in this environment, or in an image.
        image: a .sif, a sandbox folder, or a name that Docker knows.
        slurm: on a node that Slurm gives.
        words: what else Slurm is asked for, or what Docker is told.
    """
    node = ["srun", "--pty", "--nodes=1", "--ntasks=1", *words] if slurm else []
    if way == "apptainer":
        return [*node, "apptainer", "shell", *([] if slurm else words), image]
    if way == "docker":
        return docker(image, words)
    return [*node, "bash", "--norc", "-i"]


def docker(image: str, words: Sequence[str]) -> list[str]:
    """Docker's command: as this user, with the paths of this machine, and no limit that NCCL would meet."""
    found = environment()
    binds = [bind for bind in found[BIND].split(",") if bind]
    cwd = str(Path.cwd())
    return [
        "docker", "run", "--rm", "--interactive", "--tty", "--gpus=all", "--ipc=host", "--network=host",
        "--pid=host", "--ulimit=memlock=-1", f"--user={os.getuid()}:{os.getgid()}",
        f"--workdir={cwd}", f"--env=HOME={cwd}",
        *(f"--volume={path}:{path}" for path in dict.fromkeys([cwd, *binds]) if ":" not in path),
        *(f"--env={name.removeprefix(INSIDE)}={value}" for name, value in found.items() if _is_told(name)),
        *(f"--env={name}" for name in TOKENS),
        *words, image, "bash",
    ]  # fmt: skip


def _is_told(name: str) -> bool:
    """Whether a value may stand in a command line: what an image is told, but for tokens."""
    return name.startswith(INSIDE) and name.removeprefix(INSIDE) not in TOKENS


def surroundings(way: Way, named: Any = ()) -> dict[str, str]:
    """What is set for the command besides what is."""
    if way == "apptainer":
        return environment(named)
    return {"PATH": f"{_here()}:{os.environ['PATH']}"} if way == "here" else {}


def _here() -> Path:
    """The commands of this environment."""
    return Path(sys.executable).parent


def printed(command: Sequence[str], surroundings: Mapping[str, str]) -> str:
    """The command with what is set for it, to be pasted into a shell; tokens are named, never shown."""
    shown = [f"{name}={_shown(name, value)}" for name, value in surroundings.items()]
    return " ".join([*shown, shlex.join(command)])


def _shown(name: str, value: str) -> str:
    own = name.removeprefix(INSIDE)
    if own in TOKENS:
        return f'"${own}"'
    return f'{shlex.quote(str(_here()))}:"$PATH"' if name == "PATH" else shlex.quote(value)
