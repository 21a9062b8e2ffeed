"""Pixels are resized by torch's kernels, without its Python modules."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.data import resize

SIDES = st.integers(1, 70)
RATIOS = st.floats(0.3, 1.5)


def drawn(height, width, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@given(
    height=SIDES, width=SIDES, size=st.tuples(SIDES, SIDES), channels=st.sampled_from([1, 3, 4]),
    kernel=st.sampled_from(["bilinear", "bicubic"]), turned=st.booleans(),
)  # fmt: skip
def test_as_torch_resizes(height, width, size, channels, kernel, turned):
    pixels = drawn(height, width, channels)
    if turned:  # rows that do not stand one behind the other
        pixels = pixels.transpose(1, 0, 2)
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(planes, size[::-1], mode=kernel, antialias=True)
    np.testing.assert_array_equal(resize.resize(pixels, size, kernel), theirs[0].permute(1, 2, 0))


@given(
    size=st.tuples(SIDES, SIDES),
    over=st.tuples(RATIOS, RATIOS),
    kernel=st.sampled_from(["bilinear", "bicubic"]),
)
def test_by_the_same_scales_with_an_older_torch(size, over, kernel):
    pixels = drawn(40, 50, 3)
    extent = (50 - over[0], 40 - over[1])
    ours = resize.resize(pixels, size, kernel, extent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resize, "_library", lambda: None)
        np.testing.assert_array_equal(resize.resize(pixels, size, kernel, extent), ours)


def test_the_extent_moves_the_centres():
    """The last pixel weighs 1 - 1.5 / 4 of 3.5, and 1 - 2.25 / 3.5 of 3.43 where it is beyond the edge."""
    pixels = np.zeros((1, 8, 1), np.uint8)
    pixels[:, 7] = 100
    whole = resize.resize(pixels, (2, 1), "bilinear")
    cut = resize.resize(pixels, (2, 1), "bilinear", (7, 1))
    assert (whole[0, 1, 0], cut[0, 1, 0]) == (18, 10)


def test_torch_tells_in_its_own_words_what_it_refuses():
    with pytest.raises(RuntimeError, match="_upsample_nearest2d_aa"):
        resize.resize(drawn(2, 2, 3), (1, 1), "nearest")
    with pytest.raises(RuntimeError, match="greater than 0"):
        resize.resize(drawn(2, 2, 3), (0, 1), "bicubic")


SMALLER = """
import sys
import numpy as np
from plait.data.resize import resize
assert resize(np.zeros((9, 9, 3), np.uint8), (2, 2), "bicubic").shape == (2, 2, 3)
sys.exit("torch" in sys.modules)
"""


def test_the_modules_of_torch_are_not_loaded():
    assert subprocess.run([sys.executable, "-c", SMALLER], check=False).returncode == 0
