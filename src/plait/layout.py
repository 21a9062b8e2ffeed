"""The path of every artifact: written, parsed and constrained here and nowhere else.

A path says what the artifact is. Rules take their patterns and wildcards from these classes, the
command line reads ``tp``, ``pp`` and steps back from a target with :func:`parse`.

>>> str(Sharded(model="solo-tiny", tp=2, pp=1))
'data/models/sharded/solo-tiny-megatron-tp2-pp1'
>>> parse("data/models/sharded/solo-tiny-megatron-tp2-pp1").tp
2
>>> Iteration(run="x", iteration=100).proof
'data/verify/ckpts/x/iter_0000100/parity.json'
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cache
from itertools import groupby, takewhile
from typing import Any, ClassVar, Self
from urllib.parse import quote, unquote, urlsplit

from plait.errors import LayoutError

TENSORS = "tensors.json"
"""Beside the files of a model: each tensor of its Hugging Face view, with type, shape and digest."""
MANIFEST = "plait.json"
FAST = "tokenizer.json"
"""A tokenizer as transformers' fast ones have it."""
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SAMPLES = "samples"
TRAINED_WITH = "run.json"
PRUNED = "pruned.json"
"""Which files of an artifact were removed on purpose, and why."""
OPTIMIZER = "optimizer"
WEIGHT_FILES, OPTIMIZER_FILES = "__*.distcp", f"{OPTIMIZER}__*.distcp"
"""What the ranks of a run write: each its weights in one file, and its optimizer's state in another."""
LOADER_FILES = "train_dataloader_dprank*.json"
"""Where a run stands in each of its streams of samples."""
HF_CONFIG = "hf_config.json"
HF_PREPROCESSOR = "hf_preprocessor_config.json"
CARRIED = "carried.safetensors"
TRACKER = "latest_checkpointed_iteration.txt"
NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
NUMBER = r"[1-9]\d*"
SEGMENT = r"[^\x00-\x1f/.\x7b\x7d\\][^\x00-\x1f/\x7b\x7d\\]*"
"""A folder or file of the hub: it does not begin with a dot and has no braces, which are Snakemake's."""

WILDCARDS: dict[str, str] = {
    "dataset": NAME,
    **dict.fromkeys(("shard", "first", "last"), r"\d{5}"),
    "format": r"[A-Za-z0-9][A-Za-z0-9.+-]*",
    "seq": NUMBER,
    "mixture": NAME,
    "tokenizer": NAME,
    "model": NAME,
    "tp": NUMBER,
    "pp": NUMBER,
    "run": NAME,
    "iteration": r"\d{7}",
    "step": NUMBER,
    "repo": r"(?:(?:models|datasets)--[\w.-]+--[\w.-]+|(?:urls|packages)--[\w.-]+)",
    "commit": r"[0-9a-f]{40}",
    "revision": r"\w[\w.%-]*",
    "file": rf"(?:{SEGMENT}/)*{SEGMENT}",
    "part": NUMBER,
    "parts": NUMBER,
}
WIDTHS = {"shard": 5, "first": 5, "last": 5, "iteration": 7}
COUNTED = "a number from 1 without leading zeros"
IN_WORDS = {
    "shard": "five digits",
    "iteration": "seven digits",
    "seq": COUNTED,
    "tp": COUNTED,
    "pp": COUNTED,
    "step": COUNTED,
}


TYPES: dict[Any, dict[str, Any]] = {}


