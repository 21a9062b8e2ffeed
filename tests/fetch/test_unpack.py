"""Archives of strangers: what is unpacked, and what is refused by name."""

import io
import stat
import tarfile
import zipfile

import pytest

from plait.errors import DataError
from plait.fetch.unpack import Limits, is_archive, unpack

ENOUGH = Limits(bytes=10**6, files=100)
MODES = {".tar": "w", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}


def everything(_):
    return True


def archive(path, members, ending):
    """An archive of (name, content) and (name, tarfile type)."""
    path = path.with_name(f"a{ending}")
    if ending == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for name, content in members:
                info = zipfile.ZipInfo(name)
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = (stat.S_IFLNK | 0o777) << 16 if content is tarfile.SYMTYPE else 0
                out.writestr(info, content)
        return path
    with tarfile.open(path, MODES[ending]) as out:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str | bytes) and content in tarfile.SUPPORTED_TYPES:
                info.type, info.linkname = content, "../out"
                out.addfile(info)
            else:
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("ending", [".zip", *MODES])
def test_wanted_files_are_unpacked_and_hidden_ones_are_not(tmp_path, ending):
    members = [
        ("a/x.jsonl", b"<1>"),
        ("a/y.txt", b"<2>"),
        ("./b.jsonl", b"<3>"),
        ("a/._x.jsonl", b"<4>"),
        ("__MACOSX/x.jsonl", b"<5>"),
    ]
    path = archive(tmp_path / "a", members, ending)
    assert is_archive(path.name)
    found = unpack(path, tmp_path / "out", lambda name: name.endswith(".jsonl"), ENOUGH)
    assert found == ["a/x.jsonl", "b.jsonl"]
    there = {
        p.relative_to(tmp_path / "out").as_posix(): p.read_bytes()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    }
    assert there == {"a/x.jsonl": b"<1>", "b.jsonl": b"<3>"}


@pytest.mark.parametrize("ending", [".zip", ".tgz"])
@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "a\\..\\..\\x", "C:/x"])
def test_names_that_lead_out_are_refused(tmp_path, ending, name):
    path = archive(tmp_path / "a", [("good", b"<1>"), (name, b"<2>")], ending)
    with pytest.raises(DataError, match="which leads out of its folder"):
        unpack(path, tmp_path / "out", everything, ENOUGH)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {path.name, "good"}


@pytest.mark.parametrize(
    ("ending", "kind"),
    [(".zip", tarfile.SYMTYPE), *((".tgz", kind) for kind in (b"1", b"2", b"3", b"6"))],
    ids=["zip link", "hard link", "symbolic link", "device", "fifo"],
)
def test_links_and_devices_are_refused(tmp_path, ending, kind):
    path = archive(tmp_path / "a", [("link", kind), ("link/x", b"<1>")], ending)
    with pytest.raises(DataError, match="'link', which is a link or device"):
        unpack(path, tmp_path / "out", everything, ENOUGH)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", [".zip", ".tgz"])
def test_what_becomes_too_much_is_stopped(tmp_path, ending):
    path = archive(tmp_path / "a", [("a", bytes(10**6)), ("bomb", bytes(50 * 10**6))], ending)
    assert path.stat().st_size < 200_000
    with pytest.raises(DataError, match=r"unpacks to more than 0\.002 GB"):
        unpack(path, tmp_path / "out", everything, Limits(bytes=2 * 10**6, files=9))
    assert (tmp_path / "out/bomb").stat().st_size <= 2 * 2**20
    with pytest.raises(DataError, match="has more than 1 members"):
        unpack(path, tmp_path / "out2", everything, Limits(bytes=10**9, files=1))


@pytest.mark.parametrize("ending", [".zip", ".tgz", ".tar.xz"])
def test_damage_is_a_sentence(tmp_path, ending):
    path = archive(tmp_path / "a", [("a", bytes(range(256)) * 400)], ending)
    content = path.read_bytes()
    middle = len(content) // 3
    path.write_bytes(content[:middle] + bytes(40) + content[middle + 40 :])
    with pytest.raises(DataError, match="is damaged or no archive"):
        unpack(path, tmp_path / "out", everything, ENOUGH)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="is damaged or no archive"):
        unpack(path, tmp_path / "out2", everything, ENOUGH)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("members", [[("a", b"<1>"), ("a", b"<2>")], [("a", b"<1>"), ("a/b", b"<2>")]])
def test_two_of_one_name_are_refused(tmp_path, members):
    path = archive(tmp_path / "a", members, ".zip")
    with pytest.raises(DataError, match=r"has a twice|has a file where it has a folder"):
        unpack(path, tmp_path / "out", everything, ENOUGH)


def test_a_password_is_a_sentence(tmp_path):
    path = archive(tmp_path / "a", [("a", b"<1>")], ".zip")
    content = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + flags] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="which is a file with a password"):
        unpack(path, tmp_path / "out", everything, ENOUGH)
