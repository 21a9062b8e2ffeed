"""Text to packed shards in two processes, beside raw gigatoken and a pool of transformers' tokenizers.

Each process has a file of records of its own. Modules, and the texts and the tokenizer of raw gigatoken, are
there before both begin at once; ours and the pool's workers read theirs within the clock. What is compared is
the processor's time of the process that needed more, of a pool the half of all it needed: beside other work
of the machine the clock would tell nothing.

Texts of the first seed are those of Python's packages here, which are code for the most part and repeat
themselves; of the second those of the system's manuals and documents, of some thirty languages, where it has
them; of the third both. They are cut into documents of 0.5 to 8 kB, in another order for each seed, and more.
"""

import contextlib
import gzip
import json
import multiprocessing
import os
import re
import sysconfig
import time
from functools import partial
from pathlib import Path

import numpy as np

from tests.bench.harness import Own, Row, peak, processor

PROCESSES = 2
BYTES = 200_000_000
MORE = 30_000_000
"""By so many bytes each seed's text is larger than that of the one before."""
CHUNK = 32
"""Lines that a worker of the pool is given at once, as preprocess_data.py does it."""
KINDS = (".py", ".md", ".rst", ".txt", ".json", ".pyi", ".html")
SYSTEM = (Path("/usr/share/man"), Path("/usr/share/doc"))
ENOUGH = 50_000_000
"""Bytes of its files, as they lie there, that a system must have."""
FORM = {
    "template": "pretrain", "packing": "best_fit", "overlong": "split", "pictures": "encoded",
    "patch_size": 32, "max_resolution": 1024, "reject_limit": 0.5, "no_loss": "reject",
}  # fmt: skip
LIMIT = 4096


def packages():
    """Text files of the packages that are installed."""
    root = Path(sysconfig.get_path("purelib"))
    folders = [root, *(Path(line) for one in root.glob("*.pth") for line in one.read_text().splitlines())]
    return sorted(path for one in folders for path in one.rglob("*") if path.suffix in KINDS)


def manuals():
    """Manuals and documents of the system; packages where it has few."""
    found = [path for one in SYSTEM for path in one.rglob("*") if path.suffix in (*KINDS, ".gz")]
    found = sorted(path for path in found if path.is_file() and not path.is_symlink())
    return found if sum(path.stat().st_size for path in found) > ENOUGH else packages()


SOURCES = (packages, manuals, lambda: [*packages(), *manuals()])
"""Of each seed."""


def text_in(path):
    """What is in a file, if it is UTF-8: packed pictures and the like are no texts."""
    content = path.read_bytes()
    with contextlib.suppress(UnicodeDecodeError):
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    return ""


