import json
import shutil
import subprocess
import sys

import pytest
from tokenizer_folders import ADDED, PACKAGE, make

from plait import files
from plait.errors import ConfigError, DataError
from plait.tokens import tokenizer as stage

TEXTS = [
    "Hello, world!",
    "日本語の文 😀 と\n改行\tタブ",
    "红球 <|im_start|>user\nhi<|im_end|>\n",
    "<vision><vpatch><vrow_sep><vpatch></vision>a ball<loc_1><loc_1024>",
    "e\u0301 \u3000 ﬁ ▁ \x00 \u200d",
]


@pytest.mark.parametrize(("name", "size"), [("base", 32000), ("solo", 33031), ("chatml", 32002)])
def test_transformers_the_sentencepiece_model_and_tokenizer_json_agree_id_for_id(tokenizers, name, size):
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tokenizers[name])
    fast = Tokenizer.from_file(str(tokenizers[name] / "tokenizer.json"))
    pieces = SentencePieceProcessor(model_file=str(tokenizers[name] / "tokenizer.model"))

    assert len(hf) == fast.get_vocab_size() == pieces.get_piece_size() == size
    names = [pieces.id_to_piece(token) for token in range(size)]
    assert hf.convert_ids_to_tokens(list(range(size))) == names
    assert [fast.id_to_token(token) for token in range(size)] == names
    for text in TEXTS:
        assert hf(text, add_special_tokens=False).input_ids == fast.encode(text).ids


@pytest.mark.parametrize(
    ("config", "image", "pad"),
    [
        ({"image_token_index": 7, "pad_token_id": 2}, 7, 2),
        ({"image_token_id": 9}, 9, 32001),
        ({"pad_token_id": 2}, 32000, 32001),
        (None, 32000, 32001),
    ],
)
def test_the_tokenizer_of_a_llava_has_the_ids_of_its_config(tokenizers, tmp_path, config, image, pad):
    """A model of text has a pad_token_id too, which says nothing of pictures' batches."""
    own = make(tmp_path / "own", {"kind": "extend", "base": "base", "add": ["image"]}, tokenizers["base"])
    if config is not None:
        (own / "config.json").write_text(json.dumps(config))

    facts = files.read_manifest(make(tmp_path / "t", {"kind": "model", "model": "m"}, own))["facts"]

    assert (facts["image_token_id"], facts["pad_token_id"]) == (image, pad)


def test_texts_without_special_tokens_get_the_ids_of_sentencepiece(tokenizers):
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tokenizers["solo"])
    pieces = SentencePieceProcessor(model_file=str(tokenizers["base"] / "tokenizer.model"))

    for text in TEXTS[:2] + TEXTS[4:]:
        assert hf(text, add_special_tokens=False).input_ids == pieces.encode(text)


def test_added_tokens_get_the_ids_of_the_original_systems(tokenizers):
    from transformers import AutoTokenizer

    solo = AutoTokenizer.from_pretrained(tokenizers["solo"]).get_vocab()
    facts = files.read_manifest(tokenizers["solo"])["facts"]

    vision = ("<vision>", "<vpatch>", "<vrow_sep>", "<vframe_sep>", "</vision>")
    assert [solo[name] for name in vision] == [32000, 32001, 32002, 32003, 32004]
    assert (solo["<loc_1>"], solo["<loc_1024>"]) == (32005, 33028)
    assert (solo["<|im_start|>"], solo["<|im_end|>"]) == (33029, 33030)
    assert facts["vision"] == {name: solo[name] for name in vision}
    assert (facts["vocab_size"], facts["bos_id"], facts["eos_id"]) == (33031, 1, 2)
    chatml = files.read_manifest(tokenizers["chatml"])["facts"]
    assert chatml["chatml"] == {"<|im_start|>": 32000, "<|im_end|>": 32001}
    assert chatml["vision"] == {}


def test_added_tokens_are_special_and_decode_to_nothing(tokenizers):
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tokenizers["solo"])
    ids = hf("<vision><vpatch></vision>a red ball<loc_7><|im_end|>", add_special_tokens=False).input_ids

    assert hf.decode(ids, skip_special_tokens=True).strip() == "a red ball"


def test_a_token_that_is_there_is_not_added_again(tokenizers, tmp_path):
    both = {"kind": "extend", "base": "chatml", "add": ["vision", "chatml"]}

    facts = files.read_manifest(make(tmp_path / "both", both, tokenizers["chatml"]))["facts"]

    assert facts["vocab_size"] == 32007
    assert facts["chatml"] == {"<|im_start|>": 32000, "<|im_end|>": 32001}
    assert facts["vision"]["<vision>"] == 32002


def test_an_equal_rebuild_elsewhere_gives_equal_bytes_and_names_no_place(tokenizers, tmp_path):
    """In another process, with another hash seed and another folder."""
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from tokenizer_folders import *; base = make(Path(sys.argv[2]) / 'base', PACKAGE);"
        "make(Path(sys.argv[2]) / 'solo', {'kind': 'extend', 'base': 'base', 'add': ADDED['solo']}, base)"
    )
    here = str(__file__).rsplit("/", 1)[0]
    subprocess.run(
        [sys.executable, "-c", program, here, str(tmp_path)],
        check=True,
        timeout=120,
        env={"PYTHONHASHSEED": "77", "PATH": ""},
    )

    for name in ("base", "solo"):
        ours = files.read_manifest(tokenizers[name])["files"]
        assert files.read_manifest(tmp_path / name)["files"] == ours
        for file in ours:
            assert str(tokenizers[name].parent).encode() not in (tokenizers[name] / file).read_bytes()


def test_a_local_folder_is_taken_as_it_is(tokenizers, tmp_path):
    folder = tmp_path / "downloaded"
    shutil.copytree(tokenizers["chatml"], folder)
    (folder / "plait.json").unlink()

    made = make(tmp_path / "made", {"kind": "folder", "path": str(folder)})

    ours, theirs = (files.read_manifest(path)["files"] for path in (made, tokenizers["chatml"]))
    assert ours == theirs


def test_the_chat_template_follows_the_chat_tokens(tokenizers):
    assert not (tokenizers["base"] / "chat_template.jinja").exists()
    assert "<|im_start|>" in (tokenizers["chatml"] / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (PACKAGE | {"package": "no_such_package"}, "not installed"),
        (PACKAGE | {"file": "data/nothing"}, "has no file"),
        ({"kind": "folder", "path": "/nowhere"}, "neither"),
        ({"kind": "extend", "base": "base", "add": ADDED["chatml"]}, "was not given"),
    ],
)
def test_a_source_that_is_not_there_is_named(source, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        make(tmp_path / "t", source)


def test_a_sentencepiece_model_that_disagrees_is_found(tokenizers, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(tokenizers["chatml"], folder)
    shutil.copyfile(tokenizers["base"] / "tokenizer.model", folder / "tokenizer.model")

    with pytest.raises(DataError, match="32000 pieces, the tokenizer 32002"):
        stage.build(tmp_path, {"kind": "folder", "path": str(folder)})
