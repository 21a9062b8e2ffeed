"""A thousand small shards: what Snakemake and the start of a command cost stays small beside them."""

import json

import pytest

from tests.bench.harness import processor
from tests.bench.rows.steps import many

SHARDS, CORES, LIMIT = 1000, 2, 300


@pytest.mark.long
def test_a_thousand_shards_take_less_than_five_minutes_of_two_cores(tmp_path):
    """In processor seconds: a shared machine's clock proves nothing."""
    project, config, targets = many(tmp_path, SHARDS)

    before = processor()

    project.run(*targets, config=config, timeout=3000)

    spent = processor() - before
    assert spent / CORES < LIMIT
    ledgers = [
        json.loads(path.read_text()) for path in project.folder.glob("data/processed/many/*.ledger.json")
    ]
    assert len(ledgers) == SHARDS
    assert all(ledger["kept"] == 2 for ledger in ledgers)
    assert project.plan(*targets, config=config).nothing
