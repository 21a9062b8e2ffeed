"""Weights of a mixture from limits on its tokens, by a linear program (pulp, with its solver CBC).

What is read together is a dataset, or with ``whole_shards`` a shard. How often each is read is the unknown;
every limit is a bound on tokens of one kind over tokens of another. Of all mixtures that keep to the limits
the one is taken that

1. reads the most tokens,
2. is nearest to the natural mixture, in which an epoch reads all datasets equally often: the largest relative
   deviation of a dataset from that is as small as it can be, then the largest of the others, and so on.

Of whole shards nearness comes first, for some tokens more are no reason to leave a dataset out: the largest
deviation, then the sum of all, then the tokens, each to within ``GAP``. Equal questions have equal answers.

Where no mixture keeps to the limits, those that exclude one another are named: without any of them the others
can be kept to (a deletion filter). So is the smallest change that helps: of all limits but the budget, whose
relative changes together are least (an elastic program), or of the budget alone if that is less; each is then
brought back as far as the others allow.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pulp

from plait.errors import DataError
from plait.tokens.mixture import Shard

log = logging.getLogger(__name__)

TIGHT = 1e-6
"""A limit whose value is so near to its bound, relatively, is met exactly: it binds."""
SLACK = 1e-8
"""By how much a later program may fall behind what an earlier one found."""
SETTLED = 1e-9
"""A dual above it says that no mixture does better."""
FLOOR = 1e-3
"""Share of the least budget, or of the data, that is always read: reading nothing is no mixture."""
GAP = 1e-3
"""How far an answer over whole shards may be from the best one, relatively."""
ANY = 1e6
"""A gap that any answer is within: the first is taken."""
NODES = 2000
"""Of the search over whole shards; a number of nodes, and no time, ends it the same everywhere."""
DIGITS = 4
"""Of a bound that is proposed."""

Reads = list[float]
"""How often each unit is read."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What is read together: its dataset, its tokens and those of pictures."""

    dataset: str
    tokens: int
    pictures: int


@dataclass(frozen=True)
class Limit:
    """A bound on ``over`` divided by ``under``.

    Attributes:
        key: where it stands in ``solve``.
        side: which end of a range it is.
        bound: the number.
        over: tokens that a reading of each unit adds above the line.
        under: those it adds below, or one number for all mixtures.
        about: what ``under`` amounts to in a mixture of the budget's size.
    """

    key: str
    side: Literal["least", "most"]
    bound: float
    over: tuple[float, ...]
    under: tuple[float, ...] | float
    about: float

    def value(self, reads: Sequence[float]) -> float:
        """What it is of a mixture."""
        under = self.under if isinstance(self.under, float) else _dot(self.under, reads)
        return _dot(self.over, reads) / under if under else math.inf

    def binds(self, reads: Sequence[float]) -> bool:
        """Whether a mixture meets it exactly."""
        return abs(self.value(reads) - self.bound) <= TIGHT * (self.bound or 1.0)

    def changed(self, bound: float) -> float:
        """How far another bound is from this one, relatively."""
        return abs(bound - self.bound) / (self.bound or 1.0)

    def row(self, reads: Sequence[Any]) -> Any:
        """How far a mixture is above the bound, relatively: at least, or at most, 0 where it is kept to."""
        size = (self.bound or 1.0) * self.about
        if isinstance(self.under, float):
            return _sum(self.over, reads, size) - self.bound * self.under / size
        above = [over - self.bound * under for over, under in zip(self.over, self.under, strict=True)]
        return _sum(above, reads, size)

    def __str__(self) -> str:
        """The limit in words."""
        return f"{self.key} at {self.side} {_number(self.bound)}"


@dataclass(frozen=True)
class Change:
    """A limit and the bound that it would need."""

    limit: Limit
    bound: float

    def __str__(self) -> str:
        """The change in words."""
        verb, end = ("raise", "most") if self.limit.side == "most" else ("lower", "least")
        return (
            f"{verb} the {end} of {self.limit.key} from {_number(self.limit.bound)} to {_number(self.bound)}"
        )


@dataclass(frozen=True)
class Conflict:
    """Limits that no mixture keeps to together, none of which could be left out, and what would help."""

    limits: list[Limit]
    changes: list[Change]


