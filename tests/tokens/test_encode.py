"""Ids of gigatoken are those of tokenizers and transformers, and so is each text's first within a whole."""

import json
import logging
import shutil
import sys
from functools import cache
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from folders import tokenizer_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import tekken
from tokenizers import Tokenizer, normalizers
from transformers import AutoTokenizer

from plait import files
from plait.tokens import encode

KINDS = ("base", "solo", "chatml", "bytes")
ALL = (*KINDS, "tekken")
MILLION = 1_000_000
MARKS = [
    "<s>",
    "</s>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<vision>",
    "<vpatch>",
    "<loc_1>",
    "<s",
    "[INST]",
]
NEAR = [
    " ",
    "  ",
    "\n",
    "\t",
    "\u2581",
    "\u00a0",
    "\u200d",
    "<0x0A>",
    "a",
    "The ",
    " of",
    "é",
    "e\u0301",
    "日本",
    "\U0001f600",
]
TEXTS = st.lists(st.one_of(st.sampled_from(MARKS + NEAR), st.text(max_size=12)), max_size=8).map("".join)


@pytest.fixture(scope="module")
def folders(tokenizers, tmp_path_factory):
    """A tokenizer of each kind: SentencePiece's, one of bytes without merges, and byte-level BPE."""
    root = tmp_path_factory.mktemp("t")
    return {
        **tokenizers,
        "bytes": tokenizer_folder(root / "bytes", vision=True),
        "tekken": tekken(root / "tekken"),
    }


@pytest.fixture(scope="module")
def both(folders):
    """The fast and the slow encoder of a tokenizer."""

    @cache
    def made(kind, specials):
        found = encode.chosen(folders[kind], [], specials=specials)
        assert isinstance(found, encode.Fast)
        return found, encode.Slow(folders[kind], specials=specials)

    return made


def same(first, second):
    return np.array_equal(first[0], second[0]) and first[0].dtype == second[0].dtype and first[1] == second[1]


@pytest.mark.parametrize("specials", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@given(documents=st.lists(st.lists(TEXTS, min_size=1, max_size=5), min_size=1, max_size=10))
@settings(max_examples=60)
def test_any_texts_have_the_ids_and_the_places_of_the_slow_one(both, kind, specials, documents):
    fast, slow = both(kind, specials)
    for first, second in zip(fast.whole(documents), slow.whole(documents), strict=True):
        assert same(first, second)
    for texts in documents:
        for first, second in zip(fast.apart(texts), slow.apart(texts), strict=True):
            assert np.array_equal(first, second)


RANGES = (
    (0, 0x20), (0x20, 0x7F), (0x7F, 0x250), (0x250, 0x3000), (0x3000, 0x10000), (0xE000, 0xF900),
    (0xFE00, 0x10000), (0x10000, 0x20000), (0x1F000, 0x1FB00), (0x20000, 0x2FFFF), (0x30000, 0x33480),
    (0xE0000, 0xE01F0), (0xF0000, 0x100000), (0x100000, 0x110000),
)  # fmt: skip
"""Characters of every plane that has any: controls, letters, emoji, tags, selectors, and for private use."""


def mixed(count, seed):
    """Strings of a few characters of all planes and of marks, in any order."""
    draw = np.random.default_rng(seed)
    low, high = np.array(RANGES)[draw.integers(len(RANGES), size=(count, 12))].transpose(2, 0, 1)
    places, sizes = draw.integers(low, high), draw.integers(1, 13, count)
    marks = draw.choice([*MARKS, *NEAR, *[""] * 50], count).tolist()
    for row, size, mark in zip(places.tolist(), sizes, marks, strict=True):
        letters = [chr(place) if not 0xD800 <= place < 0xE000 else " " for place in row[:size]]
        cut = size // 2
        yield "".join([*letters[:cut], mark, *letters[cut:]])


@pytest.mark.long
@pytest.mark.parametrize("specials", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_a_million_mixed_strings_have_the_ids_of_transformers(folders, kind, specials):
    """So many in all: other strings for each kind and either way."""
    fast = encode.chosen(folders[kind], [], specials=specials)
    assert isinstance(fast, encode.Fast)
    reference = AutoTokenizer.from_pretrained(folders[kind])
    keys = {"add_special_tokens": False, "split_special_tokens": not specials}
    which, count = 2 * ALL.index(kind) + specials, MILLION // 1000 // (2 * len(ALL))
    for seed in range(which * count, (which + 1) * count):
        texts = list(mixed(1000, seed))
        expected = reference(texts, **keys, return_attention_mask=False)["input_ids"]
        for text, first, second in zip(texts, fast.apart(texts), expected, strict=True):
            assert np.array_equal(first, second), text


AT_ONCE = 10_000
NEWEST = ["\U000323b0", "\u0c5c", "\ua7d2", "\U0001e6c0"]
NO_CASE = ["\u0295"]
SYMBOLS = ["\U0001faef", "\u20c1", "\U00010ed0"]
SOME = [*NEWEST, *NO_CASE, *SYMBOLS]
ISOLATED = {"type": "Split", "behavior": "Isolated", "invert": False}
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^RN\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[RN]*|\s*[RN]+|\s+(?!\S)|\s+".replace("RN", "\r\n"),
)
"""What DeepSeek-V3 splits texts by: it names punctuation and symbols, which the others do not."""


@pytest.fixture(scope="module")
def splitting(folders, tmp_path_factory):
    """Byte-level BPE with tekken's pattern, which names letters, marks and numbers; with DeepSeek's."""
    told = encode.read(folders["tekken"])
    *_, by_bytes = told["pre_tokenizer"]["pretokenizers"]
    splits = [{**ISOLATED, "pattern": {"Regex": one}} for one in DEEPSEEK]
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, by_bytes]}
    folder = tmp_path_factory.mktemp("deepseek")
    (folder / encode.FAST).write_bytes(msgspec.json.encode(told))
    found = {"tekken": folders["tekken"], "deepseek": folder}
    return {kind: (fast_one(one), encode.Slow(one, specials=False)) for kind, one in found.items()}


