"""A folder with a small model and data of a run's kind, such as its own stages would leave them."""

import io
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from plait import files, layout
from plait.config import Plan
from plait.config.model import Energon
from plait.convert import folders
from plait.data import energon
from plait.data.chat import Message, Picture, Sample, Text
from plait.models.common import drawn
from plait.models.llava import DTYPES, cast
from plait.models.specs import Spec
from plait.models.tower import PREPROCESSOR, preprocessor_for
from plait.models.weights import config_text, write_safetensors
from plait.parallel.grid import Grid
from plait.preflight.inputs import stands
from plait.preflight.small import Small
from plait.tokens import indexed, roles, tokenizer
from plait.tokens.indexed import Pack, PackedShard
from plait.tokens.vocabulary import IMAGE, PADDING
from plait.train.job import Job

Facts = dict[str, Any]
NAME = "small"
"""Of the model, the data and the run."""
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
PACKS, SAMPLES, SHARD = 16, 40, 4
SEED = 0
STD = 0.02


def write(root: Path, small: Small, plan: Plan, job: Job) -> tuple[Job, str]:
    """Write everything that the small run's job reads.

    Args:
        root: an empty folder.
        small: the small run.
        plan: where the real run's data are looked for.
        job: the real run's first job.

    Returns:
        The small run's first job, whose paths are relative to the folder, and what its data are.
    """
    run, data = layout.Run(run=NAME), root / "data"
    facts = _tokenizer(root / str(layout.Tokenizer(tokenizer=NAME)))
    grid = _grid(small)
    start = layout.Sharded(model=NAME, tp=grid.tp, pp=grid.pp)
    model = _model(root, small, grid, start, facts)
    analysis = layout.Analysis(mixture=NAME)
    (root / str(analysis)).mkdir(parents=True)
    if model.vision is None:
        told = _packed(root, small, plan, job, model, facts)
    else:
        told = _pictured(root, small, plan, job, model)
    files.write_manifest(root / str(analysis), kind="analysis", settings={})
    (data / "ckpts" / NAME).mkdir(parents=True)
    files.write_json(root / run.schedule, {"train_iters": small.train_iters, "save_interval": 1})
    target = layout.Iteration(run=NAME, iteration=1)
    settings = {**small.settings, "model": NAME, "mixture": NAME}
    return Job(str(start), str(analysis), run.schedule, str(target), settings, small.around), told


def _grid(small: Small) -> Grid:
    return Job("", "", "", "", small.settings).grid


# The model


def _tokenizer(folder: Path) -> Facts:
    """One token a byte, and those of a picture and of padding; the facts of its manifest."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [UNKNOWN, BEGIN, END, *letters]
    inner = Tokenizer(
        models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[], unk_token=UNKNOWN)
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN, pad_token=PADDING
    )
    found.add_tokens([AddedToken(name, special=True, normalized=False) for name in (IMAGE, PADDING)])
    folder.mkdir(parents=True)
    tokenizer.save(found, folder)
    facts = {
        "vocab_size": len(found),
        "bos_id": names.index(BEGIN),
        "eos_id": names.index(END),
        "vision": {},
        "image_token_id": found.convert_tokens_to_ids(IMAGE),
        "pad_token_id": found.convert_tokens_to_ids(PADDING),
    }
    files.write_manifest(folder, kind="tokenizer", settings={}, facts=facts)
    return facts


def _model(root: Path, small: Small, grid: Grid, start: layout.Sharded, facts: Facts) -> Spec:
    """Draw the model, convert it and cut it for the small run's grid."""
    hf = root / str(layout.HfModel(model=NAME))
    hf.mkdir(parents=True)
    config = _with_tokens(small.model, facts)
    (hf / "config.json").write_text(config_text(config), encoding="utf-8")
    spec = Spec.from_config(config)
    if spec.vision is not None:
        prepared = preprocessor_for(spec.vision.kind, spec.vision.image_size)
        (hf / PREPROCESSOR).write_text(config_text(prepared), encoding="utf-8")
    fast = root / str(layout.Tokenizer(tokenizer=NAME)) / layout.FAST
    (hf / layout.FAST).write_bytes(fast.read_bytes())
    weights = drawn(spec.shapes, std=STD, seed=SEED)
    write_safetensors(hf, cast(weights, DTYPES[small.settings["params_dtype"]]))
    whole = root / str(layout.Megatron(model=NAME))
    cut = root / str(start)
    for folder in (whole, cut):
        folder.mkdir(parents=True)
    files.write_manifest(whole, kind="megatron", settings={}, facts=folders.convert(hf, whole))
    files.write_manifest(cut, kind="sharded", settings={}, facts=folders.shard(whole, cut, grid))
    return spec