@dataclass(frozen=True)
class Solution:
    """How often an epoch of the mixture reads each shard, and the limits that it was solved from."""

    shards: Sequence[Shard]
    reads: Reads
    limits: list[Limit]
    values: list[float]
    binding: list[Limit]

    def to_json(self) -> dict[str, Any]:
        """What mixture.yaml and tokens.json say of it; shares and tokens are those of an epoch."""
        total = sum(shard.tokens * reads for shard, reads in self._read)
        there = sum(shard.tokens for shard in self.shards)
        return {
            "tokens": round(total),
            "limits": [
                {"key": one.key, "side": one.side, "bound": one.bound, "value": value, "binds": binds}
                for one, value, binds in self._limits()
            ],
            "datasets": {
                name: {
                    "tokens": round(tokens),
                    "share": tokens / total,
                    "natural_share": own / there,
                    "epochs": round(tokens / own, 6),
                }
                for name, (tokens, own) in self._by_dataset().items()
            },
            "left_out": [shard.prefix for shard, reads in self._read if not reads],
        }

    @property
    def _read(self) -> list[tuple[Shard, float]]:
        return [*zip(self.shards, self.reads, strict=True)]

    def _limits(self) -> list[tuple[Limit, float, bool]]:
        pairs = zip(self.limits, self.values, strict=True)
        return [(one, float(f"{value:.9g}"), one in self.binding) for one, value in pairs]

    def _by_dataset(self) -> dict[str, tuple[float, int]]:
        """Tokens of an epoch, and tokens that are there."""
        found: dict[str, tuple[float, int]] = {}
        for shard, reads in self._read:
            tokens, own = found.get(shard.dataset, (0.0, 0))
            found[shard.dataset] = tokens + shard.tokens * reads, own + shard.tokens
        return found


def solve(shards: Sequence[Shard], wanted: Mapping[str, Any], where: str = "solve") -> Solution:
    """Find how often to read each shard.

    Args:
        shards: those of the mixture, counted.
        wanted: ``solve`` of a mixture in the config, as JSON.
        where: what the limits are called in a sentence.

    Raises:
        DataError: no mixture keeps to the limits; those that exclude one another are named, and the smallest
            change that helps. Or the search over whole shards was given up.
    """
    whole = wanted["whole_shards"]
    units = [Unit(s.dataset, s.tokens, s.picture_tokens) for s in shards] if whole else _datasets(shards)
    kept = limits(units, wanted)
    question = Question(units, floor(units, wanted), whole=whole)
    found = question.nearest(kept)
    if found is None:
        raise _refusal(question.conflict(kept), where)
    values = [limit.value(found) for limit in kept]
    binding = [limit for limit in kept if limit.binds(found)]
    names = {unit.dataset: number for number, unit in enumerate(units)}
    reads = found if whole else [found[names[shard.dataset]] for shard in shards]
    return Solution(shards, reads, kept, values, binding)


def floor(units: Sequence[Unit], wanted: Mapping[str, Any]) -> float:
    """Tokens that every mixture reads."""
    least: int = wanted["tokens"][0]
    return FLOOR * min(least, sum(unit.tokens for unit in units))


def limits(units: Sequence[Unit], wanted: Mapping[str, Any]) -> list[Limit]:
    """The limits of ``solve`` as rows; those that every mixture keeps to are left out."""
    budget = float(wanted["tokens"][1])
    tokens = tuple(float(unit.tokens) for unit in units)
    pictures = tuple(float(unit.pictures) for unit in units)
    text = tuple(whole - part for whole, part in zip(tokens, pictures, strict=True))

    def of(*names: str) -> tuple[float, ...]:
        return tuple(unit.tokens * float(unit.dataset in names) for unit in units)

    rows: list[tuple[str, Sequence[float | None], Any, Any, float]] = [
        ("tokens", wanted["tokens"], tokens, 1.0, 1.0)
    ]
    for name, part in wanted["datasets"].items():
        rows += [
            (f"datasets.{name}.share", part["share"], of(name), tokens, budget),
            (f"datasets.{name}.epochs", part["epochs"], of(name), sum(of(name)), sum(of(name))),
        ]
    rows.append(("picture_to_text", wanted["picture_to_text"], pictures, text, budget))
    for language, share in wanted["languages"].items():
        spoken = [name for name, part in wanted["datasets"].items() if part["language"] == language]
        rows.append((f"languages.{language}", (share, 1), of(*spoken), tokens, budget))
    found = []
    for key, (least, most), over, under, about in rows:
        if least:
            found.append(Limit(key, "least", float(least), over, under, about))
        if most is not None and not (most == 1 and under is tokens):
            found.append(Limit(key, "most", float(most), over, under, about))
    return found


