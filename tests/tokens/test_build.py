import base64
import gzip
import io
import json
import shutil
import tempfile
from itertools import accumulate, chain, groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from plait import files
from plait.data.images import patches
from plait.errors import DataError
from plait.tokens import build, laid
from plait.tokens import pack as packs
from plait.tokens.analysis import document_bounds
from plait.tokens.documents import Batch, Document, Documents, Picture
from plait.tokens.indexed import PackedShard
from plait.tokens.lineage import Lineage
from plait.tokens.render import Renderer
from plait.tokens.roles import ASSISTANT, CODES, IMAGE, PACK_SEP

FORM = {
    "tokenizer": "solo",
    "template": "pretrain",
    "packing": "best_fit",
    "overlong": "split",
    "pictures": "encoded",
    "patch_size": 32,
    "max_resolution": 1024,
    "reject_limit": 0.5,
    "no_loss": "reject",
}


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


def part(content):
    if isinstance(content, str):
        return {"type": "text", "text": content}
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def turn(role, *contents):
    return {"role": role, "content": [part(content) for content in contents]}


def chats(path, *conversations):
    with gzip.open(path, "wt") as file:
        for number, messages in enumerate(conversations):
            file.write(json.dumps({"id": f"s{number}", "messages": list(messages)}) + "\n")
    return path


def index(folder, tokenizer, shards, limit=128, **form):
    folder.mkdir()
    facts = build.build(folder, tokenizer, shards, FORM | form, limit)
    files.write_manifest(folder, kind="indexed", settings={}, inputs=shards, facts=facts)
    return PackedShard(folder)


CAPTIONED = [
    (turn("assistant", picture(64, 64, seed), text),)
    for seed, text in enumerate(["a red ball", "赤い玉", "红球😀", "a literal <vpatch> token"])
]


def test_a_caption_becomes_a_picture_and_its_words(tokenizers, tmp_path):
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(tokenizers["base"] / "tokenizer.model"))
    shard = index(tmp_path / "i", tokenizers["solo"], [chats(tmp_path / "c.gz", CAPTIONED[3])])
    pack = shard.pack(0)
    words = pieces.encode("a literal <vpatch> token")

    assert len(shard) == 1
    assert pack.text.tolist() == [32000, 32001, 32001, 32002, 32001, 32001, 32004, *words]
    assert pack.role.tolist() == [2, 3, 3, 2, 3, 3, 2, *[2] * len(words)]
    assert pack.patch_indices.tolist() == [-1, 0, 1, -1, 2, 3, -1, *[-1] * len(words)]
    assert pack.pictures == [picture(64, 64, 3)]
    assert pack.patches is None
    assert shard.rows() == [
        {"n_tokens": len(pack.text), "n_image_tokens": 4, "n_images": 1, "n_loss_tokens": len(words)}
    ]


@pytest.mark.parametrize(
    ("width", "height", "rows", "columns", "tokens"),
    [
        (640, 480, 15, 20, 316),
        (500, 333, 11, 16, 188),
        (1920, 1080, 18, 32, 595),
        (333, 500, 16, 11, 193),
        (1, 1, 1, 1, 3),
        (33, 33, 2, 2, 7),
        (1024, 1024, 32, 32, 1057),
        (300, 10, 1, 10, 12),
        (4000, 3, 1, 32, 34),
    ],
)
@pytest.mark.parametrize("template", ["pretrain", "chatml"])
def test_pictures_have_as_many_tokens_as_in_solo(tokenizers, width, height, rows, columns, tokens, template):
    from plait.data.chat import Message, Sample, Text
    from plait.data.chat import Picture as Encoded

    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    sample = Sample((Message("assistant", (Encoded(out.getvalue()), Text("a"))),))
    renderer = Renderer(tokenizers["solo"], FORM | {"template": template})
    found = renderer.documents([renderer.pieces(sample)])[0]
    start, end = (found.text.tolist().index(token) for token in (32000, 32004))

    assert end - start + 1 == tokens
    assert (found.role == IMAGE).sum() == rows * columns
    assert (found.text == 32002).sum() == rows - 1
    assert found.patch_indices[found.role == IMAGE].tolist() == list(range(rows * columns))
    assert (found.patch_indices[found.role != IMAGE] == -1).all()


