"""Tars of conversations: what is written is what is read, byte for byte; what cannot be is a sentence."""

import io
import subprocess
import tarfile

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from talks import KEYS, exchange, picture, talk

from plait.data import tars, webdataset
from plait.data.chat import Message, Sample, Text
from plait.errors import ConfigError, DataError, RecordError


def test_the_parts_are_those_of_the_guides(tmp_path):
    for name, layout in (("a", "conversations"), ("b", "question_answer")):
        (tmp_path / name).mkdir()
        webdataset.write([exchange(0)], tmp_path / name, {**KEYS, "layout": layout})
    with tarfile.open(tmp_path / "a" / "000000.tar") as tar:
        assert tar.getnames()[:2] == ["s-0.jpg", "s-0.json"]
        assert orjson.loads(tar.extractfile("s-0.json").read()) == [
            {"from": "human", "value": "<image>\nwhat is 0?"},
            {"from": "gpt", "value": "it is 0"},
        ]
    with tarfile.open(tmp_path / "b" / "000000.tar") as tar:
        assert tar.getnames()[:3] == ["s-0.jpg", "s-0.txt", "s-0.json"]
        assert orjson.loads(tar.extractfile("s-0.json").read()) == {"question": "what is 0?", "id": "s-0"}
        assert tar.extractfile("s-0.txt").read() == b"it is 0"


def test_pictures_without_a_place_stand_before_the_users_first_turn():
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "what?"}]
    found = webdataset.conversation(turns, [picture().encoded], "k")
    assert found.messages[0] == Message("system", (Text("Be brief."),))
    assert found.messages[1] == Message("user", (picture(), Text("\nwhat?")))


def test_equal_samples_give_equal_tars(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        webdataset.write([exchange(n) for n in range(6)], tmp_path / name, KEYS)
    assert (tmp_path / "a/000001.tar").read_bytes() == (tmp_path / "b/000001.tar").read_bytes()


def test_a_bare_caption_is_the_answer_to_its_picture():
    caption = Sample((Message("assistant", (picture(), Text("a cat"))),), "c")
    asked = webdataset.with_question(caption)
    assert [message.role for message in asked.messages] == ["user", "assistant"]
    parts = webdataset.to_parts(asked, "question_answer")
    assert orjson.loads(parts["json"])["question"] == ""
    assert webdataset.to_sample(parts, "c") == asked


def test_words_before_a_picture_make_no_caption():
    told = Sample((Message("assistant", (Text("this: "), picture(), Text("a cat"))),), "c")
    shown = Sample((Message("assistant", (picture(),)),), "c")
    text = Sample((Message("assistant", (Text("a cat"),)), Message("user", (picture(),))), "c")
    assert [webdataset.with_question(sample) for sample in (told, shown, text)] == [told, shown, text]


def test_a_layout_that_has_no_place_for_a_sample():
    with pytest.raises(RecordError, match="2 pictures; the layout question_answer holds one"):
        webdataset.to_parts(talk(0), "question_answer")
    shown = Sample((Message("user", (Text("draw"),)), Message("assistant", (picture(),))), "a")
    with pytest.raises(RecordError, match="turns user, assistant and 1 pictures"):
        webdataset.to_parts(shown, "question_answer")


def test_words_that_stand_for_a_picture_are_refused():
    said = Sample((Message("user", (picture(), Text("\nwrite <image>"))), *exchange(0).messages[1:]), "a")
    with pytest.raises(RecordError, match="sample 'a' says <image> in its text"):
        webdataset.to_parts(said, "conversations")


@pytest.mark.parametrize(
    "pattern",
    ["all.tar", "{:06d}", "{:06d}.tar.gz", "{name}.tar", "{:d.tar", "../{}.tar", "/{}.tar", ".x/{}.tar"],
)
def test_a_name_that_names_no_shards(tmp_path, pattern):
    with pytest.raises(ConfigError, match=r"energon.shard_name '.*' (is no format|must name another .tar)"):
        webdataset.write([exchange(0)], tmp_path, {**KEYS, "shard_name": pattern})


ASKED = {
    "before": (picture(), Text("what?")),
    "after": (Text("what?"), picture()),
    "within": (Text("what is "), picture(), Text("?\n")),
    "alone": (picture(),),
    "a line below": (picture(), Text("\n")),
    "two lines below": (picture(), Text("\n\nwhat?")),
    "guide": (picture(), Text("\nwhat?")),
}


@pytest.mark.parametrize("layout", ["conversations", "question_answer"])
@pytest.mark.parametrize("where", ASKED)
def test_text_is_kept_verbatim_around_the_picture(where, layout):
    sample = Sample((Message("user", ASKED[where]), Message("assistant", (Text(" so\n"),))), "k")
    assert webdataset.to_sample(webdataset.to_parts(sample, layout), "k") == sample


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: "<image>" not in text
)
SHOWN = st.integers(0, 3).map(lambda number: picture(number, ["JPEG", "PNG", "WEBP", "GIF"][number]))


