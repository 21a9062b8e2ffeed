"""Logits by transformers, the model class that users load, with one layer of it in memory at a time.

Its first part has the embedding, the tower and the first layer; its last the norm and the head. Each is a
model of transformers' own class with one layer, loaded by transformers' own reader.

B = sequences, S = tokens, D = hidden size, V = vocabulary.
"""

import gc
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait import files
from plait.errors import ProofError
from plait.models import remote
from plait.models.specs import EMBEDDING, HEAD, LANGUAGE_MODEL, Spec
from plait.models.weights import FolderTensors
from plait.verify.cases import Case
from plait.verify.states import PRECISIONS, Logits, States

LAYERS = "model.layers."


def of_transformers(folder: Path, inputs: list[Case], states: States | None = None) -> Logits:
    """Logits by the model class that users load; what its layers give is kept in ``states``.

    Raises:
        ProofError: the folder carries code that plait did not write.
    """
    hidden: dict[torch.dtype, list[Any]] = {dtype: [None] * len(inputs) for dtype in PRECISIONS}
    logits: dict[torch.dtype, list[Any]] = {dtype: [None] * len(inputs) for dtype in PRECISIONS}
    with torch.no_grad():
        for layer, model in enumerate(parts(folder)):
            for dtype in PRECISIONS:
                _compute_in(model, dtype)
                for number, case in enumerate(inputs):
                    given, logits[dtype][number] = _by_documents(model, case, hidden[dtype][number])
                    hidden[dtype][number] = given
                    if states is not None:
                        states.keep(given, dtype=dtype, case=number, layer=layer)
            del model
            gc.collect()  # its modules know each other: the next layer would find it still there
    return logits


def parts(folder: Path) -> Iterator[Any]:
    """A model's layers, each as a model of one layer in fp32; only the last of them has logits.

    Raises:
        ProofError: the folder carries code that plait did not write, or lacks what transformers looks for.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    trusted, spec = carries_our_code(folder), Spec.of(folder)
    with tempfile.TemporaryDirectory() as modules:
        os.environ.setdefault("HF_MODULES_CACHE", modules)
        for layer in range(spec.num_layers):
            yield _part(folder, spec, layer, trusted=trusted)


def _part(folder: Path, spec: Spec, layer: int, *, trusted: bool) -> Any:
    """One layer.

    Its files are read by the safetensors library, not by the reader that conversion has.

    Its embedding and its head are one matrix: the first part has no use for the head, and the last for the
    embedding; those between have none for either, and a vocabulary of one token.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    first, last = layer == 0, layer == spec.num_layers - 1
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    kind = AutoModelForImageTextToText if first and spec.vision else AutoModelForCausalLM
    text = config.get_text_config()
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[layer]]
    if not (first or last):
        text.vocab_size, text.pad_token_id = 1, None
    if not (first and last):
        config.tie_word_embeddings = text.tie_word_embeddings = True
    config = config if first else text
    with torch.device("meta"):
        own = type(kind.from_config(config, trust_remote_code=trusted))
    model, told = own.from_pretrained(
        None,
        config=config,
        state_dict=_tensors(FolderTensors(folder), spec, layer),
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    wrong = {key: sorted(names) for key, names in told.items() if names}
    if wrong:
        raise ProofError(f"transformers looks for other tensors in layer {layer} of {folder}: {wrong}")
    if spec.num_experts:
        model.set_experts_implementation("eager")  # its grouped products are not of fp64
    return model.eval()


def _tensors(weights: FolderTensors, spec: Spec, layer: int) -> dict[str, Tensor]:
    """A layer's tensors under the names of the first, and what the model has beside layers.

    The files are opened for each layer: pages of those before would else stay in memory.
    """
    first, last = layer == 0, layer == spec.num_layers - 1
    below = LANGUAGE_MODEL if spec.vision else ""
    own = below if first else ""
    ends, others, here = {below + EMBEDDING, below + HEAD}, below + LAYERS, f"{below}{LAYERS}{layer}."
    found = {}
    for name in weights:
        if name.startswith(here):
            found[f"{own}{LAYERS}0.{name.removeprefix(here)}"] = weights[name].float()
        elif name not in ends and not name.startswith(others) and (first or name.startswith(below)):
            found[own + name.removeprefix(below) if name.startswith(below) else name] = weights[name].float()
    if first and last and not spec.tied:
        found[own + HEAD] = weights[below + HEAD].float()
    if first or last:
        matrix = HEAD if last and not first and not spec.tied else EMBEDDING
        found[own + EMBEDDING] = weights[below + matrix].float()
    else:
        found[own + EMBEDDING] = torch.zeros(1, spec.hidden_size)
    return found


def _compute_in(model: Any, dtype: torch.dtype) -> None:
    """Take sums in a type.

    Eager attention takes its softmax in fp32, whatever it is given, and so do norms their sums; sdpa and
    :func:`_norm` take them in fp64.
    """
    model.set_attn_implementation("sdpa" if dtype == torch.float64 else "eager")
    for norm in (one for one in model.modules() if hasattr(one, "variance_epsilon")):
        norm.forward = partial(_norm, norm) if dtype == torch.float64 else norm.forward
    model.to(dtype)


def _norm(norm: Any, states: Tensor) -> Tensor:
    """RMSNorm in the type of its input: in fp32 it alone moved the logits of a trained model by 9e-5."""
    spread = states.pow(2).mean(-1, keepdim=True)
    found: Tensor = norm.weight * (states * torch.rsqrt(spread + norm.variance_epsilon))
    return found


def _by_documents(model: Any, case: Case, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a layer gives [B, S, D], and the logits; of every document by itself, laid end to end.

    Args:
        model: the layer.
        case: the input.
        before: what the layer before gave, [B, S, D]; None before the first.
    """
    _, lengths = case.documents[0].unique_consecutive(return_counts=True)
    given: list[Tensor] = []
    hook = model.get_decoder().layers[0].register_forward_hook(lambda *of: given.append(of[2]))
    if before is None:
        calls = [{"input_ids": ids} | _seen(model, case) for ids in case.input_ids.split(lengths.tolist(), 1)]
    else:
        calls = [{"inputs_embeds": states} for states in before.split(lengths.tolist(), 1)]
    logits = [model(**call, use_cache=False).logits for call in calls]
    hook.remove()
    return torch.cat(given, dim=1), torch.cat(logits, dim=1)


def _seen(model: Any, case: Case) -> dict[str, Tensor]:
    """The pictures of a case, as the model's class is given them."""
    if case.pictures is None or case.picture_rows is None:
        return {}
    pictures = case.pictures.to(model.dtype)
    if case.pictures.dim() == 2:
        return {"vision_patches": pictures, "vision_patch_indices": case.picture_rows}
    return {"pixel_values": pictures}


def carries_our_code(folder: Path) -> bool:
    """Whether the folder has modelling code; it is run only if it is byte for byte plait's."""
    found = sorted(folder.glob("*.py"))
    for path in found:
        ours = Path(remote.__path__[0]) / path.name
        if not ours.is_file() or files.digest(ours) != files.digest(path):
            raise ProofError(f"{path} is not plait's own code, and is not run")
    return bool(found)
