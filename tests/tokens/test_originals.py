"""Packs of SOLO and CodeActAgent, built byte by byte from what their format is, read and written anew."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from plait import files, foreign, layout
from plait.cli.main import main
from plait.errors import DataError
from plait.tokens import analysis, originals, standing
from plait.tokens.indexed import IndexedReader, PackedShard

BOS, VISION, PATCH, ROW, END = 1, 32000, 32001, 32002, 32004
SEP, USER, ASSISTANT, IMAGE = 1000, 1, 2, 3
TARGET = layout.Indexed(format="f", dataset="d", seq=16, shard=0)


def pair(folder, name, code, kind, items):
    """A pair as Megatron-LLM writes it: packs one after another, and no document closed."""
    packed = [struct.pack(f"<{len(item)}{kind}", *item) for item in items]
    starts = np.cumsum([0, *map(len, packed[:-1])]).tolist()
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(items), 1)
    index += struct.pack(f"<{len(items)}i", *map(len, items)) + struct.pack(f"<{len(items)}q", *starts)
    (folder / f"{name}.bin").write_bytes(b"".join(packed))
    (folder / f"{name}.idx").write_bytes(index + struct.pack("<q", 0))


TEXT = [[VISION, PATCH, ROW, PATCH, END, 400, 401, BOS, 500, 501], [600, 601, 602]]
ROLE = [[2, 3, 2, 3, 2, 2, 2, SEP, 1, 2], [1, 2, 2]]
INDICES = [[-1, 0, -1, 1, -1, -1, -1, -1, -1, -1], [-1, -1, -1]]
PIXELS = [[0.5, -1.25] * 3072, [0.0] * 3072]
"""Two patches; and the one of zeros that a pack without pictures has."""


def solo(folder, text=TEXT, role=ROLE, indices=INDICES, pixels=PIXELS, code=10):
    folder.mkdir()
    pair(folder, "data-text", 8, "H", text)
    pair(folder, "data-role", 8, "H", role)
    pair(folder, "data-vision_patch_indices", 4, "i", indices)
    pair(folder, "data-vision_patch", code, {10: "e", 9: "f"}[code], pixels)
    counts = [{"n_tokens": len(one), "n_image_tokens": one.count(PATCH), "n_images": 0.5} for one in text]
    (folder / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in counts))
    (folder / "data_stats.json").write_text(json.dumps({"n_total_packed_doc": 2, "error_skipped": 1}))
    (folder / "data_DONE").touch()
    return folder


def codeact(folder):
    folder.mkdir()
    pair(folder, "data-text", 8, "H", [[300, 301, BOS, 302]])
    pair(folder, "data-role", 8, "H", [[1, 2, SEP, 2]])
    return folder


@pytest.fixture
def place(tokenizers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/tokenizers").mkdir(parents=True)
    for name, folder in tokenizers.items():
        Path("data/tokenizers", name).symlink_to(folder)
    return tmp_path


def repack(source, tokenizer="solo", target=TARGET):
    return main(["repack", f"data/tokenizers/{tokenizer}", str(target), "--from", str(source)])


def adopted(tokenizer="solo"):
    found = standing.packed(TARGET, Path("data/tokenizers", tokenizer))
    foreign.record(TARGET, found, {})
    return PackedShard(str(TARGET))


@pytest.mark.parametrize("code", [9, 10])
def test_four_files_of_solo_become_packs_that_are_adopted(place, code):
    source = solo(place / "theirs", code=code)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert repack(source) == 0
    shard = adopted()

    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    for number, pack in enumerate(shard):
        assert pack.text.tolist() == TEXT[number]
        assert pack.role.tolist() == ROLE[number]
        assert pack.patch_indices.tolist() == INDICES[number]
    assert shard.pack(0).patches.tolist() == np.reshape(PIXELS[0], (2, 3072)).tolist()
    assert shard.pack(1).patches.shape == (0, 3072)
    assert shard.rows() == [
        {"n_tokens": 10, "n_image_tokens": 2, "n_images": 1, "n_loss_tokens": 3},
        {"n_tokens": 3, "n_image_tokens": 0, "n_images": 0, "n_loss_tokens": 2},
    ]
    counted = analysis.measure(TARGET)
    assert counted.measures["document_tokens"].values.tolist() == [2, 3, 7]
    assert counted.counts == {"packs": 2, "documents": 3}


def test_two_files_of_codeact_open_with_megatron_core_afterwards(place):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    assert repack(codeact(place / "theirs"), "chatml") == 0
    shard = adopted("chatml")
    assert (shard.pack(0).text.tolist(), shard.pack(0).role.tolist()) == (
        [300, 301, BOS, 302],
        [1, 2, SEP, 2],
    )
    text = IndexedDataset(f"{TARGET}/data-text")
    assert text[0].tolist() == [300, 301, BOS, 302]
    assert text.document_indices[-1] == len(text) == 1


def test_its_codes_are_not_megatron_cores(place):
    source = solo(place / "theirs")
    assert IndexedReader(source / "data-vision_patch", originals.CODES)[0].dtype == np.float16
    with pytest.raises(DataError, match="dtype code 10"):
        IndexedReader(source / "data-vision_patch")


def changed(rows, number, place, value):
    rows = [list(row) for row in rows]
    rows[number][place] = value
    return rows


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ({"role": changed(ROLE, 0, 0, 7)}, "pack 0 of .* has not roles that are known"),
        ({"role": changed(ROLE, 0, 1, 2)}, "has not an index for each token of a picture, and for no other"),
        ({"indices": changed(INDICES, 0, 1, 2)}, "has not a patch for each index"),
        ({"indices": changed(INDICES, 0, 1, -2)}, "has not .*a patch for each index"),
        ({"text": changed(TEXT, 1, 0, 40000)}, "pack 1 of .* the token 40000, the tokenizer 33031 tokens"),
        ({"pixels": [PIXELS[0], [0.25] * 3072]}, "pack 1 of .* has patches that no token is of"),
        ({"pixels": [PIXELS[0][:-1], PIXELS[1]]}, "of 6143 values of float16; expected halves, 3072 a patch"),
        ({"pixels": [[1e-9] * 6144, PIXELS[1]], "code": 9}, "values of float32; expected halves"),
        ({"role": [ROLE[0], ROLE[1][:-1]]}, "data-role has not a value for each token"),
        ({"text": [[400] * 17], "role": [[2] * 17], "indices": [[-1] * 17], "pixels": [PIXELS[1]]},
         "has a pack of 17 tokens, longer than 16"),
    ],
)  # fmt: skip
def test_files_that_contradict_one_another_are_refused(place, capsys, fault, sentence):
    assert repack(solo(place / "theirs", **fault)) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not Path(str(TARGET)).exists()


def test_a_file_that_is_cut_short_or_missing_is_named(place, capsys):
    source = solo(place / "theirs")
    patches = source / "data-vision_patch.bin"
    patches.write_bytes(patches.read_bytes()[:-2])
    assert repack(source) == 2
    assert "data-vision_patch.bin has 18430 bytes, its index says 18432" in capsys.readouterr().err
    (source / "data-vision_patch.idx").unlink()
    assert repack(source) == 2
    assert "has one of data-vision_patch_indices and data-vision_patch" in capsys.readouterr().err
    assert files.made_by_plait(Path(str(TARGET)))
