"""Paths are written and read by one grammar."""

import re
import string
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from plait import layout
from plait.errors import LayoutError

NAMES = st.from_regex(re.compile(layout.NAME), fullmatch=True).filter(lambda name: len(name) < 30)
COUNTS = st.integers(1, 10**6)
SHARDS = st.integers(0, 99_999)
FORMATS = st.text(string.ascii_letters + string.digits, min_size=1, max_size=12)
REPOS = st.sampled_from(
    ["models--us--tiny", "datasets--us-2--Talks_v1.0", "urls--example.org", "packages--tiny-model"]
)
FILES = st.from_regex(re.compile(layout.WILDCARDS["file"]), fullmatch=True).filter(
    lambda name: len(name) < 30
)
ARTIFACTS = {
    layout.Raw: {"dataset": NAMES},
    layout.Chat: {"dataset": NAMES, "shard": SHARDS},
    layout.ChatBatch: {"dataset": NAMES, "first": SHARDS, "last": SHARDS},
    layout.Tokenizer: {"tokenizer": NAMES},
    layout.Energon: {"dataset": NAMES},
    layout.Generated: {"run": NAMES, "step": COUNTS},
    layout.Indexed: {"format": FORMATS, "dataset": NAMES, "seq": COUNTS, "shard": SHARDS},
    layout.IndexedBatch: {
        "format": FORMATS,
        "dataset": NAMES,
        "seq": COUNTS,
        "first": SHARDS,
        "last": SHARDS,
    },
    layout.Analysis: {"mixture": NAMES},
    layout.HfModel: {"model": NAMES},
    layout.Megatron: {"model": NAMES},
    layout.Sharded: {"model": NAMES, "tp": COUNTS, "pp": COUNTS},
    layout.Run: {"run": NAMES},
    layout.Iteration: {"run": NAMES, "iteration": st.integers(1, 9_999_999)},
    layout.Export: {"run": NAMES, "step": COUNTS},
    layout.LossCurve: {"run": NAMES},
    layout.HubTree: {"repo": REPOS, "revision": st.sampled_from(["main", "v1.0", "refs%2Fpr%2F1"])},
    layout.HubFile: {
        "repo": REPOS,
        "commit": st.text("0123456789abcdef", min_size=40, max_size=40),
        "file": FILES,
    },
}


@pytest.mark.parametrize("kind", ARTIFACTS)
@given(st.data())
def test_a_path_is_read_back_as_what_wrote_it(kind, data):
    artifact = kind(**{key: data.draw(values) for key, values in ARTIFACTS[kind].items()})
    try:
        path = str(artifact)
    except LayoutError:
        assume(False)

    assert kind.parse(path) == artifact
    assert kind.parse(f"{Path.cwd()}/{path}/") == artifact
    assert layout.parse(path) == artifact


def test_every_kind_is_covered():
    assert set(ARTIFACTS) == set(layout.KINDS)


@pytest.mark.parametrize(
    ("artifact", "path"),
    [
        (layout.Chat(dataset="x", shard=7), "data/processed/x/shard_00007.jsonl.gz"),
        (
            layout.Indexed(format="mmistral", dataset="cc3m", seq=32768, shard=0),
            "data/megatron_format/mmistral_cc3m_pack32768/shard_00000",
        ),
        (layout.Megatron(model="Mistral-7b"), "data/models/raw/Mistral-7b-megatron"),
        (
            layout.Sharded(model="Mistral-7b", tp=2, pp=1),
            "data/models/sharded/Mistral-7b-megatron-tp2-pp1",
        ),
        (layout.Iteration(run="x", iteration=100), "data/ckpts/x/iter_0000100"),
        (layout.Export(run="x", step=100), "data/ckpts/x/hf/model_iter_100"),
    ],
)
def test_paths_are_those_of_the_guides(artifact, path):
    assert str(artifact) == path


def test_what_a_part_says_lies_beside_its_artifact():
    cut = layout.Sharded(model="x", tp=2, pp=1)

    assert cut.part(2, 3) == "data/models/sharded/.x-megatron-tp2-pp1.parts/2-of-3.json"
    assert layout.part_pattern(layout.Sharded).format(model="x", tp=2, pp=1, part=2, parts=3) == cut.part(
        2, 3
    )


def test_proofs_mirror_their_artifacts():
    export = layout.Export(run="x", step=100)

    assert export.proof == "data/verify/ckpts/x/hf/model_iter_100/parity.json"
    assert layout.proof_pattern(layout.Export).format(run="x", step=100) == export.proof
    assert layout.Chat(dataset="x", shard=0).manifest == "data/processed/x/shard_00000.ledger.json"


@pytest.mark.parametrize("name", ["../up", "", "a/b", "a b", "-a", ".hidden"])
def test_a_name_that_would_be_read_otherwise_is_refused_when_made(name):
    with pytest.raises(LayoutError, match="would be read otherwise"):
        str(layout.Sharded(model=name, tp=1, pp=1))


@pytest.mark.parametrize(
    "path",
    [
        "data/models/sharded/x-megatron-tp0-pp1",
        "data/models/sharded/x-megatron-tp02-pp1",
        "data/ckpts/x/hf/model_iter_0100",
        "data/ckpts/x/iter_100",
        "data/processed/x/shard_0.jsonl.gz",
        "models/raw_hf/x",
    ],
)
def test_what_is_no_path_says_what_is_expected(path):
    with pytest.raises(LayoutError, match="is not") as found:
        layout.parse(path)
    assert "data/models/sharded/{model}-megatron-tp{tp}-pp{pp}" in found.value.hint


def test_links_are_not_resolved(tmp_path, monkeypatch):
    (tmp_path / "scratch/raw/x").mkdir(parents=True)
    (tmp_path / "data").symlink_to("scratch")
    monkeypatch.chdir(tmp_path)

    assert layout.Raw.parse(tmp_path / "data/raw/x") == layout.Raw(dataset="x")


MADE_BESIDE_ARTIFACTS = [
    "data/raw/x/plait.json",
    "data/processed/x/shard_00000.ledger.json",
    "data/processed/x/shard_00000.rejects.jsonl",
    "data/ckpts/x/schedule.json",
    "data/ckpts/x/iter_0000100/plait.json",
    "data/verify/ckpts/x/iter_0000100/parity.json",
    "data/verify/models/sharded/x-megatron-tp2-pp1/parity.json",
    "ckpts/x/hf/model_iter_100",
    "data/models/raw/.x-megatron.parts/2-of-3.json",
    "data/models/sharded/.x-megatron-tp2-pp1.parts/10-of-12.json",
    "data/logs/raw/x.log",
]


@pytest.mark.parametrize("path", MADE_BESIDE_ARTIFACTS)
def test_what_a_rule_makes_is_never_unmade(path):
    assert re.fullmatch(layout.unmade(), path) is None
    assert re.fullmatch(layout.unmade(), f"{path}x") or path.startswith("data/logs")
