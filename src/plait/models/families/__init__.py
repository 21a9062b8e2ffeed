"""The families of language models that plait knows, a table each.

To add one: a table here, its rows in ``plait.convert.tables``, and a tiny config in the tests.
"""

from plait.models.families.family import Family
from plait.models.families.llama import LLAMA
from plait.models.families.mistral import MISTRAL
from plait.models.families.mixtral import MIXTRAL
from plait.models.families.qwen2 import QWEN2
from plait.models.families.qwen3 import QWEN3
from plait.models.families.solo import SOLO

__all__ = ["BY_ARCHITECTURE", "BY_TEXT_TYPE", "Family"]

BY_ARCHITECTURE: dict[str, Family] = {
    one.architecture: one for one in (MISTRAL, LLAMA, QWEN2, QWEN3, MIXTRAL, SOLO)
}
BY_TEXT_TYPE: dict[str, Family] = {one.model_type: one for one in (MISTRAL, LLAMA, QWEN2, QWEN3, MIXTRAL)}
"""The language models of LLaVA, by the ``model_type`` of its ``text_config``."""
