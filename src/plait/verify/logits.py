"""Logits of a Megatron artifact on its own grid, and of transformers, on the same inputs.

B = sequences, S = tokens, V = vocabulary, N = patches, P = values of a patch.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait import files
from plait.errors import ProofError
from plait.models import remote
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.verify.ranks import run_ranks

TOLERANCE = 1e-5
ROUNDED = 3e-5
"""Tolerance in fp32 arithmetic, relative to the largest logit: transformers' own rounding has its share."""
PRECISIONS = (torch.float32, torch.float64)
"""Weights are the artifact's, in fp32; sums are taken in fp32 and in fp64, on both sides. Both differences
are recorded; fp64's must be within 1e-5. In fp32 the rounding of transformers alone has reached 2e-5 on a
trained tiny model (against its own fp64), so its bound is wider and follows the logits."""
SEQUENCES, TOKENS, PATCHES, WORDS = 2, 48, 4, 5
Loader = Callable[[Any], None]
Logits = dict[torch.dtype, list[Any]]
"""By arithmetic, one [B, S, V] a case."""


@dataclass(frozen=True)
class Case:
    """One input of a proof.

    Attributes:
        name: what it tries.
        input_ids: [B, S].
        documents: [B, S], the document of each token; the reference sees each document alone.
        pictures: SOLO's patches [N, P], or a tower's pictures [I, 3, side, side].
        picture_rows: [B, S], a row of the patches or of all features laid end to end, or -1.
    """

    name: str
    input_ids: Tensor
    documents: Tensor
    pictures: Tensor | None = None
    picture_rows: Tensor | None = None


def cases(spec: Spec) -> list[Case]:
    """Inputs drawn by a fixed seed over the whole vocabulary: alone, packed, and with pictures."""
    draw = torch.Generator().manual_seed(20_240)
    shape = (SEQUENCES, TOKENS)
    packed = torch.tensor([0] * 11 + [1] * 1 + [2] * (TOKENS - 12)).expand(shape)
    found = [
        Case(name, _words(spec, shape, draw), documents)
        for name, documents in (("text", torch.zeros(shape, dtype=torch.long)), ("packed", packed))
    ]
    if spec.patch_dim:
        found.append(_patches(spec, draw))
    if spec.vision is not None:
        found += [_pictures(spec, draw, "one picture", 1), _pictures(spec, draw, "several pictures", 2)]
    return found


