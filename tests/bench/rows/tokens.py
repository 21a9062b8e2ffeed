"""None yet."""

ROWS = []
