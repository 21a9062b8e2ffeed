"""The page of a mixture: figures recounted in plain loops, samples read back, all of it in a browser."""

import base64
import html.parser
import io
import json
import math
import re
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import pytest
import yaml
from browser import browser
from folders import tokenizer_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_build import CAPTIONED, chats, index, picture, turn

from plait import files, layout
from plait.cli.main import main
from plait.data import energon, images
from plait.data.chat import Message, Picture, Sample, Text
from plait.tokens import analysis, charts, page, shown
from plait.tokens.indexed import PackedShard
from plait.tokens.roles import ASSISTANT, PACK_SEP
from plait.tokens.tally import Tally

SCRIPT = "<script>document.title = 'mine'</script>"
HOSTILE = f"</div>{SCRIPT}<img src=x onerror=\"fetch('//evil')\">&lt; \u202eback\x00\x1b[0m"
CONFIG = {
    "datasets": {
        "talk": {"source": {"kind": "chat-jsonl", "path": "talk"}, "shards": 2, "reject_limit": 0.5},
        "seen": {"source": {"kind": "chat-jsonl", "path": "seen"}},
    },
    "tokenizers": {"byte": {"kind": "folder", "path": "data/tokenizers/byte"}},
    "formats": {"f": {"tokenizer": "byte", "template": "chatml", "reject_limit": 0.5}},
    "mixtures": {"packs": {"format": "f", "pack": 256, "datasets": ["talk", "seen"]}},
}
ENERGON = {
    "layout": "conversations", "shard_name": "{:06d}.tar", "samples_per_shard": 5, "split": [1, 0, 0],
    "split_parts": {}, "exclude": "", "sample_type": None, "field_map": {}, "reject_limit": 0.01,
}  # fmt: skip
SIZES = {"many": 30, "few": 6}
PACKS = [
    f"data/megatron_format/f_{name}_pack256/shard_{n:05d}"
    for name, n in (("talk", 0), ("talk", 1), ("seen", 0))
]


def run(*words):
    assert main([*words, "--config", "config.yaml"]) == 0


def lines_of_talk():
    """60 good lines; every sixth line more is bad: two whose sentence or reason are a stranger's text."""
    for number in range(60):
        words = f"{number} {HOSTILE}" if number % 20 == 3 else f"{number} 赤い玉 {'long ' * (number % 9)}😀"
        yield [turn("user", f"question {number}"), turn("assistant", words)]
        if number % 6 == 0:
            yield (
                {"messages": [{"role": f"<b>{number}", "content": "x"}]} if number % 4 else {"words": HOSTILE}
            )


def lines_of_seen():
    for number in range(12):
        yield [turn("user", picture(40 + number, 33, number), "what?"), turn("assistant", f"thing {number}")]


def jpeg(number):
    file = io.BytesIO()
    Image.new("RGB", (300, 20 + number), (number * 5, 0, 0)).save(file, "JPEG")
    return Picture(file.getvalue())


