"""``config/hub.lock.json``: which commit a revision of the hub is, and the digests of its files.

    {"models/us/tiny@main": {"commit": "0123...", "files": {"config.json": {"bytes": 571, "git_sha1": "..."},
                                                            "model.safetensors": {..., "sha256": "..."}}},
     "https://example.org/talks.tgz": {"bytes": 1234, "sha256": "..."}}

Planning reads it and asks nobody. What it lacks is resolved by ``plait lock``, which keeps a record of each
tree beside its files too: a job on another machine finds it there.
"""

from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import Field, NonNegativeInt, ValidationError

from plait import layout
from plait.config.base import Strict
from plait.config.gguf import GgufModel
from plait.config.hub import HubData, HubModel, UrlData
from plait.errors import ConfigError, LayoutError
from plait.files import read_json

LOCK = "config/hub.lock.json"
MODEL_FILES = ("*.json", "*.jinja", "tokenizer.model", "*.txt")
WEIGHTS = ("model*.safetensors", "*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
"""The first of these that matches counts: Mistral's `consolidated.safetensors` are the same weights again."""
OTHERS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5")

Fetchable = HubModel | HubData | UrlData | GgufModel


class Listed(Strict):
    """What is known of one file: git's sha1 of a small one, the sha256 of a large one."""

    bytes: NonNegativeInt | None = None
    sha256: str = ""
    git_sha1: str = ""


class Tree(Strict):
    """A commit and its files."""

    commit: str = Field(pattern=f"^{layout.WILDCARDS['commit']}$")
    files: dict[str, Listed]


class Lock:
    """The lock file, read again whenever it has changed: a job of the same plan may have added to it."""

    def __init__(self, path: str = LOCK) -> None:
        """Nothing is read yet."""
        self.path = Path(path)
        self._seen: tuple[int, int] = (0, 0)
        self._entries: dict[str, Tree | Listed] = {}

    @property
    def entries(self) -> dict[str, Tree | Listed]:
        """Everything locked, by name.

        Raises:
            ConfigError: the file is not what a lock is.
        """
        if not self.path.is_file():
            return {}
        stat = self.path.stat()
        if self._seen != (stat.st_mtime_ns, stat.st_size):
            found = read_json(self.path)
            self._entries = {key: _entry(self.path, key, entry) for key, entry in dict(found).items()}
            self._seen = (stat.st_mtime_ns, stat.st_size)
        return self._entries

    def tree(self, tree: layout.HubTree) -> Tree | None:
        """The commit and files of a revision; None where nobody has asked the hub yet."""
        found = self.entries.get(tree.key)
        if found is None and Path(str(tree)).is_file():
            found = _entry(Path(str(tree)), tree.key, read_json(str(tree)))
        return found if isinstance(found, Tree) else None

    def url(self, source: UrlData) -> Listed:
        """What is known of the file of a URL: what config/ says, or what the first fetch found."""
        found = self.entries.get(source.url)
        if source.sha256:
            same = isinstance(found, Listed) and found.sha256 == source.sha256
            return found if same and isinstance(found, Listed) else Listed(sha256=source.sha256)
        return found if isinstance(found, Listed) else Listed()

    def commit(self, source: Fetchable) -> str:
        """The commit of a source of the hub; empty where it is not locked, or is of no hub."""
        tree = self.tree(source.tree) if isinstance(source, HubModel | HubData) else None
        return tree.commit if tree else ""

    def files(self, source: Fetchable, where: str) -> list[layout.HubFile] | None:
        """The files that a source is made from; None where it is not locked.

        Args:
            source: an entry of config/.
            where: its place in config/, for the sentence of an error.

        Raises:
            ConfigError: the repository does not have them.
        """
        if isinstance(source, UrlData):
            return [layout.HubFile.of_url(source.url)]
        if isinstance(source, GgufModel):
            return [source.place] if source.place else []
        tree = self.tree(source.tree)
        if tree is None:
            return None
        names = _of_model(source, tree) if isinstance(source, HubModel) else _of_data(source, tree, where)
        return [layout.HubFile(repo=source.tree.repo, commit=tree.commit, file=name) for name in names]

    def listed(self, file: layout.HubFile) -> Listed | None:
        """What the hub lists of one file; None where no entry has its commit."""
        repo = file.repo.replace("--", "/", 2) + "@"
        trees = [self.tree(layout.HubTree(repo=file.repo, revision=path.stem)) for path in _records(file)]
        trees += [
            tree for key, tree in self.entries.items() if key.startswith(repo) and isinstance(tree, Tree)
        ]
        found = (tree.files.get(file.file) for tree in trees if tree and tree.commit == file.commit)
        return next((one for one in found if one), None)


def _records(file: layout.HubFile) -> list[Path]:
    folder = Path(layout.HubTree(repo=file.repo, revision="main").manifest).parent
    return sorted(path for path in folder.glob("*.json") if layout.HubTree.read(str(path)))


def _entry(path: Path, key: str, found: object) -> Tree | Listed:
    try:
        return (Listed if key.startswith("http") else Tree).model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path}: {key}: {place}: {first['msg']}", hint="remove the entry; `plait lock` writes it again"
        ) from error


def _of_model(source: HubModel, tree: Tree) -> list[str]:
    """The files that a model needs; the same weights in other forms are not among them.

    Raises:
        ConfigError: it has no weights that plait reads.
    """
    names = [name for name in tree.files if "/" not in name]
    weights = next(filter(None, ([n for n in names if fnmatchcase(n, kind)] for kind in WEIGHTS)), [])
    if not weights:
        others = [name for name in names if any(fnmatchcase(name, kind) for kind in OTHERS)]
        raise ConfigError(
            f"{source.repo} has no safetensors and no pytorch_model.bin"
            f"{f', only {others[0]} and the like' if others else ''}",
            hint="name a revision or a repository that has one of them",
        )
    others = [name for name in names if any(fnmatchcase(name, kind) for kind in MODEL_FILES)]
    return sorted(name for name in {*weights, *others} if not name.startswith("."))


def _of_data(source: HubData, tree: Tree, where: str) -> list[str]:
    """The files that a pattern of the source matches.

    Raises:
        ConfigError: a pattern matches none, or a file whose name cannot be that of an artifact.
    """
    found: set[str] = set()
    for pattern in source.files:
        names = [name for name in tree.files if fnmatchcase(name, pattern)]
        if not names:
            some = ", ".join(sorted(tree.files)[:8])
            raise ConfigError(
                f"{where}: {source.repo} at {tree.commit[:12]} has no file {pattern!r}", hint=f"it has {some}"
            )
        found.update(names)
    for name in found:
        try:
            str(layout.HubFile(repo=source.tree.repo, commit=tree.commit, file=name))
        except LayoutError as error:
            raise ConfigError(
                f"{where}: {source.repo} has a file {name!r}, which plait cannot name"
            ) from error
    return sorted(found)
