from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import DataError
from plait.tokens import mixture
from plait.tokens.mixture import Shard

SHARDS = [
    Shard("data/megatron_format/f_a_pack8/shard_00000", "a", packs=30, tokens=240),
    Shard("data/megatron_format/f_a_pack8/shard_00001", "a", packs=10, tokens=80),
    Shard("data/megatron_format/f_b_pack8/shard_00000", "b", packs=60, tokens=400),
]


def test_natural_weights_are_shares_of_the_sequences():
    weighed = mixture.natural(SHARDS)

    assert [weight for _, weight in weighed] == [0.3, 0.1, 0.6]
    assert [source["epochs"] for source in mixture.to_json(weighed)["sources"]] == [1, 1, 1]
    assert mixture.to_json(weighed)["total_instances"] == 100
    assert mixture.to_json(weighed)["total_tokens"] == 720


def test_explicit_weights_are_shared_out_by_tokens_inside_a_dataset():
    weighed = mixture.explicit(SHARDS, {"a": 0.7, "b": 0.3})

    assert [weight for _, weight in weighed] == pytest.approx([0.525, 0.175, 0.3])
    # 70 of 100 draws go to 40 sequences of a
    assert [source["epochs"] for source in mixture.to_json(weighed)["sources"]] == [1.75, 1.75, 0.5]


def test_the_classic_string_is_megatrons_data_path():
    assert mixture.classic(mixture.natural(SHARDS)) == (
        "0.3000 data/megatron_format/f_a_pack8/shard_00000/data "
        "0.1000 data/megatron_format/f_a_pack8/shard_00001/data "
        "0.6000 data/megatron_format/f_b_pack8/shard_00000/data"
    )


def test_megatron_core_reads_the_classic_string():
    from megatron.core.datasets.utils import get_blend_from_list

    prefixes, weights = get_blend_from_list(mixture.classic(mixture.natural(SHARDS)).split())

    assert prefixes == [f"{shard.prefix}/data" for shard in SHARDS]
    assert weights == [0.3, 0.1, 0.6]


def test_a_small_weight_is_not_rounded_to_nothing():
    assert mixture.rounded([0.99996, 0.00004]) == ["0.99996", "0.00004"]
    assert mixture.rounded([1 / 3] * 3) == ["0.3334", "0.3333", "0.3333"]
    assert mixture.rounded([1.0]) == ["1.0000"]


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=80))
def test_rounded_weights_sum_to_one_and_stay_close(packs):
    weights = [count / sum(packs) for count in packs]
    found = [Decimal(text) for text in mixture.rounded(weights)]

    assert sum(found) == 1
    assert min(found) > 0
    digits = -found[0].as_tuple().exponent
    assert all(abs(float(a) - b) <= 10.0**-digits for a, b in zip(found, weights, strict=True))


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.5, "b": 0.4, "c": 0.1}])
def test_shards_of_other_datasets_are_refused(weights):
    with pytest.raises(DataError, match="the shards are of the datasets a, b; the mixture names a"):
        mixture.explicit(SHARDS, weights)
