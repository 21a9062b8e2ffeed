"""Jobs of a real Slurm in real images: training starts `srun` outside and the image on each node."""

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
