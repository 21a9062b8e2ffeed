"""What stands somewhere else and takes the place of an artifact: the key ``given``."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from plait import layout
from plait.errors import LayoutError


def _target(path: str) -> str:
    try:
        artifact = layout.parse(path)
    except LayoutError as error:
        raise ValueError(str(error)) from error
    if not isinstance(artifact, layout.ADOPTABLE):
        known = ", ".join(kind.PATTERN for kind in layout.ADOPTABLE)
        raise ValueError(  # noqa: TRY004 - pydantic shows no other
            f"{path} is made here and never given; what may be is {known}"
        )
    return str(artifact)


def _absolute(path: str) -> str:
    if not Path(path).is_absolute():
        raise ValueError(f"{path!r} is not an absolute path")
    return path


Target = Annotated[str, AfterValidator(_target)]
Elsewhere = Annotated[str, AfterValidator(_absolute)]