@given(st.lists(st.tuples(st.booleans(), WORDS, SHOWN), min_size=1, max_size=4))
def test_a_conversation_is_read_as_it_was_written(turns):
    messages = [
        Message("assistant" if number % 2 else "user", (Text(words), shown) if both else (Text(words),))
        for number, (both, words, shown) in enumerate(turns)
    ]
    sample = Sample(tuple(messages), "k")
    assert webdataset.to_sample(webdataset.to_parts(sample, "conversations"), "k") == sample


def test_pictures_keep_their_bytes_under_the_name_of_their_kind():
    kinds = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
    shown = tuple(picture(number, kind) for number, kind in enumerate(kinds))
    sample = Sample((Message("user", shown), Message("assistant", (Text("six"),))), "k")
    parts = webdataset.to_parts(sample, "conversations")
    assert list(parts) == ["jpg", "1.png", "2.webp", "3.gif", "4.bmp", "5.tif", "json"]
    assert [parts[name] for name in list(parts)[:6]] == sample.pictures


@given(st.sets(st.text(st.characters(exclude_categories=["Cs"]), max_size=120), min_size=2))
def test_ids_become_keys_that_a_tar_can_hold(ids):
    keys = {webdataset.key_for(id_) for id_ in ids}
    assert len(keys) == len(ids)
    assert all(webdataset.PLAIN_KEY.fullmatch(key) for key in keys)


def test_ids_of_any_script_and_length_are_written(tmp_path):
    ids = ["猫", "犬", "coco/train2017/1.jpg", "a.b", "x" * 300]
    webdataset.write(
        [exchange(n, id_) for n, id_ in enumerate(ids)], tmp_path, {**KEYS, "samples_per_shard": 9}
    )
    keys = [key for key, _ in tars.read_tar(tmp_path / "000000.tar")]
    assert len(set(keys)) == 5
    assert keys[2].startswith("coco_train2017_1_jpg-")


def test_entries_that_are_no_samples_part_are_passed_over_at_any_place(tmp_path):
    """As energon does: hidden files of macOS, folders, meta entries; a tar may end with one."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("./._1.jpg", "__meta__/1.jpg", "d/1.jpg", "d/1.json", "README", ".DS_Store"):
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(b"x" * 600))
        tar.addfile(tarfile.TarInfo("e"))
    assert list(tars.read_tar(path)) == [("d/1", {"jpg": b"x" * 600, "json": b"x" * 600})]


def test_every_cut_of_a_tar_is_found(tmp_path):
    webdataset.write([exchange(n) for n in range(3)], tmp_path, KEYS)
    whole = (tmp_path / "000000.tar").read_bytes()
    filled = max(n for n in range(0, len(whole), 512) if whole[n : n + 512].strip(b"\0")) + 512
    for size in range(0, filled + 1, 256):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"cut.tar (is damaged or no tar|is cut short)"):
            list(tars.read_tar(tmp_path / "cut.tar"))


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_a_link_in_place_of_a_part_is_found(tmp_path, kind):
    """GNU tar writes a file's second name as a hard link; readers pass it over, and its picture is lost."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("1.jpg", "1.txt"):
            tar.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = kind, "1.jpg"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("2.txt"))
    with pytest.raises(DataError, match=r"a.tar: 2.jpg is a link, a device or sparse"):
        list(tars.read_tar(path))


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_a_file_with_holes_is_found(tmp_path, form):
    """Its bytes do not stand in the tar as they are: others would be read in their place."""
    with (tmp_path / "1.jpg").open("wb") as file:
        file.write(b"begin")
        file.truncate(1 << 20)
    (tmp_path / "1.txt").write_bytes(b"x" * (1 << 20))
    words = ["tar", f"--format={form}", "--sparse", "-cf", "a.tar", "1.jpg", "1.txt"]
    subprocess.run(words, cwd=tmp_path, check=True)
    with pytest.raises(DataError, match=r"a.tar: 1.jpg is a link, a device or sparse"):
        list(tars.read_tar(tmp_path / "a.tar"))


@pytest.mark.parametrize("name", [b"x\xe9.jpg", b"a" * 150 + b"\xe9.jpg"], ids=["plain", "by tarfile"])
def test_a_name_that_is_no_text_is_refused(tmp_path, name):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo(name.decode("utf-8", "surrogateescape")))
    with pytest.raises(DataError, match=r"a.tar: the name '.*\\udce9.jpg' is not UTF-8"):
        list(tars.places(path))


