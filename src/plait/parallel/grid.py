"""The arithmetic of a tensor x pipeline grid; no processes, no torch.

Ranks stand in Megatron's order: tensor fastest, then data, then pipeline.

>>> Grid(tp=2, pp=2).coordinates(5, world=8)
Coordinates(tp=1, dp=0, pp=1)
>>> Grid(tp=2, pp=2).layers(1, num_layers=4)
range(2, 4)
>>> [len(Grid(pp=3, first=2).layers(stage, num_layers=8)) for stage in range(3)]
[2, 3, 3]
>>> Grid(tp=2, pp=2).folder(tp=1, pp=0), Grid(tp=2, pp=1).folder(tp=1, pp=0)
('mp_rank_01_000', 'mp_rank_01')
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from plait.errors import ConfigError


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands on each axis."""

    tp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Grid:
    """How many ranks share a layer (``tp``) and how many stages share the layers (``pp``).

    ``first`` and ``last`` are the layers of the first and the last stage where stages are uneven, Megatron's
    ``num_layers_in_first_pipeline_stage`` and its fellow; the other stages share the rest evenly.
    """

    tp: int = 1
    pp: int = 1
    first: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        """Refuse sizes below 1; a single stage has no uneven ones."""
        if min(self.tp, self.pp, self.first or 1, self.last or 1) < 1:
            raise ConfigError(f"grid tp{self.tp} x pp{self.pp} is impossible: sizes start at 1")
        if self.pp == 1:
            object.__setattr__(self, "first", None)
            object.__setattr__(self, "last", None)

    def __str__(self) -> str:
        uneven = (f"{name} stage of {size} layers" for name, size in self._uneven.items())
        return ", ".join((f"{self.tp} x {self.pp} grid", *uneven))

    @property
    def _uneven(self) -> dict[str, int]:
        return {name: size for name, size in (("first", self.first), ("last", self.last)) if size}

    @property
    def facts(self) -> dict[str, int]:
        """The grid as a manifest has it: ``Grid(**facts)`` is this one."""
        return {"tp": self.tp, "pp": self.pp, **self._uneven}

    def __len__(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Every ``(tp, pp)`` of the grid, tensor ranks fastest."""
        return ((tp, pp) for pp in range(self.pp) for tp in range(self.tp))

    def interleaved(self, chunks: int) -> "Grid":
        """The grid whose stages are the chunks of this one's: chunk c of stage s is its stage c x pp + s.

        >>> [Grid(pp=2).interleaved(2).layers(stage, num_layers=4) for stage in range(4)]
        [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]

        Raises:
            ConfigError: the stages are uneven.
        """
        if chunks > 1 and self._uneven:
            raise ConfigError(
                f"the stages of a {self} are not cut into {chunks} chunks each: they are uneven"
            )
        return self if chunks == 1 else replace(self, pp=self.pp * chunks)

    def data_parallel(self, world: int) -> int:
        """Copies of the model among ``world`` processes.

        Raises:
            ConfigError: they do not divide into whole copies.
        """
        if world < 1 or world % len(self):
            raise ConfigError(f"{world} processes do not divide into copies of a {self}")
        return world // len(self)

    def rank(self, *, tp: int, dp: int, pp: int, world: int) -> int:
        """The rank at these coordinates among ``world`` processes."""
        return (pp * self.data_parallel(world) + dp) * self.tp + tp

    def coordinates(self, rank: int, world: int) -> Coordinates:
        """The coordinates of a rank among ``world`` processes."""
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.data_parallel(world))
        return Coordinates(tp=tp, dp=dp, pp=pp)

    def layers(self, stage: int, *, num_layers: int) -> range:
        """The model's layers that a pipeline stage holds.

        Raises:
            ConfigError: the layers do not divide into the stages.
        """
        sizes = self._stages(num_layers)
        start = sum(sizes[:stage])
        return range(start, start + sizes[stage])

    def _stages(self, num_layers: int) -> list[int]:
        """Layers of each stage."""
        given = [*self._uneven.values()]
        others, rest = self.pp - len(given), num_layers - sum(given)
        if not given and num_layers % self.pp:
            legal = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
            raise ConfigError(
                f"{num_layers} layers do not divide into {self.pp} pipeline stages",
                hint=f"pp may be {', '.join(map(str, legal))}",
            )
        if rest < others or (others and rest % others) or (rest and not others):
            raise ConfigError(
                f"of {num_layers} layers {' + '.join(map(str, given))} are given to the first or last stage, "
                f"and {rest} do not divide among the other {others} of {self.pp} pipeline stages"
            )
        middle = [rest // others] * others if others else []
        ends = ([self.first] if self.first else []), ([self.last] if self.last else [])
        return [*ends[0], *middle, *ends[1]]

    def stage_of(self, layer: int, *, num_layers: int) -> int:
        """The pipeline stage that holds a layer."""
        stages = (stage for stage in range(self.pp) if layer in self.layers(stage, num_layers=num_layers))
        return next(stages)

    def folder(self, *, tp: int, pp: int, ep: int | None = None) -> str:
        """The folder of a rank in Megatron's classic layout; ``ep`` is given where experts are dealt out."""
        stage = f"_{pp:03d}" if self.pp > 1 else ""
        return f"mp_rank_{tp:02d}{stage}" + (f"_{ep:03d}" if ep is not None else "")


def context_rows(length: int, rank: int, ranks: int) -> list[int]:
    """The places of a sequence that a context parallel rank has: a piece of each half, as Megatron deals.

    Under a causal mask every rank then has as much to compute.

    >>> context_rows(8, 0, 2), context_rows(8, 1, 2)
    ([0, 1, 6, 7], [2, 3, 4, 5])

    Raises:
        ConfigError: the sequence does not divide into two pieces a rank.
    """
    piece, rest = divmod(length, 2 * ranks)
    if rest:
        raise ConfigError(f"a sequence of {length} tokens does not divide into 2 x {ranks} context pieces")
    starts = rank * piece, (2 * ranks - 1 - rank) * piece
    return [place for start in starts for place in range(start, start + piece)]