def fast_one(folder):
    found = encode.chosen(folder, [], specials=False)
    assert isinstance(found, encode.Fast)
    return found


def beside(letters):
    """Each letter where its class decides on where a text is cut."""
    return [text for one in letters for text in (f"{one}[A", f"a{one}!?", f" {one}1B", f"A{one}Ab ")]


def check_letters(both, letters):
    fast, slow = both
    texts = beside(letters)
    for text, first, second in zip(texts, fast.apart(texts), slow.apart(texts), strict=True):
        assert np.array_equal(first, second), text


@pytest.mark.parametrize("kind", ["tekken", "deepseek"])
def test_the_newest_letters_have_the_ids_of_the_slow_one(splitting, kind):
    """A pattern that asks for letters cuts them from what is beside them, or does not."""
    fast, slow = splitting[kind]
    check_letters((fast, slow), SOME)
    for one in beside(SOME):
        assert same(fast.whole([["so ", one, "."]])[0], slow.whole([["so ", one, "."]])[0])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tekken", "deepseek"])
def test_every_letter_has_the_ids_of_the_slow_one(splitting, kind):
    for start in range(0, sys.maxunicode + 1, AT_ONCE):
        places = range(start, min(start + AT_ONCE, sys.maxunicode + 1))
        check_letters(splitting[kind], [chr(one) for one in places if not 0xD800 <= one < 0xE000])


def test_only_letters_that_a_pattern_names_are_read_by_the_slow_one(splitting, monkeypatch):
    read = []
    monkeypatch.setattr(encode.Slow, "apart", lambda _, texts: read.extend(texts) or texts)
    old = ["\U0001f600", "\u4e2d", "\uffff", "\u05ff"]
    for kind, newer in {"tekken": [*NEWEST, *NO_CASE], "deepseek": [*NEWEST, *SYMBOLS]}.items():
        read.clear()
        splitting[kind][0].apart([*old, *SOME])
        assert [text for text in read if text] == newer  # an empty one comes where its vocabulary is loaded


def changed(folder, target, change):
    """A tokenizer's folder whose tokenizer.json was changed."""
    content = json.loads((folder / encode.FAST).read_text())
    change(content)
    target.mkdir()
    (target / encode.FAST).write_text(json.dumps(content))
    return target


