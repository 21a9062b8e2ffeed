"""Packing: packs beside the lower bound, and seconds of a million lengths."""

import math
import time
from functools import partial

import numpy as np

from tests.bench.harness import Figure, Own, Row, Told

DOCUMENTS = 1_000_000
SECONDS = 0.5
MODE = "best_fit"
SHARES = (1, 0.5, 0.1)
"""Of the documents of a seed need a separator before them."""


def lengths(seed, limit):
    """As conversations have them: lognormal; how long, differs from seed to seed."""
    draw = np.random.default_rng(seed)
    drawn = draw.lognormal(math.log(draw.uniform(600, 900)), 0.9, DOCUMENTS)
    return np.clip(drawn, 1, limit).astype(np.int64)


def separators(seed):
    """All need one before them, or some do, as where an answer begins with one."""
    return (np.random.default_rng(seed).random(DOCUMENTS) < SHARES[seed]).astype(np.int64)


def full(seed, limit):
    """The lower bound on packs, of those made."""
    from plait.tokens.pack import pack

    packing = pack(lengths(seed, limit), limit, MODE, separators(seed))
    more = len(packing) - packing.lower_bound
    return Told(packing.lower_bound / len(packing), f"{more} packs more than {packing.lower_bound}")


def quick(seed, limit):
    """Half a second of processor, of those needed."""
    from plait.tokens.pack import pack

    given, needed = lengths(seed, limit), separators(seed)
    before = time.process_time()
    pack(given, limit, MODE, needed)
    seconds = time.process_time() - before
    return Told(SECONDS / seconds, f"{seconds:.2f} s of processor for {DOCUMENTS:,} lengths")


# Counting


def indexed(folder, seed):
    """A packed shard of noise, with the manifest that counting reads."""
    from plait import files
    from plait.tokens.indexed import ROLE, TEXT, IndexedWriter, RowsWriter
    from plait.tokens.roles import ASSISTANT, IMAGE, PACK_SEP, USER

    spoken = np.array([USER, ASSISTANT, ASSISTANT, IMAGE], np.uint16)
    draw = np.random.default_rng(seed)
    with (
        IndexedWriter(folder / TEXT, np.uint16) as text,
        IndexedWriter(folder / ROLE, np.uint16) as roles,
        RowsWriter(folder) as rows,
    ):
        for _ in range(3000):
            size = int(draw.integers(14_000, 16_385))
            role = np.repeat(draw.choice(spoken, size // 64 + 1), 64)[:size]
            role[draw.integers(1, size, 18)] = PACK_SEP
            text.document(draw.integers(0, 32_000, size, np.uint16))
            roles.document(role)
            rows.packs([size], [int((role == IMAGE).sum())], [0], [trained_of(role)])
    facts = {**rows.totals, "own_separators": True, "documents": 0, "fill": 1}
    files.write_manifest(folder, kind="indexed", settings={}, facts=facts)


def trained_of(role):
    """Tokens of answers."""
    from plait.tokens.roles import ASSISTANT

    return int((role == ASSISTANT).sum())


def loaded():
    """Modules that both sides import when they begin."""
    import plait.tokens.analysis  # noqa: F401


def counted(source, target):
    """Ours: all that the analysis knows of a shard, of its roles, rows and indexes; no token is read."""
    from plait import layout
    from plait.tokens.analysis import measure

    shard = Shard(source, layout.Indexed)
    before = time.process_time()
    measured = measure(shard)
    seconds = time.process_time() - before
    np.savez(target / "n.npz", **{key: [one.values, one.counts] for key, one in measured.measures.items()})
    return Own(seconds)


def Shard(folder, kind):  # noqa: N802 - stands for a class of the layout
    """An indexed shard that lies elsewhere."""

    class Elsewhere(kind):
        def __str__(self):
            return str(folder)

    return Elsewhere(format="f", dataset="d", seq=16_384, shard=0)


def by_bincount(source, target):
    """numpy's count of each token, a stretch at a time."""
    from plait.tokens.indexed import TEXT, IndexedReader

    before, counts = time.process_time(), np.zeros(1 << 16, np.int64)
    for stretch in IndexedReader(source / TEXT).stretches(1 << 22):
        counts += np.bincount(stretch, minlength=1 << 16)
    seconds = time.process_time() - before
    np.save(target / "n.npy", counts)
    return Own(seconds)


def equal(source, ours, peer):
    """Each pack's and each document's counts are those of the ids and roles."""
    from plait.tokens.indexed import ROLE, TEXT, IndexedReader
    from plait.tokens.roles import IMAGE, PACK_SEP

    found, text, role = np.load(ours / "n.npz"), IndexedReader(source / TEXT), IndexedReader(source / ROLE)
    packs = [(len(text[number]), role[number]) for number in range(len(text))]
    separators = np.flatnonzero(np.concatenate([one for _, one in packs]) == PACK_SEP)
    ends = np.cumsum([size for size, _ in packs])
    images = [int((one == IMAGE).sum()) for _, one in packs]
    wanted = {
        "document_tokens": np.diff(np.unique([0, *separators, *ends])),
        "n_tokens": [size for size, _ in packs],
        "n_text_tokens": [size - image for (size, _), image in zip(packs, images, strict=True)],
        "n_image_tokens": images,
        "n_loss_tokens": [trained_of(one) for _, one in packs],
        "n_images": [0] * len(packs),
    }
    assert set(found) == set(wanted)
    for key, counts in wanted.items():
        assert np.array_equal(found[key], np.unique(counts, return_counts=True)), key
    ids = np.load(peer / "n.npy")
    assert ids.sum() == ends[-1] == found["n_tokens"].prod(axis=0).sum()
    documents = len(wanted["document_tokens"])
    return f"{ends[-1] / 1e6:.0f} M tokens, {len(packs):,} packs and {documents:,} documents"


ROWS = [
    *(
        Figure(f"packs-{limit}", 1 / (1 + share), partial(full, limit=limit))
        for limit, share in ((4096, 0.0005), (32_768, 0.001))
    ),
    *(Figure(f"packing-seconds-{limit}", 1, partial(quick, limit=limit)) for limit in (4096, 32_768)),
    Row("count-tokens", 4, indexed, counted, by_bincount, equal, loaded),
]