def test_chatml_with_pictures_gives_the_ids_of_the_rendered_text(tokenizers):
    """As a processor does it: render, put each picture's tokens in its place, tokenise."""
    from transformers import AutoTokenizer

    from plait.data.chat import parse
    from plait.tokens.vocabulary import PICTURE, picture_text

    hf = AutoTokenizer.from_pretrained(tokenizers["solo"])
    messages = [
        turn("user", "What is in", picture(64, 32), picture(32, 96, 1), " these? <vpatch>"),
        turn("assistant", "赤い玉。"),
    ]
    text = hf.apply_chat_template(messages, tokenize=False)
    for grid in ((1, 2), (3, 1)):
        text = text.replace(PICTURE, picture_text(*grid), 1)
    renderer = Renderer(tokenizers["solo"], FORM | {"template": "chatml"})
    found = renderer.documents([renderer.pieces(parse(json.dumps(messages)))])[0]

    assert found.text.tolist() == hf(text, add_special_tokens=False).input_ids
    assert found.patch_indices[found.role == IMAGE].tolist() == [0, 1, 2, 3, 4]
    assert [p.patches for p in found.pictures] == [2, 3]
    lookalike = np.flatnonzero((found.text == 32001) & (found.role != IMAGE))
    assert len(lookalike) == 1
    assert found.patch_indices[lookalike] == -1


@pytest.mark.parametrize("packing", ["best_fit", "next_fit", "sorted_next_fit"])
def test_packs_hold_every_document_once_with_its_own_pictures(tokenizers, tmp_path, packing):
    source = chats(tmp_path / "c.gz", *CAPTIONED * 5)
    apart = index(tmp_path / "apart", tokenizers["solo"], [source], limit=16, packing="next_fit")
    shard = index(tmp_path / "packed", tokenizers["solo"], [source], limit=64, packing=packing)
    found = []

    for pack, row in zip(shard, shard.rows(), strict=True):
        assert len(pack.text) == row["n_tokens"] <= 64
        breaks = np.flatnonzero(pack.role == PACK_SEP)
        assert (pack.text[breaks] == 1).all()
        assert (pack.patch_indices[breaks] == -1).all()
        assert np.array_equal(pack.patch_indices >= 0, pack.role == IMAGE)
        values = np.concatenate([patches(encoded) for encoded in pack.pictures])
        for document in np.split(np.arange(len(pack.text)), breaks):
            own = document[pack.role[document] != PACK_SEP]
            used = pack.patch_indices[own]
            found.append((pack.text[own].tolist(), values[used[used >= 0]].tobytes()))

    expected = [(p.text.tolist(), patches(p.pictures[0]).tobytes()) for p in apart]
    assert sorted(found) == sorted(expected)
    assert shard.facts["documents"] == 20
    assert shard.facts["packs"] == len(shard) >= shard.facts["lower_bound"]
    assert shard.facts["tokens"] == sum(len(pack.text) for pack in shard)


def test_windows_of_records_are_packed_as_if_each_were_a_shard(tokenizers, tmp_path, monkeypatch):
    long = (turn("assistant", "word " * 100),)
    unheard = (turn("user", "nobody answers"),)
    talks = [*CAPTIONED * 3, unheard, long, *CAPTIONED * 2]

    def packed(name, some):
        source = chats(tmp_path / f"{name}.gz", *some)
        form = {"template": "chatml", "reject_limit": 1.0, "overlong": "drop"}
        return index(tmp_path / name, tokenizers["solo"], [source], limit=64, **form)

    monkeypatch.setattr(build, "BATCH", 2)
    monkeypatch.setattr(build, "WINDOW", 3)
    whole = packed("whole", talks)
    monkeypatch.undo()
    parts = [packed(f"p{first}", talks[first : first + 6]) for first in range(0, len(talks), 6)]

    assert len(parts) == 4
    assert [pack.text.tolist() for pack in whole] == [pack.text.tolist() for one in parts for pack in one]
    assert [pack.role.tolist() for pack in whole] == [pack.role.tolist() for one in parts for pack in one]
    assert [pack.pictures for pack in whole] == [pack.pictures for one in parts for pack in one]
    assert [*whole.rows()] == [row for one in parts for row in one.rows()]
    lines = [origin.line for pack in range(len(whole)) for origin in Lineage(whole.folder)[pack]]
    assert sorted(lines) == [n for n in range(1, len(talks) + 1) if n not in (13, 14)]
    for key in ("packs", "tokens", "documents", "dropped", "dropped_tokens", "read", "loss_tokens", "images"):
        assert whole.facts[key] == sum(one.facts[key] for one in parts), key
    together = packed("together", talks)
    same = ("documents", "lower_bound", "rejected", "dropped", "own_separators", "read")
    assert {key: whole.facts[key] for key in same} == {key: together.facts[key] for key in same}
    assert (whole.facts["dropped"], whole.facts["rejected"]) == (1, {"no_loss": 1})
    assert whole.facts["fill"] == round(whole.facts["tokens"] / (64 * len(whole)), 6)


