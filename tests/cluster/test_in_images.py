"""Jobs of a real Slurm in real images: training starts `srun` outside and the image on each node."""

import contextlib
import os
import re
import subprocess
import sys

from envs.containers import SEEN, proofs
from envs.fixtures import CHAT, EXPORT, PATIENCE, bare, commands, contained, image, scratch, small

__all__ = ["bare", "commands", "contained", "image", "scratch"]
ASKED = {"runtime": 30, "mem_mb": 1500}
JOBS = {"classes": {"io": ASKED, "cpu": ASKED, "gpu": {**ASKED, "partition": "gpu"}}}


def test_the_chat_plan_on_two_nodes_in_images_gives_the_roots_of_one_without(
    bare, project_on_slurm, contained, image, scratch, tmp_path, cluster
):
    project = project_on_slurm(tmp_path / "project")
    runs = {"small": {**CHAT["runs"]["small"], "nodes": 2}}
    small(project, dict.fromkeys(("io", "cpu", "gpu"), str(image)), jobs=JOBS, runs=runs)
    (scratch / "shared").mkdir()
    (project.folder / "data").symlink_to(scratch / "shared")

    done = project.submit(
        f"ckpts/{EXPORT.removeprefix('data/ckpts/')}", "--sdm", "apptainer", timeout=PATIENCE
    )

    assert done.code == 0, done.text
    assert proofs(project.folder) == proofs(bare.folder)
    seen = (project.folder / SEEN).read_text().split()
    assert {"raw", "index", "build", "verify", "export"} <= set(seen)
    assert seen.count("plait.train.node") == 4  # two segments, two nodes
    logs = list((project.folder / "data/logs/slurm/rule_train").glob("small_*/*.log"))
    jobs = [cluster.show(log.stem) for log in logs]
    assert {(job["NumNodes"], job["NumTasks"]) for job in jobs} == {("2", "2")}


def test_a_shell_opens_in_an_image_on_a_node(contained, cluster, image, tmp_path):
    words = ["shell", "--slurm", "--apptainer", "--image", str(image), "--", "--partition=gpu", "--mem=200"]
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text("{}\n")
    terminal, end = os.openpty()
    shell = subprocess.Popen(
        [sys.executable, "-m", "plait.cli.main", *words], cwd=tmp_path, stdin=end, stdout=end, stderr=end
    )
    os.close(end)
    os.write(terminal, b'echo "on $SLURMD_NODENAME in $(command -v plait)."; exit\n')

    said = b""
    with contextlib.suppress(OSError):  # a terminal whose other end is closed
        while more := os.read(terminal, 4096):
            said += more
    os.close(terminal)

    assert shell.wait(60) == 0
    assert re.search(r"on n[12] in /image/bin/plait\.", said.decode()), said
