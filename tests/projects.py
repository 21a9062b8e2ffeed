"""Project folders in which the tests run Snakemake itself."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from plait import files

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
JOB = re.compile(
    r"^(?:local)?(?:rule|checkpoint) (\w+):\n(?:    input: .*\n)?    output: ([^,\n]+)", re.MULTILINE
)


@dataclass(frozen=True)
class Done:
    """What Snakemake said, and the jobs it listed: rule and first output, sorted."""

    code: int
    text: str

    @property
    def jobs(self):
        return sorted(f"{rule} {output}" for rule, output in JOB.findall(self.text))

    @property
    def rules(self):
        """How many jobs of each rule."""
        names = [job.split()[0] for job in self.jobs]
        return {name: names.count(name) for name in sorted(set(names))}

    @property
    def nothing(self):
        return self.code == 0 and "Nothing to be done" in self.text and not self.jobs


@dataclass(frozen=True)
class Project:
    """A folder with the workflow in it."""

    folder: Path

    @classmethod
    def make(cls, folder):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "Snakefile", folder)
        for name in ("workflow", "profiles", "config"):
            shutil.copytree(ROOT / name, folder / name)
        (folder / "slurm").symlink_to("profiles/slurm")
        return cls(folder)

    def snakemake(self, *words, config=None, start=("-m", "snakemake"), timeout=280):
        overlay = []
        if config is not None:
            path = self.folder / "overlay.yaml"
            path.write_text(yaml.safe_dump(config))
            overlay = ["--configfile", path.name]
        environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *start, *words, *overlay],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        return Done(done.returncode, done.stdout + done.stderr)

    def copy(self, folder):
        """Another checkout that was given this one's data and .snakemake; every mtime is new."""
        shutil.copytree(self.folder, folder, symlinks=True, copy_function=shutil.copy)
        return type(self)(folder)

    def plan(self, *targets, config=None, **more):
        """What a dry run lists."""
        done = self.snakemake("-n", "--cores", "2", *targets, config=config, **more)
        assert done.code == 0, done.text
        return done

    def refusal(self, *targets, config=None):
        """The text of a dry run that fails; no stack of ours is in it."""
        done = self.snakemake("-n", "--cores", "2", *targets, config=config)
        assert done.code == 1, done.text
        assert "src/plait" not in done.text
        return done.text

    def run(self, *targets, config=None, timeout=580):
        done = self.snakemake("--cores", "2", *targets, config=config, timeout=timeout)
        assert done.code == 0, done.text
        return done

    def write(self, path, text):
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file


def contents(folder):
    """Every file of a folder and its digest: what is to stay as it is."""
    return {str(path): files.digest(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()}
