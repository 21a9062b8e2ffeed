"""The proof of a model artifact: coverage, Merkle root, and its layers and logits against transformers.

Coverage (each destination element written once, each source element read once) and the root over
(name, dtype, shape, bytes) of the Hugging Face view are made by the job that writes the artifact.
This module checks that they hold, adds the logits, and writes ``parity.json`` only if all is well.
"""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from plait import files, layout
from plait.convert import checkpoint, engine, layouts
from plait.convert.torch_dist import METADATA
from plait.errors import CheckpointError, ProofError
from plait.models import leaves
from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.verify import logits
from plait.verify.cases import cases
from plait.verify.ours import Loader, of_megatron
from plait.verify.reference import of_transformers
from plait.verify.states import States

Rows = dict[str, list[dict[str, Any]]]
"""``logits``, a row a case, and ``layers``, a row a layer; see :mod:`plait.verify.logits`."""

NOTHING: Rows = {"logits": [], "layers": []}
"""What a proof by bytes alone has of them."""

log = logging.getLogger(__name__)


def computed(reference: Path, spec: Spec, tp: int, load: Loader) -> Rows:
    """Compare what a Megatron model computes with what a Hugging Face folder does, layer by layer.

    Args:
        reference: the folder.
        spec: the model.
        tp: tensor parallel ranks of the Megatron model.
        load: loads a layer of it.

    Raises:
        ProofError: a rank failed, or the folder carries code that plait did not write.
    """
    inputs = cases(spec)
    with tempfile.TemporaryDirectory() as folder:
        states = States(Path(folder))
        theirs = of_transformers(reference, inputs, states)
        ours, differences = of_megatron(spec, tp, load, inputs, states)
    rows = logits.compare(inputs, theirs, ours, depth=spec.num_layers)
    return {"logits": rows, "layers": logits.of_layers(differences)}


def prove_converted(
    reference: Path, artifact: Path, proof: Path, *, by: Literal["logits", "bytes"] = "logits"
) -> dict[str, Any]:
    """Prove a whole or sharded Megatron model against the Hugging Face folder it was made from.

    Args:
        reference: the folder.
        artifact: the model.
        proof: what is written.
        by: by its logits, or by its bytes alone, which the proof then says.

    Raises:
        ProofError: the artifact does not compute what the reference computes; nothing is written.
    """
    manifest = files.check_manifest(artifact)
    facts = manifest["facts"]
    grid = Grid(**facts["grid"])
    spec = Spec.of(reference)
    load = Sharded(artifact, spec, grid) if manifest["kind"] == "sharded" else _Whole(artifact, spec)
    rows = computed(reference, spec, grid.tp, load) if by == "logits" else NOTHING
    facts = {**facts, "merkle": leaves.root(layouts.released(artifact, spec, grid).stream())}
    root = files.check_manifest(reference)["facts"]["merkle"]
    return write(proof, artifact, facts=facts, reference=reference, root=root, rows=rows)


def prove_export(
    iteration: Path,
    folder: Path,
    export: layout.Export,
    *,
    facts: dict[str, Any],
    by: Literal["logits", "bytes"] = "logits",
) -> dict[str, Any]:
    """Prove a Hugging Face folder against the checkpoint it was made from, on the checkpoint's grid.

    Args:
        iteration: the checkpoint.
        folder: the folder, not yet in its place.
        export: its place.
        facts: ``merkle`` and ``coverage`` of the folder.
        by: as :func:`prove_converted`.

    Returns:
        The facts, with the checkpoint's grid, and whether bytes alone prove it or what it comes from.

    Raises:
        ProofError: the two differ; nothing is written.
    """
    trained = files.check_manifest(iteration)["facts"]
    spec = Spec.of(folder)
    grid = Grid(**trained["grid"])
    load = Trained(iteration, spec, grid)
    rows = computed(folder, spec, grid.tp, load) if by == "logits" else NOTHING
    root = leaves.root(layouts.of_hf(folder, spec).stream())
    known = {**facts, **files.stamp(iteration), "grid": trained["grid"], "merkle": root}
    parity = write(
        Path(export.proof), str(export), facts=known, reference=iteration, root=trained["merkle"], rows=rows
    )
    return known | ({} if parity["proof"] == "logits" else {"proof": parity["proof"]})


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
    facts |= files.stamp(export)
    root, rows = known["facts"]["merkle"], {name: parity[name] for name in ("logits", "layers")}
    return write(proof, iteration, facts=facts, reference=export, root=root, rows=rows)


