"""200,000 samples through the stages, of which one in a hundred is damaged in a way that a gate names.

What each stage must reject is known line by line from how the corpus was made.
"""

import io
import json
import random
import subprocess
import sys
from base64 import b64encode
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from folders import tokenizer_folder
from PIL import Image

from plait import files, layout
from plait.data.lines import read_lines

SAMPLES, SHARDS, EVERY, PICTURED = 200_000, 4, 100, 10
PLACE = 37
"""Of each hundred lines, one from this on is damaged, in each shard in turn."""
FORM = {"tokenizer": "byte", "reject_limit": 0.02}
CONFIG = {
    "datasets": {
        "talk": {
            "source": {"kind": "chat-jsonl", "path": "talk.jsonl"}, "shards": SHARDS, "reject_limit": 0.02,
            "duplicates": "reject", "energon": {"samples_per_shard": 1000, "reject_limit": 0.02},
        }
    },
    "tokenizers": {"byte": {"kind": "folder", "path": "data/tokenizers/byte"}},
    "formats": {
        "packed": {**FORM, "template": "chatml"},
        "asked": {**FORM, "template": "llava", "picture_tokens": 4},
    },
    "mixtures": {
        "packs": {"format": "packed", "pack": 2048, "datasets": ["talk"]},
        "samples": {"format": "asked", "decoder_seq_length": 1024, "datasets": ["talk"]},
    },
}  # fmt: skip
CHATS = [f"data/processed/talk/shard_{n:05d}.jsonl.gz" for n in range(SHARDS)]
PACKS = [f"data/megatron_format/packed_talk_pack2048/shard_{n:05d}" for n in range(SHARDS)]
WORDS = ["".join(random.Random(n).choices("aeioubcdfglmnprst", k=3 + n % 7)) for n in range(2000)]


# The corpus


def url(content, kind="jpeg"):
    return f"data:image/{kind};base64,{b64encode(content).decode()}"


def drawn(number, kind="JPEG", **keys):
    file = io.BytesIO()
    points = np.random.default_rng(number).integers(0, 255, (8, 9, 3), np.uint8)
    Image.fromarray(points).resize((32, 32), Image.Resampling.BICUBIC).save(file, kind, **keys)
    return file.getvalue()


def vast():
    file = io.BytesIO()
    Image.new("1", (11_000, 11_000)).save(file, "PNG")
    return file.getvalue()


VAST = vast()


def part(address):
    return {"type": "image_url", "image_url": {"url": address}}


def record(number, *, asked=None, answer=None, id_=None, pictured=None):
    """A sample; every tenth shows a picture."""
    words = random.Random(number).choices(WORDS, k=40)
    question = " ".join(words[:20]) if asked is None else asked
    shown = [part(url(drawn(number)))] if number % PICTURED == 5 and pictured is None else pictured or []
    said = " ".join(words[20:]) if answer is None else answer
    turns = [
        {"role": "user", "content": [*shown, {"type": "text", "text": question}] if shown else question},
        {"role": "assistant", "content": said},
    ]
    return {"id": f"s-{number if id_ is None else id_}", "messages": turns}


def with_turns(number, change):
    made = record(number)
    return {**made, "messages": change(made["messages"])}


DAMAGES = {
    # how a line is damaged: (its bytes, the stage that rejects it: chat, packs, tars, samples -> reason)
    "cut": (lambda n: json.dumps(record(n))[:50], {"chat": "bad_json"}),
    "not utf-8": (lambda n: b'{"id": "\xff\xfe"}', {"chat": "bad_json"}),
    "a number": (lambda n: "42", {"chat": "not_a_record"}),
    "no turns under a known name": (lambda n: {"talk": []}, {"chat": "not_a_record"}),
    "a turn that is a string": (lambda n: with_turns(n, lambda t: ["hello"]), {"chat": "not_a_record"}),
    "no messages": (lambda n: with_turns(n, lambda t: []), {"chat": "no_messages"}),
    "a role nobody knows": (
        lambda n: with_turns(n, lambda t: [t[0], {**t[1], "role": "tool"}]), {"chat": "unknown_role"}
    ),
    "content that is a number": (lambda n: record(n, answer=7), {"chat": "not_text"}),
    "a text that is none": (lambda n: record(n, answer=[{"type": "text", "text": 7}]), {"chat": "not_text"}),
    "a part of another type": (lambda n: record(n, pictured=[{"type": "audio"}]), {"chat": "unknown_part"}),
    "an address": (lambda n: record(n, pictured=[part("https://example.org/a.png")]), {"chat": "not_base64"}),
    "broken base64": (
        lambda n: record(n, pictured=[part("data:image/png;base64,@@@@")]), {"chat": "not_base64"}
    ),
    "no picture": (lambda n: record(n, pictured=[part(url(b"hello"))]), {"chat": "undecodable_picture"}),
    "a picture cut in half": (
        lambda n: record(n, pictured=[part(url(drawn(n)[:200]))]), {"chat": "undecodable_picture"}
    ),
    "a vast picture": (lambda n: record(n, pictured=[part(url(VAST, "png"))]), {"chat": "too_many_pixels"}),
    "an empty answer": (lambda n: record(n, answer=" \n"), {"chat": "empty_text"}),
    "an id that was there": (
        lambda n: record(n, id_=n - SHARDS), {"packs": "duplicate_id", "tars": "duplicate_id"}
    ),
    "a sample that was there": (
        lambda n: {**record(n - SHARDS), "id": f"s-{n}"}, {"packs": "duplicate", "tars": "duplicate"}
    ),
    "no answer": (
        lambda n: with_turns(n, lambda t: t[:1]), {"packs": "no_loss", "samples": "no_answer"}
    ),
    "a picture as an answer": (
        lambda n: with_turns(n, lambda t: [t[0], {**t[1], "content": [part(url(drawn(n)))]}]),
        {"samples": "picture_not_users"},
    ),
    "the placeholder of a picture in a text": (
        lambda n: record(n, asked="an <image> is worth it"), {"tars": "picture_in_text"}
    ),
    "an answer beyond the length": (
        lambda n: record(n, asked=record(n)["id"] + " and so on" * 110), {"samples": "no_loss"}
    ),
    "a system turn last": (
        lambda n: with_turns(n, lambda t: [*t, {"role": "system", "content": "be brief"}]),
        {"samples": "system_without_user"},
    ),
}  # fmt: skip
NAMES = [*DAMAGES]


