"""Megatron's classic checkpoint layout, written and read without Megatron and without processes.

::

    latest_checkpointed_iteration.txt           "release"
    release/mp_rank_00/model_optim_rng.pt       one file a rank; mp_rank_00_000 where pp > 1
    hf_config.json                              the source's config.json, byte for byte

A rank's file is ``torch.save`` of {model, args, checkpoint_version, iteration}. It is laid out first, with
room for its tensors, which are then written in place. The price: the zip entries carry no checksum of their
own (the manifest has the digest of the file), which ``torch.load`` does not ask for.

Megatron's own training writes the same below ``iter_NNNNNNN``, with Transformer Engine's names where that
was trained, a third number in the folder's name where experts are dealt out, and ``model0``, ``model1`` and
so on where a stage has several chunks; all of that is read here.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.convert import forms, old
from plait.convert.engine import rank_shapes
from plait.convert.forms import Form, Place
from plait.convert.ops import Part
from plait.convert.stream import Placed, type_of
from plait.convert.tables import Layers, entries, file_name
from plait.convert.torch_dist import EXTRA
from plait.errors import CheckpointError
from plait.layout import HF_CONFIG, TRACKER
from plait.models import archive
from plait.models.archive import Archive, Room
from plait.models.specs import Spec
from plait.models.stored import Stored, StoredTensors
from plait.models.weights import check_shapes
from plait.parallel.grid import Grid
from plait.tokens.vocabulary import DIVISOR, padded_vocab_size

RELEASE, ITERATION = "release", "iter_{:07d}"
FILE, OTHER_FILE = "model_optim_rng.pt", "model_rng.pt"
VOCABULARIES = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")
VERSION = 3.0
ENGINE = "transformer_engine"
EXPERTS, CHUNKS = "expert_model_parallel_size", "virtual_pipeline_model_parallel_size"


class Rank(NamedTuple):
    """A rank's file.

    Attributes:
        path: where it is.
        content: all that it holds, with the places of its tensors.
        parts: its weights by part: ``model``, or ``model0`` and so on; of a file that is read, in its order.
        is_old: whether it is of another world than Megatron Core's.
    """

    path: Path
    content: Mapping[str, Any]
    parts: Mapping[str, Sequence[Placed]]
    is_old: bool = False


def weights(ranks: Iterable[Rank]) -> list[Placed]:
    """The weights of all files."""
    return [one for rank in ranks for part in rank.parts.values() for one in part]


def rank_file(folder: Path, grid: Grid, tp_rank: int, pp_rank: int, *, ep: int | None = None) -> Path:
    """The file of a rank; Megatron-LLM's distributed optimizer leaves the model in one of another name."""
    place = saved(folder) / grid.folder(tp=tp_rank, pp=pp_rank, ep=ep)
    other = place / OTHER_FILE
    return other if other.is_file() and not (place / FILE).is_file() else place / FILE


def saved(folder: Path) -> Path:
    """Where the ranks of a checkpoint stand: below what its tracker names, or in the folder itself."""
    tracker = folder / TRACKER
    if tracker.is_file():
        name = tracker.read_text(encoding="utf-8").strip()
        return folder / (ITERATION.format(int(name)) if name.isdecimal() else RELEASE)
    return folder if any(folder.glob("mp_rank_*")) else folder / RELEASE


def lay_out(
    folder: Path,
    spec: Spec,
    grid: Grid,
    dtypes: Mapping[str, str],
    *,
    padded: bool = True,
    ep: int = 1,
    chunks: int = 1,
    layers: Layers = "local",
) -> list[Placed]:
    """Make the files of a released checkpoint, with room for the tensors; where each of them stands.

    Equal models give equal bytes.

    Args:
        folder: where the checkpoint goes.
        spec: the model.
        grid: its grid.
        dtypes: torch's names of the types, by Hugging Face's name.
        padded: whether the vocabulary is padded; else the model is whole.
        ep: expert parallel ranks.
        chunks: chunks of each stage of an interleaved pipeline.
        layers: whose names the tensors have.

    Raises:
        ConfigError: the model cannot be cut for this grid; no file is made.
        CheckpointError: parts of one tensor have different types.
    """
    args = megatron_args(spec, grid if padded else None)
    divisor = DIVISOR if padded else 1
    if layers != "local":
        args.transformer_impl, args.moe_grouped_gemm = ENGINE, layers == "te-grouped"
    return weights(
        lay_out_ranks(
            folder / RELEASE, spec, grid, dtypes, args, divisor=divisor, ep=ep, chunks=chunks, layers=layers
        )
    )


