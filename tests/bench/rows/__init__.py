"""All rows, by name."""

from tests.bench.rows import conversion, packing, pictures, steps, tokens, training, webdataset

ROWS = {
    row.name: row
    for module in (pictures, tokens, packing, webdataset, conversion, steps, training)
    for row in module.ROWS
}
