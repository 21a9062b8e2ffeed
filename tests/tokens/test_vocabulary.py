import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.tokens.vocabulary import GROUPS, padded_vocab_size, picture_text


@pytest.mark.parametrize(
    ("size", "padded"),
    [
        (33029, (33152, 33280, 33280, 33792)),
        (33031, (33152, 33280, 33280, 33792)),
        (32002, (32128, 32256, 32256, 32768)),
        (32768, (32768, 32768, 32768, 32768)),
        (32769, (32896, 33024, 33280, 33792)),
    ],
)
def test_padding_gives_the_sizes_of_the_original_systems(size, padded):
    assert tuple(padded_vocab_size(size, tp) for tp in (1, 2, 4, 8)) == padded


@given(st.integers(1, 10**6), st.integers(1, 64))
def test_padding_is_the_smallest_multiple_that_holds_the_vocabulary(size, tp):
    padded = padded_vocab_size(size, tp)

    assert padded % (128 * tp) == 0
    assert padded - 128 * tp < size <= padded


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_picture_is_its_patches_a_mark_a_row_and_two_ends(rows, columns):
    text = picture_text(rows, columns)

    assert text.count("<vpatch>") == rows * columns
    assert text.count("<vrow_sep>") == rows - 1
    assert text.startswith("<vision><vpatch>")
    assert text.endswith("<vpatch></vision>")
    assert text.count("<") == rows * columns + rows + 1


def test_the_groups_are_those_of_solo_and_codeact():
    assert [len(names) for names in GROUPS.values()] == [5, 1024, 2, 2]
    assert GROUPS["vision"] == ("<vision>", "<vpatch>", "<vrow_sep>", "<vframe_sep>", "</vision>")
    assert GROUPS["locations"][0] == "<loc_1>"
    assert GROUPS["locations"][-1] == "<loc_1024>"
