"""What ``plait status`` tells of real processes: living ones, killed ones, and what they left."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plait import files
from plait.cli.main import main
from plait.config.remembered import remembered

HOLD = """
import sys, time
from pathlib import Path
from plait import files
from plait.train import lease
with lease.hold(Path("data/ckpts/x")), files.appears_whole("data/raw/emoji", folder=True) as part:
    (part / "half").write_text("half")
    print("holds", flush=True)
    time.sleep(600)
"""


def started(code):
    """A process that has said its first word."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds\n"
    return process


def killed(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """Runs ``plait status`` in an empty project; its words."""
    monkeypatch.chdir(tmp_path)

    def run(*words, status=0):
        assert main(["status", *words]) == status
        found = capsys.readouterr()
        return found.out + found.err

    return run


def checkpoint(path, *, kind="iteration", inputs=(), settings=None, facts=None):
    folder = Path(path)
    folder.mkdir(parents=True)
    files.write_manifest(folder, kind=kind, settings=settings or {}, inputs=inputs, facts=facts)


def test_samples_that_a_run_evaluates_and_trains_are_counted(said):
    checkpoint("data/ckpts/x/iter_0000005")
    listed = Path("data/ckpts/x/leaks.jsonl")
    listed.write_bytes(b"")
    assert "evaluates" not in said("x")
    listed.write_bytes(b'{"id": "a"}\n{"id": "b"}\n')
    assert "samples that it evaluates and trains: 2, in data/ckpts/x/leaks.jsonl" in said("x")


def test_a_living_job_and_what_it_leaves_when_it_is_killed(said):
    process = started(HOLD)
    part = next(Path("data/raw").iterdir())
    try:
        text = said("x")
        assert f"lease: live, process {process.pid} on " in text
        assert f"{part}, 0.0 MB: process {process.pid} on " in text
        assert " writes it" in text
        assert "removed" not in said("--clean")
        assert (part / "half").exists()
    finally:
        killed(process)

    text = said()
    assert f"lease: stale, process {process.pid} on " in text
    assert "the next job takes it over by itself" in text
    assert "plait status --clean removes it" in text
    assert f"removed: {part}" in said("--clean")
    assert not part.exists()
    assert "half written" not in said()


def test_what_another_machine_writes_is_left_to_it(said, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    part = Path("data/models/raw/.x-megatron.1@elsewhere.part")
    part.mkdir(parents=True)

    text = said("--clean")

    assert "process 1 on elsewhere, which cannot be asked from here" in text
    assert part.exists()


def test_what_jobs_of_a_conversion_wrote_stays_while_one_of_them_is_at_work(said):
    parts = Path("data/models/raw/.x-megatron.parts")
    process = started(HOLD.replace("data/raw/emoji", f"{parts}/0123456789abcdef"))
    try:
        (parts / "1-of-3.json").write_text("{}")
        assert f"{parts}, 0.0 MB: a conversion of several jobs writes it" in said("--clean")
        assert (parts / "1-of-3.json").exists()
    finally:
        killed(process)

    Path(".snakemake/locks").mkdir(parents=True)
    Path(".snakemake/locks/0.input.lock").touch()
    said("--clean")
    assert (parts / "1-of-3.json").exists()  # its other jobs may still be to come

    Path(".snakemake/locks/0.input.lock").unlink()
    assert "a conversion of several jobs is gone; plait status --clean removes it" in said()
    assert f"removed: {parts}" in said("--clean")
    assert not parts.exists()


def test_a_download_that_goes_on_and_a_half_written_checkpoint_are_told_apart(said):
    download, half = Path("data/hub/.model.safetensors.part"), Path("data/ckpts/x/.iter_0000100.part")
    for folder in (download, half):
        folder.mkdir(parents=True)

    assert f"{half}, 0.0 MB: the holder of the run's lease is gone" in said("--clean")

    assert download.exists()
    assert not half.exists()


def test_a_run_is_known_by_what_stands(said):
    checkpoint("data/ckpts/x/iter_0000050", settings={"recipe": "chat"}, facts={"grid": {"tp": 2, "pp": 1}})
    checkpoint("data/ckpts/x/.state/iter_0000073", kind="state")
    Path("data/ckpts/x/iter_0000100").mkdir()
    Path("data/ckpts/x/metrics.jsonl").write_text('{"iteration": 72}\n{"iteration": 73}\n')

    text = said("x")

    assert "lease: free, nobody trains it" in text
    assert "checkpoints: iter_0000050\n" in text
    assert "newest: data/ckpts/x/iter_0000050 (recipe chat, tp2 pp1)" in text
    assert "crash state: data/ckpts/x/.state/iter_0000073" in text
    assert 'last row of metrics.jsonl: {"iteration": 73}\n' in text
    assert "there is no data/ckpts/y\nhint:  known: x" in said("y", status=2)


def test_one_damaged_run_hides_no_other(said):
    assert "nothing: no run, no lock, nothing half written" in said()
    checkpoint("data/ckpts/good/iter_0000050")
    for name, file, text in (("bad", "iter_0000050/plait.json", "{"), ("held", ".lease", "?")):
        Path("data/ckpts", name, file).parent.mkdir(parents=True)
        Path("data/ckpts", name, file).write_text(text)
    Path("data/ckpts/.hidden").mkdir()
    Path("data/ckpts/held/.iter_0000007.part").mkdir()

    text = said("--clean")

    assert "damaged: data/ckpts/bad/iter_0000050/plait.json is not JSON" in text
    assert "lease: data/ckpts/held/.lease is no lease" in text
    assert "newest: data/ckpts/good/iter_0000050" in text
    assert ".hidden" not in text
    assert Path("data/ckpts/held/.iter_0000007.part").is_dir()


def test_snakemakes_own_lock_living_and_left_behind(said):
    Path("Snakefile").write_text("rule all:\n    output: 'x'\n    shell: 'sleep 600'\n")
    words = [sys.executable, "-m", "snakemake", "--cores", "1"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while not list(Path(".snakemake/locks").glob("*")) and time.monotonic() < end:
        time.sleep(0.2)
    try:
        assert f"workflow: locked; snakemake runs in this folder as process {process.pid}" in said()
    finally:
        killed(process)

    assert "if none does elsewhere: snakemake --unlock" in said()


def test_status_loads_no_torch():
    code = "import sys; from plait.cli.main import main; main(['status']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)

    assert not set(done.stdout.split()) & {"torch", "transformers", "numpy", "megatron", "pydantic"}


def test_a_run_that_the_config_has_lost_is_exported_by_what_its_manifests_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf, packed = "data/models/raw_hf/m", "data/megatron_format/im_d_pack64/shard_00000"
    checkpoint(hf, kind="hf_model")
    checkpoint("data/models/raw/m-megatron", kind="megatron", inputs=[hf])
    checkpoint(packed, kind="indexed", settings={"format": {"template": "chatml"}})
    checkpoint("data/analysis/d", kind="analysis", inputs=[packed], settings={"mixture": {}})
    inputs = ["data/models/raw/m-megatron", "data/analysis/d"]
    assert remembered("x") == ""
    checkpoint("data/ckpts/x/iter_0000050", inputs=inputs, settings={"recipe": "chat"})

    command = f"plait export {hf} data/ckpts/x/iter_0000050 data/ckpts/x/hf/model_iter_50 --settings"

    assert command in remembered("x")
    assert json.dumps({"recipe": "chat", "template": "chatml"}, separators=(",", ":")) in remembered("x")
    Path("data/analysis/d/plait.json").unlink()
    assert "what it was made from does not: bring its entry in runs back" in remembered("x")
    manifest = Path("data/ckpts/x/iter_0000050/plait.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "adopted": True}))
    assert "was adopted, and nothing says of what model: bring its entry in runs back" in remembered("x")
