"""Megatron's classic checkpoint layout, written and read without Megatron and without processes.

::

    latest_checkpointed_iteration.txt           "release"
    release/mp_rank_00/model_optim_rng.pt       one file a rank; mp_rank_00_000 where pp > 1
    hf_config.json                              the source's config.json, byte for byte

A rank's file is ``torch.save`` of {model, args, checkpoint_version, iteration}. It is laid out
first and its tensors are then written in place, one at a time, so memory does not grow with the
model. The price: the zip entries carry no checksum of their own (the manifest has the digest of
the file), which ``torch.load`` does not ask for.

Megatron's own training writes the same below ``iter_NNNNNNN``, with Transformer Engine's names where that
was trained; both are read here.

Files are read with ``weights_only=True``. ``argparse.Namespace`` is the only class allowed in; objects of
any other, such as Megatron's enums among the arguments, become :class:`Inert`.
"""

import argparse
import mmap
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from plait.convert.carried import hf_view
from plait.convert.engine import coverage, join, rank_shapes
from plait.convert.tables import entries
from plait.convert.torch_dist import EXTRA, METADATA, read_iteration
from plait.errors import CheckpointError
from plait.layout import HF_CONFIG, TRACKER
from plait.models.specs import Spec
from plait.models.weights import check_shapes, merkle
from plait.parallel.grid import Grid
from plait.tokens.vocabulary import padded_vocab_size

RELEASE = "release"
FILE = "model_optim_rng.pt"
VERSION = 3.0

State = Mapping[str, Tensor]


def rank_file(folder: Path, grid: Grid, tp_rank: int, pp_rank: int) -> Path:
    """The file of a rank in a released checkpoint."""
    return folder / RELEASE / grid.folder(tp=tp_rank, pp=pp_rank) / FILE


class Inert:
    """Stands for an object of a class that has no place here: nothing of that class is loaded or run."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Take whatever the object would be made from, and leave it."""
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Leave its state too."""


def saved(folder: Path) -> Path:
    """Where the ranks of a checkpoint stand: below what its tracker names, or in the folder itself."""
    tracker = folder / TRACKER
    if tracker.is_file():
        name = tracker.read_text(encoding="utf-8").strip()
        return folder / (f"iter_{int(name):07d}" if name.isdecimal() else RELEASE)
    return folder if any(folder.glob("mp_rank_*")) else folder / RELEASE


def write_rank(path: Path, state: State, *, outline: State, args: argparse.Namespace) -> int:
    """Write what one rank holds; its size in bytes. Equal states give equal bytes.

    Args:
        path: the rank's file.
        state: its tensors, computed as they are asked for.
        outline: the same on the meta device: names, shapes and types.
        args: the model's arguments.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    model = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in outline.items()}
    with torch.serialization.skip_data():
        content = {"model": model, "args": args, "checkpoint_version": VERSION, "iteration": 0}
        torch.save(content, path)
    del model, content
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        room = _load(path)["model"]
    for name, tensor in tqdm(state.items(), desc=path.parent.name, unit="tensor", disable=None):
        room[name].copy_(tensor)
    return path.stat().st_size


def write_tracker(folder: Path) -> None:
    """Say that the checkpoint is whole: Megatron reads this file first, so it comes last."""
    (folder / TRACKER).write_text(RELEASE, encoding="utf-8")


def read_rank(folder: Path | str, grid: Grid, tp_rank: int, pp_rank: int) -> dict[str, Tensor]:
    """What one rank of a released checkpoint holds; tensors are read as they are touched.

    Raises:
        CheckpointError: the file is missing, is not a checkpoint, or does not hold the tensors that
            the config promises a rank of this grid; the first few names are given.
    """
    folder = Path(folder)
    path = saved(folder) / grid.folder(tp=tp_rank, pp=pp_rank) / FILE
    content = _read(path)
    spec = Spec.of(folder, HF_CONFIG)
    names = {entry.local_engine(spec, grid): entry.local(spec, grid) for entry in entries(spec)}
    state = {
        names.get(name, name): tensor for name, tensor in content["model"].items() if not name.endswith(EXTRA)
    }
    expected = rank_shapes(spec, grid if is_padded(content["args"]) else None, tp_rank, pp_rank)
    check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, expected, str(path))
    return state