def lay_out_ranks(
    folder: Path,
    spec: Spec,
    grid: Grid,
    dtypes: Mapping[str, str],
    args: argparse.Namespace,
    *,
    divisor: int = DIVISOR,
    ep: int = 1,
    chunks: int = 1,
    layers: Layers = "local",
    order: Callable[[str], Any] | None = None,
    more: Callable[[Mapping[str, Form]], Mapping[str, Any]] = lambda _: {},
) -> list[Rank]:
    """Make the files of all ranks.

    Args:
        folder: where their folders go.
        spec: the model.
        grid: its grid.
        dtypes: torch's names of the types, by Hugging Face's name.
        args: Megatron's arguments, as every file has them.
        divisor: the vocabulary is padded to a multiple of it times the tensor ranks.
        ep: expert parallel ranks.
        chunks: chunks of each stage of an interleaved pipeline.
        layers: whose names the weights have.
        order: by what the weights of a part are sorted; None leaves them in the order of the table.
        more: what a file has besides, of what the rank holds by part.

    Raises:
        ConfigError: as :func:`lay_out`.
        CheckpointError: as :func:`lay_out`.
    """
    for key, value in ((EXPERTS, ep), (CHUNKS, chunks)):
        if value > 1:
            setattr(args, key, value)
    held = forms.of_grid(spec, grid.interleaved(chunks), ep=ep, divisor=divisor)
    names = partial(file_name, layers=layers, routed=spec.num_experts > 0)
    found = []
    for place in (Place(tp, pp, number) for number in range(ep) for tp, pp in grid):
        parts = {
            _model(chunk, chunks): _sorted(held[place._replace(pp=chunk * grid.pp + place.pp)], order)
            for chunk in range(chunks)
        }
        path = folder / grid.folder(tp=place.tp, pp=place.pp, ep=place.ep if ep > 1 else None) / FILE
        rest = {"args": args, "checkpoint_version": VERSION, "iteration": 0, **more(parts)}
        found.append(_lay_out_rank(path, parts, dtypes, rest, names))
    return found


def _sorted(form: Form, order: Callable[[str], Any] | None) -> Form:
    return {name: form[name] for name in sorted(form, key=order)} if order else form


