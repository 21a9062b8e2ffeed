"""What any config.json can hold: how its values are checked, and the fields that decide no number."""

from collections.abc import Collection, Mapping
from typing import Any

from plait.errors import CheckpointError

# fmt: off
NAMES = (
    "_attn_implementation_autoset", "_commit_hash", "_from_model_config", "_name_or_path", "architectures",
    "auto_map", "dtype", "torch_dtype", "model_type", "transformers_version", "transformers.js_config",
    "is_llama_config", "is_decoder", "use_cache", "use_bfloat16", "torchscript", "pretraining_tp",
    "tokenizer_class", "prefix", "max_sequence_length", "model_max_length",
)
TRAINING = (
    "initializer_range", "initializer_factor", "attention_dropout", "return_dict", "output_attentions",
    "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "id2label", "label2id",
    "finetuning_task", "problem_type", "task_specific_params",
)
GENERATION = (
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id",
    "decoder_start_token_id", "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
)
# fmt: on
INERT = frozenset((*NAMES, *TRAINING, *GENERATION))
"""Fields of all models that change nothing of what a forward pass computes: types, names, drawing, dropout
(a run has its own), generation. They stay byte for byte in hf_config.json, and come back with the export."""


def refuse_unknown(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse fields that nobody reads and that are set: they may change what the model computes.

    Raises:
        CheckpointError: there are some; they are named.
    """
    odd = sorted(name for name, value in config.items() if value and name not in INERT and name not in known)
    if odd:
        raise CheckpointError(
            f"{where} has {' and '.join(odd)}, which plait does not know: the model may compute otherwise",
            hint="if it changes nothing of what is computed, take it out of a copy of the folder",
        )


def check_size(value: Any, key: str, where: str) -> int:
    """A size of a config.

    Raises:
        CheckpointError: it is no whole number above zero.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"{where}: {key} is {value!r}, expected a whole number above 0",
            hint="plait knows models of one size in all layers and square pictures and patches only",
        )
    return value


def check_number(value: Any, key: str, where: str) -> float:
    """A number of a config.

    Raises:
        CheckpointError: it is none above zero.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"{where}: {key} is {value!r}, expected a number above 0")
    return value


def check_window(value: Any, key: str, where: str) -> int | None:
    """A window in tokens, or none.

    Raises:
        CheckpointError: it is neither.
    """
    return None if value is None else check_size(value, key, where)


def check_flag(value: Any, key: str, where: str) -> bool:
    """A yes or no; null is no.

    Raises:
        CheckpointError: it is neither.
    """
    if value not in (None, True, False):
        raise CheckpointError(f"{where}: {key} is {value!r}, expected true or false")
    return bool(value)


def part(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """A config within a config; empty where there is none.

    Raises:
        CheckpointError: it is no object.
    """
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key} is {value!r}, expected an object with keys")
    return value
