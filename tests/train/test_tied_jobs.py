"""`plait train` itself on a tied model with norms of heads, and its export, proven."""

import numpy as np
import pytest
from jobs import TARGET, packed, pictured, saved
from makers import Maker

from plait import files
from plait.convert import folders
from plait.convert.export import export_folder
from plait.models.specs import Spec
from plait.models.weights import FolderTensors
from plait.parallel.grid import Grid
from plait.verify import logits, parity
from plait.verify.ranks import run_ranks  # noqa: F401 - loaded before ranks are forked

WAYS = {
    "tensors": {"tensor_model_parallel_size": 2},
    "copies": {"data_parallel_size": 2, "use_distributed_optimizer": True},
}


def tied(maker):
    return maker.foreign("Qwen3", tied=True, head_dim=12, num_hidden_layers=2, initializer_range=0.2)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_a_tied_model_is_trained_and_exported_tied(way, tmp_path):
    places = {}
    for name, keys in (("alone", {}), (way, WAYS[way])):
        (tmp_path / name).mkdir()
        place = packed(tmp_path / name, model=tied, hidden_dropout=0.0, global_batch_size=2, **keys)
        place.train(env={"OMP_NUM_THREADS": "1"})
        places[name] = place
    for key in ("lm loss", "grad norm"):
        rows = [[row[key] for row in place.rows()] for place in places.values()]
        assert np.allclose(*rows, atol=1e-5, rtol=1e-5)
    iteration = places[way].root / TARGET
    source = tied(Maker(places[way].root / "made"))

    folder = tmp_path / "exported"
    folder.mkdir()
    facts = export_folder(source, iteration, folder, recipe="chat", chat_template=None)

    assert Spec.of(folder).tied
    assert "lm_head.weight" not in FolderTensors(folder).shapes
    assert facts["merkle"] == files.read_manifest(iteration)["facts"]["merkle"]
    spec = Spec.of(folder)
    grid = Grid(WAYS[way].get("tensor_model_parallel_size", 1))
    rows = parity.computed(folder, spec, grid.tp, parity.Trained(iteration, spec, grid))
    assert logits.failures(**rows) == []


@pytest.mark.long
def test_a_tied_llava_is_trained_over_stages_and_exported_tied(tmp_path):
    keys = {"train_iters": 4, "global_batch_size": 4, "micro_batch_size": 1, "hidden_dropout": 0.0}
    places = []
    for stages in (1, 2):
        (tmp_path / str(stages)).mkdir()
        place = pictured(
            tmp_path / str(stages), model=Maker.tied_llava, pipeline_model_parallel_size=stages, **keys
        )
        place.train(to=4, env={"OMP_NUM_THREADS": "1"})
        places.append(place)
    for key in ("lm loss", "grad norm"):
        rows = [[row[key] for row in place.rows()] for place in places]
        assert np.allclose(*rows, atol=1e-5, rtol=1e-5)
    iteration = places[1].root / saved(4)
    source = Maker(places[1].root / "made").tied_llava()

    folder = tmp_path / "exported"
    folder.mkdir()
    facts = export_folder(source, iteration, folder, recipe="llava", chat_template=None)

    spec = Spec.of(folder)
    assert spec.tied
    assert "language_model.lm_head.weight" not in FolderTensors(folder).shapes
    assert facts["merkle"] == files.read_manifest(iteration)["facts"]["merkle"]
    assert facts["merkle"] != files.read_manifest(source)["facts"]["merkle"]
    rows = parity.computed(folder, spec, 1, parity.Trained(iteration, spec, Grid(1, 2)))
    assert logits.failures(**rows) == []

    (tmp_path / "cut").mkdir()
    cut = folders.remake(iteration, tmp_path / "cut", Grid(2, 2), to="classic", optim=True)
    (tmp_path / "joined").mkdir()
    joined = folders.remake(tmp_path / "cut", tmp_path / "joined", Grid(), to="torch_dist", optim=True)
    assert cut["merkle"] == joined["merkle"] == facts["merkle"]
    assert cut["optimizer"] == joined["optimizer"]
