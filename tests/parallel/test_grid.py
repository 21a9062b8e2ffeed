"""The arithmetic of a grid, against Megatron Core's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import ConfigError
from plait.parallel.grid import Grid

SIZES = st.integers(1, 4)


@given(tp=SIZES, pp=SIZES, dp=SIZES)
def test_ranks_and_coordinates_are_a_bijection(tp, pp, dp):
    grid, world = Grid(tp, pp), tp * pp * dp

    found = [grid.coordinates(rank, world) for rank in range(world)]

    assert len(set(found)) == world
    assert [grid.rank(tp=c.tp, dp=c.dp, pp=c.pp, world=world) for c in found] == list(range(world))


@pytest.mark.parametrize(("tp", "pp", "dp"), [(2, 2, 1), (2, 1, 2), (2, 3, 2), (1, 2, 2), (4, 2, 3)])
def test_the_order_of_ranks_is_megatrons(tp, pp, dp):
    from megatron.core.parallel_state import RankGenerator

    grid, world = Grid(tp, pp), tp * pp * dp
    theirs = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")

    for axis, size in (("tp", tp), ("dp", dp), ("pp", pp)):
        for group in theirs.get_ranks(axis):
            assert [getattr(grid.coordinates(rank, world), axis) for rank in group] == list(range(size))


@given(st.integers(1, 4).flatmap(lambda pp: st.tuples(st.just(pp), st.integers(1, 6).map(lambda n: n * pp))))
def test_stages_share_out_the_layers_in_order(sizes):
    pp, layers = sizes
    grid = Grid(pp=pp)

    shared = [layer for stage in range(pp) for layer in grid.layers(stage, num_layers=layers)]

    assert shared == list(range(layers))
    assert all(
        layer in grid.layers(grid.stage_of(layer, num_layers=layers), num_layers=layers) for layer in shared
    )


def test_layers_that_do_not_divide_are_refused_with_what_would():
    with pytest.raises(ConfigError, match="4 layers do not divide into 3") as error:
        Grid(pp=3).layers(0, num_layers=4)
    assert error.value.hint == "pp may be 1, 2, 4"


def test_impossible_grids_are_refused():
    with pytest.raises(ConfigError, match="sizes start at 1"):
        Grid(tp=0)
    with pytest.raises(ConfigError, match="3 processes do not divide into copies of a 2 x 1 grid"):
        Grid(tp=2).data_parallel(3)


def test_folders_name_the_stage_only_where_there_are_several():
    assert [Grid(2, 1).folder(tp=tp, pp=pp) for tp, pp in Grid(2, 1)] == ["mp_rank_00", "mp_rank_01"]
    assert [Grid(1, 2).folder(tp=tp, pp=pp) for tp, pp in Grid(1, 2)] == ["mp_rank_00_000", "mp_rank_00_001"]
