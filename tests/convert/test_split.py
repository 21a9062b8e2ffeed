"""A conversion in several jobs makes what one makes, whatever becomes of a job."""

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from projects import contents

from plait import files
from plait.convert import split, stream
from plait.convert.split import share
from plait.convert.stream import Model, Placed
from plait.errors import CheckpointError, ConfigError, LayoutError
from plait.models import archive
from plait.models.safe import read
from plait.models.stored import Stored

HF, WHOLE, CUT = (
    "data/models/raw_hf/x",
    "data/models/raw/x-megatron",
    "data/models/sharded/x-megatron-tp2-pp2",
)
STAGES = {"convert": (HF, WHOLE), "shard": (WHOLE, CUT)}


def plait(stage, *words):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"plait.cli.{stage}").add(parser.add_subparsers())
    settings = {"stage": stage, "version": 1}
    args = parser.parse_args([stage, *STAGES[stage], *words, "--settings", json.dumps(settings)])
    args.run(args)


def in_parts(stage, of):
    for number in range(of, 0, -1):
        plait(stage, "--part", f"{number}/{of}")
    plait(stage, "--join", str(of))


def apart(stage, *words, patch=lambda: None):
    """A process of its own that runs a command; not yet waited for."""

    def body():
        patch()
        plait(stage, *words)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def leftovers():
    """What lies beside models and is none."""
    return sorted(path.name for path in Path("data").rglob(".*"))


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def source(work, maker):
    """Puts a model where the stages look for one."""

    def put(hf):
        shutil.copytree(hf, HF, dirs_exist_ok=True)

    put(maker.solo())
    return put


@pytest.mark.parametrize("model", ["solo", "llava", "mixtral"])
def test_parts_make_the_bytes_and_manifests_of_one_job(model, source, maker):
    shutil.rmtree(HF)
    source(getattr(maker, model)())
    for stage, (_, target) in STAGES.items():
        plait(stage)
        whole = contents(target)
        assert any(path.endswith("tensors.json") for path in whole)
        for of in (1, 2, 5, 60) if model == "solo" else (2, 5):
            shutil.rmtree(target)
            in_parts(stage, of)
            assert contents(target) == whole
            files.check_manifest(target)
            assert leftovers() == []


def test_parts_at_one_time_lay_out_the_files_once(source):
    plait("convert")
    whole = contents(WHOLE)
    shutil.rmtree(WHOLE)

    running = [apart("convert", "--part", f"{number}/4") for number in (1, 2, 3, 4)]
    for process in running:
        process.join(60)

    assert [process.exitcode for process in running] == [0] * 4
    assert (
        len([path for path in Path(f"{Path(WHOLE).parent}/.x-megatron.parts").iterdir() if path.is_dir()])
        == 1
    )
    assert not Path(WHOLE).exists()
    plait("convert", "--join", "4")
    assert contents(WHOLE) == whole


def killed_in(module, name, *, after):
    """The process kills itself in the call of a function that follows so many."""

    def patch():
        whole, calls = getattr(module, name), iter(range(after))

        def mortal(*words, **more):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*words, **more)

        setattr(module, name, mortal)

    return patch


DEATHS = {
    "laying out": ("--part", "2/3", killed_in(archive, "append", after=2)),
    "before its files appear": ("--part", "2/3", killed_in(split, "share", after=0)),
    "writing": ("--part", "2/3", killed_in(stream, "write_from", after=3)),
    "before it says so": ("--part", "2/3", killed_in(split, "to_json", after=0)),
    "joining": ("--join", "3", killed_in(files, "write_manifest", after=0)),
    "putting into place": ("--join", "3", killed_in(files, "_put", after=2)),
}


@pytest.mark.parametrize("when", DEATHS)
def test_a_job_that_is_killed_is_run_again(when, source):
    *words, patch = DEATHS[when]
    plait("convert")
    plait("shard")
    whole = contents(CUT)
    shutil.rmtree(CUT)
    for part in ("1/3", "3/3", *(["2/3"] if "--join" in words else [])):
        if when != "laying out":
            plait("shard", "--part", part)

    process = apart("shard", *words, patch=patch)
    process.join(60)

    assert process.exitcode == -signal.SIGKILL
    assert not Path(CUT).exists()
    for part in ("1/3", "2/3", "3/3")[:: 1 if "--part" in words else 3]:
        plait("shard", "--part", part)
    plait("shard", "--join", "3")
    assert contents(CUT) == whole


