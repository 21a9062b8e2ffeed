"""A Slurm of this host, brought up once; a host that cannot have one skips in one line."""

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from projects import BIN, Project

SCRIPT = Path(__file__).parent / "one_host_slurm"
QUICK = {"slurm-init-seconds-before-status-checks": 1, "latency-wait": 5}
"""What the tests change of the shipped profile: they cannot wait as one waits for a cluster."""
ENVIRONMENT = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


def run(*words, **more):
    return subprocess.run(words, capture_output=True, text=True, check=True, **more).stdout


def keys(line):
    return dict(re.findall(r"(\w+)=(\S*)", line))


@dataclass(frozen=True)
class Cluster:
    """Slurm's own words about its jobs."""

    folder: Path

    def ended(self):
        """What Slurm recorded of each end of a job, by key; a requeued job has one record a life."""
        return [keys(line) for line in (self.folder / "log/jobs").read_text().splitlines()]

    def show(self, job):
        """What Slurm knows of a job, by key."""
        return keys(run("scontrol", "show", "job", job))

    def queued(self, folder, comment, states):
        """The jobs of a project in these states whose comment, rule and wildcards, begins so."""
        lines = run("squeue", "--noheader", f"--states={states}", "--format=%i %k %Z").splitlines()
        jobs = [line.split(maxsplit=2) for line in lines]
        return [job for job, said, place in jobs if said.startswith(comment) and place == str(folder)]

    def warn(self, job):
        """What Slurm does some time before a job's limit, where the job asked for it by --signal=B:USR1."""
        run("scancel", "--batch", "--signal=USR1", job)

    def cancel(self, job):
        run("scancel", job)

    def wait(self, what, seconds=300):
        """The first true answer to a question that is asked twice a second."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := what():
                return found
            time.sleep(0.5)
        return pytest.fail(f"not within {seconds} s; the queue:\n{run('squeue', '--states=all')}")


@dataclass(frozen=True)
class OnSlurm(Project):
    """A folder with the workflow whose jobs go to Slurm."""

    def submit(self, *targets, config=None, timeout=1800):
        """Snakemake with the profile, from here."""
        return self.snakemake("--profile", "slurm", *targets, config=config, timeout=timeout)

    def start(self, *targets):
        """Snakemake with the profile, beside what the tests do; what it says is in ``driver.log``."""
        with (self.folder / "driver.log").open("a") as log:
            return subprocess.Popen(
                ["snakemake", "--profile", "slurm", *targets],
                cwd=self.folder, env=ENVIRONMENT, stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def said(self):
        """What the drivers beside the test have said."""
        return (self.folder / "driver.log").read_text()

    def sbatch(self, *words):
        """A batch job from here; its number."""
        return run("sbatch", "--parsable", *words, cwd=self.folder, env=ENVIRONMENT).strip()


@pytest.fixture(scope="session")
def cluster():
    up = subprocess.run([SCRIPT, "up"], capture_output=True, text=True, check=False)
    if up.returncode == 3:
        pytest.skip(up.stdout.strip())
    if up.returncode:
        run(SCRIPT, "down")
        pytest.fail(up.stderr)
    yield Cluster(Path(os.path.realpath("/etc/slurm/slurm.conf")).parents[1])
    if not os.environ.get("KEEP_SLURM"):
        run(SCRIPT, "down")


@pytest.fixture(scope="session")
def project_on_slurm(cluster):
    """Makes a folder with the workflow whose profile `slurm` does not make the tests wait."""

    def make(folder, config=None):
        made = OnSlurm.make(folder)
        profile = made.folder / "profiles/slurm/config.yaml"
        profile.write_text(yaml.safe_dump(yaml.safe_load(profile.read_text()) | QUICK))
        if config is not None:
            shutil.copy(config, made.folder / "config/config.yaml")
        return made

    return make


@pytest.fixture
def project(project_on_slurm, tmp_path):
    return project_on_slurm(tmp_path / "project")
