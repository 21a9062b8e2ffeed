"""The arithmetic of a tensor x pipeline grid; no processes, no torch.

Ranks stand in Megatron's order: tensor fastest, then data, then pipeline.

>>> Grid(tp=2, pp=2).coordinates(5, world=8)
Coordinates(tp=1, dp=0, pp=1)
>>> Grid(tp=2, pp=2).layers(1, num_layers=4)
range(2, 4)
>>> Grid(tp=2, pp=2).folder(tp=1, pp=0), Grid(tp=2, pp=1).folder(tp=1, pp=0)
('mp_rank_01_000', 'mp_rank_01')
"""

from collections.abc import Iterator
from dataclasses import dataclass

from plait.errors import ConfigError


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands on each axis."""

    tp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Grid:
    """How many ranks share a layer (``tp``) and how many stages share the layers (``pp``)."""

    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes below 1."""
        if min(self.tp, self.pp) < 1:
            raise ConfigError(f"grid tp{self.tp} x pp{self.pp} is impossible: sizes start at 1")

    def __str__(self) -> str:
        return f"{self.tp} x {self.pp} grid"

    def __len__(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Every ``(tp, pp)`` of the grid, tensor ranks fastest."""
        return ((tp, pp) for pp in range(self.pp) for tp in range(self.tp))

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
        if num_layers % self.pp:
            legal = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
            raise ConfigError(
                f"{num_layers} layers do not divide into {self.pp} pipeline stages",
                hint=f"pp may be {', '.join(map(str, legal))}",
            )
        size = num_layers // self.pp
        return range(stage * size, (stage + 1) * size)

    def stage_of(self, layer: int, *, num_layers: int) -> int:
        """The pipeline stage that holds a layer."""
        return layer // len(self.layers(0, num_layers=num_layers))

    def folder(self, *, tp: int, pp: int) -> str:
        """The folder of a rank in Megatron's classic checkpoint layout."""
        return f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if self.pp > 1 else "")