def spoil(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_a_source_that_is_damaged_between_two_parts_is_refused(source):
    plait("convert", "--part", "1/2")
    placed = read(Path(HF, "model.safetensors"))
    name = "model.norm.weight"
    spoil(Path(HF, "model.safetensors"), placed[name].offset)
    plait("convert", "--part", "2/2")

    with pytest.raises(CheckpointError, match=f"{HF} is not what it was when it was made"):
        plait("convert", "--join", "2")

    assert not Path(WHOLE).exists()
    assert leftovers() == []  # so that all parts are asked for again


def test_the_tensor_that_was_damaged_is_named(source):
    plait("convert")
    plait("shard", "--part", "1/2")
    (file,) = Path(WHOLE).rglob("*.pt")
    placed = archive.Archive(file).content["model"]
    spoil(file, placed["decoder.final_layernorm.weight"].offset)
    plait("shard", "--part", "2/2")

    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has sha256"):
        plait("shard", "--join", "2")


def test_a_part_that_is_missing_is_named_and_nothing_is_lost(source):
    plait("convert", "--part", "3/4")
    plait("convert", "--part", "1/4")

    with pytest.raises(CheckpointError, match="lacks part 2/4, 4/4"):
        plait("convert", "--join", "4")

    assert not Path(WHOLE).exists()
    plait("convert", "--part", "2/4")
    plait("convert", "--part", "4/4")
    plait("convert", "--join", "4")
    files.check_manifest(WHOLE)


def test_a_part_of_another_source_is_none(source, maker):
    plait("convert", "--part", "1/2")
    source(maker.solo("other", initializer_range=0.5))
    plait("convert", "--part", "2/2")

    with pytest.raises(CheckpointError, match="lacks part 1/2, or it was made of another source"):
        plait("convert", "--join", "2")

    plait("convert", "--part", "1/2")
    plait("convert", "--join", "2")
    assert files.check_manifest(WHOLE)["facts"]["merkle"] == files.read_manifest(HF)["facts"]["merkle"]


def test_tensors_that_no_part_or_two_parts_wrote_are_refused(source):
    for change, times in ((lambda tensors: tensors.pop("model.norm.weight"), 0), (None, 2)):
        plait("convert", "--part", "1/2")
        plait("convert", "--part", "2/2")
        one, two = (Path(f"data/models/raw/.x-megatron.parts/{number}-of-2.json") for number in (1, 2))
        said = json.loads(two.read_text())
        if change:
            change(said["tensors"])
            two.write_text(json.dumps(said))
        else:
            other = json.loads(one.read_text())
            other["tensors"]["model.norm.weight"] = said["tensors"]["model.norm.weight"]
            one.write_text(json.dumps(other))
        with pytest.raises(CheckpointError, match=f"its 2 parts wrote model.norm.weight {times} times"):
            plait("convert", "--join", "2")
        assert leftovers() == []


def test_a_part_that_cannot_be_is_refused(source, capsys):
    for part in ("0/2", "3/2"):
        with pytest.raises(ConfigError, match=f"there is no part {part[0]} of 2"):
            plait("convert", "--part", part)
    with pytest.raises(ConfigError, match="-1 parts cannot be joined"):
        plait("convert", "--join=-1")
    for part in ("2", "a/b", "-1/2"):
        with pytest.raises(SystemExit):
            plait("convert", f"--part={part}")
        assert "is no part such as 2/4" in capsys.readouterr().err
    Path("data/models/raw/x-megatron").mkdir(parents=True)
    Path("data/models/raw/x-megatron/mine").touch()
    with pytest.raises(LayoutError, match="plait did not make it"):
        plait("convert", "--part", "1/2")
    assert leftovers() == []


def test_parts_are_of_targets_inside_data(work, maker):
    parser = argparse.ArgumentParser()
    importlib.import_module("plait.cli.convert").add(parser.add_subparsers())
    args = parser.parse_args(["convert", str(maker.hf()), "there", "--part", "1/2"])

    with pytest.raises(LayoutError, match="inside data/, which there is not"):
        args.run(args)


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=40), of=st.integers(1, 50))
def test_shares_are_neighbours_of_about_as_many_bytes(sizes, of):
    shapes = {f"t{n}": (size,) for n, size in enumerate(sizes)}
    held = stream.forms.identity(shapes)
    model = Model([Placed(n, Stored(Path("x"), 0, "float32", s), held[n]) for n, s in shapes.items()], shapes)

    shares = [share(model, number, of) for number in range(1, of + 1)]

    assert [name for one in shares for name in one] == list(shapes)
    most = sum(sizes) / of + max(sizes)
    assert all(sum(shapes[name][0] for name in one) <= most for one in shares)