def merges_as_lines(content):
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def a_gap(content):
    content["added_tokens"][-1]["id"] += 5


def truncated(content):
    content["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}


def other_keys(content):
    content["model"] |= {"fuse_unk": False, "dropout": 0.25, "ignore_merges": True}


def words(content):
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}


def exact(content):
    """Nothing is changed."""


CHANGES = [exact, merges_as_lines, a_gap, truncated, other_keys, words]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ALL)
def test_a_tokenizer_by_its_parts_is_the_one_that_tokenizers_reads_whole(folders, kind, change, tmp_path):
    folder = changed(folders[kind], tmp_path / "t", change)

    found = encode._loaded(folder)

    expected = Tokenizer.from_file(str(folder / encode.FAST))
    assert found.to_str() == expected.to_str()
    texts = ["".join(MARKS), "a<s> b</s>[INST] 日本 <loc_1>\n", *NEAR]
    if change is not other_keys:  # dropout is by chance
        both = ([one.ids for one in tokenizer.encode_batch(texts)] for tokenizer in (found, expected))
        assert next(both) == next(both)


def described(tokenizer, folder):
    folder.mkdir()
    tokenizer.save(str(folder / encode.FAST))
    return encode.chosen(folder, [], specials=False)


def test_a_tokenizer_with_a_normaliser_is_read_by_the_slow_one_and_that_is_said(tokenizers, tmp_path, caplog):
    tokenizer = Tokenizer.from_file(str(tokenizers["base"] / encode.FAST))
    tokenizer.normalizer = normalizers.Lowercase()
    with caplog.at_level(logging.WARNING):
        assert isinstance(described(tokenizer, tmp_path / "t"), encode.Slow)
    assert "no BPE without a normaliser" in caplog.text


def test_one_other_id_is_found_before_texts_are_read(both, tokenizers, caplog, monkeypatch):
    fast, slow = both("base", specials=True)

    class Wrong:
        """Has another id for one word."""

        def __init__(self, *_, **__):
            pass

        def whole(self, documents):
            return [
                (ids[::-1] if "zebra" in "".join(texts) else ids, starts)
                for texts, (ids, starts) in zip(documents, fast.whole(documents), strict=True)
            ]

        def apart(self, texts):
            return [ids for ids, _ in self.whole([[text] for text in texts])]

    monkeypatch.setattr(encode, "Fast", Wrong)
    texts = ["a horse", "a zebra of two words"]
    with caplog.at_level(logging.WARNING):
        found = encode.Choice(tokenizers["base"], specials=True).apart(texts)
    assert "gigatoken gives other ids for 'a zebra of two words'" in caplog.text
    assert np.array_equal(found[1], slow.apart(texts)[1])
    first = encode.Choice(tokenizers["base"], specials=True)
    assert isinstance(first._encoder([["a horse"]]), Wrong)
    assert first._encoder([["a zebra"]]) is first._encoder([])


@pytest.fixture
def compared(tokenizers, tmp_path):
    """A tokenizer as the command makes it."""
    folder = tmp_path / "compared"
    shutil.copytree(tokenizers["base"], folder)
    written(folder, encode.compared(folder))
    return folder


def written(folder, more):
    facts = files.read_manifest(folder)["facts"] | more
    files.write_manifest(folder, kind="tokenizer", settings={}, facts=facts)


def test_a_tokenizer_that_was_compared_when_it_was_made_is_not_compared_again(compared, monkeypatch):
    monkeypatch.setattr(encode, "_compared", None)
    for specials in (True, False):
        assert isinstance(encode.chosen(compared, [], specials=specials), encode.Fast)


def test_what_differed_when_it_was_made_is_read_by_tokenizers_and_told(compared, caplog):
    found = files.read_manifest(compared)["facts"][encode.COMPARED]
    differs = {"specials": "gigatoken gives other ids for 'zebra'", "plain": ""}
    written(compared, {encode.COMPARED: found | {encode.DIFFERS: differs}})
    with caplog.at_level(logging.WARNING):
        assert isinstance(encode.chosen(compared, [], specials=True), encode.Slow)
    assert "other ids for 'zebra'" in caplog.text
    assert isinstance(encode.chosen(compared, [], specials=False), encode.Fast)