def _with_tokens(model: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """A row for every token, and the ids of a picture and of padding where the model sees."""
    if "text_config" not in model:
        return {**model, "vocab_size": max(model["vocab_size"], facts["vocab_size"])}
    text = model["text_config"]
    rows = max(text.get("vocab_size", 0), facts["vocab_size"])
    ids = {"image_token_index": facts["image_token_id"], "pad_token_id": facts["pad_token_id"]}
    others = {key: value for key, value in model.items() if key != "image_token_id"}
    return {**others, **ids, "text_config": {**text, "vocab_size": rows}}


# Packed data


def _packed(root: Path, small: Small, plan: Plan, job: Job, model: Spec, facts: Facts) -> str:
    """An indexed shard: the beginning of the run's own packs, or drawn ones."""
    shard = layout.Indexed(format=NAME, dataset=NAME, seq=small.sequence, shard=0)
    form = plan.config.formats[plan.config.mixtures[job.settings["mixture"]].format]
    known = next(
        (one for one in plan.indexed(layout.Analysis.parse(job.analysis)) if stands(plan, one)), None
    )
    own = {"eos_id": facts["eos_id"], "vision": {}}
    if known is None:
        packs, told = list(_drawn_packs(small, model)), "drawn tokens"
    else:
        real = PackedShard(str(known))
        packs = [_cut(real.pack(n), small.sequence) for n in range(min(PACKS, len(real)))]
        own = {key: real.facts[key] for key in own}
        told = f"the first packs of {known}, {small.sequence} tokens of each"
    folder = root / str(shard)
    folder.mkdir(parents=True)
    _write_packs(folder, packs, vocabulary=model.vocab_size, vision=model.patch_dim > 0)
    more = {
        **own,
        "tokenizer": folders.digest_of_tokenizer(root / str(layout.HfModel(model=NAME))),
        "vocab_size": model.vocab_size,
        "patch_size": form.patch_size,
        "max_resolution": form.max_resolution,
    }
    files.write_manifest(folder, kind="indexed", settings={}, facts=more)
    _write_mixture(root, {"sources": [{"prefix": str(shard), "weight": 1.0}]})
    return told


def _drawn_packs(small: Small, model: Spec) -> Iterator[Pack]:
    """Packs of two documents, trained on all their tokens; those of SOLO begin with four patches."""
    draw = np.random.default_rng(SEED)
    role = roles.CODES[small.settings["loss_roles"][0]]
    seen = 4 if model.patch_dim else 0
    for _ in range(PACKS):
        text = draw.integers(3, model.vocab_size, small.sequence)
        spoken = np.full(small.sequence, role)
        spoken[small.sequence // 2], spoken[:seen] = roles.PACK_SEP, roles.IMAGE
        indices = np.full(small.sequence, -1)
        indices[:seen] = range(seen)
        patches = draw.standard_normal((seen, model.patch_dim)).astype(np.float16) if seen else None
        yield Pack(text, spoken, indices, [], patches)


def _cut(pack: Pack, length: int) -> Pack:
    """So many tokens of a pack, the first that its assistant says among them; its pictures stay whole."""
    spoken: NDArray[Any] = np.flatnonzero(pack.role == roles.ASSISTANT)
    first = max(0, int(spoken[0]) - length // 2) if len(spoken) else 0
    part = slice(first, first + length)
    return Pack(pack.text[part], pack.role[part], pack.patch_indices[part], pack.pictures, pack.patches)


def _write_packs(folder: Path, packs: list[Pack], *, vocabulary: int, vision: bool) -> None:
    """The files of an indexed shard."""
    with ExitStack() as stack:

        def opened(name: str, dtype: Any) -> indexed.IndexedWriter:
            return stack.enter_context(indexed.IndexedWriter(folder / name, dtype))

        text, role = opened(indexed.TEXT, indexed.text_dtype(vocabulary)), opened(indexed.ROLE, np.uint16)
        encoded = packs[0].patches is None
        if vision:
            indices = opened(indexed.INDICES, np.int32)
            pictures = opened(*((indexed.IMAGE, np.uint8) if encoded else (indexed.PATCHES, np.uint16)))
        for pack in packs:
            text.document(pack.text)
            role.document(pack.role)
            if vision:
                indices.document(pack.patch_indices)
                values: list[Any] = list(pack.pictures)
                pictures.document(*(values if pack.patches is None else [pack.patches.view("<u2")]))


# Pictured data


def _pictured(root: Path, small: Small, plan: Plan, job: Job, model: Spec) -> str:
    """A dataset for energon: pictures of one colour, a question and an answer each, in the run's format."""
    assert model.vision is not None
    keys = Energon(samples_per_shard=SHARD).model_dump(mode="json")
    dataset = root / str(layout.Energon(dataset=NAME))
    dataset.mkdir(parents=True)
    facts = energon.build(dataset, map(_sample, range(SAMPLES)), keys)
    files.write_manifest(dataset, kind="energon", settings={}, facts=facts)
    form = plan.config.formats[plan.config.mixtures[job.settings["mixture"]].format]
    mixture: dict[str, Any] = {
        "tokenizer": str(layout.Tokenizer(tokenizer=NAME)),
        "image_token_id": model.image_token_id,
        "format": {**form.model_dump(mode="json"), "picture_tokens": model.vision.tokens},
        "decoder_seq_length": small.sequence,
        "sources": [],
    }
    folder = _write_mixture(root, mixture)
    blend = energon.blend({str(dataset): 1.0}, relative_to=folder)
    (folder / "metadataset.yaml").write_text(yaml.safe_dump(blend), encoding="utf-8")
    return "drawn pictures"


def _sample(number: int) -> Sample:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.full((48, 64, 3), 6 * number, np.uint8)).save(file, "JPEG")
    question = Message("user", (Picture(file.getvalue()), Text("\nHow grey?")))
    return Sample((question, Message("assistant", (Text(f"{6 * number}"),))), f"small-{number}")


def _write_mixture(root: Path, mixture: Mapping[str, Any]) -> Path:
    folder = root / str(layout.Analysis(mixture=NAME))
    (folder / "mixture.yaml").write_text(yaml.safe_dump(dict(mixture)), encoding="utf-8")
    return folder
