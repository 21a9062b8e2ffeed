import logging
import re
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_build import CAPTIONED, chats, index, turn

from plait import files, layout
from plait.errors import DataError
from plait.tokens import analysis
from plait.tokens.indexed import ROLE, IndexedWriter, PackedShard
from plait.tokens.roles import PACK_SEP, USER
from plait.tokens.tally import Tally

NATURAL = {"format": "f", "pack": 64, "datasets": ["emoji", "talk"], "weights": {}}
SHARDS = [
    layout.Indexed(format="f", dataset=dataset, seq=64, shard=shard)
    for dataset, shard in (("emoji", 0), ("emoji", 1), ("talk", 0))
]
TALK = [(turn("user", "word " * n), turn("assistant", "answer " * (n % 7 + 1))) for n in range(1, 40)]


@pytest.fixture(scope="module")
def root(tokenizers, tmp_path_factory):
    """A working folder with three indexed shards of two datasets."""
    root = tmp_path_factory.mktemp("root")
    for shard, number in zip(SHARDS, range(3), strict=True):
        (root / str(shard)).parent.mkdir(parents=True, exist_ok=True)
        records = TALK if shard.dataset == "talk" else CAPTIONED * (number + 3)
        source = chats(root / f"{number}.gz", *records)
        index(root / str(shard), tokenizers["solo"], [source], limit=64)
    return root


@pytest.fixture(scope="module")
def made(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        analysis.build(folder, "both", [analysis.measure(shard) for shard in SHARDS], NATURAL)
    return folder


def test_figures_are_those_of_a_recount_of_the_tokens(made, root):
    found = files.read_json(made / "tokens.json")

    for dataset in ("emoji", "talk"):
        packs = [p for shard in SHARDS if shard.dataset == dataset for p in PackedShard(root / str(shard))]
        figures = found["datasets"][dataset]
        assert figures["packs"] == len(packs)
        assert figures["tokens"] == sum(len(p.text) for p in packs)
        assert figures["image_tokens"] == sum((p.role == 3).sum() for p in packs)
        assert figures["loss_tokens"] == sum(
            ((p.role == 2) & ~((p.text >= 32000) & (p.text < 32005))).sum() for p in packs
        )
        assert figures["images"] == sum(len(p.pictures) for p in packs)
        assert figures["documents"] == sum((p.role == PACK_SEP).sum() + 1 for p in packs)
        assert figures["text_tokens"] == figures["tokens"] - figures["image_tokens"]
        expected = pd.Series([len(p.text) for p in packs]).describe()
        assert figures["statistics"]["n_tokens"] == pytest.approx(expected.to_dict(), abs=1e-5)
        shards = figures["shards"].values()
        assert sum(shard["tokens"] for shard in shards) == figures["tokens"]
    assert found["total"]["tokens"] == sum(d["tokens"] for d in found["datasets"].values())


def test_the_mixture_is_written_for_people_machines_and_megatron(made):
    mixed = yaml.safe_load((made / "mixture.yaml").read_text())
    line = (made / "mixture.txt").read_text().split()

    assert [source["prefix"] for source in mixed["sources"]] == list(map(str, SHARDS))
    assert sum(source["weight"] for source in mixed["sources"]) == pytest.approx(1)
    assert mixed["total_instances"] == sum(source["packs"] for source in mixed["sources"])
    assert line[1::2] == [f"{shard}/data" for shard in SHARDS]
    assert [float(weight) for weight in line[::2]] == pytest.approx(
        [source["weight"] for source in mixed["sources"]], abs=1e-4
    )


def test_the_lines_that_used_to_be_copied_by_hand_are_printed(root, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(root)
    caplog.set_level(logging.INFO)

    facts = analysis.build(tmp_path, "both", [analysis.measure(shard) for shard in SHARDS], NATURAL)

    text = caplog.text
    assert f"Total instances: ** {facts['total_instances']} **" in text
    between = re.search("===== FINAL MIXTURE =====\n(.*)\n=========================", text)
    assert between[1] + "\n" == (tmp_path / "mixture.txt").read_text()


def test_the_page_needs_no_network_and_shows_every_dataset(made):
    page = (made / "tokens.html").read_text()

    outside = set(re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)([^"'#][^"']*)""", page))
    assert outside == set()
    assert "<script" not in page
    assert "@import" not in page
    assert page.count("<svg") == 6 + 2 * 3
    assert re.search(
        '<h2 id="source-1"><b class="dot c0"></b>emoji</h2>.*<h2 id="source-2">', page, re.DOTALL
    )
    assert page.count(str(SHARDS[2])) >= 2


def test_an_equal_rebuild_is_equal_byte_for_byte(made, root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    analysis.build(tmp_path, "both", [analysis.measure(shard) for shard in SHARDS], NATURAL)

    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        p.name: p.read_bytes() for p in made.iterdir()
    }


@pytest.mark.parametrize(
    ("chosen", "shards", "words"),
    [
        (NATURAL | {"datasets": ["emoji"]}, SHARDS, "the mixture names emoji"),
        (NATURAL, SHARDS[:2], "are of the datasets emoji; the mixture names emoji, talk"),
        (NATURAL | {"datasets": [], "weights": {"talk": 1.0}}, SHARDS, "the mixture names talk"),
    ],
)
def test_shards_that_are_not_the_mixtures_are_refused(root, tmp_path, monkeypatch, chosen, shards, words):
    monkeypatch.chdir(root)

    with pytest.raises(DataError, match=words):
        analysis.build(tmp_path, "both", [analysis.measure(shard) for shard in shards], chosen)


def test_counts_that_contradict_the_manifest_are_found(root, tmp_path, monkeypatch):
    copy = tmp_path / str(SHARDS[0])
    shutil.copytree(root / str(SHARDS[0]), copy)
    rows = (copy / "data.jsonl").read_text().splitlines(keepends=True)
    (copy / "data.jsonl").write_text("".join(rows[1:]))
    monkeypatch.chdir(tmp_path)

    with pytest.raises(DataError, match=r"index -> mixture, .* does not balance"):
        analysis.measure(SHARDS[0])


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=6))
def test_document_lengths_are_read_from_roles(tmp_path_factory, packs):
    folder = tmp_path_factory.mktemp("roles")
    with IndexedWriter(folder / ROLE, np.uint16) as writer:
        for lengths in packs:
            roles = [role for length in lengths for role in [PACK_SEP, *[USER] * length]][1:]
            writer.document(np.array(roles))

    expected = list(chain.from_iterable(packs))
    own = [length + bool(place) for lengths in packs for place, length in enumerate(lengths)]
    for found, own_separators in ((expected, False), (own, True)):
        starts, ends = analysis.document_bounds(folder, own_separators=own_separators)
        assert (ends - starts).tolist() == found


def test_the_figures_of_one_value_are_finite():
    assert analysis.statistics(Tally.of(np.array([3])))["std"] == 0


def test_prefixes_are_folders_of_indexed_shards(made):
    for source in yaml.safe_load((made / "mixture.yaml").read_text())["sources"]:
        assert layout.Indexed.parse(Path(source["prefix"]))
