"""GGUF files by the library's writer, read by plait and by transformers; and files of hostile hands."""

import json
import struct

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter, quants
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from plait.config.model import load
from plait.errors import CheckpointError, ConfigError
from plait.models.build import build
from plait.models.gguf import header
from plait.models.gguf.build import in_halves
from plait.models.gguf.tables import TENSORS

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENS = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell", "ĠĠ"]
MERGES = ["h e", "l l", "he ll", "Ġ Ġ"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SIZES = {
    "vocab_size": len(TOKENS), "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}  # fmt: skip
PACKING = {"attn_q": Kind.Q8_0, "attn_k": Kind.F16, "ffn_up": Kind.Q4_1, "token_embd": Kind.Q8_0}
OURS = {theirs: own for own, theirs in TENSORS.items()}
TEXTS = ("hello hell\n\nthere", "Ünïcode 日本, don't", "2024 is 1 2", "<|im_start|>user\nhe<|im_end|>")


def random_model(*, tied):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def swapped(rows, heads):
    """Rows of a head as llama.cpp wants them: i and i + half beside each other."""
    half = rows.shape[0] // heads // 2
    order = [h * 2 * half + i + part * half for h in range(heads) for i in range(half) for part in (0, 1)]
    return rows[order]


def write(path, *, tied=True, values=(), leave=(), tensors=(), tokens=TOKENS, merges=MERGES):
    """A small SmolLM2: a model of Hugging Face's, packed as llama.cpp has it."""
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(SIZES["vocab_size"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(SIZES["rms_norm_eps"])
    writer.add_rope_freq_base(SIZES["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(SIZES["head_dim"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for key, method, value in values:
        getattr(writer, method)(key, value)
    for name, weight in random_model(tied=tied).state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        layer, part = own_name(name)
        if part not in leave:
            add(writer, layer, part, weight.numpy())
    for name, weight in tensors:
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def own_name(name):
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return "", OURS[stem]
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.", OURS[rest]


def add(writer, layer, part, weight):
    heads = {"attn_q": SIZES["num_attention_heads"], "attn_k": SIZES["num_key_value_heads"]}.get(part)
    weight = swapped(weight, heads) if heads else weight
    kind = PACKING.get(part, Kind.F32)
    writer.add_tensor(f"{layer}{part}.weight", quants.quantize(weight, kind), raw_dtype=kind)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def made(path, folder, **keys):
    folder.mkdir()
    return build(folder, {"kind": "gguf", "path": str(path), **keys}, [])


@pytest.fixture
def read_by_transformers(monkeypatch):
    """Its own loader; it asks for accelerate, which it then uses for nothing."""
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: True)

    def load(path):
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    return load


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_bit_for_bit_what_transformers_loads(tmp_path, tied, read_by_transformers):
    path = write(tmp_path / "tiny.gguf", tied=tied)
    theirs = read_by_transformers(path)
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        made(path, tmp_path / dtype, dtype=dtype)
        ours = load_file(tmp_path / dtype / "model.safetensors")
        wanted = {
            k: v.to(kind) for k, v in theirs.state_dict().items() if not (tied and k == "lm_head.weight")
        }
        assert ours.keys() == wanted.keys()
        assert all(torch.equal(ours[name], weight) for name, weight in wanted.items())
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[1, 40, 5, 77, 200, 3]])
    # Theirs has the norm's epsilon as a float32 has it, 9.99999975e-06.
    torch.testing.assert_close(again(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    # Packing loses a little of what was written, the order of rows nothing.
    source = random_model(tied=tied)(ids).logits
    assert torch.corrcoef(torch.stack([source.flatten(), again(ids).logits.flatten()]))[0, 1] > 0.97


def test_rows_left_in_llama_cpps_order_are_noticed(file, tmp_path, monkeypatch, read_by_transformers):
    monkeypatch.setattr("plait.models.gguf.build.in_halves", lambda rows, heads: rows)
    made(file, tmp_path / "wrong", dtype="fp32")
    ours, theirs = load_file(tmp_path / "wrong/model.safetensors"), read_by_transformers(file).state_dict()
    wrong = {name for name, weight in ours.items() if not torch.equal(weight, theirs[name])}
    assert {name.split(".")[-2] for name in wrong} == {"q_proj", "k_proj"}


@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 8), (9, 64)])
def test_halves_undo_pairs(heads, width):
    rows = np.arange(heads * width * 5, dtype=np.uint8).reshape(heads * width, 5)
    assert (in_halves(swapped(rows, heads), heads) == rows).all()
    assert in_halves(rows, 0) is rows


def test_the_folder_is_whole_and_the_same_each_time(file, tmp_path):
    facts = [made(file, tmp_path / name) for name in "ab"]
    assert facts[0] == facts[1]
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tensors.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["dtype"]) == (1e-5, 5e4, "bfloat16")
    assert (config["head_dim"], config["tie_word_embeddings"], config["pad_token_id"]) == (32, True, 2)


def test_the_tokenizer_writes_what_transformers_reads_of_the_file(file, tmp_path):
    made(file, tmp_path / "hf")
    ours = AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template == TEMPLATE
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == text


def test_digits_stand_alone_before_white_space_is_split(file, tmp_path):
    """As llama.cpp splits `smollm`; transformers' loader leaves the last space to the digit after it."""
    made(file, tmp_path / "hf")
    ours = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert ours.tokenize("he  20") == ["he", "ĠĠ", "2", "0"]
    assert ours.tokenize("he 20") == ["he", "Ġ", "2", "0"]


def test_the_header_is_what_the_library_reads(file):
    found, reader = header.read(file), GGUFReader(file)
    assert set(found.values) == {key for key in reader.fields if not key.startswith("GGUF.")}
    for tensor in reader.tensors:
        one = found.tensors[tensor.name]
        assert one.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (one.offset, one.kind, one.nbytes) == (
            tensor.data_offset,
            tensor.tensor_type,
            int(tensor.n_bytes),
        )


WORDS = {
    "a key": ({"values": [("llama.rope.scaling.factor", "add_float32", 8.0)]}, "llama.rope.scaling.factor"),
    "experts": ({"values": [("llama.expert_count", "add_uint32", 8)]}, "llama.expert_count"),
    "a tensor": ({"tensors": [("rope_freqs.weight", np.ones(16, np.float32))]}, "rope_freqs.weight"),
    "a missing tensor": ({"leave": ("ffn_up",)}, r"lacks model\.layers\.0\.mlp\.up_proj\.weight"),
    "a bias": ({"tensors": [("blk.0.attn_q.bias", np.ones(96, np.float32))]}, "blk.0.attn_q.bias"),
    "half a rotation": ({"values": [("llama.attention.value_length", "add_uint32", 16)]}, "length is 16"),
    "odd merges": ({"merges": ["h e", "x yz"]}, "the merge 'x yz'"),
    "one token twice": ({"tokens": [*TOKENS[:-1], "he"]}, "one twice"),
    "other blocks": ({"values": [("general.quantization_version", "add_uint32", 1)]}, "version 1 of ggml"),
    "a BOS of its own": ({"values": [("tokenizer.ggml.add_eos_token", "add_bool", True)]}, "add_eos_token"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "words"), WORDS.values(), ids=[*WORDS])
def test_what_plait_would_drop_is_refused_by_name(keys, words, tmp_path):
    path = write(tmp_path / "odd.gguf", **keys)
    with pytest.raises(CheckpointError, match=words) as caught:
        made(path, tmp_path / "hf")
    assert "odd.gguf" in str(caught.value)


def text(words):
    return struct.pack("<Q", len(words)) + words.encode()


def head(*values, tensors=(), version=3, counts=None):
    """A header by hand: values as key, code and bytes; tensors as name, axes, code of type and offset."""
    counts = counts or (len(tensors), len(values))
    content = b"GGUF" + struct.pack("<IQQ", version, *counts)
    for key, kind, value in values:
        content += text(key) + struct.pack("<I", kind) + value
    for name, axes, kind, offset in tensors:
        content += text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)
    return content + b"\0" * (-len(content) % 32)