def _types(kind: type[Any]) -> dict[str, Any]:
    """The fields of a class of artifacts and their types: asked for thousands of times."""
    if kind not in TYPES:
        TYPES[kind] = {field.name: field.type for field in fields(kind)}
    return TYPES[kind]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A file or folder whose name says what it is."""

    PATTERN: ClassVar[str]
    MARKS: ClassVar[tuple[str, ...]] = (MANIFEST,)
    """Files by which plait knows a folder of its own."""

    def __str__(self) -> str:
        """Write the path, and refuse a name that would be read back as something else."""
        values = {name: getattr(self, name) for name in _types(type(self))}
        path = self.PATTERN.format(
            **{k: f"{v:0{WIDTHS.get(k, 1)}d}" if isinstance(v, int) else v for k, v in values.items()}
        )
        if self.read(path) != self:
            kind = type(self).__name__
            raise LayoutError(f"{values} cannot name a {kind}: {path!r} would be read otherwise")
        return path

    @classmethod
    def read(cls, path: str) -> Self | None:
        """Read a path of this kind; None where it is not one."""
        match = _regex(cls.PATTERN).fullmatch(path)
        if match is None:
            return None
        types = _types(cls)
        return cls(**{k: int(v) if types[k] is int else v for k, v in match.groupdict().items()})

    @classmethod
    def parse(cls, path: str | os.PathLike[str]) -> Self:
        """Read a path of this kind.

        Raises:
            LayoutError: the path is of another kind.
        """
        relative = inside(path)
        found = cls.read(relative)
        if found is None:
            name = cls.__name__
            raise LayoutError(f"{relative!r} is not a {name} path", hint=f"expected {cls.PATTERN}")
        return found

    @property
    def manifest(self) -> str:
        """The manifest of this artifact: written last, what other rules depend on."""
        return f"{self}/{MANIFEST}"

    @property
    def proof(self) -> str:
        """The proof of this artifact."""
        return proof_of(str(self))

    @property
    def parts(self) -> str:
        """Where several jobs that make it together leave what they have, until one more joins it."""
        folder, _, name = str(self).rpartition("/")
        return f"{folder}/.{name}.parts"

    def part(self, number: int, of: int) -> str:
        """What one of these jobs says when it is done."""
        return f"{self.parts}/{number}-of-{of}.json"


@dataclass(frozen=True, kw_only=True)
class Raw(Artifact):
    """A raw source: fetched, linked or built in."""

    PATTERN = "data/raw/{dataset}"
    dataset: str


@dataclass(frozen=True, kw_only=True)
class HubTree(Artifact):
    """Which commit a revision of a repository is, and what its files are."""

    PATTERN = "data/hub/{repo}/{revision}.json"
    repo: str
    revision: str

    @classmethod
    def of(cls, kind: str, repo: str, revision: str) -> Self:
        """That of a repository; a revision may have slashes.

        >>> str(HubTree.of("models", "us/tiny", "refs/pr/1"))
        'data/hub/models--us--tiny/refs%2Fpr%2F1.json'
        """
        return cls(repo=f"{kind}--{repo.replace('/', '--')}", revision=quote(revision, safe=""))

    @property
    def key(self) -> str:
        """Its name in the lock file, e.g. ``models/us/tiny@main``."""
        return f"{self.repo.replace('--', '/', 2)}@{unquote(self.revision)}"

    @property
    def manifest(self) -> str:
        """A file stands for itself."""
        return str(self)


@dataclass(frozen=True, kw_only=True)
class HubFile(Artifact):
    """One file of a commit of the hub; of a URL or a package ``commit`` is the sha1 of what names it."""

    PATTERN = "data/hub/{repo}/{commit}/{file}"
    CHECKED = "data/hub/{repo}/{commit}.checked/{file}.json"
    repo: str
    commit: str
    file: str

    @classmethod
    def of_url(cls, url: str) -> Self:
        """The file of a URL.

        >>> str(HubFile.of_url("https://example.org/a/pictures.zip?version=2"))
        'data/hub/urls--example.org/dc08eab065252a36f9e8380a300a75aa94bd9ba4/pictures.zip'
        """
        parts = urlsplit(url)
        name = unquote(parts.path).rpartition("/")[2] or "index"
        commit = hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()
        return cls(repo=f"urls--{parts.hostname}", commit=commit, file=name)

    @classmethod
    def of_package(cls, package: str, file: str) -> Self:
        """A file inside the wheel of a package, which is given as ``name==version``.

        >>> str(HubFile.of_package("tiny==1.0", "tiny/model.gguf"))
        'data/hub/packages--tiny/37f01daca07078b4bc778d94b742c66043796bb9/model.gguf'
        """
        commit = hashlib.sha1(f"{package} {file}".encode(), usedforsecurity=False).hexdigest()
        name = package.partition("==")[0]
        return cls(repo=f"packages--{name}", commit=commit, file=file.rpartition("/")[2])

    @property
    def manifest(self) -> str:
        """Size and digests of the file as they were checked."""
        return self.CHECKED.format(repo=self.repo, commit=self.commit, file=self.file)


@dataclass(frozen=True, kw_only=True)
class Chat(Artifact):
    """One shard of chat records with base64 pictures; its ledger is its manifest."""

    PATTERN = "data/processed/{dataset}/shard_{shard}.jsonl.gz"
    LEDGER = "data/processed/{dataset}/shard_{shard}.ledger.json"
    REJECTS = "data/processed/{dataset}/shard_{shard}.rejects.jsonl"
    dataset: str
    shard: int

    @property
    def manifest(self) -> str:
        """Counts and digest of the shard: kept + rejected = read."""
        return str(self).removesuffix(".jsonl.gz") + ".ledger.json"

    @property
    def rejects(self) -> str:
        """The rejected lines with file, line number and reason."""
        return str(self).removesuffix(".jsonl.gz") + ".rejects.jsonl"


def said_of(chat: str) -> str:
    """What a file of chat records has beside it to be compared by; of few records there is none."""
    return chat.removesuffix(".jsonl.gz") + ".said"


@dataclass(frozen=True, kw_only=True)
class Tokenizer(Artifact):
    """A tokenizer with its added tokens and chat template."""

    PATTERN = "data/tokenizers/{tokenizer}"
    tokenizer: str


@dataclass(frozen=True, kw_only=True)
class Indexed(Artifact):
    """One shard of packed Megatron indexed data."""

    PATTERN = "data/megatron_format/{format}_{dataset}_pack{seq}/shard_{shard}"
    format: str
    dataset: str
    seq: int
    shard: int


@dataclass(frozen=True, kw_only=True)
class Batch(Artifact):
    """Consecutive shards that one job makes; it is there once they all are, and says which."""

    OF: ClassVar[type[Any]]
    first: int
    last: int

    @property
    def manifest(self) -> str:
        """A file stands for itself."""
        return str(self)

    @property
    def shards(self) -> "list[Any]":
        """Its shards, in order."""
        values = {name: getattr(self, name) for name in _types(type(self))}
        first, last = values.pop("first"), values.pop("last")
        return [self.OF(**values, shard=number) for number in range(first, last + 1)]

    @classmethod
    def between(cls, first: Any, last: Any) -> Self:
        """The batch from one shard to another of the same kind and dataset."""
        values = {name: getattr(first, name) for name in _types(type(first))}
        return cls(**values | {"first": values.pop("shard"), "last": last.shard})


@dataclass(frozen=True, kw_only=True)
class ChatBatch(Batch):
    """Shards of chat records."""

    PATTERN = "data/processed/{dataset}/.batches/{first}-{last}.json"
    OF = Chat
    dataset: str


@dataclass(frozen=True, kw_only=True)
class IndexedBatch(Batch):
    """Shards of packed Megatron indexed data."""

    PATTERN = "data/megatron_format/{format}_{dataset}_pack{seq}/.batches/{first}-{last}.json"
    OF = Indexed
    format: str
    dataset: str
    seq: int


BATCHES: dict[type[Artifact], type[Batch]] = {Chat: ChatBatch, Indexed: IndexedBatch}
"""What is made in shards, and how several of them are named."""


@dataclass(frozen=True, kw_only=True)
class Energon(Artifact):
    """A dataset as webdataset shards, prepared for megatron-energon."""

    PATTERN = "data/energon/{dataset}"
    dataset: str


@dataclass(frozen=True, kw_only=True)
class Analysis(Artifact):
    """Token counts, pictures and sampling weights of a mixture."""

    PATTERN = "data/analysis/{mixture}"
    mixture: str


@dataclass(frozen=True, kw_only=True)
class HfModel(Artifact):
    """A Hugging Face model: downloaded, linked, made or built."""

    PATTERN = "data/models/raw_hf/{model}"
    model: str


@dataclass(frozen=True, kw_only=True)
class Megatron(Artifact):
    """A whole Megatron model."""

    PATTERN = "data/models/raw/{model}-megatron"
    model: str


@dataclass(frozen=True, kw_only=True)
class Sharded(Artifact):
    """A Megatron model cut for one tensor x pipeline grid."""

    PATTERN = "data/models/sharded/{model}-megatron-tp{tp}-pp{pp}"
    model: str
    tp: int
    pp: int


@dataclass(frozen=True, kw_only=True)
class Run(Artifact):
    """The folder of a training run."""

    PATTERN = "data/ckpts/{run}"
    run: str

    @property
    def schedule(self) -> str:
        """Iterations in all and between two checkpoints, as the data give them."""
        return f"{self}/schedule.json"

    @property
    def metrics(self) -> str:
        """One line an iteration, written while the run trains; no stage's declared output."""
        return f"{self}/{METRICS}"

    @property
    def samples(self) -> str:
        """Which samples each iteration saw: a file a copy of the model, written while the run trains."""
        return f"{self}/{SAMPLES}"

    @property
    def leaks(self) -> str:
        """The packed samples that it evaluates and trains, as its last job found them."""
        return f"{self}/leaks.jsonl"

    @property
    def states(self) -> str:
        """States against a crash, no stage's outputs; they are gone with the next checkpoint."""
        return f"{self}/.state"

    @property
    def saved(self) -> str:
        """Whole checkpoints that a job wrote and whose own jobs have still to move into place."""
        return f"{self}/.saved"


