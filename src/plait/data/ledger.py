"""What goes over the edge between two stages: nothing is lost on it, and nothing comes twice.

    raw -> chat -> index -> mixture -> training, and chat -> energon -> mixture

Each stage counts what it was given and compares that with what the stage before it says it made.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from plait import files, layout
from plait.errors import DataError

ADOPTED = "adopted"
T = TypeVar("T")


def balance(edge: str, came: int, went: Mapping[str, int]) -> None:
    """Refuse an edge that loses something or has it twice.

    Args:
        edge: the two stages, and what is made.
        came: what the stage before it made.
        went: what became of it, by a word for each.

    Raises:
        DataError: they are not equal; every number is named.
    """
    total = sum(went.values())
    if total != came:
        parts = " + ".join(f"{number} {word.replace('_', ' ')}" for word, number in went.items())
        raise DataError(
            f"{edge} does not balance: {came} came in, {parts} = {total} went out",
            hint="a file was changed since it was made: remove what is on both sides and ask for it again",
        )


def kept(shards: Iterable[Path | str]) -> int:
    """Records that shards of chat records say they have.

    Raises:
        DataError: a shard has no ledger.
    """
    return sum(int(of_shard(shard)["kept"]) for shard in shards)


def counted(records: Iterable[T], shard: Path | str, stage: str) -> Iterator[T]:
    """The records of a shard of chat records, as many as its ledger has.

    Raises:
        DataError: there are more, or fewer.
    """
    came, number = kept([shard]), 0
    for number, record in enumerate(records, 1):
        if number > came:
            break
        yield record
    balance(f"chat -> {stage}, {shard}", came, {"read": number})


def of_shard(shard: Path | str) -> dict[str, int]:
    """The ledger of a shard of chat records.

    Raises:
        DataError: there is none.
    """
    ledger: dict[str, int] = files.read_json(layout.Chat.parse(str(shard)).manifest)
    return ledger


def check_shares(shards: Iterable[Path | str]) -> None:
    """All shards of a dataset together have every line of its raw source once.

    Args:
        shards: those of whole datasets; adopted ones have no raw source that is known.

    Raises:
        DataError: they have not.
    """
    lines: dict[str, int] = {}
    shares: dict[str, dict[str, int]] = {}
    for shard in shards:
        ledger, name = of_shard(shard), layout.Chat.parse(str(shard)).dataset
        if ledger.get(ADOPTED):
            continue
        lines[name] = max(lines.get(name, 0), ledger["lines"])
        found = shares.setdefault(name, {"read": 0, "blank": 0})
        for key in found:
            found[key] += ledger[key]
    for name, found in shares.items():
        balance(f"raw -> chat of {name}", lines[name], found)