LLAMA = ("general.architecture", 8, text("llama"))
HOSTILE = {
    "empty": (b"", "no GGUF file"),
    "another format": (b"PK\3\4 and so on", "no GGUF file"),
    "only magic": (b"GGUF", "no room"),
    "version 1": (head(version=1), "GGUF file of version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 3, big-endian"),
    "2^60 tensors": (head(counts=(1 << 60, 0)), "tensors .* no room"),
    "2^60 values": (head(counts=(0, 1 << 60)), "values .* no room"),
    "a key of 2^63 bytes": (head(counts=(0, 1))[:24] + struct.pack("<QQQ", 1 << 63, 0, 0), "no room"),
    "a list of 2^60 texts": (head(("a", 9, struct.pack("<IQ", 8, 1 << 60))), "texts of a .* no room"),
    "a list of 2^60 numbers": (head(("a", 9, struct.pack("<IQ", 10, 1 << 60))), "numbers .* no room"),
    "a list of lists": (head(("a", 9, struct.pack("<IQIQ", 9, 1, 9, 1))), "a is of type 9"),
    "a value of no type": (head(("a", 77, b"")), "a is of type 77"),
    "no UTF-8": (head(("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")), "not UTF-8"),
    "a key twice": (head(LLAMA, LLAMA), "general.architecture stands in it twice"),
    "an alignment of 7": (head(("general.alignment", 4, struct.pack("<I", 7))), "power of two"),
    "a tensor of no type": (head(LLAMA, tensors=[("t", (32,), 199, 0)]), "number 199"),
    "a tensor without axes": (head(LLAMA, tensors=[("t", (), 0, 0)]), "t has 0 axes"),
    "a tensor of 2^62 rows": (head(LLAMA, tensors=[("t", (32, 1 << 62), 8, 0)]), "t ends at byte"),
    "half a block": (head(LLAMA, tensors=[("t", (48,), 8, 0)]), "not made of Q8_0 blocks"),
    "an odd offset": (head(LLAMA, tensors=[("t", (32,), 0, 4)]) + bytes(256), "at 4 is not made"),
    "one place twice": (
        head(LLAMA, tensors=[("t", (32,), 0, 0), ("u", (32,), 0, 0)]) + bytes(512), "u begins at byte",
    ),
    "one name twice": (
        head(LLAMA, tensors=[("t", (32,), 0, 0), ("t", (32,), 0, 128)]) + bytes(512), "t stands in it twice",
    ),
    "another architecture": (head(("general.architecture", 8, text("gemma"))), "architecture 'gemma'"),
    "no sizes": (head(LLAMA), "None heads"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "words"), HOSTILE.values(), ids=[*HOSTILE])
