"""Seconds, memory and padding of each packing mode: ``python tests/bench/bench_pack.py``.

Ratios are of the time of the first mode of the same lengths, in one run; memory is above that before.
"""

import math
import time

import numpy as np
from peaks import forget, peak

from plait.tokens.pack import pack

MODES = ("best_fit", "next_fit", "sorted_next_fit")
DOCUMENTS = 1_000_000


def main() -> None:
    """Print one line a limit and mode: CPU seconds of one core, compilation apart, and padding."""
    drawn = np.random.default_rng(0).lognormal(math.log(735), 0.9, DOCUMENTS)
    for mode in MODES:
        pack(np.array([1, 2, 3]), 10, mode)
    for limit in (4096, 16_384, 32_768):
        lengths = np.clip(drawn, 1, limit).astype(np.int64)
        first = None
        for mode in MODES:
            forget()
            before, start = peak(), time.process_time()
            packing = pack(lengths, limit, mode)
            seconds = time.process_time() - start
            first = first or seconds
            above = len(packing) - packing.lower_bound
            padding = f"padding {1 - packing.fill:8.4%}, {above:6} packs above the bound"
            grown = max(0.0, peak() - before)
            cost = f"{seconds:6.3f} s, {seconds / first:5.2f} of {MODES[0]}'s, {grown:.2f} GB"
            print(f"{limit:6} {mode:16} {cost}  {padding}")  # noqa: T201


if __name__ == "__main__":
    main()
