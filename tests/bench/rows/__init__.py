"""All rows, by name."""

from tests.bench.rows import (
    conversion,
    packing,
    pictures,
    saving,
    steps,
    tokens,
    training,
    webdataset,
    workers,
)

ROWS = {
    row.name: row
    for module in (
        pictures,
        tokens,
        packing,
        webdataset,
        workers,
        conversion,
        steps,
        training,
        saving,
    )
    for row in module.ROWS
}