@dataclass(frozen=True)
class Question:
    """Mixtures of some units.

    Attributes:
        units: what is read together.
        floor: tokens that are read at least.
        whole: whether each is read a whole number of times, those of a dataset k or k + 1 times.
    """

    units: Sequence[Unit]
    floor: float
    whole: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that are there."""
        return sum(unit.tokens for unit in self.units)

    def nearest(self, kept: Sequence[Limit]) -> Reads | None:
        """The mixture that is taken; None if none keeps to the limits."""
        budget = max((limit.bound for limit in kept if limit.key == "tokens"), default=float(self.tokens))
        found = self._whole(kept, budget) if self.whole else self._most(kept, budget)
        if found is None:
            return None
        return [float(f"{reads:.7g}") if reads > TIGHT / 10 else 0.0 for reads in found]

    def feasible(self, kept: Sequence[Limit]) -> bool:
        """Whether a mixture keeps to the limits."""
        program = self.program(kept)
        return program.minimise(program.total(self.tokens), gap=ANY) is not None

    def conflict(self, wanted: Sequence[Limit]) -> Conflict:
        """Which of limits that no mixture keeps to exclude one another; the smallest change that helps."""
        left = [*wanted]
        for limit in wanted:
            rest = [one for one in left if one is not limit]
            if not self.feasible(rest):
                left = rest
        return Conflict(left, self.relaxed(wanted))

    def relaxed(self, wanted: Sequence[Limit]) -> list[Change]:
        """The smallest change of limits after which a mixture keeps to them; none if nothing helps."""
        budget = [limit for limit in wanted if limit.key == "tokens"]
        others = [limit for limit in wanted if limit.key != "tokens"]
        ways = [found for free in (others, budget) if (found := self._relaxed(wanted, free))]
        ways = ways or [self._relaxed(wanted, wanted)]
        return min(ways, key=lambda way: sum(one.limit.changed(one.bound) for one in way))

    def program(self, kept: Sequence[Limit]) -> "Program":
        """The limits as a program."""
        program = Program(self)
        for limit in kept:
            program.keep(limit)
        return program

    def _most(self, kept: Sequence[Limit], budget: float) -> Reads | None:
        """Read the most tokens; with so many, bring the largest deviation down, then the next, and so on."""
        each = tuple(float(unit.tokens) for unit in self.units)
        program = self.program(kept)
        found = program.minimise(-_sum(each, program.reads, budget))
        if found is None:
            return None
        most = _dot(each, found)
        return (
            self._even([*kept, Limit("tokens", "least", most * (1 - SLACK), each, 1.0, 1.0)], most) or found
        )

    def _even(self, kept: Sequence[Limit], tokens: float) -> Reads | None:
        """Bring the largest deviation down, then the largest of the others, and so on."""
        settled: dict[str, float] = {}
        found: Reads | None = None
        while len(settled) < len(self.units):
            program = self.program(kept)
            largest = program.number("largest")
            rows = {
                name: program.within(away, settled.get(name, largest))
                for name, away in self.deviations(program.reads, tokens).items()
            }
            nearer = program.minimise(largest)
            if nearer is None:
                break
            found = nearer
            free = [name for name in rows if name not in settled]
            held = [name for name in free if any(abs(row.pi or 0) > SETTLED for row in rows[name])]
            away = {name: abs(pulp.value(one)) for name, one in self.deviations(found, tokens).items()}
            for name in held or [max(free, key=lambda one: away[one])]:
                settled[name] = away[name] + SLACK
        return found

    def _whole(self, kept: Sequence[Limit], budget: float) -> Reads | None:
        """Bring the largest deviation down, then the sum of all; of what is left read the most tokens."""
        found, bounds = None, dict[str, float]()
        for goal in ("largest", "sum", "tokens"):
            program = self.program(kept)
            moved_by = self.deviations(program.reads, budget)
            largest = program.number("largest", bounds.get("largest"))
            each = [program.number(f"away{number}") for number in range(len(moved_by))]
            for own, away in zip(each, moved_by.values(), strict=True):
                program.within(away, own)
                program.within(away, largest)
            total = program.number("sum", bounds.get("sum"))
            program.within(pulp.lpSum(each), total)
            read = program.total(budget)
            nearer = program.minimise({"largest": largest, "sum": total, "tokens": -read}[goal], gap=GAP)
            if nearer is None:
                break
            found = nearer
            away = [abs(pulp.value(one)) for one in self.deviations(found, budget).values()]
            bounds[goal] = {"largest": max(away), "sum": sum(away), "tokens": 0.0}[goal] * (1 + GAP) + SLACK
        return found

    def deviations(self, reads: Sequence[Any], size: float) -> dict[str, Any]:
        """By dataset, how much oftener it is read than all are on average, in readings of ``size`` tokens."""
        tokens = [unit.tokens for unit in self.units]
        average = _sum(tokens, reads, size)
        found = {}
        for name in dict.fromkeys(unit.dataset for unit in self.units):
            own = [unit.tokens * (unit.dataset == name) for unit in self.units]
            found[name] = _sum(own, reads, size * sum(own) / self.tokens) - average
        return found

    def _relaxed(self, wanted: Sequence[Limit], free: Sequence[Limit]) -> list[Change]:
        """The smallest change of some of the limits; none if the others exclude one another already."""
        program = self.program([limit for limit in wanted if limit not in free])
        slacks = [program.keep(limit, by=program.number(f"by{n}")) for n, limit in enumerate(free)]
        found = program.minimise(pulp.lpSum(slacks))
        if found is None or _dot([unit.tokens for unit in self.units], found) <= 2 * self.floor:
            return []
        now = [
            replace(one, bound=one.value(found)) if one in free and _missed(one, found) else one
            for one in wanted
        ]
        for n, limit in enumerate(wanted):
            if now[n] is not limit:
                now[n] = self._brought_back(limit, now[n].bound, [*now[:n], *now[n + 1 :]])
        return [Change(was, is_.bound) for was, is_ in zip(wanted, now, strict=True) if is_ is not was]

    def _brought_back(self, limit: Limit, bound: float, others: Sequence[Limit]) -> Limit:
        """The limit with the bound nearest to its own that the others allow, rounded away from it.

        The extreme of a quotient, by Dinkelbach's method: each program improves on the quotient before.
        """
        sign = 1 if limit.side == "most" else -1
        while True:
            at = replace(limit, bound=bound)
            program = self.program(others)
            found = program.minimise(sign * at.row(program.reads))
            value = bound if found is None else limit.value(found)
            if sign * (bound - value) <= TIGHT / 10 * max(abs(bound), TIGHT):
                break
            bound = value
        if sign * (limit.bound - bound) >= 0:
            return limit
        if abs(bound) <= TIGHT * (limit.bound or 1.0):
            bound = 0.0
        for steps in (0, 1):
            near = replace(limit, bound=_outward(bound, sign, steps))
            if self.feasible([*others, near]):
                break
        return near


class Program:
    """A program of pulp over a question's units."""

    def __init__(self, question: Question) -> None:
        """Have the unknowns, and read something."""
        self.problem = pulp.LpProblem("mixture", pulp.LpMinimize)
        self.question = question
        self.reads = self._whole_reads() if question.whole else self._reads()
        self._add(self.total(question.floor) >= 1)

    def keep(self, limit: Limit, *, by: Any = 0) -> Any:
        """Keep to a limit, but for ``by`` of its bound; gives ``by``."""
        row = limit.row(self.reads)
        self._add(row - by <= 0 if limit.side == "most" else row + by >= 0)
        return by

    def within(self, what: Any, bound: Any) -> tuple[Any, Any]:
        """Keep a number between minus a bound and the bound; gives both rows."""
        return self._add(what - bound <= 0), self._add(what + bound >= 0)

    def total(self, size: float) -> Any:
        """The tokens that are read, in units of ``size``."""
        return _sum([unit.tokens for unit in self.question.units], self.reads, size)

    def number(self, name: str, most: float | None = None) -> Any:
        """An unknown of at least 0."""
        return pulp.LpVariable(name, 0, most)

    def minimise(self, objective: Any, *, gap: float = 0.0) -> Reads | None:
        """How often each unit is read at the minimum, or so near to it; None if nothing keeps to all rows.

        Raises:
            DataError: the search was given up.
        """
        self.problem.setObjective(objective)
        self.problem.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=gap, maxNodes=NODES))
        if self.problem.status == pulp.LpStatusInfeasible:
            return None
        if self.problem.status != pulp.LpStatusOptimal:
            raise DataError(
                f"no mixture of {len(self.question.units)} whole shards was found in {NODES} steps, nor that "
                "there is none",
                hint="widen the limits, or leave out `whole_shards`",
            )
        values = [float(pulp.value(reads) or 0.0) for reads in self.reads]
        return [float(round(value)) for value in values] if self.question.whole else values

    def _add(self, row: Any) -> Any:
        """Add a row; gives it."""
        self.problem.addConstraint(row, f"row{len(self.problem.constraints)}")
        return row

    def _reads(self) -> list[Any]:
        return [pulp.LpVariable(f"reads{n}", 0) for n in range(len(self.question.units))]

    def _whole_reads(self) -> list[Any]:
        """Of each dataset k readings of all shards, and one more of some."""
        names = dict.fromkeys(unit.dataset for unit in self.question.units)
        all_of = {name: pulp.LpVariable(f"all{n}", 0, cat=pulp.LpInteger) for n, name in enumerate(names)}
        return [
            all_of[unit.dataset] + pulp.LpVariable(f"more{n}", cat=pulp.LpBinary)
            for n, unit in enumerate(self.question.units)
        ]