def test_raw_patches_are_those_of_the_encoded_pictures(tokenizers, tmp_path):
    wordy = (turn("assistant", "only words"),)
    source = chats(tmp_path / "c.gz", CAPTIONED[0], wordy, CAPTIONED[1])
    encoded = index(tmp_path / "e", tokenizers["solo"], [source], limit=16, packing="next_fit")
    raw = index(
        tmp_path / "r", tokenizers["solo"], [source], limit=16, packing="next_fit", pictures="patches"
    )

    assert not (tmp_path / "r" / "data-image.bin").exists()
    for ours, theirs in zip(raw, encoded, strict=True):
        expected = [patches(picture).astype(np.float16) for picture in theirs.pictures]
        assert ours.pictures == []
        assert ours.patches.dtype == np.float16
        assert np.array_equal(ours.patches, np.concatenate([np.empty((0, 3072), np.float16), *expected]))


def test_the_files_open_with_megatron_core(tokenizers, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    wordy = (turn("assistant", "words, and no picture at all, for once"),)
    shard = index(tmp_path / "i", tokenizers["solo"], [chats(tmp_path / "c.gz", *CAPTIONED, wordy)], limit=24)
    text, role, indices, images = (
        IndexedDataset(str(tmp_path / "i" / f"data-{name}"))
        for name in ("text", "role", "vision_patch_indices", "image")
    )

    assert len(text) == len(role) == len(indices) == len(shard)
    for number, pack in enumerate(shard):
        assert text[number].tolist() == pack.text.tolist()
        assert role[number].tolist() == pack.role.tolist()
        assert indices[number].tolist() == pack.patch_indices.tolist()
        start, end = images.document_indices[number : number + 2]
        assert [images[item].tobytes() for item in range(start, end)] == pack.pictures
    assert images.document_indices[-1] == len(images) == 4


def test_a_shard_without_any_picture_is_read(tokenizers, tmp_path):
    wordy = (turn("assistant", "only words"),)
    shard = index(tmp_path / "i", tokenizers["solo"], [chats(tmp_path / "c.gz", wordy)])

    assert (tmp_path / "i" / "data-image.bin").stat().st_size == 0
    assert shard.pack(0).pictures == []


def test_sources_are_packed_jointly(tokenizers, tmp_path):
    first = chats(tmp_path / "a.gz", *CAPTIONED[:2])
    second = chats(tmp_path / "b.gz", *CAPTIONED[2:])

    shard = index(tmp_path / "i", tokenizers["solo"], [first, second])

    assert shard.facts["documents"] == 4
    assert len(shard) == 1


def test_records_without_a_loss_token_are_rejected_or_kept_and_counted(tokenizers, tmp_path):
    """A run may train what users say (`loss_roles`)."""
    source = chats(
        tmp_path / "c.gz", (turn("user", "nobody answers"),), (turn("user", "x"), turn("assistant", "y"))
    )
    form = {"template": "mistral", "packing": "next_fit"}
    rejecting = index(tmp_path / "r", tokenizers["chatml"], [source], **form)
    shard = index(tmp_path / "i", tokenizers["chatml"], [source], **form, no_loss="count")

    assert rejecting.facts["rejected"] == {"no_loss": 1}
    assert (rejecting.facts["documents"], rejecting.facts["without_loss"]) == (1, 0)
    assert shard.facts["rejected"] == {}
    assert (shard.facts["read"], shard.facts["documents"], shard.facts["without_loss"]) == (2, 2, 1)
    assert sum(row["n_loss_tokens"] for row in shard.rows()) == shard.facts["loss_tokens"] == 2


def test_refused_records_are_written_down_with_their_place_and_counted(tokenizers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = chats(
        tmp_path / "c.gz",
        (turn("user", "x"), turn("assistant", "y")),
        (turn("user", "x"), turn("assistant", "y"), turn("system", "z")),
    )
    shard = index(tmp_path / "i", tokenizers["chatml"], [source], template="mistral")
    rejects = [json.loads(line) for line in (tmp_path / "i" / "rejects.jsonl").read_text().splitlines()]

    assert shard.facts["rejected"] == {"system_without_user": 1}
    assert (shard.facts["read"], shard.facts["documents"]) == (2, 1)
    assert files.read_json(tmp_path / "i" / "data_stats.json") == shard.facts
    assert rejects == [
        {
            "file": "c.gz",
            "line": 2,
            "id": "s1",
            "reason": "system_without_user",
            "message": "a system turn is not followed by a user's",
        }
    ]


def test_more_rejects_than_the_limit_of_the_format_fail_the_shard(tokenizers, tmp_path):
    good, bad = (turn("user", "x"), turn("assistant", "y")), (turn("user", "x"), turn("system", "z"))
    source = chats(tmp_path / "c.gz", good, good, good, bad)
    index(tmp_path / "at", tokenizers["chatml"], [source], template="mistral", reject_limit=0.25)

    words = r"1 of 4 records of .*c\.gz are rejected \(1 system_without_user\); at most 24\.00%.* line 4: "
    with pytest.raises(DataError, match=words):
        index(tmp_path / "over", tokenizers["chatml"], [source], template="mistral", reject_limit=0.24)


def test_a_picture_alone_teaches_nothing(tokenizers, tmp_path):
    source = chats(tmp_path / "c.gz", (turn("assistant", picture(64, 64)),), CAPTIONED[0])

    assert index(tmp_path / "i", tokenizers["solo"], [source]).facts["rejected"] == {"no_text": 1}


@pytest.mark.parametrize(
    ("template", "put"), [("mistral", 0), ("llama2", 0), ("chatml", 1), ("tokenizer", 0)]
)
@pytest.mark.parametrize("packing", ["best_fit", "next_fit"])
def test_every_document_of_a_pack_has_the_ids_of_the_template_and_one_bos(
    tokenizers, tmp_path, template, put, packing
):
    from transformers import AutoTokenizer

    from plait.tokens.templates import chat_template

    folder = tmp_path / "t"
    shutil.copytree(tokenizers["chatml"], folder)
    markup = chat_template("mistral" if template == "tokenizer" else template)
    (folder / "chat_template.jinja").write_text(markup)
    hf = AutoTokenizer.from_pretrained(folder)
    told = [[("user", f"question {n}" * (n + 1)), ("assistant", f"answer {n}")] for n in range(9)]
    source = chats(tmp_path / "c.gz", *([turn(*said) for said in turns] for turns in told))
    shard = index(tmp_path / "i", folder, [source], template=template, packing=packing, limit=90)
    found = []
    for pack in shard:
        for number, place in enumerate(
            np.split(np.arange(len(pack.text)), np.flatnonzero(pack.role == 1000))
        ):
            found.append(pack.text[place[put * bool(number) :]].tolist())
            if number:
                assert pack.text[place[0]] == 1
                assert (pack.text[place] == 1).sum() == 1

    expected = [
        hf.apply_chat_template([{"role": r, "content": t} for r, t in turns], return_dict=False)
        for turns in told
    ]
    assert sorted(found) == sorted(expected)
    assert 1 < len(shard) < 9
    assert shard.facts["tokens"] == sum(map(len, expected)) + put * (9 - len(shard))
    assert shard.facts["own_separators"] == (not put)


def test_parts_of_split_documents_get_a_separator_where_they_have_none(tokenizers, tmp_path):
    long = (turn("user", "x"), turn("assistant", "word " * 50))
    source = chats(tmp_path / "c.gz", long, *[(turn("user", "x"), turn("assistant", "y"))] * 4)
    shard = index(tmp_path / "i", tokenizers["chatml"], [source], template="mistral", limit=40)

    assert shard.facts["split"] == 1
    for pack in shard:
        assert len(pack.text) <= 40
        assert (pack.text[pack.role == PACK_SEP] == 1).all()
        assert not ((pack.text[1:] == 1) & (pack.text[:-1] == 1)).any()
    assert sum(len(pack.text) for pack in shard) == shard.facts["tokens"]
    # documents have a separator of their own, which counts; the later part of the long one has not
    starts, ends = document_bounds(tmp_path / "i", own_separators=True)
    flat = np.concatenate([pack.text for pack in shard])
    assert (ends - starts).tolist() == Lineage(tmp_path / "i").lengths.tolist()
    assert sorted(flat[starts].tolist())[:5] == [1] * 5
    assert (flat[starts] != 1).sum() == len(starts) - 5 > 0


def test_long_documents_are_dropped_or_split_and_counted(tokenizers, tmp_path):
    long = (turn("user", "x"), turn("assistant", "word " * 100))
    source = chats(tmp_path / "c.gz", long, (turn("assistant", "short"),))
    dropped = index(tmp_path / "d", tokenizers["chatml"], [source], limit=40, overlong="drop").facts
    split = index(tmp_path / "s", tokenizers["chatml"], [source], limit=40, overlong="split")

    assert (dropped["dropped"], dropped["split"], dropped["documents"]) == (1, 0, 1)
    assert (split.facts["dropped"], split.facts["split"], split.facts["documents"]) == (0, 1, 2)
    separators = sum((pack.role == PACK_SEP).sum() for pack in split)
    assert split.facts["tokens"] - separators == dropped["tokens"] + dropped["dropped_tokens"]
    assert max(len(pack.text) for pack in split) == 40


def test_nothing_left_to_pack_is_an_error_with_the_reasons(tokenizers, tmp_path):
    source = chats(tmp_path / "c.gz", (turn("user", "x"), turn("system", "y")))

    with pytest.raises(DataError, match=r"no document is left.*'system_without_user': 1"):
        index(tmp_path / "i", tokenizers["chatml"], [source], template="mistral", reject_limit=1)


def test_a_malformed_line_is_named(tokenizers, tmp_path):
    (tmp_path / "c.jsonl").write_text(
        '{"role": "assistant", "content": "a"}\n{"role": "alien", "content": "b"}\n'
    )

    with pytest.raises(DataError, match=r"c\.jsonl line 2: .*alien"):
        index(tmp_path / "i", tokenizers["chatml"], [tmp_path / "c.jsonl"])


def test_an_equal_rebuild_is_equal_byte_for_byte(tokenizers, tmp_path):
    source = chats(tmp_path / "c.gz", *CAPTIONED * 3)
    for name in "ab":
        index(tmp_path / name, tokenizers["solo"], [source], limit=32)

    one, other = (files.read_manifest(tmp_path / name) for name in "ab")
    assert one["files"] == other["files"]
    assert one["facts"] == other["facts"]


# Documents


@st.composite
def documents(draw):
    """A document of runs of text and pictures; patch k of it has the token id 1000 + k."""
    text, role, indices, pictures, patch = [], [], [], [], 0
    run = st.tuples(st.integers(0, 5), st.integers(0, 9), st.sampled_from([*CODES.values()]))
    for number, (words, count, code) in enumerate(draw(st.lists(run, min_size=1))):
        text += [7] * words
        role += [code] * words + [IMAGE] * count
        indices += [-1] * words
        if count:
            text += range(1000 + patch, 1000 + patch + count)
            indices += range(patch, patch + count)
            pictures.append(Picture(bytes([number]), count))
            patch += count
    return Document(np.array(text, np.int32), np.array(role, np.uint8), np.array(indices, np.int32), pictures)


def shown(document):
    """What stands at each token: the picture it is of and the place in it, or nothing."""
    places = [(p.encoded, place) for p in document.pictures for place in range(p.patches)]
    return [places[index] if index >= 0 else None for index in document.patch_indices]


@given(documents(), st.integers(1, 12))
def test_a_part_shows_what_the_whole_shows_and_keeps_no_other_picture(whole, limit):
    seen = []
    for start in range(0, len(whole), limit):
        part = whole.part(start, min(start + limit, len(whole)))
        seen += shown(part)
        used = {place[0] for place in shown(part) if place}
        assert [p.encoded for p in part.pictures] == sorted(used)

    assert seen == shown(whole)


def apart(packs):
    """Each pack that was laid out, as a document."""
    for some in packs:
        for pictures, start, size in zip([*some.pictures], some.starts, some.sizes, strict=True):
            columns = (column[start : start + size] for column in (some.text, some.role, some.indices))
            yield Document(*columns, pictures)


def joined(pieces, separator):
    """Text, role and what is shown of a pack of these pieces, token by token."""
    for number, piece in enumerate(pieces):
        if number and piece.text[0] != separator:
            yield separator, PACK_SEP, None
        for place, one in enumerate(zip(piece.text.tolist(), piece.role.tolist(), shown(piece), strict=True)):
            own = number and not place and one[0] == separator
            yield (separator, PACK_SEP, None) if own else one


def as_batch(several):
    """Documents end to end; an empty one has a run of no token."""
    roles = [np.where(one.role == IMAGE, ASSISTANT, one.role).tolist() for one in several]
    runs = [[(code, len([*same])) for code, same in groupby(role)] or [(ASSISTANT, 0)] for role in roles]
    codes, sizes = zip(*chain(*runs), strict=True)
    return Batch(
        np.concatenate([one.text for one in several]),
        np.array(sizes, np.int32),
        np.array(codes, np.uint8),
        np.array([0, *accumulate(map(len, runs))]),
        np.concatenate([one.patch_indices for one in several])
        if any(one.pictures for one in several)
        else None,
        [one.pictures for one in several],
    )


@settings(deadline=None)
@given(
    st.lists(documents(), min_size=1, max_size=8), st.integers(1, 20), st.sampled_from([1, 7]),
    st.sampled_from([np.uint16, np.int32]), st.integers(1, 3),
)  # fmt: skip
def test_laid_out_packs_show_what_their_documents_showed_apart(several, limit, separator, dtype, many):
    with Documents(np.dtype(dtype)) as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(laid, "AT_ONCE", many * limit)
        store.extend(as_batch(several), range(len(several)))
        cuts = packs.cut(store.lengths, limit)
        begins = store.tokens_at(cuts.document, cuts.start) == separator
        packing = packs.pack(cuts.lengths, limit, "next_fit", separators=~begins)
        found = list(apart(laid.Packs(store, cuts, packing, separator)))

    for document, numbers in zip(found, packing, strict=True):
        pieces = [several[cuts.document[one]].part(cuts.start[one], cuts.end[one]) for one in numbers]
        assert document.text.dtype == dtype
        expected = list(joined(pieces, separator))
        assert list(zip(document.text, document.role, shown(document), strict=True)) == expected


def test_a_full_disk_of_temporary_files_is_named():
    one = Document(np.arange(9, dtype=np.int32), np.zeros(9, np.uint8), np.full(9, -1, np.int32), [])
    store = Documents(np.dtype(np.int32))
    store._spool.close()
    store._spool = Path("/dev/full").open("wb")  # noqa: SIM115 - closed by the store
    with pytest.raises(OSError, match="No space left") as caught, store:
        store.extend(as_batch([one]), [0])
    assert caught.value.filename == tempfile.gettempdir()


@given(st.lists(st.lists(documents(), min_size=1, max_size=4), max_size=3), st.data())
def test_stored_documents_come_back(batches, data):
    several = []
    with Documents(np.dtype(np.int32)) as store:
        for batch in batches:
            numbers = data.draw(st.lists(st.sampled_from(range(len(batch))), unique=True))
            store.extend(as_batch(batch), numbers)
            several += [batch[number] for number in numbers]

        assert store.lengths.tolist() == [len(document) for document in several]
        for number, document in enumerate(several):
            assert store[number].pictures == list(document.pictures)
            for column in ("text", "role", "patch_indices"):
                assert np.array_equal(getattr(store[number], column), getattr(document, column))
            places = np.arange(len(document))
            found = store.tokens_at(np.full(len(document), number), places)
            assert np.array_equal(found, document.text)