def is_padded(args: argparse.Namespace) -> bool:
    """Whether a checkpoint's vocabulary has the rows that make it divide among its ranks."""
    return bool(args.make_vocab_size_divisible_by > 1)


def read_args(folder: Path | str, grid: Grid) -> argparse.Namespace:
    """Megatron's arguments, as the first rank's file records them."""
    args: argparse.Namespace = _read(saved(Path(folder)) / grid.folder(tp=0, pp=0) / FILE)["args"]
    return args


def grid_of(folder: Path | str) -> Grid:
    """The grid that a checkpoint says it was saved on.

    Raises:
        CheckpointError: the folder has no first rank's file.
    """
    place = saved(Path(folder))
    pipelined = (place / "mp_rank_00_000").is_dir()
    args = vars(read_args(folder, Grid(pp=2) if pipelined else Grid()))
    if args.get("expert_model_parallel_size", 1) > 1:
        raise CheckpointError(
            f"{folder} was saved in Megatron's classic format by {args['expert_model_parallel_size']} expert "
            "parallel ranks, which plait does not read",
            hint="save it as torch_dist (--ckpt-format torch_dist), or with expert_model_parallel_size 1",
        )
    return Grid(
        tp=args["tensor_model_parallel_size"],
        pp=args["pipeline_model_parallel_size"],
        first=args.get("decoder_first_pipeline_num_layers"),
        last=args.get("decoder_last_pipeline_num_layers"),
    )


def read_trained(folder: Path | str, spec: Spec) -> State:
    """Megatron's whole tensors of a training checkpoint, torch_dist or classic.

    Raises:
        CheckpointError: as :func:`read_whole` and :func:`read_iteration`.
    """
    if (Path(folder) / METADATA).is_file() or saved(Path(folder)) != Path(folder):
        return read_iteration(folder, spec)
    return read_whole(folder, grid_of(folder))


def read_whole(folder: Path | str, grid: Grid) -> State:
    """Megatron's whole tensors of a released checkpoint of any grid, with the true vocabulary.

    Raises:
        CheckpointError: as :func:`read_rank`; or the tracker file does not say that it is whole.
    """
    folder = Path(folder)
    if not saved(folder).is_dir() or not ((folder / TRACKER).is_file() or saved(folder) == folder):
        raise CheckpointError(
            f"{folder / TRACKER} does not say {RELEASE!r}: the checkpoint is not whole, or is not one"
        )
    ranks = {(tp, pp): read_rank(folder, grid, tp, pp) for tp, pp in grid}
    return join(ranks, Spec.of(folder, HF_CONFIG), grid)


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
        untie_embeddings_and_output_weights=True,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=spec.attention_bias,
        tensor_model_parallel_size=size.tp,
        pipeline_model_parallel_size=size.pp,
        decoder_first_pipeline_num_layers=size.first,
        decoder_last_pipeline_num_layers=size.last,
        vocab_size=spec.vocab_size,
        padded_vocab_size=padded_vocab_size(spec.vocab_size, size.tp) if grid else spec.vocab_size,
        make_vocab_size_divisible_by=128 if grid else 1,
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
    content: dict[str, Any] = _load(path)
    known = isinstance(content, dict) and {"model", "args"} <= content.keys()
    if not known or not isinstance(content["args"], argparse.Namespace):
        raise CheckpointError(f"{path} is not a Megatron checkpoint: it has no 'model' and 'args'")
    return content


def _load(path: Path) -> Any:
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        inert = [(Inert, name) for name in unknown if name != "argparse.Namespace"]
        with torch.serialization.safe_globals([argparse.Namespace, *inert]):
            return torch.load(path, mmap=True, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error


def facts_of_iteration(folder: Path | str, spec: Spec, grid: Grid) -> dict[str, Any]:
    """Merkle root and coverage of a training checkpoint, from what is on disk.

    Raises:
        CheckpointError: an element of the model is missing, or stored twice.
    """
    root = merkle(hf_view(read_trained(folder, spec), spec, folder))
    return {"merkle": root, "coverage": coverage(spec, grid), "grid": grid.facts}