@dataclass(frozen=True, kw_only=True)
class Iteration(Artifact):
    """A persistent training checkpoint."""

    PATTERN = "data/ckpts/{run}/iter_{iteration}"
    # Snakemake takes the manifest away before a rerun, not the rest.
    MARKS = (MANIFEST, TRAINED_WITH)
    run: str
    iteration: int

    @property
    def export(self) -> "Export":
        """The Hugging Face folder that is made from it."""
        return Export(run=self.run, step=self.iteration)


@dataclass(frozen=True, kw_only=True)
class Export(Artifact):
    """A trained model as a Hugging Face folder."""

    PATTERN = "data/ckpts/{run}/hf/model_iter_{step}"
    run: str
    step: int

    @property
    def short(self) -> str:
        """The link by which the same folder is known outside data/."""
        return str(self).removeprefix("data/")

    @property
    def iteration(self) -> Iteration:
        """The training checkpoint that it is made from."""
        return Iteration(run=self.run, iteration=self.step)


@dataclass(frozen=True, kw_only=True)
class LossCurve(Artifact):
    """The picture of a run's losses, up to the last of its exports."""

    PATTERN = "data/reports/{run}/loss.svg"
    run: str

    @property
    def manifest(self) -> str:
        """A picture stands for itself."""
        return str(self)