def damage_of(number):
    """The way in which a line is damaged, if it is."""
    which = number // EVERY
    return NAMES[which % len(NAMES)] if number % EVERY == PLACE + which % SHARDS else None


def line(number):
    name = damage_of(number)
    made = DAMAGES[name][0](number) if name else record(number)
    text = made if isinstance(made, str | bytes) else json.dumps(made)
    return text if isinstance(text, bytes) else text.encode()


def expected(stage):
    """The lines, counted from 0, that a stage rejects, with the reasons."""
    wrong = {number: DAMAGES[name][1] for number in range(SAMPLES) if (name := damage_of(number))}
    return {number: reasons[stage] for number, reasons in wrong.items() if stage in reasons}


# Through the stages

PEAK = """
import sys
from plait.cli.main import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(code)
"""
MOST = 300
"""MB that a process may have."""
peaks: dict[str, int] = {}


def run(*words):
    """A stage in a process of its own, whose peak memory in MB is kept."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *words, "--config", "config.yaml"], check=True, capture_output=True
    )
    peaks[" ".join(words)] = int(done.stdout.split()[-1]) // 1000


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
        tokenizer_folder(Path("data/tokenizers/byte"), vision=True, chatml=True, image=True)
        with Path("talk.jsonl").open("wb") as out:
            out.writelines(line(number) + b"\n" for number in range(SAMPLES))
        run("raw", "data/raw/talk")
        for chat, packs in zip(CHATS, PACKS, strict=True):
            run("chat", "data/raw/talk", chat)
            run("index", "data/tokenizers/byte", chat, packs)
        run("energon", *CHATS, "data/energon/talk")
        run("analyse", *PACKS, "data/analysis/packs")
        run("analyse", "data/tokenizers/byte", "data/energon/talk", "data/analysis/samples")
        yield root


def rejected(path, place):
    """What rejects.jsonl lists: line of the corpus -> reason; a line that is there twice fails."""
    found = [
        (place(entry), entry["reason"]) for entry in map(json.loads, Path(path).read_bytes().splitlines())
    ]
    assert len(found) == len(dict(found))
    return dict(found)


def written():
    """The raw line, counted from 0, of each line of the chat shards."""
    return {
        (chat, number): json.loads(content)["source"]["line"] - 1
        for chat in CHATS
        for number, content in read_lines(chat)
    }


def by_chat_line(known):
    return lambda entry: known[entry["file"], entry["line"]]


@pytest.mark.long
def test_every_record_is_kept_or_rejected_for_the_reason_that_it_was_damaged_by(workplace):
    """Line by line, at each stage; ledgers of neighbouring stages balance."""
    known = written()
    chat = {}
    for shard in CHATS:
        chat |= rejected(layout.Chat.parse(shard).rejects, lambda entry: entry["line"] - 1)
    assert chat == expected("chat")
    assert set(known.values()) | chat.keys() == set(range(SAMPLES))
    assert len(known) + len(chat) == SAMPLES

    packs = {}
    for shard in PACKS:
        packs |= rejected(f"{shard}/rejects.jsonl", by_chat_line(known))
    assert packs == expected("packs")
    assert rejected("data/energon/talk/rejects.jsonl", by_chat_line(known)) == expected("tars")

    ledgers = [files.read_json(layout.Chat.parse(shard).manifest) for shard in CHATS]
    assert sum(one["kept"] for one in ledgers) == len(known)
    facts = [files.read_manifest(shard)["facts"] for shard in PACKS]
    assert sum(one["documents"] for one in facts) == len(known) - len(packs)
    assert files.read_manifest("data/analysis/packs")["facts"]["documents"] == len(known) - len(packs)


@pytest.mark.long
def test_what_the_template_cannot_write_is_rejected_of_the_training_samples(workplace):
    facts = files.read_manifest("data/energon/talk")["facts"]
    kept = SAMPLES - len(expected("chat")) - len(expected("tars"))
    assert facts["samples"] == sum(facts["splits"].values()) == kept

    found = rejected("data/analysis/samples/rejects.jsonl", lambda entry: int(entry["id"].split("-")[-1]))
    wanted = expected("samples")
    assert found.items() <= wanted.items()
    share = facts["splits"]["train"] / kept
    assert abs(len(found) / len(wanted) - share) < 0.05
    counted = files.read_manifest("data/analysis/samples")["facts"]
    assert counted["samples"] + len(found) == facts["splits"]["train"]
    assert Counter(found.values()) == counted["reasons"]


@pytest.mark.long
def test_nothing_of_it_is_counted_as_alike_but_what_was_copied(workplace):
    for name in ("packs", "samples"):
        found = files.read_json(f"data/analysis/{name}/duplicates.json")["datasets"]["talk"]
        assert found.pop("samples") > 0.85 * SAMPLES
        assert not any(found.values()), found


@pytest.mark.long
def test_no_stage_needs_more_memory_than_a_laptop_spares(workplace):
    assert len(peaks) == 12
    assert max(peaks.values()) < MOST, peaks
