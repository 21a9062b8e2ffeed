"""What energon stumbles over becomes a sentence: the first of ours that names the sample, else its own."""

import re
from itertools import pairwise

import pytest
from talks import KEYS, exchange

from plait.data import energon, meta, probe
from plait.errors import DataError, RecordError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("d")
    energon.build(folder, [exchange(number) for number in range(8)], KEYS)
    return folder


def chain(*errors):
    for above, below in pairwise(errors):
        above.__cause__ = below
    return errors[0]


def test_the_sentence_that_names_shard_and_key_is_kept():
    ours = DataError("a.tar: sample 'k': there is no part json[nope]", hint="mend it")
    cause = chain(ValueError("energon's"), ours, RecordError("there is no part"), KeyError("nope"))
    assert probe._first_cause(cause) == "DataError: a.tar: sample 'k': there is no part json[nope]"
    assert probe._first_cause(chain(ValueError("above"), KeyError("nope"))) == "KeyError: 'nope'"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (energon.CONVERSATION, "sample 's-0': s-0 has 0 pictures"),
        (
            {"image": "jpg", "bild": "jpg", **energon.CONVERSATION},
            "field_map does not map to type VQASample fields",
        ),
        (
            {"image": "jpg", "context": "json[9][value]", "answers": "json[1][value]"},
            r"0000.*.tar: sample 's-\d': there is no part json\[9\]\[value\]",
        ),
    ],
)
def test_a_field_map_that_energon_cannot_use(prepared, fields, sentence):
    described = meta.read_yaml(prepared / meta.DATASET)
    try:
        meta.write_yaml(prepared / meta.DATASET, meta.description(meta.VQA, fields))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe, "SAMPLES", 2)

            assert re.search(sentence, probe.read(prepared)["wrong"])
    finally:
        meta.write_yaml(prepared / meta.DATASET, described)
