"""No classic fault of a converter passes the proof, and each is found by the check that the table names."""

import megatron.core.models.gpt  # noqa: F401 - loaded once here, not in every forked rank
import pytest
import transformers.models.mistral.modeling_mistral  # noqa: F401
from mutants import GRIDS, KILLERS, MODELS, MUTANTS, killed, prove


@pytest.mark.parametrize("model", MODELS)
def test_each_model_is_proven_without_a_fault(model, maker, tmp_path):
    prove(MODELS[model](maker), tmp_path / "run", GRIDS[model])


@pytest.mark.parametrize("name", MUTANTS)
def test_no_fault_passes(name, maker, tmp_path):
    said = killed(name, MODELS[MUTANTS[name].model](maker), tmp_path / "run")
    assert KILLERS[MUTANTS[name].killer] in said, said or "it passed"
    assert not (tmp_path / "run" / "parity.json").exists()