def write(
    proof: Path,
    artifact: Path | str,
    *,
    facts: dict[str, Any],
    reference: Path | str,
    root: str,
    rows: Rows,
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
        **rows,
        "proof": "bytes" if not rows["logits"] else facts.get("proof", "logits"),
        "passed": True,
    }
    files.write_json(proof, parity)
    worst = max((row["max_abs_diff"] for row in rows["logits"]), default=None)
    told = "by bytes alone" if worst is None else f"logits within {worst:.2g} of transformers"
    log.info("%s: proven; merkle %s, %s", artifact, root[:16], told)
    return parity


def _check(artifact: Path | str, *, facts: dict[str, Any], root: str, rows: Rows) -> None:
    wrong = logits.failures(rows["logits"], rows["layers"])
    if facts["merkle"] != root:
        wrong.append(f"merkle root {facts['merkle'][:16]} of its Hugging Face view, reference {root[:16]}")
    if not (facts["coverage"]["written_once"] and facts["coverage"]["read_once"]):
        wrong.append(f"coverage is not complete: {facts['coverage']}")
    if wrong:
        raise ProofError(f"{artifact} failed its proof: " + "; ".join(wrong), hint="do not use it")


class _Whole:
    """Loads a layer of a whole model on one rank, which pads its vocabulary as any grid does."""

    def __init__(self, folder: Path, spec: Spec) -> None:
        self.spec = spec
        self.whole = layouts.whole(layouts.released(folder, spec, Grid()), spec)

    def __call__(self, stage: Any, layer: int) -> None:
        from plait.train.build import load_weights

        load_weights(stage, engine.cut(self.whole, self.spec, Grid(1, self.spec.num_layers), 0, layer))


class Sharded:
    """Loads a layer of a rank from Megatron's classic layout; Megatron says which file it stands in."""

    def __init__(self, folder: Path, spec: Spec, grid: Grid) -> None:
        """Take the folder, its model and its grid."""
        self.folder, self.spec, self.grid = folder, spec, grid

    def __call__(self, stage: Any, layer: int) -> None:
        """Load it."""
        from megatron.core import parallel_state

        from plait.train.build import layers_of, load_weights

        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        stages = [layers_of(self.spec, self.grid, pp_rank) for pp_rank in range(self.grid.pp)]
        pp_rank = next(number for number, layers in enumerate(stages) if layer in layers)
        held = checkpoint.read_rank(self.folder, self.grid, tp_rank, pp_rank)
        load_weights(stage, _alone(held, stage, layer - stages[pp_rank].start, len(stages[pp_rank])))


def _alone(held: Mapping[str, Tensor], stage: Any, layer: int, layers: int) -> dict[str, Tensor]:
    """A layer of a rank's, and its ends that the stage has, by the names of a stage of one layer.

    A rank with both ends of a tied model has one matrix for them.

    Raises:
        CheckpointError: the rank has other layers than Megatron gives it.
    """
    below = "language_model." if hasattr(stage, "language_model") else ""
    stack, head = f"{below}decoder.layers.", f"{below}output_layer.weight"
    numbers = {int(name.removeprefix(stack).split(".")[0]) for name in held if name.startswith(stack)}
    if numbers != set(range(layers)):
        raise CheckpointError(f"a rank has layers {sorted(numbers)}, Megatron looks there for {layers}")
    own = {name for name in stage.state_dict() if not name.startswith(stack)}
    found = {name: held[name] for name in own & set(held)}
    here = f"{stack}{layer}."
    for name in held:
        if name.startswith(here):
            found[f"{stack}0.{name.removeprefix(here)}"] = held[name]
    embedding = f"{below}embedding.word_embeddings.weight"
    if head in own - set(held) and embedding in held:
        found[head] = held[embedding]
    return found


class Trained:
    """Loads a layer of a training checkpoint: by Megatron's reader where it wrote it, ours where classic."""

    def __init__(self, folder: Path, spec: Spec, grid: Grid) -> None:
        """Take the iteration's folder, its model and its grid."""
        self.folder, self.spec, self.grid = folder, spec, grid

    def __call__(self, stage: Any, layer: int) -> None:
        """Load it."""
        from megatron.core import parallel_state

        from plait.train.build import load_weights
        from plait.train.state import load_model

        if (self.folder / METADATA).is_file():
            load_model([stage], self.folder, whole=False)
            return
        whole = layouts.whole(layouts.trained(self.folder, self.spec), self.spec)
        stages = Grid(self.grid.tp, self.spec.num_layers)
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        load_weights(stage, engine.cut(whole, self.spec, stages, tp_rank, layer))