@dataclass(frozen=True, kw_only=True)
class Generated(Artifact):
    """What an export answers to the prompts of its run: one line a prompt."""

    PATTERN = "data/generated/{run}/model_iter_{step}.jsonl"
    run: str
    step: int

    @property
    def manifest(self) -> str:
        """A file stands for itself."""
        return str(self)


KINDS: tuple[type[Artifact], ...] = (
    Raw, Chat, Tokenizer, Indexed, Energon, Analysis, HfModel, Sharded, Megatron, Export, Iteration, Run,
    LossCurve, Generated, HubTree, HubFile, ChatBatch, IndexedBatch,
)  # fmt: skip


ADOPTABLE: tuple[type[Artifact], ...] = (
    Raw, Chat, Indexed, Energon, HfModel, Megatron, Sharded, Iteration,
)  # fmt: skip
"""What ``plait adopt`` takes where plait did not make it."""


SPLIT: tuple[type[Artifact], ...] = (Megatron, Sharded)
"""What several jobs can make together."""


def pattern(kind: type[Artifact], suffix: str = "") -> str:
    """The Snakemake pattern of a kind of artifact, or of a file inside it."""
    return kind.PATTERN + (f"/{suffix}" if suffix else "")


def proof_pattern(kind: type[Artifact]) -> str:
    """The Snakemake pattern of the proof of a kind of artifact."""
    return f"data/verify/{kind.PATTERN.removeprefix('data/')}/parity.json"


def part_pattern(kind: type[Artifact]) -> str:
    """The Snakemake pattern of what a job says that makes a part of an artifact."""
    folder, _, name = kind.PATTERN.rpartition("/")
    return f"{folder}/.{name}.parts/{{part}}-of-{{parts}}.json"


def shards_of(paths: Iterable[str | os.PathLike[str]]) -> list[Any]:
    """The artifacts of paths; a batch of shards stands for each of them.

    >>> len(shards_of(["data/processed/x/.batches/00000-00002.json", "data/raw/x"]))
    4
    """
    found = map(parse, paths)
    return [one for each in found for one in (each.shards if isinstance(each, Batch) else [each])]


