"""Projects with a preset's config, whose models from afar have their config.json here and nothing else."""

import json

import pytest
from hub_configs import PLANS, config_of

from plait.config import Plan
from plait.config.model import load_file


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """A maker of the plan of a preset, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def make(name):
        plan = Plan(load_file(PLANS / f"{name}.yaml"))
        for source in plan.config.raw_hf.values():
            if source.kind in {"hub", "gguf"}:
                path = tmp_path / plan.config_file(source)
                path.parent.mkdir(parents=True)
                path.write_text(json.dumps(config_of(source)))
        return plan

    return make