def test_a_hostile_file_ends_in_a_sentence(content, words, tmp_path):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        made(path, tmp_path / "hf")
    assert "hostile.gguf" in str(caught.value)


def test_a_file_cut_anywhere_is_refused(file, tmp_path):
    content = file.read_bytes()
    start = min(one.offset for one in header.read(file).tensors.values())
    for end in (*range(0, start, 997), start, (start + len(content)) // 2, len(content) - 64):
        path = tmp_path / "cut.gguf"
        path.write_bytes(content[:end])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            header.read(path)


def test_a_flipped_bit_in_the_header_is_a_sentence_or_a_model(file, tmp_path):
    """Nothing else comes of one: no other error, no memory taken for what is not there."""
    content, generator = file.read_bytes(), np.random.default_rng(0)
    start = min(one.offset for one in header.read(file).tensors.values())
    path, refused = tmp_path / "flipped.gguf", 0
    for number in range(300):
        place = int(generator.integers(0, min(start, 1200 if number % 2 else start)))
        changed = bytearray(content)
        changed[place] ^= 1 << int(generator.integers(0, 8))
        path.write_bytes(changed)
        try:
            header.read(path)
        except CheckpointError:
            refused += 1
    assert refused > 30


def test_the_command_ends_with_2_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    from plait.cli.main import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.gguf").write_bytes(head(LLAMA)[:30])
    settings = json.dumps({"source": {"kind": "gguf", "path": "cut.gguf"}})
    assert main(["build", "data/models/raw_hf/x", "--settings", settings]) == 2
    assert not (tmp_path / "data/models/raw_hf/x").exists()
    assert [*tmp_path.glob("data/models/raw_hf/*")] == []


@pytest.mark.parametrize(
    "keys",
    [
        {}, {"path": "a.gguf", "package": "a==1"}, {"package": "a==1", "file": "a/b.gguf"},
        {"package": "a==1", "file": "../b.gguf", "sha256": "0" * 64},
        {"package": "--index-url=x", "file": "b.gguf", "sha256": "0" * 64},
        {"package": "a>=1", "file": "b.gguf", "sha256": "0" * 64},
        {"package": "a==1", "file": "b.zip", "sha256": "0" * 64},
    ],
)  # fmt: skip
def test_a_source_is_a_path_or_a_pinned_file_of_a_package(keys):
    with pytest.raises(ConfigError, match=r"raw_hf\.m\.gguf"):
        load({"raw_hf": {"m": {"kind": "gguf", **keys}}})