@pytest.mark.parametrize("change", ["gigatoken", "tokenizers", "tokenizer.json"])
def test_another_library_or_file_is_compared_again(compared, monkeypatch, change):
    if change == encode.FAST:
        path = compared / encode.FAST
        path.write_text(json.dumps(json.loads(path.read_text())))
    else:
        found = files.read_manifest(compared)["facts"][encode.COMPARED]
        written(compared, {encode.COMPARED: found | {change: "0.0.1"}})
    made = []
    monkeypatch.setattr(encode, "_compared", lambda slow, texts: made.append(texts) or ("fast", ""))
    assert encode.found_before(compared, specials=True) is None
    assert encode.chosen(compared, [["a"]], specials=True) == "fast"
    assert made[0][-1] == ["a"]


def test_a_tokenizer_is_compared_by_strings_of_all_planes(compared, monkeypatch):
    seen = []
    monkeypatch.setattr(encode, "_compared", lambda slow, texts: seen.append(texts) or (None, "x"))
    assert encode.compared(compared)[encode.COMPARED][encode.DIFFERS] == {"specials": "x", "plain": "x"}
    letters = {letter for texts in seen[0] for text in texts for letter in text}
    assert all(any(low <= ord(one) < high for one in letters) for low, high in pairwise((0, *encode.PLANES)))
    assert len(seen[0]) > encode.MIXED


def test_samples_have_every_added_token_of_few_and_the_last_of_many(tokenizers):
    content = json.loads((tokenizers["solo"] / encode.FAST).read_text())
    names = [one["content"] for one in content["added_tokens"]]
    slow = encode.Slow(tokenizers["solo"], specials=True)
    samples = {text for texts in slow.samples() for text in texts}
    assert samples >= {*names[: encode.PROBED], names[-1]}


def test_memory_is_given_back_and_the_ids_stay(both, monkeypatch):
    made = []
    monkeypatch.setattr(encode, "MOST", 0)
    monkeypatch.setattr(encode, "MORE", -(1 << 40))
    fast, slow = both("base", specials=False)
    monkeypatch.setattr(encode.Fast, "_make", lambda self, old=encode.Fast._make: made.append(old(self)))
    monkeypatch.setattr(fast, "_most", 0)
    texts = ["so many words", "\u2581 which only one can place"]
    expected = slow.whole([texts])[0]
    slow.let_go()
    assert "_tokenizer" not in vars(slow)
    assert [same(fast.whole([texts])[0], expected) for _ in range(3)] == [True] * 3
    assert len(made) == 4, "each time, and once more when the other library has loaded"


def test_words_are_given_up_while_the_other_library_loads_its_vocabulary(both, monkeypatch):
    fast, slow = both("base", specials=False)
    texts, there = ["so many words", "\u2581 which only one can place"], []
    expected = slow.whole([texts])[0]

    def load(path, old=encode._loaded):
        there.append("_encode" in vars(fast))
        return old(path)

    fast._slow.let_go()
    assert not fast._slow.is_loaded
    monkeypatch.setattr(encode, "_loaded", load)
    assert [same(fast.whole([texts])[0], expected) for _ in range(3)] == [True] * 3
    assert there == [False]
    assert fast._slow.is_loaded


@pytest.mark.parametrize("kind", ["base", "solo", "chatml"])
def test_tokens_and_their_ids_are_those_of_tokenizers(tokenizers, kind):
    found = encode.ids_by_name(encode.read(tokenizers[kind]))
    tokenizer = Tokenizer.from_file(str(tokenizers[kind] / encode.FAST))
    assert found == tokenizer.get_vocab(with_added_tokens=True)


def test_a_vocabulary_that_is_a_list_has_its_places_as_ids():
    described = {
        "added_tokens": [{"content": "<s>", "id": 0}, {"content": "<more>", "id": 2}],
        "model": {"vocab": [["<s>", 0.0], ["a", -1.0]]},
    }
    assert encode.ids_by_name(described) == {"<s>": 0, "a": 1, "<more>": 2}
