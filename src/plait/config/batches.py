"""How the shards of a dataset are cut into jobs; nothing of what is made depends on it.

With ``shards_per_job`` what is made from many shards waits for batches of them. A batch is a file that the
job of its shards writes last. Its shards are no outputs of that job: Snakemake would delete those that are
whole when another one fails. So it has no record of them, and what it cannot know of them is asked here.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from plait import layout
from plait.config.plan import Plan
from plait.files import digest, read_json


class Batches:
    """The jobs that make shards."""

    def __init__(self, plan: Plan, targets: Callable[[], Iterable[str]] = tuple) -> None:
        """Take a plan, and what gives the paths that are asked for."""
        self.plan = plan
        self.targets = targets
        self._cuts: dict[layout.Artifact, list[layout.Artifact]] = {}

    def cut(self, found: Iterable[layout.Artifact]) -> list[Any]:
        """The same artifacts, batches in place of their shards, each once."""
        return [*dict.fromkeys(self._piece(one) for one in found)]

    def whole(self, batch: layout.Batch) -> bool:
        """Whether each shard is as the batch says; one that was not made yet says nothing."""
        path = Path(batch.manifest)
        said = read_json(path)["shards"] if path.is_file() else {}
        manifests = {name: Path(layout.parse(name).manifest) for name in said}
        return all(one.is_file() and digest(one) == said[name] for name, one in manifests.items())

    def to_force(self, artifact: Any, needed: Iterable[Any], recorded: Callable[[str], Any]) -> list[str]:
        """What is to be made again although Snakemake finds no reason: it has no record of a batch's shards.

        What stands as config/ has it needs nothing: who removes shards that all is made of gets none back.

        Args:
            artifact: what a job would make.
            needed: what it is made from.
            recorded: what Snakemake knows of the job that made a file; nothing, if no job of its own did.
        """
        batches = [one for one in needed if isinstance(one, layout.Batch)]
        alone = type(artifact) in layout.BATCHES and _made_in_batch(artifact)
        alone = alone and Path(artifact.manifest).is_file() and not recorded(artifact.manifest)
        if not (batches or alone) or self.plan.is_current(artifact):
            return []
        return [one.manifest for one in batches if not self.whole(one)] + [artifact.manifest] * alone

    def gone(self, iteration: layout.Iteration, asked: Any) -> list[str]:
        """What a checkpoint's job would read and is gone, though the analysis that it waits for stands.

        Args:
            iteration: what a job would make.
            asked: Snakemake's settings of the plan: its targets, and what is forced.
        """
        analysis = self.plan.analysis(iteration.run)
        if not Path(analysis.manifest).is_file() or self.plan.settled(iteration, asked):
            return []
        read = [one for several in self.plan.mixed(analysis).values() for one in several]
        return [one.manifest for one in self.cut(one for one in read if not Path(one.manifest).is_file())]

    def _piece(self, one: Any) -> Any:
        """The job's artifact that a shard is part of."""
        if type(one) not in layout.BATCHES:
            return one
        first = replace(one, shard=0)
        if first not in self._cuts:
            self._cuts[first] = self._cut(first)
        return self._cuts[first][one.shard]

    def _cut(self, first: Any) -> list[layout.Artifact]:
        """The piece that each shard of a dataset is part of.

        It stays as it was while it is current: what is made from it would be made again from other files.
        """
        dataset, kind = self.plan.dataset(first.dataset), layout.BATCHES[type(first)]
        shards = [replace(first, shard=number) for number in range(dataset.shards)]
        folder = Path(str(kind.between(first, first))).parent
        pieces: dict[int, Any] = {
            one.shard: batch for batch in self._there(folder, dataset.shards) for one in batch.shards
        }
        rest = [one for one in shards if one.shard not in pieces]
        each = dataset.shards_per_job
        stay = each == 1 or (not folder.is_dir() and sum(map(self.plan.is_current, rest)) * 2 > len(shards))

        def row(numbered: tuple[int, Any]) -> tuple[int, ...]:
            place, one = numbered
            return one.shard // each, one.shard - place, one.shard if self._apart(one) else -1

        for (number, *_, apart), several in groupby(enumerate(rest), row):
            ours = [one for _, one in several]
            others = len(ours) < min(each, dataset.shards - number * each)
            single = stay or (others and all(map(self.plan.is_current, ours)))
            if apart >= 0 or (single and not any(map(self._from_batches, ours))):
                pieces |= {one.shard: one for one in ours}
            else:
                pieces |= dict.fromkeys([one.shard for one in ours], kind.between(ours[0], ours[-1]))
        return [pieces[one.shard] for one in shards]

    def _apart(self, shard: Any) -> bool:
        """Whether no batch makes a shard: it was adopted, or a job of this plan makes it alone."""
        return shard in self._named or self.plan.adopted(shard)

    def _from_batches(self, shard: Any) -> bool:
        """Whether a shard is made from batches, so that a batch makes it too."""
        chats = self.plan.chats(shard) if isinstance(shard, layout.Indexed) else []
        return any(isinstance(self._piece(one), layout.Batch) for one in chats)

    @cached_property
    def _named(self) -> set[Any]:
        """The shards that are targets themselves, and the chat records that these are made from."""
        found = {one for target in self.targets() if (one := _shard(str(target)))}
        return found | {
            chat for one in found if isinstance(one, layout.Indexed) for chat in self.plan.chats(one)
        }

    def _there(self, folder: Path, shards: int) -> list[Any]:
        """The batches of a folder that are as config/ has them now."""
        return [one for one in _listed(folder) if one.last < shards and self.plan.is_current(one)]


def _listed(folder: Path) -> list[Any]:
    """The batches of a folder."""
    return [layout.parse(path) for path in sorted(folder.glob("*.json"))]


def _made_in_batch(shard: Any) -> bool:
    """Whether a batch says that it has made a shard, whatever has become of it."""
    folder = Path(str(layout.BATCHES[type(shard)].between(shard, shard))).parent
    return any(one.first <= shard.shard <= one.last for one in _listed(folder))


def _shard(target: str) -> Any:
    """The shard that a target is, or is a file of."""
    path = re.sub(r"\.(ledger\.json|rejects\.jsonl)$", ".jsonl.gz", target)
    return layout.Chat.read(path) or layout.Indexed.read(path.removesuffix(f"/{layout.MANIFEST}"))