def spans(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The same artifacts in few words: shards in a row as one batch. Thousands would fit no command line.

    >>> spans(["data/raw/x", *(f"data/processed/x/shard_{n:05d}.jsonl.gz" for n in (0, 1, 2))])
    ['data/raw/x', 'data/processed/x/.batches/00000-00002.json']
    """

    def row(numbered: tuple[int, Any]) -> tuple[Any, ...]:
        place, one = numbered
        return (replace(one, shard=0), one.shard - place) if type(one) in BATCHES else (place,)

    rows = [[one for _, one in several] for _, several in groupby(enumerate(shards_of(paths)), row)]
    return [str(BATCHES[type(row[0])].between(row[0], row[-1]) if row[1:] else row[0]) for row in rows]


def inside(path: str | os.PathLike[str]) -> str:
    """The path relative to the working folder, normalised, without a trailing slash."""
    return os.path.relpath(os.path.abspath(path))  # noqa: PTH100 - no link may be resolved: data/ may be one


def proof_of(path: str | os.PathLike[str]) -> str:
    """Where the proof of a model stands, by the model's folder."""
    return f"data/verify/{inside(path).removeprefix('data/')}/parity.json"


def parse(path: str | os.PathLike[str]) -> Any:
    """Read any artifact's path.

    Raises:
        LayoutError: no artifact has such a path.
    """
    relative = inside(path)
    for kind in KINDS:
        found = kind.read(relative)
        if found is not None:
            return found
    known = "\n       ".join(kind.PATTERN for kind in KINDS)
    raise LayoutError(
        f"{relative!r} is not the path of an artifact{_nearest(relative)}", hint=f"one of\n       {known}"
    )


def refuse_target(path: str) -> None:
    """Refuse a path that no rule makes.

    Raises:
        LayoutError: it says what to ask for.
    """
    found = parse(path if path.startswith("data/") else f"data/{path}")
    ask = {
        Iteration: lambda: f"ask for {found.manifest}",
        Run: lambda: f"ask for {found}/iter_0000100/{MANIFEST} or {found}/hf/model_iter_100, as it saves",
    }
    raise LayoutError(f"no rule makes the folder {path} itself", hint=ask[type(found)]())


def unmade() -> str:
    """The regex of what lies where artifacts do and is neither made by a rule nor a log."""
    whole = [kind.PATTERN for kind in KINDS if kind not in {Iteration, Run}]
    lone = {Chat, Run, LossCurve, Generated, HubTree, HubFile, *BATCHES.values()}
    parts = [pattern(kind, MANIFEST) for kind in KINDS if kind not in lone]
    proofs = [proof_pattern(kind) for kind in (Megatron, Sharded, Iteration, Export)]
    others = [Chat.LEDGER, Chat.REJECTS, f"{Run.PATTERN}/schedule.json", Export.PATTERN.removeprefix("data/")]
    others += [HubFile.CHECKED, *map(part_pattern, SPLIT)]
    made = "|".join(_nameless(template) for template in whole + parts + proofs + others)
    return f"(?!(?:{made})$)(?:data/(?!logs/|benchmarks/)|ckpts/).+"


def _nearest(path: str) -> str:
    """The pattern that most folders of a path follow, and what its wildcards stand for."""

    def alike(kind: type[Artifact]) -> tuple[int, int]:
        segments, wanted = path.split("/"), re.sub(r"\{\w+\}", "*", kind.PATTERN).split("/")
        pairs = zip(segments, wanted, strict=False)
        return len([*takewhile(lambda pair: fnmatchcase(*pair), pairs)]), -len(wanted)

    nearest = max(KINDS, key=alike)
    if alike(nearest)[0] < 2:
        return ""
    names = re.findall(r"\{(\w+)\}", nearest.PATTERN)
    words = "; ".join(f"{name} is {IN_WORDS[name]}" for name in names if name in IN_WORDS)
    return f"; nearest: {nearest.PATTERN}" + (f" ({words})" if words else "")


def _nameless(template: str) -> str:
    """The regex of a pattern, without groups that have names."""
    return re.sub(r"\(\?P<\w+>", "(?:", _regex(template).pattern)


@cache
def _regex(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile(
        "".join(
            f"(?P<{part}>{WILDCARDS[part]})" if odd % 2 else re.escape(part) for odd, part in enumerate(parts)
        )
    )