def _lay_out_rank(
    path: Path,
    parts: Mapping[str, Form],
    dtypes: Mapping[str, str],
    rest: Mapping[str, Any],
    names: Callable[[str], str],
) -> Rank:
    """Make a rank's file; ``names`` are those that its weights have there."""
    rooms = {
        part: {names(name): Room(type_of(name, one.pieces, dtypes), one.shape) for name, one in form.items()}
        for part, form in parts.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    archive.lay_out(path, {**rooms, **rest})
    content: dict[str, Any] = Archive(path).content
    placed = {
        part: [Placed(n, content[part][names(n)], one) for n, one in form.items()]
        for part, form in parts.items()
    }
    return Rank(path, content, placed)


def _model(chunk: int, chunks: int) -> str:
    """What a file calls the model of a stage's chunk."""
    return "model" if chunks == 1 else f"model{chunk}"


def write_tracker(folder: Path, iteration: int | None = None) -> None:
    """Say that the checkpoint is whole: Megatron reads this file first, so it comes last."""
    name = RELEASE if iteration is None else str(iteration)
    (folder / TRACKER).write_text(name, encoding="utf-8")


def read_rank(folder: Path | str, grid: Grid, tp_rank: int, pp_rank: int) -> Mapping[str, Tensor]:
    """What one rank of a released checkpoint holds; each tensor is read when it is asked for.

    Raises:
        CheckpointError: the file is missing, is not a checkpoint, or does not hold the tensors that
            the config promises a rank of this grid; the first few names are given.
    """
    folder = Path(folder)
    spec = Spec.of(folder, HF_CONFIG)
    path = rank_file(folder, grid, tp_rank, pp_rank)
    content = _read(path)
    state = _local(content["model"], spec, grid)
    refuse_padding(path, content["args"], spec, grid)
    expected = rank_shapes(spec, grid if is_padded(content["args"]) else None, tp_rank, pp_rank)
    check_shapes({name: one.shape for name, one in state.items()}, expected, str(path))
    return StoredTensors(state)


def sources(folder: Path | str, spec: Spec, grid: Grid | None = None) -> list[Placed]:
    """Where a checkpoint's tensors stand, and what they hold of the model.

    Args:
        folder: the checkpoint.
        spec: the model.
        grid: its grid; None is what its first rank's arguments say.

    Raises:
        CheckpointError: a file is missing, or is not a checkpoint; or does not hold the tensors that the
            config promises a rank of this grid; the first few names are given.
    """
    return weights(ranks(folder, spec, grid))


def ranks(folder: Path | str, spec: Spec, grid: Grid | None = None) -> Iterator[Rank]:
    """The files of a checkpoint's ranks; arguments and errors are those of :func:`sources`."""
    folder = Path(folder)
    if not saved(folder).is_dir() or not ((folder / TRACKER).is_file() or saved(folder) == folder):
        raise CheckpointError(
            f"{folder / TRACKER} does not say {RELEASE!r}: the checkpoint is not whole, or is not one"
        )
    first = _first(folder)
    args = vars(first["args"])
    size = grid or _grid(args)
    combined = False
    ep, chunks = (int(args.get(key) or 1) for key in (EXPERTS, CHUNKS))
    divisor = _divisor(first["args"])
    for number in range(ep if spec.num_experts else 1):
        for tp, pp in size:
            path = rank_file(folder, size, tp, pp, ep=number if ep > 1 else None)
            content = _read(path)
            _check_rank(path, content, first, spec)
            if old.is_megatron_llm(content.get("model")):
                placed = old.megatron_llm(path, content["model"], spec, size, (tp, pp))
                yield Rank(path, content, {"model": placed}, is_old=True)
                continue
            parts = {}
            for chunk in range(chunks):
                stage, cut = chunk * size.pp + pp, size.interleaved(chunks)
                form = forms.of_rank(spec, cut, Place(tp, stage, number), ep=ep, divisor=divisor)
                tensors = content.get(_model(chunk, chunks))
                if not isinstance(tensors, dict):
                    raise CheckpointError(f"{path} has no {_model(chunk, chunks)!r}")
                old.refuse_halves(path, tensors)
                state = _local(tensors, spec, cut)
                combined |= old.is_llava_jp(state)
                if combined:
                    part = Part(tp, size.tp, old.padding_of(state, VOCABULARIES, spec, size.tp, divisor))
                    form = forms.of_rank(spec, cut, Place(tp, stage, number), ep=ep, divisor=part.divisor)
                    parts[_model(chunk, chunks)] = old.llava_jp(path, state, form, spec, part)
                else:
                    parts[_model(chunk, chunks)] = _placed(path, state, form)
            yield Rank(path, content, parts, is_old=combined)


def _placed(path: Path, state: Mapping[str, Stored], form: Form) -> list[Placed]:
    check_shapes(
        {name: one.shape for name, one in state.items()},
        {name: held.shape for name, held in form.items()},
        str(path),
    )
    return [Placed(name, one, form[name]) for name, one in state.items()]


def _local(model: Mapping[str, Any], spec: Spec, grid: Grid) -> dict[str, Stored]:
    """A rank's tensors by their local names; Transformer Engine's extra states are left out."""
    names = {entry.local_engine(spec, grid): entry.local(spec, grid) for entry in entries(spec)}
    found: dict[str, Stored] = {}
    for name, one in model.items():
        own = names.get(name, name)
        if own in found:
            raise CheckpointError(f"{one.path}: {own} stands there by two names, {name} is one")
        if not name.endswith(EXTRA) and isinstance(one, Stored):
            found[own] = one
    return found


def is_padded(args: argparse.Namespace) -> bool:
    """Whether a checkpoint's vocabulary has the rows that make it divide among its ranks."""
    return _divisor(args) > 1


def _divisor(args: argparse.Namespace) -> int:
    return int(getattr(args, "make_vocab_size_divisible_by", None) or DIVISOR)


def refuse_padding(path: Path, args: argparse.Namespace, spec: Spec, grid: Grid) -> None:
    """Refuse a vocabulary with other rows than the model that is trained has: ranks hold other tokens then.

    Raises:
        CheckpointError: it is padded by another rule.
    """
    divisor = _divisor(args)
    rows, own = (padded_vocab_size(spec.vocab_size, grid.tp, size) for size in (divisor, DIVISOR))
    if divisor > 1 and rows != own:
        raise CheckpointError(
            f"{path} has a vocabulary of {rows} rows, padded by --make-vocab-size-divisible-by {divisor}; "
            f"training has {own}, by {DIVISOR}",
            hint="`plait convert` reads any padding: make it anew by that",
        )


def read_args(folder: Path | str, grid: Grid) -> argparse.Namespace:
    """Megatron's arguments, as the first rank's file records them."""
    args: argparse.Namespace = _read(rank_file(Path(folder), grid, 0, 0))["args"]
    return args


def _first(folder: Path | str) -> dict[str, Any]:
    """What the first rank's file holds."""
    place = saved(Path(folder))
    paths = sorted(place.glob("mp_rank_00*/model_*rng.pt")) or [place / "mp_rank_00" / FILE]
    return _read(paths[0])


SAID = (
    "num_layers", "hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size", "rotary_base",
    "norm_epsilon",
)  # fmt: skip
"""Arguments that decide what a file's tensors are, or compute; the config must say the same."""


def _check_rank(path: Path, content: Mapping[str, Any], first: Mapping[str, Any], spec: Spec) -> None:
    """A rank's file is of the first one's iteration, and of the model that the config says."""
    if content.get("iteration") != first.get("iteration"):
        raise CheckpointError(
            f"{path} is of iteration {content.get('iteration')}, the first rank of {first.get('iteration')}",
            hint="the files are of different checkpoints",
        )
    args, own = vars(content["args"]), vars(megatron_args(spec, None))
    names = (*SAID, *(["num_query_groups"] if args.get("group_query_attention") else []))
    for name in names:
        if args.get(name) not in (None, own[name]):
            raise CheckpointError(
                f"{path} was written with {name} {args[name]}, its config says {own[name]}",
                hint="give the config of the model that was trained",
            )


def _grid(args: Mapping[str, Any]) -> Grid:
    return Grid(
        tp=args["tensor_model_parallel_size"],
        pp=args["pipeline_model_parallel_size"],
        first=args.get("decoder_first_pipeline_num_layers"),
        last=args.get("decoder_last_pipeline_num_layers"),
    )


def megatron_args(spec: Spec, grid: Grid | None) -> argparse.Namespace:
    """The model's arguments under Megatron-LM's names.

    Args:
        spec: the model.
        grid: the grid it was cut for; None where it is whole and its vocabulary not padded.
    """
    size = grid or Grid()
    return argparse.Namespace(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_attention_heads,
        group_query_attention=spec.num_key_value_heads != spec.num_attention_heads,
        num_query_groups=spec.num_key_value_heads,
        ffn_hidden_size=spec.intermediate_size,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        norm_epsilon=spec.rms_norm_eps,
        position_embedding_type="rope",
        rotary_base=spec.rope_theta,
        rotary_percent=1.0,
        max_position_embeddings=spec.max_position_embeddings,
        seq_length=spec.max_position_embeddings,
        window_size=None if spec.sliding_window is None else (spec.sliding_window - 1, 0),
        untie_embeddings_and_output_weights=not spec.tied,
        qk_layernorm=spec.qk_norm,
        use_rope_scaling=spec.rope.kind == "llama3",
        rope_scaling_factor=spec.rope.factor,
        rotary_seq_len_interpolation_factor=spec.rope.factor if spec.rope.kind == "linear" else None,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=spec.attention_bias,
        tensor_model_parallel_size=size.tp,
        pipeline_model_parallel_size=size.pp,
        decoder_first_pipeline_num_layers=size.first,
        decoder_last_pipeline_num_layers=size.last,
        vocab_size=spec.vocab_size,
        padded_vocab_size=padded_vocab_size(spec.vocab_size, size.tp) if grid else spec.vocab_size,
        make_vocab_size_divisible_by=DIVISOR if grid else 1,
        params_dtype=getattr(torch, spec.dtype),
        bf16=spec.dtype == "bfloat16",
        fp16=spec.dtype == "float16",
        vision_patch_dim=spec.patch_dim,
        iteration=0,
        **_expert_args(spec),
        **_tower_args(spec),
    )


def _expert_args(spec: Spec) -> dict[str, Any]:
    """What Megatron-LM calls the sizes of a mixture of experts."""
    if not spec.num_experts:
        return {}
    return {
        "num_experts": spec.num_experts,
        "moe_router_topk": spec.experts_per_token,
        "moe_ffn_hidden_size": spec.intermediate_size,
        "expert_model_parallel_size": 1,
    }


def _tower_args(spec: Spec) -> dict[str, Any]:
    """What Megatron-LM's multimodal example calls the choices for a tower."""
    tower = spec.vision
    if tower is None:
        return {}
    return {
        "vision_model_type": tower.kind,
        "img_h": tower.image_size,
        "img_w": tower.image_size,
        "patch_dim": tower.patch_size,
        "disable_vision_class_token": tower.class_token and tower.drop_class_token,
        "encoder_num_layers": tower.used_layers,
    }


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing", hint=f"a rank's file stands in {RELEASE}/mp_rank_TT[_PPP]/"
        )
    content: dict[str, Any] = Archive(path).content
    known = (
        isinstance(content, dict) and "args" in content and any(str(key)[:5] == "model" for key in content)
    )
    if not known or not isinstance(content["args"], argparse.Namespace):
        raise CheckpointError(f"{path} is not a Megatron checkpoint: it has no 'model' and 'args'")
    return content
