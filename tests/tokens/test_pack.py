import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.tokens.pack import cut, pack

MODES = ("best_fit", "next_fit", "sorted_next_fit")
LIMITS = st.integers(1, 40)


@st.composite
def cases(draw):
    """Lengths that fit, and the limit they fit."""
    limit = draw(LIMITS)
    return np.array(draw(st.lists(st.integers(1, limit), max_size=60)), np.int64), limit


def chat_lengths(number: int, limit: int) -> np.ndarray:
    """Lengths as conversations have them: lognormal, median 735 tokens."""
    drawn = np.random.default_rng(0).lognormal(math.log(735), 0.9, number)
    return np.clip(drawn, 1, limit).astype(np.int64)


def best_fit_by_hand(lengths: list[int], limit: int) -> list[set[int]]:
    """Longest first into the fullest pack with room; quadratic, but plain to see."""
    packs: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        rooms = [limit - sum(lengths[d] for d in p) - len(p) for p in packs]
        fitting = [r for r in rooms if r >= lengths[document]]
        if fitting:
            packs[rooms.index(min(fitting))].append(document)
        else:
            packs.append([document])
    return [set(p) for p in packs]


def best_fit_one_by_one(lengths: list[int], needed: list[int], limit: int) -> list[list[int]]:
    """Of packs that are equally full the one that became so last, a document at a time."""
    capacity = limit + min(needed, default=1)
    packs: list[list[int]] = []
    stacks: dict[int, list[int]] = {}
    costs = [min(length + more, capacity) for length, more in zip(lengths, needed, strict=True)]
    for document in sorted(range(len(lengths)), key=lambda d: -costs[d]):
        cost = costs[document]
        room = min((room for room, stack in stacks.items() if stack and room >= cost), default=0)
        if not room:
            packs.append([])
        chosen, room = (stacks[room].pop(), room) if room else (len(packs) - 1, capacity)
        packs[chosen].append(document)
        stacks.setdefault(room - cost, []).append(chosen)
    return sorted(sorted(pack) for pack in packs)


def next_fit_by_hand(lengths: list[int], limit: int) -> list[list[int]]:
    """SOLO's rule: a document joins the open pack if it and its separator fit."""
    packs: list[list[int]] = []
    size = 0
    for document, length in enumerate(lengths):
        if packs and size + 1 + length <= limit:
            packs[-1].append(document)
            size += 1 + length
        else:
            packs.append([document])
            size = length
    return packs


@pytest.mark.parametrize("mode", MODES)
@given(case=cases())
def test_every_document_is_in_one_pack_and_no_pack_is_too_long(mode, case):
    lengths, limit = case
    packing = pack(lengths, limit, mode)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    assert len(packing.offsets) == len(packing) + 1
    sizes = [sum(lengths[d] for d in documents) + len(documents) - 1 for documents in packing]
    assert packing.sizes.tolist() == sizes
    assert packing.tokens == sum(sizes)
    assert all(1 <= size <= limit for size in sizes)


@pytest.mark.parametrize("mode", MODES)
@given(case=cases(), data=st.data())
def test_documents_that_begin_with_a_separator_get_none(mode, case, data):
    lengths, limit = case
    few = st.lists(st.integers(0, 1), min_size=len(lengths), max_size=len(lengths))
    for separators in (0, 1, np.array(data.draw(few), np.int64)):
        packing = pack(lengths, limit, mode, separators)
        needed = np.broadcast_to(separators, len(lengths))
        sizes = [sum(lengths[d] for d in p) + sum(needed[d] for d in p[1:]) for p in packing]
        assert packing.sizes.tolist() == sizes
        assert packing.tokens == sum(sizes)
        assert all(1 <= size <= limit for size in sizes)
        assert packing.lower_bound <= len(packing)


def test_documents_without_separators_fill_a_pack_to_its_last_token():
    assert [d.tolist() for d in pack(np.array([5, 8, 5, 3]), 13, separators=0)] == [[0, 1], [2, 3]]
    assert len(pack(np.array([5, 8]), 13, separators=1)) == 2


@pytest.mark.parametrize("mode", MODES)
@given(case=cases())
def test_packs_and_their_documents_are_in_file_order(mode, case):
    packing = pack(*case, mode)
    assert all((np.diff(documents) > 0).all() for documents in packing)
    assert all(one[0] < other[0] for one, other in pairwise(packing))


@pytest.mark.parametrize("mode", MODES)
@given(case=cases())
def test_the_number_of_packs_is_bounded(mode, case):
    lengths, limit = case
    packing = pack(lengths, limit, mode)
    assert packing.lower_bound <= len(packing) <= len(lengths)
    assert 0 < packing.fill <= 1
    if mode != "best_fit":
        assert len(packing) <= max(2 * packing.lower_bound, 1)


@given(case=cases())
def test_best_fit_decreasing_needs_at_most_eleven_ninths_of_the_optimum_and_a_bit(case):
    """Johnson's bound: 11/9 of the optimum + 6/9; the optimum is no more than any packing has."""
    best = len(pack(*case, "best_fit"))
    for mode in ("next_fit", "sorted_next_fit"):
        assert best <= 11 / 9 * len(pack(*case, mode)) + 6 / 9


