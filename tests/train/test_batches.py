"""Order and collation: what an iteration sees, and who may look at whom."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.data.images import patches
from plait.tokens import roles
from plait.tokens.indexed import Pack
from plait.train.batches import Collator, Feed, Order, masked_out, positions


def pack(*documents: list[int], role: int = roles.ASSISTANT) -> Pack:
    """Documents of ids laid end to end, a BOS (1) between them."""
    text: list[int] = []
    role_codes: list[int] = []
    for number, document in enumerate(documents):
        text += [1] * bool(number) + document
        role_codes += [roles.PACK_SEP] * bool(number) + [role] * len(document)
    none = np.full(len(text), -1)
    return Pack(np.array(text), np.array(role_codes), none, [], None)


def collator(**changes) -> Collator:
    values = {
        "seq_length": 12,
        "pad_id": 2,
        "loss_roles": (roles.ASSISTANT,),
        "no_loss_ids": (),
        "patch_size": 4,
        "max_resolution": 64,
        "vision": False,
    }
    return Collator(**{**values, **changes})


def test_labels_are_the_next_tokens_and_padding_is_never_trained():
    batch = collator()([pack([5, 6, 7], [8, 9])])
    assert batch.input_ids[0].tolist() == [5, 6, 7, 1, 8, 9, 2, 2, 2, 2, 2, 2]
    assert batch.labels[0].tolist() == [6, 7, 1, 8, 9, 2, 2, 2, 2, 2, 2, 2]
    # the BOS between documents is not trained; the first token after it is
    assert batch.loss_mask[0].tolist() == [1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_an_end_of_turn_that_equals_the_padding_is_trained_where_the_speaker_is():
    batch = collator()([pack([5, 6, 2])])
    assert batch.loss_mask[0].tolist()[:4] == [1, 1, 0, 0]


def test_only_the_roles_asked_for_are_trained_and_never_vision_tokens():
    mixed = pack([5, 6, 7, 8])
    mixed.role[:2] = roles.USER
    assert collator()([mixed]).loss_mask[0].tolist()[:4] == [0, 1, 1, 0]
    assert collator(no_loss_ids=(7,))([mixed]).loss_mask[0].tolist()[:4] == [0, 0, 1, 0]
    assert collator(loss_roles=(roles.USER,))([mixed]).loss_mask[0].tolist()[:4] == [1, 0, 0, 0]


def test_positions_restart_and_documents_do_not_see_each_other():
    batch = collator(seq_length=8)([pack([5, 6, 7], [8, 9])])
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    seen = (~batch.attention_mask[0, 0]).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ]


def test_patch_indices_stay_minus_one_in_a_micro_batch_of_several_packs(png):
    """Named in the issue: the original shifted the -1 entries of later samples onto real patches."""
    picture = png(8, 8)  # 2 x 2 patches of 4 pixels
    one = Pack(np.arange(6), np.full(6, 2), np.array([-1, 0, 1, 2, 3, -1]), [picture], None)
    batch = collator(vision=True)([pack([5, 6]), one, one])
    assert batch.picture_rows[0].unique().tolist() == [-1]
    assert batch.picture_rows[1].tolist() == [-1, 0, 1, 2, 3, -1] + [-1] * 6
    assert batch.picture_rows[2].tolist() == [-1, 4, 5, 6, 7, -1] + [-1] * 6
    expected = patches(picture, patch_size=4, max_resolution=64)
    assert torch.equal(batch.pictures, torch.from_numpy(np.concatenate([expected, expected])))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 5))
def test_positions_count_from_zero_in_every_document(lengths, padding):
    documents = np.repeat(np.arange(len(lengths)), lengths)
    row = np.concatenate([documents, np.full(padding, -1)])[None]
    expected = np.concatenate([np.arange(n) for n in [*lengths, padding]])
    assert positions(row)[0].tolist() == expected.tolist()
    assert masked_out(torch.from_numpy(row)).logical_not().sum(-1)[0, 0].tolist() == (expected + 1).tolist()


def test_a_window_hides_what_is_too_far_back():
    seen = (~masked_out(torch.zeros(1, 5, dtype=torch.long), window=2)[0, 0]).int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.05, 1), st.integers(1, 7)), min_size=1, max_size=5),
    st.integers(0, 3),
)
def test_sources_are_drawn_by_weight_and_each_epoch_is_a_permutation(sources, seed):
    weights, sizes = zip(*sources, strict=True)
    order = Order(weights, sizes, seed, draws=200)
    drawn = [order[k] for k in range(200)]
    total = sum(weights)
    for source, (weight, size) in enumerate(sources):
        counts = np.cumsum([s == source for s, _ in drawn])
        ideal = weight / total * np.arange(1, 201)
        assert np.abs(counts - ideal).max() <= 1 + len(sources) / 2
        packs = [p for s, p in drawn if s == source]
        for start in range(0, len(packs) - size + 1, size):
            assert sorted(packs[start : start + size]) == list(range(size))
    assert drawn == [Order(weights, sizes, seed, draws=200)[k] for k in range(200)]


def test_many_sources_can_be_blended():
    order = Order((1.0,) * 300, (3,) * 300, 0, draws=900)
    assert sorted(source for source, _ in (order[k] for k in range(900))) == sorted(list(range(300)) * 3)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_data_parallel_size(dp_size):
    class Shard(list):
        def pack(self, number):
            return pack([number + 3])

    order = Order((1.0,), (64,), 7, draws=64)
    feeds = [
        Feed([Shard(range(64))], order, collator(seq_length=2), 2, 8, rank, dp_size)
        for rank in range(dp_size)
    ]
    seen = [
        sorted(row[0].item() for feed in feeds for batch in feed.batches(step) for row in batch.input_ids)
        for step in range(3)
    ]
    assert seen == [sorted(order[step * 8 + k][1] + 3 for k in range(8)) for step in range(3)]
