"""A real Apptainer for the tests, and images made of this machine's own files in a second."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "apptainer_up.sh"
TOOLS = Path("/opt/plait-tests" if os.getuid() == 0 else Path.home() / ".cache/plait-tests")
"""Outside of /tmp and of any working folder: images see nothing here unless somebody binds it."""
PACKAGES = Path(sysconfig.get_path("purelib"))
SYSTEM = Path("/usr/bin/python3.11")
STDLIB = Path("/usr/lib/python3.11")
PYTHON = Path(sys.executable).resolve()
"""The tests' own: bytes of checkpoints follow from its patch release (enums are pickled in two ways)."""
EVERYONES = SYSTEM if SYSTEM.exists() else PYTHON
"""One that other users may run too."""
ROOT = Path(__file__).parents[2]
FOLDERS = (
    "dev",
    "etc",
    "home",
    "image/bin",
    "mnt",
    "opt",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
    "usr",
    "var/tmp",
)
FILES = ("hosts", "resolv.conf", "passwd", "group", "localtime")
SEEN = "inside.txt"
"""Where an image notes in the working folder what it ran: stages and modules."""
WHERE = "images.txt"
"""Where it notes stages with its own name."""


def bring_up():
    """The folder of the command; where it cannot be had the test skips with one line."""
    place = shutil.which("apptainer")
    commands = Path(place).parent if place else installed()
    with tempfile.TemporaryDirectory() as folder:
        skeleton(Path(folder))
        words = [commands / "apptainer", "exec", "--bind=/usr", folder, "true"]
        tried = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    if tried.returncode:
        pytest.skip(f"Apptainer starts nothing here: {last_line(tried.stderr)}")
    return commands


def installed():
    """The folder of one that is installed for the tests."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [SCRIPT, TOOLS / "apptainer"], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        pytest.skip(f"no Apptainer here: {last_line(done.stderr)}")
    return TOOLS / "apptainer/usr/bin"


def last_line(said):
    return (said.strip().splitlines() or ["no word"])[-1]


def passthrough(folder, python=PYTHON):
    """An image without a file of its own but two commands: it runs what this machine has in /usr."""
    skeleton(folder)
    noted = f'echo "$2" >> {SEEN}\nPYTHONPATH=$PYTHONPATH:{PACKAGES} exec {python} "$@"'
    script(folder / "image/bin/python", noted)
    staged = f'echo "$1" >> {SEEN}\necho "{folder.name} $1" >> {WHERE}\n'
    script(folder / "image/bin/plait", f'{staged}exec /image/bin/python -m plait.cli.main "$@"')
    for name in ("squeue", "scontrol", "srun"):
        script(folder / "image/bin" / name, "exit 127")  # what most images do not have
    return folder


def skeleton(folder):
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
    for name in FILES:
        (folder / "etc" / name).touch()
    for name in ("bin", "sbin", "lib", "lib64"):
        (folder / name).symlink_to(f"usr/{name}")


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def environment(commands, python=PYTHON):
    """What such images need besides what plait gives any image."""
    binds = ["/usr", str(PACKAGES), *([] if python == SYSTEM else [str(python.parents[1])])]
    return {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "APPTAINER_BIND": ",".join(binds),
        "APPTAINERENV_PREPEND_PATH": "/image/bin",
        "OMP_NUM_THREADS": "1",
    }


def proofs(folder):
    """Every manifest and every proof below data/, by path: digests, coverage, Merkle roots."""
    data = (folder / "data").resolve()
    found = [path for name in ("plait.json", "parity.json") for path in data.rglob(name)]
    return {str(path.relative_to(data)): path.read_text() for path in found}


def small_system(folder):
    """A small system of this machine's files: a shell, Python and pip. `plait --version` needs no more."""
    skeleton(folder)
    for name in ("bin", "sbin", "lib", "lib64"):
        (folder / "usr" / name).mkdir()
    names = ("bash", "cat", "chmod", "cp", "env", "grep", "mkdir", "rm", "sh", "true")
    programs = [Path("/usr/bin", name) for name in (*names, SYSTEM.name)]
    linked = [*programs, *(STDLIB / "lib-dynload").glob("*.so")]
    needed = subprocess.run(["ldd", *linked], capture_output=True, text=True, check=True).stdout
    libraries = {word for word in needed.split() if word.startswith("/") and not word.endswith(":")}
    for file in (*programs, *libraries):
        place = folder / str(file).lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    (folder / "usr/local/bin").mkdir(parents=True)
    (folder / "usr/local/bin/python").symlink_to(SYSTEM)
    without = shutil.ignore_patterns("test", "lib2to3", "pydoc_data", "__pycache__", "EXTERNALLY-MANAGED")
    shutil.copytree(STDLIB, folder / str(STDLIB).lstrip("/"), ignore=without)
    shutil.copytree(PACKAGES / "pip", folder / "usr/local/lib/python3.11/dist-packages/pip")
    return folder
