"""Tokenizer, vocabulary and template of tokens: another one of each is refused before training, by name."""

import hashlib
from pathlib import Path

import pytest

from plait import files
from plait.errors import DataError
from plait.tokens import made_by as makers
from plait.tokens.templates import TEMPLATES
from plait.train import intact

ANALYSIS = Path("data/analysis/x")
SHARDS = [f"data/megatron_format/f_d_pack64/shard_0000{number}" for number in range(2)]


@pytest.fixture
def made(tokenizers, tmp_path, monkeypatch):
    """Two shards that the tokenizer chatml and its template made, as manifests say it."""
    monkeypatch.chdir(tmp_path)
    Path("data/tokenizers").mkdir(parents=True)
    Path("data/tokenizers/chatml").symlink_to(tokenizers["chatml"])

    def make(number, **other):
        folder = Path(SHARDS[number])
        folder.mkdir(parents=True, exist_ok=True)
        facts = makers.made_by(Path("data/tokenizers/chatml"), "chatml")
        files.write_manifest(
            folder,
            kind="indexed",
            settings={"format": {"template": "chatml"}},
            inputs=["data/tokenizers/chatml"],
            facts={"packs": 3, **facts, **other},
        )

    def check():
        ANALYSIS.mkdir(parents=True, exist_ok=True)
        files.write_manifest(ANALYSIS, kind="analysis", settings={}, inputs=SHARDS)
        packs = [{"prefix": shard, "packs": 3} for shard in SHARDS]
        intact.check_mixed(ANALYSIS, {"sources": packs, "total_instances": 6})

    make(0)
    make(1)
    return make, check


@pytest.mark.parametrize("key", ["tokenizer", "vocabulary", "template"])
def test_a_shard_made_by_another_thing_is_refused_by_its_name(made, key):
    make, check = made
    check()
    make(1, **{key: "b" * 64})
    with pytest.raises(DataError, match=f"shard_0000. was made by another {key}, "):
        check()
    make(1)
    check()


def test_a_template_that_writes_otherwise_now_is_seen(made, monkeypatch):
    _, check = made
    monkeypatch.setitem(TEMPLATES, "chatml", TEMPLATES["mistral"])
    with pytest.raises(
        DataError, match=r"shard_00000 was made by another template, .* than data/tokenizers/chatml"
    ):
        check()


def test_digests_tell_all_templates_and_tokenizers_apart(tokenizers):
    by_template = [makers.made_by(tokenizers["solo"], name) for name in TEMPLATES]
    assert len({one["template"] for one in by_template}) == len(TEMPLATES)
    assert len({one["vocabulary"] for one in by_template}) == 1
    by_tokenizer = [makers.made_by(folder, "chatml") for folder in tokenizers.values()]
    assert len({one["vocabulary"] for one in by_tokenizer}) == len(tokenizers)
    assert len({one["template"] for one in by_tokenizer}) == 1


def test_a_mixture_that_energon_reads_is_refused_by_the_name_of_what_differs(tokenizers):
    folder = str(tokenizers["solo"])
    now = makers.made_by(Path(folder), "llava")
    mixed = {"tokenizer": folder, "format": {"template": "llava"}, "made_by": now}
    intact._check_made_by(mixed, [])
    for key in makers.KEYS:
        with pytest.raises(DataError, match=f"the mixture was made by another {key}, "):
            intact._check_made_by({**mixed, "made_by": {**now, key: "c" * 64}}, [])


def test_a_digest_is_that_of_the_canonical_json():
    value = {"b\u00e9": 1, '\x01\x1f\x7f"\\': 2, "\U0001f600": [1, None], "\uffff": "/"}
    assert makers.digest(value) == hashlib.sha256(files.canonical(value).encode()).hexdigest()