def _refusal(conflict: Conflict, where: str) -> DataError:
    named, last = [str(limit) for limit in conflict.limits[:-1]], conflict.limits[-1]
    together = f"{', '.join(named)} and {last} exclude one another" if named else f"{last} is out of reach"
    helps = " and ".join(map(str, conflict.changes))
    return DataError(
        f"{where} asks for what its data cannot give: {together}"
        + (f"; the smallest change that helps: {helps}" if helps else ""),
        hint="data/analysis/{mixture}/tokens.json of a mixture without limits has the tokens of each dataset",
    )


def _datasets(shards: Sequence[Shard]) -> list[Unit]:
    """The datasets as units, in the order of their shards."""
    found: dict[str, Unit] = {}
    for shard in shards:
        before = found.get(shard.dataset, Unit(shard.dataset, 0, 0))
        found[shard.dataset] = Unit(
            shard.dataset, before.tokens + shard.tokens, before.pictures + shard.picture_tokens
        )
    return [*found.values()]


def _missed(limit: Limit, reads: Sequence[float]) -> bool:
    """Whether a mixture does not keep to a limit."""
    away = limit.value(reads) - limit.bound
    return (away if limit.side == "most" else -away) > TIGHT * (limit.bound or 1.0)


def _outward(bound: float, sign: int, steps: int) -> float:
    """A bound of few digits: more where it is a most, less where it is a least; ``steps`` further out."""
    if not bound or math.isinf(bound):
        return bound
    unit = 10.0 ** (math.floor(math.log10(abs(bound))) - DIGITS + 1)
    nearest: Callable[[float], int] = math.ceil if sign > 0 else math.floor
    count = nearest(bound / unit - sign * TIGHT) + sign * steps
    return float(f"{count * unit:.{DIGITS}g}")


def _number(value: float) -> str:
    return f"{value:.12g}"


def _sum(rates: Sequence[float], reads: Sequence[Any], size: float) -> Any:
    """What unknown readings add up to, in units of ``size``."""
    return pulp.lpSum(rate / size * number for rate, number in zip(rates, reads, strict=True))


def _dot(rates: Sequence[float], reads: Sequence[float]) -> float:
    return math.fsum(rate * number for rate, number in zip(rates, reads, strict=True))
