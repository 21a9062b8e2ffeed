"""``python -m tests.bench [ROW ...]``: all rows, or those whose names begin so; ``--list`` names them."""

import sys

from tests.bench import harness
from tests.bench.rows import ROWS


def main(words: list[str]) -> None:
    """Print one line a row, how fast the machine is before and after them, and how many missed.

    Raises:
        SystemExit: some did.
    """
    if words[:1] == ["--child"]:
        harness.child(ROWS[words[1]], words[2], words[3:])
        return
    if words == ["--list"]:
        print("\n".join(ROWS))  # noqa: T201
        return
    chosen = [row for name, row in ROWS.items() if not words or name.startswith(tuple(words))]
    if not chosen:
        raise SystemExit(f"no row begins with {' or '.join(words)}; there are: {', '.join(ROWS)}")
    print(harness.pace(), harness.HEAD, sep="\n")  # noqa: T201
    missed = sum([not harness.printed(row) for row in chosen])
    print(harness.pace())  # noqa: T201
    print(f"{missed} of {len(chosen)} rows missed what they have to be")  # noqa: T201
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
