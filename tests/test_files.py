"""Files appear whole or not at all; manifests are deterministic and name what differs."""

import os
import re
from pathlib import Path

import pytest

from plait import files
from plait.errors import DataError, LayoutError
from plait.layout import Chat, Iteration


def names(folder):
    return [path.name for path in folder.iterdir()]


def make(folder, *, text="one", settings=None, inputs=()):
    with files.appears_whole(folder, folder=True) as part:
        (part / "sub").mkdir()
        (part / "sub/a.txt").write_text(text)
        return files.write_manifest(part, kind="raw", settings=settings or {"n": 1}, inputs=inputs)


def test_a_folder_appears_whole(tmp_path):
    make(tmp_path / "deep/x")

    assert (tmp_path / "deep/x/sub/a.txt").read_text() == "one"
    assert names(tmp_path / "deep") == ["x"]
    assert files.check_manifest(tmp_path / "deep/x")["kind"] == "raw"


class InterruptedWorkError(Exception):
    pass


def fail(part):
    (part / "half").write_text("") if part.is_dir() else part.write_text("half")
    raise InterruptedWorkError


@pytest.mark.parametrize("folder", [False, True])
def test_after_a_failure_nothing_is_there_and_what_was_there_still_is(tmp_path, folder):
    with pytest.raises(InterruptedWorkError), files.appears_whole(tmp_path / "new", folder=folder) as part:
        fail(part)
    assert not names(tmp_path)

    old = tmp_path / "old"
    if folder:
        make(old)
    else:
        old.write_text("one")
    with pytest.raises(InterruptedWorkError), files.appears_whole(old, folder=folder) as part:
        fail(part)
    assert names(tmp_path) == ["old"]
    assert (old / "sub/a.txt" if folder else old).read_text() == "one"


def test_a_folder_of_ours_is_replaced_and_anothers_is_refused_by_name(tmp_path):
    make(tmp_path / "x")
    make(tmp_path / "x", text="two")
    assert (tmp_path / "x/sub/a.txt").read_text() == "two"

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    with pytest.raises(LayoutError, match=r"mine stands where plait would write"):
        make(mine)
    with pytest.raises(LayoutError, match=r"mine stands where plait would write"):
        files.refuse_foreign(mine)
    assert (mine / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("left", [(), (".snakemake_timestamp",)])
def test_a_folder_that_snakemake_prepared_is_ours(tmp_path, left):
    for name in left:
        (tmp_path / name).touch()

    assert files.made_by_plait(tmp_path)
    assert files.made_by_plait(tmp_path / "missing")


def test_what_another_host_writes_stays_whatever_its_number(tmp_path):
    others = tmp_path / f".x.{os.getpid()}@elsewhere.part"
    ours = tmp_path / f".x.{os.getpid()}@{os.uname().nodename}.part"
    for path in (others, ours):
        path.write_text("half")
    with files.appears_whole(tmp_path / "x") as part:
        part.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [others.name, "x"]


def test_an_error_names_the_target_and_not_what_is_written_beside_it(tmp_path):
    target = tmp_path / "data"
    with pytest.raises(DataError) as error, files.appears_whole(target, folder=True) as part:
        raise DataError(f"{part}/a.tar is cut", hint=f"look at {part.name}")

    assert str(error.value) == f"{target}/a.tar is cut\nhint:  look at data"


def test_a_link_of_the_user_is_not_ours(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "link").symlink_to("models")

    assert not files.made_by_plait(tmp_path / "link")


@pytest.mark.parametrize("beside", ["ledger.json", "rejects.jsonl"])
def test_a_shard_of_ours_has_its_ledger_or_its_rejects_beside_it(tmp_path, monkeypatch, beside):
    monkeypatch.chdir(tmp_path)
    shard = Chat(dataset="x", shard=0)
    files.refuse_foreign(shard)
    Path(str(shard)).parent.mkdir(parents=True)
    Path(str(shard)).touch()
    with pytest.raises(LayoutError, match=r"shard_00000\.jsonl\.gz stands where plait would write"):
        files.refuse_foreign(shard)

    Path(f"data/processed/x/shard_00000.{beside}").touch()
    files.refuse_foreign(shard)


@pytest.mark.parametrize(("mark", "ours"), [("plait.json", True), ("run.json", True), ("model.pt", False)])
def test_a_checkpoint_of_ours_holds_its_manifest_or_the_settings_of_its_run(tmp_path, mark, ours):
    (tmp_path / mark).touch()

    assert files.made_by_plait(tmp_path, Iteration.MARKS) == ours


def test_equal_rebuilds_have_equal_manifests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(Path("in"))
    make(Path("a"), inputs=["in"])
    make(Path("b"), inputs=[tmp_path / "in"])

    a, b = (Path(name, "plait.json").read_bytes() for name in ("a", "b"))
    assert a == b
    assert str(tmp_path).encode() not in a


@pytest.mark.parametrize("change", [{"text": "two"}, {"settings": {"n": 2}}])
def test_what_differs_shows_in_the_manifest_of_what_follows(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    make(Path("in"))
    before = make(Path("out"), inputs=["in"])
    make(Path("in"), **change)

    assert make(Path("out"), inputs=["in"]) != before


def test_a_file_as_input_stands_by_its_own_digest(tmp_path):
    (tmp_path / "x").write_text("one")

    assert files.digest_of_input(tmp_path / "x") == files.digest(tmp_path / "x")
    assert files.digest(tmp_path / "x") == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda x: (x / "sub/a.txt").unlink(), r"a\.txt is missing"),
        (lambda x: (x / "sub/a.txt").write_text("longer"), r"a\.txt has 6 bytes, plait\.json says 3"),
        (lambda x: (x / "sub/a.txt").write_text("owe"), r"a\.txt does not have the sha256"),
        (lambda x: (x / "plait.json").unlink(), r"has no plait\.json"),
        (lambda x: (x / "plait.json").write_text("{"), r"is not JSON"),
        (lambda x: (x / "plait.json").write_text('{"schema": 99}'), r"has schema 99; this plait reads 1"),
    ],
)
def test_harm_is_named(tmp_path, harm, sentence):
    make(tmp_path / "x")
    harm(tmp_path / "x")

    with pytest.raises(DataError, match=sentence):
        files.check_manifest(tmp_path / "x")


def test_a_manifest_of_another_kind_is_refused(tmp_path):
    make(tmp_path / "x")

    with pytest.raises(DataError, match="is of kind 'raw', expected 'indexed'"):
        files.read_manifest(tmp_path / "x", kind="indexed")


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    assert files.canonical({"b": 1, "a": "ø"}) == files.canonical({"a": "ø", "b": 1}) == '{"a":"ø","b":1}'


def test_sizes_are_of_the_wanted_files_and_know_no_place(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "deep").mkdir(parents=True)
        (tmp_path / place / "deep/a.jsonl").write_text("12\n")
        (tmp_path / place / "notes.txt").write_text("mine")
    names = re.compile(r".*\.jsonl")

    assert files.sizes(tmp_path / "here", names) == files.sizes(tmp_path / "there", names)
    assert files.sizes(tmp_path / "here", names) == {"deep/a.jsonl": 3}
    assert files.sizes(tmp_path / "here/deep/a.jsonl", names) == {"a.jsonl": 3}
    assert files.sizes(tmp_path / "gone", names) == {}


def test_a_source_without_a_path_is_not_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()

    assert files.sizes("", re.compile(r".*")) == {}
