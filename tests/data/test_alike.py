"""Equal and similar samples: what a plain comparison of all pairs finds."""

import io
import itertools
import tempfile
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from talks import STORY

from plait.data import alike, prints
from plait.data import said as told
from plait.data.alike import Alike
from plait.data.chat import Message, Picture, Sample, Text


def drawing(seed, size=64, kind="PNG", **keys):
    """A smooth picture; one seed at any size or quality looks the same."""
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(
        file, kind, **keys
    )
    return file.getvalue()


def said(text, *pictures):
    asked = (*map(Picture, pictures), Text("?"))
    return Sample((Message("user", asked), Message("assistant", (Text(text),))))


def rows(samples, ids=None):
    return prints.rows([(one, (ids or {}).get(n, f"s-{n}")) for n, one in enumerate(samples)])


def halves(found, at):
    return Alike([found[:at], found[at:]])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=40), st.integers(0, 40), st.sampled_from([1, 3, 1 << 20]))
def test_equal_fields_are_those_of_a_dictionary_however_many_passes(values, at, at_once):
    found = np.zeros(len(values), prints.ROW)
    found["id"] = values
    firsts, expected = {}, {}
    for number, value in enumerate(values):
        if value and firsts.setdefault(value, number) != number:
            expected[number] = firsts[value]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alike, "AT_ONCE", at_once)
        pairs = [
            pair for one, other in halves(found, at).equal("id") for pair in zip(other, one, strict=True)
        ]

    assert dict(pairs) == expected
    assert len(pairs) == len(expected)


def test_texts_are_similar_as_their_pieces_are():
    texts = [STORY, STORY.upper(), STORY.replace("wet", "dry"), STORY[::-1], STORY[: len(STORY) // 2], "", ""]
    found = rows(
        [said(text) if text else Sample((Message("user", (Picture(drawing(1)),)),)) for text in texts]
    )
    several = halves(found, 2)
    pairs = ((earlier, later) for earlier, later, _ in several.similar_texts())

    assert alike.later(several.equal("text"), len(found)).tolist() == [False, True, *[False] * 5]
    assert alike.later(pairs, len(found)).tolist() == [False, True, True, *[False] * 4]


def test_the_estimate_follows_the_share_of_pieces_in_common():
    words = [f"word{number} " for number in range(400)]
    for kept in (400, 380, 300, 200, 0):
        other = "".join(words[:kept] + [f"term{number} " for number in range(kept, 400)])
        one, two = ({t[n : n + 5] for n in range(len(t) - 4)} for t in ("".join(words)[:4000], other[:4000]))
        both = rows([said("".join(words)), said(other)])
        assert abs((both["pieces"][0] == both["pieces"][1]).mean() - len(one & two) / len(one | two)) < 0.2


def test_texts_have_the_same_numbers_beside_others_as_alone():
    texts = [STORY, "a", STORY[:5], "abcd", STORY[::-1], "\u4f60\u597d", "a\U0001f600" * 9]
    together = told.pieces(texts)

    assert together.tolist() == [told.pieces([text])[0].tolist() for text in texts]
    assert len(np.unique(together, axis=0)) == len(texts)
    joined = "".join(text.ljust(5, "\0") for text in texts)
    ends = np.cumsum([max(len(text), 5) for text in texts])
    pieces = {text.ljust(5, "\0")[n : n + 5] for text in texts for n in range(max(len(text) - 4, 1))}
    assert len(np.unique(told._windows(joined, ends))) == len(pieces)


@pytest.mark.parametrize("mark", [chr(n) for n in range(128)])
def test_ascii_is_compared_as_any_other_text(mark):
    texts = [f"A{mark}b C\n", f"{mark} É"]
    samples = [Sample((Message("user", (Text(text),)),)) for text in texts]
    assert [told._text(sample) for sample in samples] == [
        "".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts
    ]


def test_pictures_are_similar_after_another_size_or_quality_and_not_to_others():
    variants = [drawing(3), drawing(3, 200), drawing(3, 64, "JPEG", quality=60), drawing(3, 500, "WEBP")]
    looks = [prints.look(one) for one in variants]
    others = [prints.look(drawing(seed)) for seed in range(10, 60)]

    assert all((looks[0] ^ other).bit_count() <= alike.BITS for other in looks)
    assert all((one ^ two).bit_count() > alike.BITS for one, two in itertools.combinations(others, 2))
    assert prints.look(b"no picture") == 0
    sets = [
        rows([said("a", *variants[:2]), said("b", variants[0])]),
        rows([said("c", variants[2], drawing(9))]),
    ]
    assert alike.picture_repeats(sets) == (1, 2)


def test_a_sample_is_similar_where_both_text_and_pictures_are():
    samples = [
        said(STORY, drawing(3)),
        said(STORY, drawing(4)),
        said(STORY.replace("wet", "dry"), drawing(3, 100)),
        said(STORY, drawing(3), drawing(3)),
        said("Another story.", drawing(3)),
        said(STORY, drawing(3)),
    ]
    found = rows(samples)
    assert alike.later(halves(found, 1).equal("sample"), 6).tolist() == [*[False] * 5, True]
    assert alike.later(halves(found, 1).similar(), 6).tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_it_is_the_same_in_however_many_parts(at_once, monkeypatch):
    draw = np.random.default_rng(at_once)
    found = np.zeros(300, prints.ROW)
    found["text"] = draw.integers(0, 200, 300)
    found["pieces"] = draw.integers(0, 9, (20, 64))[draw.integers(0, 20, 300)]
    changed = draw.random((300, 64)) < 0.1
    found["pieces"][changed] = draw.integers(0, 9, int(changed.sum()))
    found["picture"] = draw.integers(0, 500, (300, 4))
    found["look"] = draw.integers(0, 1 << 63, 40, np.uint64)[draw.integers(0, 40, (300, 4))] ^ (
        np.uint64(1) << draw.integers(0, 64, (300, 4), np.uint64)
    )

    def told():
        several = halves(found, 120)
        pairs = [(several.similar_texts, 2), (several.similar, 2)]
        similar = [{*zip(*map(np.ndarray.tolist, p[:n]), strict=True)} for f, n in pairs for p in f()]
        return set().union(*similar), alike.picture_repeats([found[:120], found[120:]])

    whole = told()
    monkeypatch.setattr(alike, "AT_ONCE", at_once)
    assert told() == whole
    assert len(whole[0]) > 100
    assert min(whole[1]) > 100


def test_a_full_disk_of_temporary_files_is_named_where_keys_are_kept(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", partial(Path("/dev/full").open, "wb"))
    with pytest.raises(OSError, match="No space left") as caught:
        alike.picture_repeats([rows([said("a", drawing(1))])])
    assert caught.value.filename == tempfile.gettempdir()


@pytest.mark.parametrize("held", [1, 2, 3])
def test_what_was_seen_is_told_with_its_first_place(held, monkeypatch):
    monkeypatch.setattr(prints, "HELD", held)
    with prints.Seen() as seen:
        found = [seen.before(key.encode(), str(place)) for place, key in enumerate("abacbda")]
    assert found == [None, None, "0", None, "1", None, "0"]


def test_a_digest_is_of_roles_contents_and_their_order():
    samples = [
        said("a"),
        said("b"),
        said("a", b"p"),
        Sample((Message("user", (Text("?a"),)),)),
        Sample(said("a").messages[::-1]),
    ]
    assert len({told.digest(one) for one in samples}) == len(samples)
    assert told.digest(said("a")) == told.digest(Sample(said("a").messages, "another id"))
