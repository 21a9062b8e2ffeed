"""The proof of a model artifact: coverage, Merkle root, and logits against transformers.

Coverage (each destination element written once, each source element read once) and the root over
(name, dtype, shape, bytes) of the Hugging Face view are made by the job that writes the artifact.
This module checks that they hold, adds the logits, and writes ``parity.json`` only if all is well.
"""

import logging
from pathlib import Path
from typing import Any

from plait import files, layout
from plait.convert import checkpoint, engine, layouts, stream
from plait.convert.torch_dist import METADATA
from plait.errors import ProofError
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.verify import logits

log = logging.getLogger(__name__)


def prove_converted(reference: Path, artifact: Path, proof: Path) -> dict[str, Any]:
    """Prove a whole or sharded Megatron model against the Hugging Face folder it was made from.

    Raises:
        ProofError: the artifact does not compute what the reference computes; nothing is written.
    """
    manifest = files.check_manifest(artifact)
    facts = manifest["facts"]
    grid = Grid(**facts["grid"])
    spec = Spec.of(reference)
    inputs = logits.cases(spec)
    load = _Sharded(artifact, grid) if manifest["kind"] == "sharded" else _Whole(artifact, spec)
    found = logits.of_megatron(spec, grid, load, inputs)
    rows = logits.compare(inputs, logits.of_transformers(reference, inputs), found)
    facts = {**facts, "merkle": stream.root(layouts.released(artifact, spec, grid).stream())}
    root = files.check_manifest(reference)["facts"]["merkle"]
    return write(proof, artifact, facts=facts, reference=reference, root=root, rows=rows)


def prove_export(
    iteration: Path, folder: Path, export: layout.Export, *, facts: dict[str, Any]
) -> dict[str, Any]:
    """Prove a Hugging Face folder against the checkpoint it was made from, on the checkpoint's grid.

    Args:
        iteration: the checkpoint.
        folder: the folder, not yet in its place.
        export: its place.
        facts: ``merkle`` and ``coverage`` of the folder.

    Returns:
        The facts, with the checkpoint's grid.

    Raises:
        ProofError: the two differ; nothing is written.
    """
    trained = files.check_manifest(iteration)["facts"]
    spec = Spec.of(folder)
    inputs = logits.cases(spec)
    grid = Grid(**trained["grid"])
    found = logits.of_megatron(spec, grid, _Trained(iteration, spec, grid), inputs)
    rows = logits.compare(inputs, logits.of_transformers(folder, inputs), found)
    root = stream.root(layouts.of_hf(folder, spec).stream())
    known = {**facts, "grid": trained["grid"], "merkle": root}
    write(
        Path(export.proof), str(export), facts=known, reference=iteration, root=trained["merkle"], rows=rows
    )
    return known


def prove_iteration(export: Path, iteration: Path, proof: Path) -> dict[str, Any]:
    """Prove a checkpoint by the export that was proven against it: nothing is computed again.

    Raises:
        ProofError: the export was made from another checkpoint, or has no proof.
        DataError: a file of either is not what its manifest says.
    """
    facts = files.check_manifest(iteration)["facts"]
    known = files.check_manifest(export)
    parity = files.read_json(layout.parse(export).proof)
    if known["inputs"].get(layout.inside(iteration)) != files.digest_of_input(iteration):
        raise ProofError(f"{export} was made from another {iteration}", hint="export it again")
    root, rows = known["facts"]["merkle"], parity["logits"]
    return write(proof, iteration, facts=facts, reference=export, root=root, rows=rows)


def write(
    proof: Path,
    artifact: Path | str,
    *,
    facts: dict[str, Any],
    reference: Path | str,
    root: str,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """Write the proof of an artifact if all of it holds.

    Raises:
        ProofError: a part of it does not.
    """
    _check(artifact, facts=facts, root=root, rows=rows)
    parity = {
        "schema": files.SCHEMA,
        "artifact": layout.inside(artifact),
        "reference": layout.inside(reference),
        "grid": facts["grid"],
        "coverage": facts["coverage"],
        "merkle_root": root,
        "logits": rows,
        "passed": True,
    }
    files.write_json(proof, parity)
    worst = max(row["max_abs_diff"] for row in rows)
    log.info("%s: proven; merkle %s, logits within %.2g of transformers", artifact, root[:16], worst)
    return parity


def _check(artifact: Path | str, *, facts: dict[str, Any], root: str, rows: list[dict[str, Any]]) -> None:
    wrong = logits.failures(rows)  # type: ignore[arg-type]
    if facts["merkle"] != root:
        wrong.append(f"merkle root {facts['merkle'][:16]} of its Hugging Face view, reference {root[:16]}")
    if not (facts["coverage"]["written_once"] and facts["coverage"]["read_once"]):
        wrong.append(f"coverage is not complete: {facts['coverage']}")
    if wrong:
        raise ProofError(f"{artifact} failed its proof: " + "; ".join(wrong), hint="do not use it")


class _Whole:
    """Loads a whole model on one rank, which pads its vocabulary as any grid does."""

    def __init__(self, folder: Path, spec: Spec) -> None:
        self.folder, self.spec = folder, spec

    def __call__(self, model: Any) -> None:
        from plait.train.build import load_weights

        whole = layouts.whole(layouts.released(self.folder, self.spec, Grid()), self.spec)
        load_weights(model, engine.cut(whole, self.spec, Grid(), 0, 0))


class _Sharded:
    """Loads a rank of Megatron's classic layout."""

    def __init__(self, folder: Path, grid: Grid) -> None:
        self.folder, self.grid = folder, grid

    def __call__(self, model: Any) -> None:
        from megatron.core import parallel_state

        from plait.train.build import load_weights

        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        load_weights(model, checkpoint.read_rank(self.folder, self.grid, tp_rank, pp_rank))


class _Trained:
    """Loads a training checkpoint: Megatron Core's reader where it wrote it, ours where it is classic."""

    def __init__(self, folder: Path, spec: Spec, grid: Grid) -> None:
        self.folder, self.spec, self.grid = folder, spec, grid

    def __call__(self, model: Any) -> None:
        from megatron.core import parallel_state

        from plait.train.build import load_weights
        from plait.train.state import load_model

        if (self.folder / METADATA).is_file():
            load_model([model], self.folder)
            return
        place = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        whole = layouts.whole(layouts.trained(self.folder, self.spec), self.spec)
        load_weights(model, engine.cut(whole, self.spec, self.grid, *place))
