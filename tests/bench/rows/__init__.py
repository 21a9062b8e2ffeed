"""All rows, by name."""

from tests.bench.rows import conversion, packing, pictures, steps, tokens, training, webdataset, workers

ROWS = {
    row.name: row
    for module in (pictures, tokens, packing, webdataset, conversion, steps, training, workers)
    for row in module.ROWS
}