def texts(seed, size):
    """So many bytes of documents."""
    draw = np.random.default_rng(seed)
    paths, left = SOURCES[seed // PROCESSES % len(SOURCES)](), size
    while left > 0:
        for number in draw.permutation(len(paths)):
            text = text_in(paths[number])
            while text.strip() and left > 0:
                length = int(draw.integers(500, 8000))
                document, text = text[:length], text[length:]
                if not document.isspace():
                    left -= len(document.encode())
                    yield document
            if left <= 0:
                return


def corpus(folder, seed, *, kind):
    """A tokenizer as `plait tokenizer` makes it, and a file for each process as `plait chat` does."""
    from plait import files
    from plait.data import chat, shards
    from plait.tokens import encode

    tokenizer = folder / "tokenizer"
    TOKENIZERS[kind](tokenizer)
    facts = files.read_manifest(tokenizer)["facts"] | encode.compared(tokenizer)
    files.write_manifest(tokenizer, kind="tokenizer", settings={}, facts=facts)
    size = BYTES + seed * MORE
    for number in range(PROCESSES):
        with gzip.open(folder / f"{number}.jsonl.gz", "wb", 1) as out, contextlib.ExitStack() as stack:
            said = shards.Said(folder / f"{number}.said", stack)
            for position, text in enumerate(texts(PROCESSES * seed + number, size // PROCESSES)):
                parts = [{"type": "text", "text": text}]
                record = {
                    "id": f"d{position}",
                    "source": {"file": f"{number}.txt", "line": position + 1},
                    "messages": [{"role": "assistant", "content": parts}],
                }
                line = json.dumps(record, ensure_ascii=False).encode()
                said.append(chat.parse(line), line)
                out.write(line + b"\n")
            said.end()


def sentencepiece(folder):
    """Mistral's, of mistral_common."""
    from tokenizer_folders import PACKAGE, make

    make(folder, PACKAGE)


def byte_level(folder):
    """Mistral's tekken."""
    from tokenizer_folders import tekken

    tekken(folder)


TOKENIZERS = {"spm": sentencepiece, "bpe": byte_level}


# Both processes at once

RULES = Path(__file__).parents[3] / "workflow/rules/data.smk"
HUGE_PAGES = dict([re.search(r'HUGE_PAGES = "(\w+)=(\S+)"', RULES.read_text()).groups()])
"""What the workflow starts `plait index` with."""


@contextlib.contextmanager
def around(environ):
    """What is started meanwhile has these in its environment."""
    before = dict(os.environ)
    os.environ.update(environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def together(prepare, source, target):
    """Seconds of the later process, and the memory of the one that had most."""
    context = multiprocessing.get_context("spawn")
    barrier, told = context.Barrier(PROCESSES), context.Queue()
    words = [(prepare, source, target, number, barrier, told) for number in range(PROCESSES)]
    started = [context.Process(target=alone, args=word) for word in words]
    with around(HUGE_PAGES if prepare is ours else {}):
        for process in started:
            process.start()
    found = [told.get() for _ in started]
    for process in started:
        process.join()
        assert not process.exitcode
    return Own(max(seconds for seconds, _ in found), max(memory for _, memory in found))


def alone(prepare, source, target, number, barrier, told):
    """One process: what it does is prepared, and then timed."""
    work = prepare(source, target, number)
    barrier.wait()
    before = time.process_time()
    found = work()
    told.put((time.process_time() - before, peak()))
    if found is not None:
        np.asarray(found, np.int32).tofile(target / f"{number}.bin")


def ours(source, target, number):
    import gc

    import gigatoken  # noqa: F401
    import rensa  # noqa: F401
    from isal import igzip  # noqa: F401

    from plait.cli.main import FEWEST
    from plait.tokens import build

    gc.set_threshold(FEWEST)  # as the command does

    form, tokenizer = FORM | {"tokenizer": "t"}, source / "tokenizer"
    folder = target / str(number)
    folder.mkdir()

    def work():
        build.build(folder, tokenizer, [source / f"{number}.jsonl.gz"], form, LIMIT)

    return work


def first_half(source, target):
    """One process of ours, for its profile."""
    ours(source, target, 0)()


def records(source, number):
    with gzip.open(source / f"{number}.jsonl.gz", "rt", encoding="utf-8") as lines:
        yield from map(text_of, lines)


def text_of(line):
    return json.loads(line)["messages"][0]["content"][0]["text"]


def raw(source, target, number):
    """Nothing but gigatoken, on texts in memory; as with ours, what a text has of special tokens is text."""
    import awkward  # noqa: F401
    import gigatoken

    given = list(records(source, number))
    described = json.loads((source / "tokenizer" / "tokenizer.json").read_text())
    described["added_tokens"] = [one for one in described["added_tokens"] if not one["special"]]
    tokenizer = gigatoken.Tokenizer.from_json(json.dumps(described))
    return lambda: tokenizer.encode_batch(given, parallel=False).layout.content.data


def pool(source, target):
    """What preprocess_data.py does: workers read json and tokenise a document at a time, one writes."""
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    keys = {"split_special_tokens": True}
    before, read = processor(), partial(AutoTokenizer.from_pretrained, source / "tokenizer", **keys)
    with multiprocessing.get_context("fork").Pool(PROCESSES, worker, (read,)) as workers:
        for number in range(PROCESSES):
            written(workers, source / f"{number}.jsonl.gz", target / str(number))
        workers.close()
        workers.join()
    return Own((processor() - before) / PROCESSES)


def worker(read):
    """Read a worker's tokenizer."""
    worker.tokenizer = read()


def encoded(line):
    return worker.tokenizer(text_of(line), add_special_tokens=False)["input_ids"]


def written(workers, source, target):
    with gzip.open(source, "rt", encoding="utf-8") as lines, target.with_suffix(".bin").open("wb") as out:
        for ids in workers.imap(encoded, lines, CHUNK):
            out.write(np.array(ids, np.int32).tobytes())


def way(prepare):
    return partial(together, prepare)


def same_ids(source, mine, peer):
    """The tokens of all texts: of ours, without the separators before a pack's later documents."""
    count = 0
    for number in range(PROCESSES):
        found, wanted = unpacked(mine / str(number)), np.fromfile(peer / f"{number}.bin", np.int32)
        count += len(found)
        assert len(found) == len(wanted), f"{len(found)} tokens, {len(wanted)} of the peer"
        assert np.array_equal(found, wanted), f"{np.count_nonzero(found != wanted)} other ids"
    return f"{count / 1e6:.0f} M tokens, alike"


def unpacked(folder):
    """The tokens of a packed shard in the order of its documents."""
    from plait.tokens.analysis import document_bounds
    from plait.tokens.indexed import TEXT
    from plait.tokens.lineage import COLUMNS, LINEAGE

    tokens, lineage = flat(folder / TEXT), flat(folder / LINEAGE)
    lines, begins = (lineage[COLUMNS.index(name) :: len(COLUMNS)] for name in ("line", "start"))
    bounds = np.transpose(document_bounds(folder, own_separators=True))
    return np.concatenate([tokens[slice(*bounds[place])] for place in np.lexsort((begins, lines))])


def flat(prefix):
    """All elements of an indexed file."""
    from plait.tokens.indexed import IndexedReader

    return np.concatenate([*IndexedReader(prefix).stretches()])


def row(name, kind, peer, target, rounds):
    make = partial(corpus, kind=kind)
    return Row(name, target, make, way(ours), peer, same_ids, rounds=rounds, looked_at=first_half)


ROWS = [
    row("tokens-spm-raw", "spm", way(raw), 0.65, 3),
    row("tokens-bpe-raw", "bpe", way(raw), 0.2, 3),
    row("tokens-spm-pool", "spm", pool, 5, 2),
    row("tokens-bpe-pool", "bpe", pool, 10, 2),
]
