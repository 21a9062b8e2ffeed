"""The CPU path is pinned: another Megatron Core, or a place of it that moved, is an error that names it."""

import pytest
import torch

from plait.train import compat

install = compat.install.__wrapped__
"""Without its cache: it may have run in this process."""


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_another_megatron_core_is_refused_before_anything_is_patched(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: {"megatron-core": "0.17.0"}[name])
    monkeypatch.setattr(compat, "_replace", pytest.fail)
    with pytest.raises(RuntimeError, match=r"made for megatron-core 0\.16\.1, found 0\.17\.0"):
        install()


def test_with_cuda_any_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compat, "version", pytest.fail)
    monkeypatch.setattr(compat, "_replace", pytest.fail)
    install()


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("dumps", r"json\.dumps spells no CUDA device"),
        ("moved", r"json\.moved is gone"),
        ("JSONEncoder.moved", r"json\.JSONEncoder\.moved is gone"),
        ("moved.default", r"json\.moved\.default is gone"),
    ],
)
def test_a_place_that_moved_is_named(place, sentence, monkeypatch):
    monkeypatch.setattr(compat, "LITERALS", {"json": (place,)})
    with pytest.raises(RuntimeError, match=sentence):
        compat.literal_devices_are_the_cpu()


def test_a_name_that_is_gone_is_not_made(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)  # is put back
    monkeypatch.delattr(torch.cuda, "synchronize")
    with pytest.raises(RuntimeError, match=r"torch\.cuda\.synchronize is gone"):
        compat.current_device_is_the_cpu()
    assert not hasattr(torch.cuda, "synchronize")


def test_every_place_of_the_pinned_version_still_stands():
    from importlib import import_module

    compat.install()
    for module, names in compat.LITERALS.items():
        for name in names:
            constants = str(compat._function(import_module(module), name).__code__.co_consts)
            assert "cuda" not in constants.replace("cuda_graph", "").split("'"), name