def _words(spec: Spec, shape: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Any ids but that of a picture, which must have a picture to stand for."""
    ids = torch.randint(spec.vocab_size, shape, generator=draw)
    other = int(spec.image_token_id == 0)
    return ids if spec.image_token_id is None else ids.masked_fill(ids == spec.image_token_id, other)


def _patches(spec: Spec, draw: torch.Generator) -> Case:
    """SOLO's patches within two sequences."""
    shape = (SEQUENCES, TOKENS)
    rows = torch.full(shape, -1)
    rows[0, 3 : 3 + PATCHES // 2] = torch.arange(PATCHES // 2)
    rows[1, 7 : 7 + PATCHES // 2] = torch.arange(PATCHES // 2, PATCHES)
    patches = torch.randn(PATCHES, spec.patch_dim, generator=draw)
    return Case("picture", _words(spec, shape, draw), torch.zeros(shape, dtype=torch.long), patches, rows)


def _pictures(spec: Spec, draw: torch.Generator, name: str, count: int) -> Case:
    """LLaVA's pictures, ``count`` in each of two sequences, with a few words around each."""
    tower = spec.vision
    assert tower is not None
    shape = (SEQUENCES, WORDS + count * (tower.tokens + WORDS))
    rows, ids = torch.full(shape, -1), _words(spec, shape, draw)
    for number in range(SEQUENCES * count):
        sequence, place = divmod(number, count)
        start = WORDS + place * (tower.tokens + WORDS) - sequence
        rows[sequence, start : start + tower.tokens] = torch.arange(tower.tokens) + number * tower.tokens
    ids[rows >= 0] = int(spec.image_token_id or 0)
    pictures = torch.randn(SEQUENCES * count, 3, tower.image_size, tower.image_size, generator=draw)
    return Case(name, ids, torch.zeros(shape, dtype=torch.long), pictures, rows)


def of_transformers(folder: Path, inputs: list[Case]) -> Logits:
    """Logits by the model class that users load.

    Raises:
        ProofError: the folder carries code that plait did not write.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as modules:
        os.environ.setdefault("HF_MODULES_CACHE", modules)
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        sees = Spec.of(folder).vision is not None
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=carries_our_code(folder),
        ).eval()
        if Spec.of(folder).num_experts:
            model.set_experts_implementation("eager")  # its grouped products are not of fp64
    found: Logits = {}
    with torch.no_grad():
        for dtype in PRECISIONS:
            # eager attention takes its softmax in fp32, whatever it is given, and so do norms their sums;
            # sdpa and _norm take them in fp64
            model.set_attn_implementation("sdpa" if dtype == torch.float64 else "eager")
            for norm in (one for one in model.modules() if hasattr(one, "variance_epsilon")):
                norm.forward = partial(_norm, norm) if dtype == torch.float64 else norm.forward
            found[dtype] = [_alone(model.to(dtype), case) for case in inputs]
    return found


def _norm(norm: Any, states: Tensor) -> Tensor:
    """RMSNorm in the type of its input: in fp32 it alone moved the logits of a trained model by 9e-5."""
    spread = states.pow(2).mean(-1, keepdim=True)
    found: Tensor = norm.weight * (states * torch.rsqrt(spread + norm.variance_epsilon))
    return found


def _alone(model: Any, case: Case) -> Tensor:
    """Logits of every document by itself, laid end to end."""
    pictures: dict[str, Tensor] = {}
    if case.pictures is not None and case.picture_rows is not None:
        seen = case.pictures.to(model.dtype)
        solo = {"vision_patches": seen, "vision_patch_indices": case.picture_rows}
        pictures = solo if case.pictures.dim() == 2 else {"pixel_values": seen}
    _, lengths = case.documents[0].unique_consecutive(return_counts=True)
    parts = case.input_ids.split(lengths.tolist(), dim=1)
    return torch.cat([model(input_ids=part, **pictures).logits for part in parts], dim=1)


def carries_our_code(folder: Path) -> bool:
    """Whether the folder has modelling code; it is run only if it is byte for byte plait's."""
    found = sorted(folder.glob("*.py"))
    for path in found:
        ours = Path(remote.__path__[0]) / path.name
        if not ours.is_file() or files.digest(ours) != files.digest(path):
            raise ProofError(f"{path} is not plait's own code, and is not run")
    return bool(found)


def of_megatron(spec: Spec, grid: Grid, load: Loader, inputs: list[Case]) -> Logits:
    """Logits of a Megatron model on its grid.

    Args:
        spec: the model's shape.
        grid: the artifact's grid; one process a rank is forked.
        load: loads this rank's weights into its stage of the model.
        inputs: what to compute.
    """
    ranks = run_ranks(_megatron_rank, grid, spec, grid, load, inputs)
    found: Logits = next(result for result in ranks if result is not None)
    return found


def _megatron_rank(spec: Spec, grid: Grid, load: Loader, inputs: list[Case]) -> Logits | None:
    """The logits on one rank of the last stage, None on the others."""
    from megatron.core import parallel_state

    from plait.train.build import build_model

    logits: Logits = {}
    for dtype in PRECISIONS:
        model = build_model(spec, grid, dtype=dtype).eval().to(dtype)
        load(model)
        with torch.no_grad():
            logits[dtype] = [_forward(model, case, spec).numpy() for case in inputs]
    last = parallel_state.is_pipeline_last_stage()
    first = parallel_state.get_tensor_model_parallel_rank() == 0
    return logits if last and first else None


def _forward(model: Any, case: Case, spec: Spec) -> Tensor:
    """One pass through all stages: Megatron's schedule, forward only, logits gathered over tp."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from plait.train.batches import masked_out, positions

    batch, tokens = case.input_ids.shape
    places = torch.from_numpy(positions(case.documents.numpy()))
    mask = masked_out(case.documents, spec.sliding_window)
    found: list[Tensor] = []

    def step(_: Any, stage: Any) -> Any:
        output = stage(case.input_ids, places, mask, pictures=case.pictures, picture_rows=case.picture_rows)

        def keep(logits: Tensor, **_: Any) -> Tensor:
            found.append(gather_from_tensor_model_parallel_region(logits)[..., : spec.vocab_size])
            return logits

        return output, keep

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        seq_length=tokens,
        micro_batch_size=batch,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found[0] if found else torch.empty(0)


def compare(inputs: list[Case], reference: Logits, found: Logits) -> list[dict[str, Any]]:
    """One row a case: the largest differences and how many positions agree on the likeliest token."""
    rows = []
    for number, case in enumerate(inputs):
        pairs = {d: (reference[d][number], torch.as_tensor(found[d][number])) for d in PRECISIONS}
        want, have = pairs[torch.float64]
        rounded = pairs[torch.float32]
        rows.append(
            {
                "case": case.name,
                "positions": case.input_ids.numel(),
                "max_abs_logit": float(want.abs().max()),
                "max_abs_diff": float((want - have).abs().max()),
                "max_abs_diff_fp32": float((rounded[0] - rounded[1]).abs().max()),
                "top1_equal": int((want.argmax(-1) == have.argmax(-1)).sum()),
                "tolerance": TOLERANCE,
                "tolerance_fp32": ROUNDED * max(1.0, float(want.abs().max())),
            }
        )
    return rows


def failures(rows: list[Mapping[str, Any]]) -> list[str]:
    """What is wrong with a comparison, in words; nothing if it holds."""
    return [
        f"{row['case']}: max abs difference {row['max_abs_diff']:.3g} (tolerance {row['tolerance']:g}), "
        f"in fp32 {row['max_abs_diff_fp32']:.3g} (tolerance {row['tolerance_fp32']:.3g}), "
        f"{row['top1_equal']} of {row['positions']} likeliest tokens equal"
        for row in rows
        if not row["max_abs_diff"] <= row["tolerance"]
        or not row["max_abs_diff_fp32"] <= row["tolerance_fp32"]
        or row["top1_equal"] != row["positions"]
    ]