@given(case=cases())
def test_next_fit_is_solos_rule(case):
    lengths, limit = case
    found = [documents.tolist() for documents in pack(lengths, limit, "next_fit")]
    assert found == next_fit_by_hand(lengths.tolist(), limit)


@given(case=cases())
def test_best_fit_leaves_the_same_rooms_as_doing_it_by_hand(case):
    """Which of several equally full packs is taken is free, and so is which of equal documents."""
    lengths, limit = case
    mine = sorted(sorted(lengths[d] for d in p) for p in best_fit_by_hand(lengths.tolist(), limit))
    found = pack(lengths, limit, "best_fit")
    assert len(found) == len(mine)
    assert sorted(found.sizes) == sorted(sum(p) + len(p) - 1 for p in mine)


@given(case=cases(), data=st.data())
def test_best_fit_deals_documents_of_one_length_out_as_if_one_by_one(case, data):
    lengths, limit = case
    few = st.lists(st.integers(0, 1), min_size=len(lengths), max_size=len(lengths))
    for needed in ([0] * len(lengths), [1] * len(lengths), data.draw(few)):
        packing = pack(lengths, limit, "best_fit", np.array(needed, np.int64))
        expected = best_fit_one_by_one(lengths.tolist(), needed, limit)
        assert [documents.tolist() for documents in packing] == expected


@given(case=cases(), mode=st.sampled_from(MODES))
def test_equal_lengths_give_equal_packs(case, mode):
    one, other = pack(*case, mode), pack(*case, mode)
    np.testing.assert_array_equal(one.order, other.order)
    np.testing.assert_array_equal(one.offsets, other.offsets)


@given(lengths=st.lists(st.integers(0, 200), max_size=40), limit=LIMITS)
def test_pieces_hold_every_token_of_every_document_once_and_in_order(lengths, limit):
    pieces = cut(np.array(lengths, np.int64), limit)
    tokens = [(d, t) for d, length in enumerate(lengths) for t in range(length)]
    parts = zip(pieces.document.tolist(), pieces.start.tolist(), pieces.end.tolist(), strict=True)
    assert [(d, t) for d, start, end in parts for t in range(start, end)] == tokens
    assert all(1 <= n <= limit for n in pieces.lengths)
    assert pieces.split == sum(length > limit for length in lengths)
    assert len(pieces.document) == sum(math.ceil(length / limit) for length in lengths)
    assert (pieces.dropped, pieces.dropped_tokens) == (0, 0)


@given(lengths=st.lists(st.integers(1, 200), max_size=40), limit=LIMITS)
def test_dropped_documents_are_counted_with_their_tokens(lengths, limit):
    pieces = cut(np.array(lengths, np.int64), limit, "drop")
    assert pieces.document.tolist() == [d for d, length in enumerate(lengths) if length <= limit]
    assert pieces.dropped == len(lengths) - len(pieces.document)
    assert pieces.dropped_tokens + pieces.lengths.sum() == sum(lengths)
    assert pieces.split == 0


def test_solos_oversize_packs_do_not_occur():
    """Its packer turned 100, 3 into packs of 16, 84 and 3 at a limit of 16."""
    pieces = cut(np.array([100, 3]), 16)
    packing = pack(pieces.lengths, 16)
    assert packing.sizes.tolist() == [16, 16, 16, 16, 16, 16, 8]
    assert packing.tokens == 103 + 1


@pytest.mark.parametrize("length", [0, -1, 17])
def test_a_document_that_fits_no_pack_is_refused(length):
    with pytest.raises(ValueError, match="expected 1 to 16"):
        pack(np.array([3, length, 5]), 16)


def test_nothing_packs_into_nothing():
    packing = pack(np.array([], np.int64), 16)
    assert (len(packing), packing.tokens, packing.lower_bound, packing.fill) == (0, 0, 0, 1.0)
    assert packing.summary == "Packed 0 documents into 0 documents (0 tokens)"


def test_the_summary_counts_documents_packs_and_tokens_with_separators():
    assert pack(np.array([5, 5, 3]), 11).summary == "Packed 3 documents into 2 documents (14 tokens)"


@pytest.mark.parametrize("number", [100_000, 1_000_000])
def test_conversations_pack_within_a_twentieth_of_a_percent_of_the_lower_bound(number):
    lengths = chat_lengths(number, 4096)
    packing = pack(lengths, 4096)
    assert len(packing) <= packing.lower_bound * 1.0005
    assert packing.fill > 1 - 0.0005
    assert pack(lengths, 4096, "next_fit").fill < 0.85
    assert pack(lengths, 4096, "sorted_next_fit").fill < 0.85


def test_neighbouring_packs_are_not_sorted_by_length():
    """Sorted packs would train on one document a pack first and on many a pack last."""
    packing = pack(chat_lengths(100_000, 4096), 4096)
    documents = np.diff(packing.offsets)
    later = np.corrcoef(documents[:-1], documents[1:])[0, 1]
    assert abs(later) < 0.1