@pytest.mark.parametrize("half", [rb"\ud83d", b"\xed\xa0\xbd"])
def test_half_a_pair_of_surrogates_is_no_text(half):
    turns = b'[{"from": "human", "value": "%s"}, {"from": "gpt", "value": "x"}]' % half
    with pytest.raises(RecordError, match=r"k\.json is not JSON") as caught:
        webdataset.to_sample({"json": turns}, "k")
    assert caught.value.reason == "bad_json"
    whole = turns.replace(half, rb"\ud83d\ude00")
    assert webdataset.to_sample({"json": whole}, "k").messages[0].parts == (Text("\U0001f600"),)


@pytest.mark.parametrize(
    "content",
    [b"[" * 2000 + b"]" * 2000, r'[{"from": "human", "value": "\ud800"}]'.encode("utf-16-le")],
    ids=["deep", "of another code"],
)
def test_json_that_python_reads_and_nobody_else_is_rejected(content):
    with pytest.raises(RecordError, match=r"k\.json is not JSON"):
        webdataset.to_sample({"json": content}, "k")


def test_tars_joined_by_cat_are_found_and_padding_is_not(tmp_path):
    webdataset.write([exchange(n) for n in range(2)], tmp_path, KEYS)
    path = tmp_path / "000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(3 << 20))
    assert len(list(tars.read_tar(path))) == 2
    path.write_bytes(whole + bytes(3 << 20) + whole)
    with pytest.raises(DataError, match=r"000000.tar goes on behind its end"):
        list(tars.read_tar(path))


ASKED_IN_THREE = {"txt": b"a ball", "json": b'{"question": "what?"}'}


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"image.jpg": b"\xff", **ASKED_IN_THREE}, "unknown_part"),
        ({"avif": b"\0", **ASKED_IN_THREE}, "unknown_part"),
        ({"avif": b"\0", "json": b'[{"from": "human", "value": "what?"}]'}, "unknown_part"),
        ({"jpg": b"\xff", "1.heic": b"\0", **ASKED_IN_THREE}, "unknown_part"),
        ({"jpg": b"\xff", "JPG": b"\xff", **ASKED_IN_THREE}, "unknown_part"),
        (ASKED_IN_THREE, "missing_picture"),
        ({"txt": b"a ball"}, "missing_picture"),
        ({"jpg": b"\xff", "txt": b"a ball", "json": b"3"}, "not_a_record"),
        ({"json": b'[{"from": "human", "value": "<image>what?"}]'}, "wrong_pictures"),
    ],
)
def test_a_picture_that_is_missing_or_under_another_name(parts, reason):
    with pytest.raises(RecordError) as refused:
        webdataset.to_sample(parts, "k")
    assert refused.value.reason == reason


def test_a_list_of_turns_may_be_without_a_picture_and_other_parts_are_left_alone():
    parts = {"json": b'[{"from": "human", "value": "what?"}]', "cls": b"3", "url.txt": b"x"}
    assert webdataset.to_sample(parts, "k").messages == (Message("user", (Text("what?"),)),)


def test_names_of_parts_may_be_in_capitals():
    upper = {"JPG": picture().encoded, "TXT": b"a ball", "JSON": b'{"question": "what?"}'}
    lower = {name.lower(): content for name, content in upper.items()}
    assert webdataset.to_sample(upper, "k") == webdataset.to_sample(lower, "k")


@pytest.mark.parametrize(
    ("turns", "pictures", "sentence"),
    [
        ([{"from": "human", "value": "<image><image>"}], 1, "has 1 pictures and says <image> 2 times"),
        ([{"from": "nobody", "value": ""}], 0, "not a list of turns"),
        (["words"], 0, "not a list of turns"),
        ([{"from": "human", "value": None}], 0, "not a list of turns"),
        ([{"from": ["human"], "value": "x"}], 0, "not a list of turns"),
        ([], 0, "has no turns"),
        ([{"from": "system", "value": ""}], 0, "has no turns"),
    ],
)
def test_a_conversation_that_is_none(turns, pictures, sentence):
    with pytest.raises(RecordError, match=sentence):
        webdataset.conversation(turns, [picture().encoded] * pictures, "k")


def test_samples_that_say_the_same_are_rejected_with_the_first_ones_place(tmp_path):
    samples = [exchange(0), exchange(1), exchange(0, "another"), exchange(2)]
    for policy, kept in (("count", 4), ("reject", 3)):
        folder = tmp_path / policy
        folder.mkdir()
        keys = {**KEYS, "reject_limit": 0.5}
        made = webdataset.write(samples, folder, keys, duplicates=policy)
        assert sum(made.shards.values()) == kept
        assert made.rejected == ({"duplicate": 1} if policy == "reject" else {})
    (line,) = map(orjson.loads, (tmp_path / "reject/rejects.jsonl").read_bytes().splitlines())
    assert (line["id"], line["message"]) == ("another", "samples line 1 says the same")