def seen(number):
    """About one picture or two; two of the samples have no answer; the longest is clipped."""
    asked = Message("user", (*(jpeg(number), jpeg(number + 1))[: 1 + number % 2], Text("\nwhat?")))
    words = "long " * 60 if number == 4 else f"{number} {HOSTILE}"
    answer = (Message("assistant", (Text(words),)),) if number not in {2, 11} else ()
    return Sample((asked, *answer), f"s-{number}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A mixture of two packed datasets and one of two energon datasets, analysed."""
    root = tmp_path_factory.mktemp("root")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
        tokenizer_folder(Path("data/tokenizers/byte"), vision=True, chatml=True, image=True)
        for name, lines in (("talk", lines_of_talk()), ("seen", lines_of_seen())):
            Path(name).mkdir()
            Path(name, "a.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines) + b"\n")
            run("raw", f"data/raw/{name}")
        for path in PACKS:
            shard = layout.Indexed.parse(path)
            chat = layout.Chat(dataset=shard.dataset, shard=shard.shard)
            run("chat", f"data/raw/{shard.dataset}", str(chat))
            run("index", "data/tokenizers/byte", str(chat), path)
        for name, size in SIZES.items():
            folder = Path("data/energon", name)
            folder.mkdir(parents=True)
            facts = energon.build(folder, map(seen, range(size)), ENERGON)
            files.write_manifest(folder, kind="energon", settings={}, facts=facts)
        analyse("packs", "samples")
        yield root


def analyse(packs, samples):
    texts = {"format": "f", "pack": 256, "datasets": ["talk", "seen"], "weights": {}}
    pictures = {
        "format": "l", "pack": None, "decoder_seq_length": 180, "datasets": [*SIZES],
        "weights": {}, "validation": [], "leak_limit": 0.0,
    }  # fmt: skip
    form = {"template": "llava", "instruction": "", "language": "", "picture_tokens": 9, "reject_limit": 0.5,
            "no_loss": "reject"}  # fmt: skip
    given = {"mixture": pictures, "format": form, "image_token_id": None}
    folders = [f"data/energon/{name}" for name in SIZES]
    for words, settings in (
        ((*PACKS, f"data/analysis/{packs}"), {"mixture": texts}),
        (("data/tokenizers/byte", *folders, f"data/analysis/{samples}"), given),
    ):
        assert main(["analyse", *words, "--settings", json.dumps(settings)]) == 0


class Read(html.parser.HTMLParser):
    """What is on a page, by its tags: the samples of each source, and everything that could act."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.samples = Counter(), set(), []
        self.learnt = self.token = self.heading = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags[tag] += 1
        self.attributes |= {(tag, key) for key in found}
        if tag == "article":
            self.samples.append({"ids": [], "learnt": 0, "pictures": [], "text": "", "source": ""})
        if tag == "b" and not found:
            self.heading = True
        if tag == "span" and found.get("class") in {"y", "n"}:
            self.learnt = found["class"] == "y"
        if "data-i" in found:
            ids = [*map(int, found["data-i"].split())]
            self.samples[-1]["ids"] += ids
            self.samples[-1]["learnt"] += len(ids) * self.learnt
            self.token = True
        if tag == "img":
            self.samples[-1]["pictures"].append(base64.b64decode(found["src"].partition(",")[2]))

    def handle_endtag(self, tag):
        if tag in {"i", "em"}:
            self.token = False
        if tag == "b":
            self.heading = False

    def handle_data(self, data):
        if self.samples and self.heading:
            self.samples[-1]["source"] += data
        if self.samples and self.token:
            self.samples[-1]["text"] += data


@pytest.fixture(scope="module")
def found(root):
    """Both analyses: tokens.json, page.json and the page as it is read."""
    folders = {name: root / "data/analysis" / name for name in ("packs", "samples")}
    return {
        name: (
            files.read_json(folder / "tokens.json"),
            files.read_json(folder / "page.json"),
            Read((folder / "tokens.html").read_text()),
        )
        for name, folder in folders.items()
    }


def documents(path):
    """The documents of a shard, token by token: pack, first token in it, ids, roles."""
    for number, pack in enumerate(PackedShard(path)):
        start = 0
        for place in range(1, len(pack.text) + 1):
            if place == len(pack.text) or pack.role[place] == PACK_SEP:
                yield number, start, pack.text[start:place].tolist(), pack.role[start:place].tolist()
                start = place + 1  # chatml begins with no separator: one was put before


def between(values, edges):
    return [
        sum(low <= value < high or (value == high == edges[-1]) for value in values)
        for low, high in pairwise(edges)
    ]


def test_figures_are_those_of_plain_loops(root, found, monkeypatch):
    monkeypatch.chdir(root)
    tokens, _, _ = found["packs"]
    for name in ("talk", "seen"):
        paths = [path for path in PACKS if f"_{name}_" in path]
        sizes = [len(pack.text) for path in paths for pack in PackedShard(path)]
        lengths = [len(ids) for path in paths for _, _, ids, _ in documents(path)]
        figures = tokens["datasets"][name]
        assert figures["loss_tokens"] == sum(
            role == ASSISTANT and not 259 <= token < 264
            for path in paths
            for pack in PackedShard(path)
            for token, role in zip(pack.text.tolist(), pack.role.tolist(), strict=True)
        )
        for key, values in {"document_tokens": lengths, "n_tokens": sizes}.items():
            described = figures["quantiles"][key]
            exact = [
                sorted(values)[max(math.ceil(Fraction(n * len(values), 200)) - 1, 0)] for n in range(201)
            ]
            assert described == exact
            histogram = figures["histograms"][key]
            assert sum(histogram["counts"]) == len(values)
            assert histogram["counts"] == between(values, histogram["edges"])
        fill = figures["fill"]
        assert fill["mean"] == pytest.approx(sum(sizes) / (256 * len(sizes)), abs=1e-6)
        assert fill["counts"] == between([size * 20 for size in sizes], [256 * n for n in range(21)])


def test_rejects_are_those_of_the_files_and_some_are_quoted(root, found, monkeypatch):
    monkeypatch.chdir(root)
    _, shown_, _ = found["packs"]
    lines = [
        json.loads(line)
        for n in range(2)
        for line in Path(f"data/processed/talk/shard_{n:05d}.rejects.jsonl").read_text().splitlines()
    ]
    raw, packed = shown_["rejects"]["talk"]

    reasons = Counter(line["reason"] for line in lines)
    assert len(lines) == 10
    assert {reason: entry["count"] for reason, entry in raw["reasons"].items()} == reasons
    assert (raw["read"], raw["kept"], raw["rejected"], raw["blank"]) == (70, 60, 10, 1)
    assert (packed["read"], packed["kept"], packed["rejected"]) == (60, 60, 0)
    for reason, entry in raw["reasons"].items():
        of = [line for line in lines if line["reason"] == reason]
        assert [(one["where"], one["message"]) for one in entry["examples"]] == [
            (f"data/raw/talk/a.jsonl:{one['line']}", one["message"]) for one in of[:3]
        ]
    text = Path("data/analysis/packs/tokens.html").read_text()
    assert "data/raw/talk/a.jsonl:2<" in text
    assert "&lt;b&gt;6" in text


def test_repeats_are_those_that_were_counted(root, found, monkeypatch):
    monkeypatch.chdir(root)
    for name in found:
        folder = Path("data/analysis", name)
        counted, text = files.read_json(folder / "duplicates.json"), (folder / "tokens.html").read_text()
        section = text.partition('<h2 id="repeats">')[2].partition("<h2")[0]
        rows = dict(re.findall(r"<tr><td>(\w+)</td>((?:<td>[\d,]+</td>){7})</tr>", section))
        assert {*rows} == {*counted["datasets"]} != set()
        for dataset, cells in rows.items():
            keys = ("samples", *page.REPEATED)
            assert re.findall(r"[\d,]+", cells) == [str(counted["datasets"][dataset][key]) for key in keys]
        of_all = "".join(f"<td>{counted['all'][key]}</td>" for key in keys)
        assert f"<td>all, as one</td>{of_all}" in section
        assert ("Nothing of this mixture validates" in section) is (name == "packs")


def test_sources_of_others_have_repeats_that_nobody_knows():
    repeats = {"datasets": {"ours": dict.fromkeys(("samples", *page.REPEATED), 3)}, "leaks": {}, "first": []}
    section = page._repeats(repeats, ["ours", "theirs"])
    assert f"<td>ours</td>{'<td>3</td>' * 7}" in section
    assert f"<td>theirs</td>{'<td>not known</td>' * 7}" in section
    assert page._repeats(None, ["theirs"]) == ""


def test_samples_that_a_template_cannot_write_are_quoted(found):
    tokens, shown_, _ = found["samples"]
    row = shown_["rejects"]["many"][-1]
    assert (row["read"], row["kept"], row["reasons"]["no_answer"]["count"]) == (30, 28, 2)
    assert [one["where"].rpartition(": ")[2] for one in row["reasons"]["no_answer"]["examples"]] == [
        "s-2",
        "s-11",
    ]
    assert [entry["count"] for entry in shown_["rejects"]["few"][-1]["reasons"].values()] == [1]
    assert tokens["datasets"]["many"]["samples"] == 28


def test_samples_of_packs_are_the_documents_of_their_raw_lines(root, found, monkeypatch):
    monkeypatch.chdir(root)
    _, shown_, read = found["packs"]
    told = [*shown_["samples"]["talk"], *shown_["samples"]["seen"]]
    assert [len(several) for several in shown_["samples"].values()] == [12, 20]  # sorted by name
    assert [sample["source"] for sample in read.samples] == [one["source"] for one in told]
    assert len({one["source"] for one in told}) == 32
    for one, sample in zip(told, read.samples, strict=True):
        file, _, line = one["source"].rpartition(":")
        dataset = Path(file).parent.name
        asked, answered = orjson.loads(Path(file).read_bytes().splitlines()[int(line) - 1])
        shard, pack, first, last = re.fullmatch(
            r"(\w+), pack (\d+), tokens (\d+) to (\d+)", one["place"]
        ).groups()
        folder = f"data/megatron_format/f_{dataset}_pack256/{shard}"
        ids, roles = next((i, r) for p, s, i, r in documents(folder) if (p, s) == (int(pack), int(first)))
        assert len(ids) == int(last) + 1 - int(first) == one["tokens"]
        # <vpatch> and <vrow_sep> are drawn as their picture
        assert sample["ids"] == [token for token in ids if token not in {260, 261}]
        assert (
            sample["learnt"]
            == one["loss_tokens"]
            == sum(
                role == ASSISTANT and not 259 <= token < 264 for token, role in zip(ids, roles, strict=True)
            )
        )
        said = [part["text"] for each in (asked, answered) for part in each["content"] if "text" in part]
        assert all(words.translate(page.VISIBLE) in sample["text"] for words in said)
        assert len(sample["pictures"]) == one["images"] == (dataset == "seen")
        for each in sample["pictures"]:
            assert max(Image.open(io.BytesIO(each)).size) <= shown.SIDE


def test_samples_of_energon_are_what_training_reads(found):
    _, shown_, read = found["samples"]
    assert {name: len(several) for name, several in shown_["samples"].items()} == {"many": 20, "few": 5}
    for one, sample in zip(
        [*shown_["samples"]["many"], *shown_["samples"]["few"]], read.samples, strict=True
    ):
        number = int(one["source"].rpartition("-")[2])
        assert one["images"] == len(sample["pictures"]) == 1 + number % 2
        assert one["image_tokens"] == 9 * one["images"]
        assert len(sample["ids"]) == one["tokens"] - one["image_tokens"]
        assert sample["learnt"] == one["loss_tokens"]
        assert one["tokens"] <= 180
        assert ("clipped" in one["place"]) == (number == 4 or one["tokens"] == 180)
        for place, each in enumerate(sample["pictures"]):
            pixels = np.asarray(Image.open(io.BytesIO(each)))
            assert pixels[..., 0].mean() == pytest.approx((number + place) * 5, abs=4)


@pytest.mark.parametrize(("mixture", "source"), [("packs", "seen"), ("samples", "few")])
def test_where_all_documents_are_shown_their_figures_are_the_sources(found, mixture, source):
    tokens, shown_, _ = found[mixture]
    figures, samples = tokens["datasets"][source], shown_["samples"][source]
    assert len(samples) == figures.get("documents", figures.get("samples")) < shown.PER_SOURCE
    for key in ("loss_tokens", "image_tokens", "images"):
        assert sum(one[key] for one in samples) == figures[key] > 0


def test_a_sample_can_say_what_it_likes(found):
    for _, _, read in found.values():
        text = "".join(sample["text"] for sample in read.samples)
        assert SCRIPT in text
        assert "\u2039U+202E\u203aback\u2400\u241b[0m" in text
        assert set(read.tags) <= {
            "html", "head", "meta", "link", "title", "style", "body", "h1", "h2", "h3", "p", "nav", "a",
            "ul", "li", "b", "div", "span", "table", "tr", "th", "td", "details", "summary", "pre", "code",
            "svg", "path", "rect", "text", "article", "header", "figure", "figcaption", "img", "i", "em",
        }  # fmt: skip
        assert not {key for _, key in read.attributes if key.startswith("on")}
        assert {tag for tag, key in read.attributes if key in {"src", "href"}} == {"img", "a", "link"}


def test_an_equal_rebuild_is_equal_byte_for_byte(root, monkeypatch):
    monkeypatch.chdir(root)
    analyse("packs-again", "samples-again")
    for name in ("packs", "samples"):
        for file in ("tokens.html", "page.json", "tokens.json"):
            one, other = (Path("data/analysis", each, file).read_text() for each in (name, f"{name}-again"))
            assert other.replace(f"{name}-again", name) == one


def test_what_is_for_people_only_is_in_no_manifest(root):
    listed = files.read_manifest(root / "data/analysis/packs")["files"]
    assert set(listed) == {"tokens.json", "mixture.yaml", "mixture.txt", "duplicates.json"}


@pytest.mark.parametrize("pictures", ["encoded", "patches"])
def test_pictures_that_are_cut_through_or_stored_as_patches_are_shown(
    tokenizers, tmp_path, monkeypatch, pictures
):
    wide = (turn("user", "which?"), turn("assistant", picture(320, 128, 5), "a wide one", picture(64, 64, 6)))
    source = chats(tmp_path / "c.gz", wide, *CAPTIONED)
    monkeypatch.chdir(tmp_path)
    shard = layout.Indexed(format="f", dataset="d", seq=40, shard=0)
    Path(str(shard)).parent.mkdir(parents=True)
    index(Path(str(shard)), tokenizers["solo"], [source], limit=40, pictures=pictures)

    found = shown.of_packs("d", [analysis.measure(shard)])

    assert sum(one.to_json()["image_tokens"] for one in found) >= 40 + 4 + 4 * len(CAPTIONED)
    of_wide = [one for one in found if one.source.endswith(":1")]
    assert len(of_wide) == 2  # 45 tokens of the wide picture and its words are more than a pack
    sizes = [(each.width, each.height) for one in of_wide for each in one.pictures]
    assert sizes[-1] == (64, 64)
    if pictures == "encoded":
        assert set(sizes[:-1]) == {(320, 128)}  # whole on both sides
    else:
        assert (320, 96) in sizes  # the whole rows of one side
    small = next(one for one in found if one.source.endswith(":2")).pictures[0]
    grey = [Image.open(io.BytesIO(each)).convert("L") for each in (small.jpeg, picture(64, 64, 0))]
    assert np.corrcoef(*(np.asarray(each, float).ravel() for each in grey))[0, 1] > 0.95


def test_patches_are_put_together_again():
    encoded = picture(96, 64, 1)
    cut = images.patches(encoded)
    again = np.asarray(images.unpatched(cut.astype(np.float16), 3), np.int64)
    assert np.abs(again - np.asarray(Image.open(io.BytesIO(encoded)))).max() <= 1


def test_every_document_is_as_likely_to_be_shown():
    counts = Counter(int(n) for seed in range(400) for n in shown.drawn(f"d{seed}", 50))
    assert shown.drawn("d", 50).tolist() == shown.drawn("d", 50).tolist()
    assert len(set(shown.drawn("d", 50).tolist())) == 20
    assert shown.drawn("d", 7).tolist() == list(range(7))
    assert all(100 < count < 220 for count in counts.values())  # 160 each


def test_a_stream_is_drawn_from_as_evenly():
    counts = Counter()
    for seed in range(400):
        draw = shown.Draw.of(f"d{seed}", 50)
        for number in range(45):  # five of those counted were rejected
            draw.offer(number, lambda number=number: number)
        assert len(draw.shown) == 20
        assert draw.shown == sorted(set(draw.shown))
        counts.update(draw.shown)
    assert all(120 < count < 240 for count in counts.values())  # 178 each


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_texts_of_tokens_are_the_whole_text(root, text):
    from tokenizers import Tokenizer

    folder = root / "data/tokenizers/byte"
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = inner.encode(text, add_special_tokens=False).ids
    found = shown.Words(folder).texts(ids)
    assert [number for numbers, _ in found for number in numbers] == ids
    if "\ufffd" not in text:
        assert "".join(words for _, words in found) == inner.decode(ids, skip_special_tokens=False)


def test_a_long_tail_is_drawn_on_logarithms():
    values = Tally.counted({5: 50, 8: 40, 4000: 1})
    found = analysis.histogram(values)
    assert sum(found["counts"]) == 91
    assert "(logarithmic)" in charts.bars("tokens", **found, class_="c0")
    assert "(logarithmic)" in charts.curves("tokens", {"a": analysis.quantiles(values)}, {"a": "c0"})
    short = Tally.counted({5: 50, 8: 40})
    assert "(logarithmic)" not in charts.bars("tokens", **analysis.histogram(short), class_="c0")


def test_a_long_document_is_cut_and_says_so():
    ids = np.arange(3 * page.MOST_TOKENS)
    of = np.full(len(ids), -1)
    of[10:20] = 0
    long = shown.Shown("raw:1", "here", ids, ids > 5, of, 10, [])
    read = Read(page._sample(long, None))
    assert len(read.samples[0]["ids"]) == page.MOST_TOKENS
    assert "1,990 more tokens are not shown" in page._sample(long, None)
    assert "picture 1, not shown, 10 tokens" in page._sample(long, None)


@pytest.mark.parametrize("mixture", ["packs", "samples"])
def test_a_browser_shows_it_all_and_asks_for_nothing(root, found, tmp_path, mixture):
    _, shown_, read = found[mixture]
    address = (root / f"data/analysis/{mixture}/tokens.html").as_uri()
    with browser(tmp_path / "profile") as tab:
        for width, dark in ((1280, False), (1280, True), (390, False)):
            tab.open(address, width, dark=dark)
            assert [url for url in tab.requests if not url.startswith("data:")] == [address]
            assert tab.complaints == []
            assert tab.value("document.title") == f"{mixture}: tokens and mixture"
            assert tab.value("document.documentElement.scrollWidth") <= width
            sizes = tab.value(
                "[...document.images].map(one => [one.complete, one.naturalWidth, one.naturalHeight])"
            )
            assert len(sizes) == read.tags["img"] > 0
            assert all(whole and across > 0 and down > 0 for whole, across, down in sizes)
            groups = tab.value("[...document.querySelectorAll('.samples')].map(one => one.children.length)")
            order = ("talk", "seen") if mixture == "packs" else tuple(SIZES)
            assert groups == [len(shown_["samples"][name]) for name in order]
            paper = tab.value("getComputedStyle(document.body).backgroundColor")
            assert (paper == "rgb(255, 255, 255)") is not dark
        learnt, given_ = (
            tab.value(f"getComputedStyle(document.querySelector('.said .{kind} i')).backgroundColor")
            for kind in "yn"
        )
        assert learnt != given_
