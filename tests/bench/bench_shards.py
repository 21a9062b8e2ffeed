"""What a small shard job costs besides its work: ``python tests/bench/bench_shards.py [SHARDS]``.

It makes a project with so many shards of two records, runs its dry run and its `chat` jobs, and prints
processor seconds, which do not grow with what else the machine does, their ratio to a shard of 0.1 s, and the
memory of the largest process until then.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests"))

from projects import Project  # noqa: E402

WORK = 0.1
RECORD = json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}])


def many(folder, shards):
    """A project, its config, and the shards to ask for."""
    project = Project.make(Path(folder) / "project")
    project.write("records.jsonl", f"{RECORD}\n" * 2 * shards)
    source = {"kind": "chat-jsonl", "path": "records.jsonl"}
    config = {"datasets": {"many": {"source": source, "shards": shards}}}
    return project, config, [f"data/processed/many/shard_{n:05d}.jsonl.gz" for n in range(shards)]


def seconds(run):
    """Wall and processor seconds of a command's processes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - start, spent


def main() -> None:
    """Print one line for the dry run and one for the jobs."""
    shards = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as folder:
        project, config, targets = many(folder, shards)
        for what, run in (("planned", project.plan), ("made", project.run)):
            wall, spent = seconds(lambda run=run: run(*targets, config=config, timeout=3600))
            ratio = f"{spent / shards / WORK:.2f} times a shard of {WORK} s"
            most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
            print(f"{shards} {what}: {spent:.1f} s of processor, {wall:.1f} s; {ratio}; {most:.2f} GB")  # noqa: T201


if __name__ == "__main__":
    main()
