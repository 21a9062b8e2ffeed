"""What is made sure of data before a job reads them: each fault is injected and refused by name."""

import re
from pathlib import Path

import pytest

from plait import files
from plait.errors import DataError
from plait.train import intact

ANALYSIS = Path("data/analysis/x")
SHARDS = [f"data/megatron_format/f_d_pack64/shard_0000{number}" for number in range(6)]


@pytest.fixture
def mixture(tmp_path, monkeypatch):
    """Six shards of two small files each, and their analysis."""
    monkeypatch.chdir(tmp_path)
    for shard in SHARDS:
        Path(shard).mkdir(parents=True)
        for name in ("data-text.bin", "data-text.idx"):
            Path(shard, name).write_bytes(f"{shard}/{name}".encode() * 9)
        files.write_manifest(Path(shard), kind="indexed", settings={}, facts={"packs": 3})
    ANALYSIS.mkdir(parents=True)
    (ANALYSIS / "mixture.yaml").write_text("sources: []\n")
    files.write_manifest(ANALYSIS, kind="analysis", settings={}, inputs=SHARDS)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", [*(f"{shard}/data-text.bin" for shard in SHARDS), ANALYSIS / "mixture.yaml"])
def test_a_flipped_bit_is_found_in_whatever_file(mixture, name):
    intact.check_bytes(ANALYSIS, "all", seed="a")
    flip(Path(name))
    with pytest.raises(DataError, match=re.escape(f"{name} does not have the sha256")):
        intact.check_bytes(ANALYSIS, "all", seed="a")
    intact.check_bytes(ANALYSIS, "none", seed="a")


def found_by(seed):
    """Which of the shards' flipped files a sample finds, one at a time."""
    found = set()
    for shard in SHARDS:
        path = Path(shard, "data-text.bin")
        flip(path)
        try:
            intact.check_bytes(ANALYSIS, "sampled", seed=seed)
        except DataError as error:
            found.add(str(error).split("/data-text.bin does not have")[0])
        flip(path)
    return found


def test_a_sample_is_the_same_for_one_job_and_another_for_the_next(mixture, monkeypatch):
    assert found_by("iter_1") == set(SHARDS)
    monkeypatch.setattr(intact, "SAMPLED", 5 * 600)
    samples = [frozenset(found_by(f"iter_{number}")) for number in range(6)]

    assert frozenset(found_by("iter_0")) == samples[0]
    assert all(set() < sample < set(SHARDS) for sample in samples)
    assert len(set(samples)) > 1


def test_a_sample_looks_at_the_size_of_every_file(mixture, monkeypatch):
    monkeypatch.setattr(intact, "SAMPLED", 0)
    intact.check_bytes(ANALYSIS, "sampled", seed="a")
    path = Path(SHARDS[4], "data-text.idx")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{path} has .* bytes, plait.json says"):
        intact.check_bytes(ANALYSIS, "sampled", seed="a")
    path.unlink()
    with pytest.raises(DataError, match=f"{path} is missing"):
        intact.check_bytes(ANALYSIS, "sampled", seed="a")
