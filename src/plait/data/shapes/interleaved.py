"""Documents with pictures between their texts.

MMC4: ``{"text_list", "image_info": [{"image_name", "raw_url", "matched_text_index"}]}``, a line each. The
pictures are by name in a folder or archive, or by address in the tars of img2dataset with its parquet files.
"""

from collections.abc import Sequence
from typing import Any

from plait.data.chat import Sample
from plait.data.shapes.common import Encoded, Shape, field, said, texts
from plait.errors import RecordError


def names(record: Any) -> Sequence[Any]:
    """Each picture's name and its address: whichever is there."""
    found = record.get("image_info") if isinstance(record, dict) else None
    return [_either(one) for one in found] if isinstance(found, list) else []


def _either(info: Any) -> Any:
    if not isinstance(info, dict):
        return None
    return [name for key in ("image_name", "raw_url") if isinstance(name := info.get(key), str)] or None


def document(record: Any, pictures: Encoded) -> Sample:
    """One turn of the assistant: each picture before the text that it matches, in their order."""
    said_texts, infos = texts(record, "text_list"), field(record, "image_info")
    if not isinstance(infos, list):
        raise RecordError("image_info is no list", reason="not_a_record")
    before: list[list[bytes]] = [[] for _ in said_texts]
    for info, picture in zip(infos, pictures, strict=True):
        index = info.get("matched_text_index") if isinstance(info, dict) else None
        if type(index) is not int or not 0 <= index < len(said_texts):
            sentence = f"a picture matches text {str(index)[:20]} of {len(said_texts)}"
            raise RecordError(sentence, reason="wrong_pictures")
        if picture is not None:
            before[index].append(picture)
    parts: list[str | bytes] = []
    for shown, words in zip(before, said_texts, strict=True):
        parts += [*shown, words]
    return Sample((said("assistant", *parts),))


def mmc4(missing: str) -> Shape:
    """MMC4's documents, without the pictures that are gone, or rejected for them."""
    return Shape(document, names, skips=missing == "skip")
