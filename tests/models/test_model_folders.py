"""Random, extended, SOLO and linked models, as transformers sees them."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from folders import SIZES, tokenizer_folder

from plait import files
from plait.errors import CheckpointError, ConfigError
from plait.models.specs import Spec
from plait.models.weights import FolderTensors, check_shapes, merkle, write_safetensors

INIT = {"kind": "init", "tokenizer": "plain", **SIZES}


def loaded(folder, **kwargs):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, attn_implementation="eager", **kwargs
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


IDS = torch.tensor([[1, 70, 80, 90, 100, 35, 36, 200], [1, 3, 3, 3, 250, 9, 10, 11]])


# Random models


def test_equal_settings_make_equal_bytes_and_another_seed_does_not(make, base, tokenizers):
    again = make(INIT, tokenizers["plain"])
    other = make({**INIT, "seed": 1}, tokenizers["plain"])

    assert (again / "plait.json").read_bytes() == (base / "plait.json").read_bytes()
    assert files.check_manifest(other)["facts"] != files.check_manifest(base)["facts"]


def test_a_random_model_loads_and_has_the_shape_asked_for(base):
    model = loaded(base)

    assert type(model).__name__ == "MistralForCausalLM"
    assert model.config.num_key_value_heads == 2
    assert model.config.sliding_window is None
    assert model.config.rope_parameters["rope_theta"] == 10000.0
    assert model.dtype == torch.float32
    weight = model.model.layers[0].mlp.up_proj.weight
    assert abs(weight.std().item() - 0.1) < 0.01
    assert torch.equal(model.model.norm.weight, torch.ones(32))


def test_no_two_tensors_are_drawn_alike(base):
    tensors = [tensor for tensor in FolderTensors(base).values() if tensor.ndim == 2]
    heads = {tuple(tensor.flatten()[:4].tolist()) for tensor in tensors}

    assert len(heads) == len(tensors)


# More tokens


@pytest.mark.parametrize("policy", ["mean", "normal", "zeros"])
def test_new_rows_follow_their_policy_and_the_base_is_carried(make, base, tokenizers, policy):
    source = {"kind": "extend", "base": "b", "tokenizer": "t", "new_rows": policy}
    old, new = FolderTensors(base), FolderTensors(make(source, base, tokenizers["chat"]))

    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert torch.equal(new[name][: len(tensor)], tensor)
        grown = name in ("model.embed_tokens.weight", "lm_head.weight")
        rows = new[name][len(tensor) :]
        assert len(rows) == (2 if grown else 0)
        if grown and policy == "mean":
            assert torch.allclose(rows, tensor.mean(0).expand(2, -1), atol=1e-6)
        if grown and policy == "normal":
            assert not torch.equal(rows[0], rows[1])
            assert 0.05 < rows.std().item() < 0.15
        if grown and policy == "zeros":
            assert not rows.any()
        if grown:
            assert not any(torch.equal(row, tensor[-1]) for row in rows)


def test_seed_2_the_vocabulary_is_counted_never_written_down(make, base, tmp_path):
    from transformers import AutoTokenizer

    for more in (1, 7, 130):
        tokenizer = tokenizer_folder(tmp_path / str(more), more=more)
        folder = make({"kind": "extend", "base": "b", "tokenizer": "t"}, base, tokenizer)
        assert Spec.of(folder).vocab_size == 259 + more == len(AutoTokenizer.from_pretrained(folder))
        assert len(FolderTensors(folder)["lm_head.weight"]) == 259 + more


def test_a_tokenizer_with_fewer_tokens_than_the_base_is_refused(make, base, tokenizers, solo):
    with pytest.raises(CheckpointError, match="has 266 token rows, the tokenizer 259 tokens"):
        make({"kind": "extend", "base": "b", "tokenizer": "t"}, solo, tokenizers["plain"])


def test_the_same_tokenizer_adds_no_row(make, base, tokenizers):
    folder = make({"kind": "extend", "base": "b", "tokenizer": "t"}, base, tokenizers["plain"])

    assert merkle(FolderTensors(folder)) == merkle(FolderTensors(base))


def test_wrong_parts_are_refused(make, base, tokenizers):
    with pytest.raises(ConfigError, match="kind extend is made from 2 parts, 1 were given"):
        make({"kind": "extend", "base": "b", "tokenizer": "t"}, base)
    with pytest.raises(CheckpointError, match="has no vision tokens"):
        make({"kind": "solo", "base": "b", "tokenizer": "t"}, base, tokenizers["chat"])


# Links


def test_a_folder_is_linked_and_nothing_is_copied(make, base, tmp_path):
    (base / "pytorch_model.bin").write_bytes(b"the same again")

    folder = make({"kind": "folder", "path": str(base)})

    (base / "pytorch_model.bin").unlink()
    links = {path.name for path in folder.iterdir() if path.is_symlink()}
    assert links == {path.name for path in base.iterdir()} - {"plait.json", "tensors.json"}
    theirs, ours = files.read_manifest(base), files.check_manifest(folder)
    assert (ours["files"], ours["facts"]) == (theirs["files"], theirs["facts"])


def test_a_folder_that_is_no_model_is_refused(make, tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        make({"kind": "folder", "path": str(tmp_path / "none")})


# Tensors on disk


def test_files_of_any_size_hold_the_same_model(base, tmp_path):
    tensors = FolderTensors(base)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())

    write_safetensors(tmp_path, tensors, limit=40_000)

    parts = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert parts == [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    assert len(parts) > 2
    assert merkle(FolderTensors(tmp_path)) == merkle(tensors)
    assert torch.equal(logits(loaded(tmp_path), IDS), logits(loaded(base), IDS))


def test_a_folder_without_safetensors_or_with_a_file_missing_is_refused(base, tmp_path):
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor"):
        FolderTensors(tmp_path)
    write_safetensors(tmp_path, FolderTensors(base), limit=40_000)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002.* is missing"):
        dict(FolderTensors(tmp_path))


def test_shapes_that_differ_are_named():
    with pytest.raises(CheckpointError, match=r"x lacks b; its config promises 2 tensors"):
        check_shapes({"a": (1,)}, {"a": (1,), "b": (2,)}, "x")
    with pytest.raises(CheckpointError, match=r"x has unknown c, d, e and 2 more"):
        check_shapes(dict.fromkeys("acdefg", (1,)), {"a": (1,)}, "x")


def as_old_llama(base, folder, *, other=""):
    """A copy of a model as Llama 2 was published: a rotary buffer in every layer."""
    shutil.copytree(base, folder)
    (folder / "plait.json").unlink()
    config = {**files.read_json(folder / "config.json"), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    buffer = 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8)
    more = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq{other}": buffer.clone() for n in range(4)}
    write_safetensors(folder, {**FolderTensors(base), **more}, limit=40_000)
    (folder / "model.safetensors").unlink()
    return folder


def test_rotary_buffers_of_old_llama_files_are_left_out_and_counted(make, base, tokenizers, tmp_path, caplog):
    caplog.set_level(logging.INFO, "plait")
    old = as_old_llama(base, tmp_path / "old")

    linked = make({"kind": "folder", "path": str(old)})
    longer = make({"kind": "extend", "base": "b", "tokenizer": "t"}, linked, tokenizers["plain"])

    note = "4 rotary buffers (inv_freq) left out"
    assert [note in record.getMessage() for record in caplog.records] == [True, True]
    roots = {files.read_manifest(folder)["facts"]["merkle"] for folder in (base, linked, longer)}
    assert len(roots) == 1
    assert torch.equal(logits(loaded(longer), IDS), logits(loaded(old), IDS))


def test_no_other_tensor_may_be_left_out(make, base, tmp_path):
    old = as_old_llama(base, tmp_path / "old", other="_x")

    with pytest.raises(CheckpointError, match=r"has unknown model.layers.0.self_attn.rotary_emb.inv_freq_x"):
        make({"kind": "folder", "path": str(old)})


# SOLO


def test_the_processor_has_the_resolution_of_the_config(make, base, tokenizers):
    from transformers import AutoProcessor

    source = {"kind": "solo", "base": "b", "tokenizer": "t", "patch_size": 4, "max_resolution": 8}
    folder = make(source, base, tokenizers["vision"])

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    assert processor(images=picture(40, 20), text="")["vision_patches"].shape == (2, 48)


def test_a_models_tokenizer_is_its_tokenizers_byte_for_byte(base, solo, tokenizers):
    for folder, name in ((base, "plain"), (solo, "vision")):
        ours, theirs = (path / "tokenizer.json" for path in (folder, tokenizers[name]))
        assert ours.read_bytes() == theirs.read_bytes()


def test_text_only_logits_of_solo_equal_the_bases(base, solo):
    ours, theirs = logits(loaded(solo), IDS), logits(loaded(base), IDS)

    assert torch.equal(ours[..., :259], theirs)


def test_a_patch_is_added_to_its_tokens_embedding(solo):
    model = loaded(solo)
    ids = IDS.clone()
    patches = torch.randn(3, 48)
    indices = torch.full_like(ids, -1)
    indices[0, 2:4] = torch.tensor([2, 0])
    indices[1, 5] = 1

    found = logits(model, ids, vision_patches=patches, vision_patch_indices=indices)

    embeddings = model.model.embed_tokens(ids).detach()
    weight = FolderTensors(solo)["model.embed_vision_patch.weight"]
    for row, place, patch in ((0, 2, 2), (0, 3, 0), (1, 5, 1)):
        embeddings[row, place] += weight @ patches[patch]
    with torch.no_grad():
        expected = model(inputs_embeds=embeddings).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, logits(model, ids), atol=1e-3)


def test_the_projection_is_drawn_with_std_002(solo):
    weight = FolderTensors(solo)["model.embed_vision_patch.weight"]

    assert weight.shape == (32, 48)
    assert abs(weight.std().item() - 0.02) < 0.002


def picture(width, height, seed=0):
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def processor(solo):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(solo, trust_remote_code=True)


def generate(model, inputs, **kwargs):
    out = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **kwargs)
    return out[:, inputs["input_ids"].shape[1] :]


def test_generation_reads_the_picture_once_and_the_cache_changes_nothing(solo, processor):
    model = loaded(solo)
    inputs = processor(images=picture(11, 6), text="what is it?")
    scaled = {**inputs, "vision_patches": inputs["vision_patches"] * 50}

    cached, slow = generate(model, scaled), generate(model, scaled, use_cache=False)

    assert torch.equal(cached, slow)
    blank = {**inputs, "vision_patches": torch.zeros_like(inputs["vision_patches"])}
    assert not torch.equal(cached, generate(model, blank))


def test_a_sequence_in_a_padded_batch_generates_what_it_does_alone(solo, processor):
    model = loaded(solo)
    shown = [[picture(9, 9, 1)], [], [picture(5, 17, 2), picture(4, 4, 3)]]
    texts = ["short", "no picture, but more words", "two <image> of <image> them"]
    batch = processor(images=shown, text=texts)

    together = generate(model, batch)

    for row, (pictures, text) in enumerate(zip(shown, texts, strict=True)):
        alone = processor(images=pictures, text=text)
        assert torch.equal(generate(model, alone)[0], together[row])


def test_beams_share_the_patches_of_their_sequence(solo, processor):
    model = loaded(solo)
    batch = processor(images=[[picture(9, 9, 1)], [picture(12, 5, 2)]], text=["one", "two"])

    beams = generate(model, batch, num_beams=2, num_return_sequences=2)

    greedy = generate(model, batch)
    assert beams.shape == (4, 6)
    assert torch.equal(generate(model, batch, num_beams=1), greedy)
    for row in range(2):
        one = processor(
            images=[picture(9, 9, 1)] if row == 0 else [picture(12, 5, 2)], text=["one", "two"][row]
        )
        assert torch.equal(generate(model, one, num_beams=2), beams[2 * row : 2 * row + 1])


def test_vision_tokens_are_never_generated(solo, processor):
    model = loaded(solo)
    vision = sorted(model.config.vision_token_ids.values())
    with torch.no_grad():
        model.lm_head.weight[vision] = 100 * model.lm_head.weight[vision].sign()
    inputs = processor(text="anything")

    assert model.generation_config.suppress_tokens == vision
    assert not set(generate(model, inputs).flatten().tolist()) & set(vision)


def test_patches_without_their_places_are_refused(solo):
    with pytest.raises(ValueError, match="need vision_patch_indices"):
        loaded(solo)(input_ids=IDS, vision_patches=torch.zeros(1, 48))


# Its processor


@pytest.mark.parametrize("size", [(11, 6), (8, 8), (1, 1), (40, 3), (3, 40), (1300, 2), (33, 70)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_patches_are_those_of_training_bit_for_bit(processor, size, mode):
    import io

    from plait.data import images

    shown = picture(*size).convert(mode)
    file = io.BytesIO()
    shown.save(file, "png")

    ours, grid = processor.patches(shown)

    theirs = images.patches(file.getvalue(), patch_size=4, max_resolution=1024)
    assert grid == images.patch_grid(*size, patch_size=4, max_resolution=1024)
    assert np.array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("template", ["pretrain", "chatml"])
def test_ids_are_those_of_training(processor, tokenizers, template):
    import io
    import json

    from plait.data.chat import parse
    from plait.data.images import url_json
    from plait.tokens.render import Renderer
    from plait.tokens.templates import chat_template

    shown = [picture(11, 6, 1), picture(4, 9, 2)]
    parts = [" before ", shown[0], "between <s> them", shown[1], "after"]
    content = []
    for part in parts:
        file = io.BytesIO()
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            part.save(file, "png")
            content.append({"type": "image_url", "image_url": {"url": json.loads(url_json(file.getvalue()))}})
    messages = [{"role": "user", "content": content}]
    renderer = Renderer(tokenizers["vision"], {"template": template, "patch_size": 4, "max_resolution": 1024})
    sample = parse(json.dumps({"id": "x", "messages": messages}))
    (document,) = renderer.documents([renderer.pieces(sample)])

    if template == "pretrain":
        text = "".join(part if isinstance(part, str) else "<image>" for part in parts)
    else:
        processor.tokenizer.chat_template = chat_template(template)
        text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    inputs = processor(images=shown, text=text)

    assert inputs["input_ids"][0].tolist() == document.text.tolist()
    assert inputs["vision_patch_indices"][0].tolist() == document.patch_indices.tolist()


def test_marks_and_pictures_must_agree(processor):
    with pytest.raises(ValueError, match="1 marks <image> and 2 pictures"):
        processor(images=[picture(4, 4), picture(4, 4)], text="one <image>")
    with pytest.raises(ValueError, match="2 texts and pictures for 1"):
        processor(images=[[picture(4, 4)]], text=["a", "b"])
    with pytest.raises(ValueError, match="holds <vpatch> itself"):
        processor(text="a <vpatch> b")


def test_the_layout_of_a_picture_is_solos(processor):
    inputs = processor(images=picture(8, 12), text="x", bos=True)

    names = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    row = ["<vpatch>", "<vpatch>"]
    assert names == ["<s>", "<vision>", *row, "<vrow_sep>", *row, "<vrow_sep>", *row, "</vision>", "x"]
    assert inputs["vision_patch_indices"][0].tolist() == [-1, -1, 0, 1, -1, 2, 3, -1, 4, 5, -1, -1]
    assert inputs["vision_patches"].shape == (6, 48)
