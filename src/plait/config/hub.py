"""What config/ may take from the Hugging Face hub and from URLs."""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, StringConstraints, field_validator, model_validator

from plait.config.base import Share, Strict
from plait.config.shapes import Shape
from plait.errors import LayoutError
from plait.layout import HubFile, HubTree

AsKind = Literal["chat-jsonl", "llava-json", "tars"]
Sha256 = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")]
AS_KIND = "how the files are read; pictures of a llava-json may lie in one zip, parquet becomes chat-jsonl"
SHAPE = "in place of as_kind: what their records are, a name or a Python file of yours"
DRAWN = "share of a shape's records that is kept; which they are follows from their number alone"


class Shaped(Strict):
    """Files from afar that may be read by a shape."""

    shape: Shape | None = Field(None, description=SHAPE)
    share: Share = Field(1.0, description=DRAWN)

    @model_validator(mode="after")
    def _read_in_one_way(self) -> Self:
        if self.shape and getattr(self, "as_kind", "") != "chat-jsonl":
            raise ValueError("as_kind and shape both say how the files are read: give one")
        if not self.shape and self.share < 1:
            raise ValueError("share is of records that a shape reads, and there is none")
        return self


class HubRepo(Strict):
    """A repository of the hub at one revision."""

    repo: str = Field(pattern=r"^\w[\w.-]*/\w[\w.-]*$", description="owner/name")
    revision: str = Field(
        "main",
        pattern=r"^\w[\w./-]*$",
        description="a commit, tag or branch; `config/hub.lock.json` keeps the commit that it was at first",
    )

    @field_validator("repo", "revision")
    @classmethod
    def _can_be_a_path(cls, name: str) -> str:
        if ".." in name or "--" in name:
            raise ValueError(f"{name!r} is no name of the hub: it has `..` or `--`")
        return name


class HubModel(HubRepo):
    """A model of the Hugging Face hub, fetched at one commit and checked file by file."""

    kind: Literal["hub"]

    @property
    def tree(self) -> HubTree:
        """What the lock calls it."""
        return HubTree.of("models", self.repo, self.revision)


class HubData(HubRepo, Shaped):
    """Files of a dataset of the Hugging Face hub, fetched at one commit and checked one by one."""

    kind: Literal["hub"]
    files: tuple[str, ...] = Field(
        description="names or patterns of files, e.g. [data/codeact-*.parquet]", min_length=1
    )
    as_kind: AsKind = Field("chat-jsonl", description=AS_KIND)

    @property
    def tree(self) -> HubTree:
        """What the lock calls it."""
        return HubTree.of("datasets", self.repo, self.revision)


class UrlData(Shaped):
    """A file behind a URL: zip, tar, tgz, tar.bz2 and tar.xz are unpacked, any other is read as it is."""

    kind: Literal["url"]
    url: str = Field(description="http(s)://...; no user or password, which every log would show")
    sha256: Sha256 = Field("", description="its digest; empty: that of the first fetch is locked")
    as_kind: AsKind = Field("chat-jsonl", description=AS_KIND)
    max_unpacked_gb: PositiveInt = Field(200, description="an archive that unpacks to more is refused")
    max_files: PositiveInt = Field(2_000_000, description="an archive of more files is refused")

    @model_validator(mode="after")
    def _can_be_fetched(self) -> Self:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.url!r} is no http or https URL")
        if parts.username or parts.password:
            raise ValueError("a URL with a user or a password in it would stand in every log")
        try:
            str(HubFile.of_url(self.url))
        except LayoutError as error:
            raise ValueError(f"{self.url!r} does not end in the name of a file") from error
        return self
