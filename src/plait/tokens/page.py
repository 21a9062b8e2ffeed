"""tokens.html: a page without a network or a script, for eyes; tokens.json and page.json have its figures."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from plait import files, layout
from plait.tokens import charts, rejected, shown
from plait.tokens.analysis import HISTOGRAMS, HOW_MANY, MEASURES, TOTALS, Counted, by_dataset
from plait.tokens.shown import Shown, Thumbnail, Words
from plait.tokens.style import COLOURS, STYLE

MOST_TOKENS = 1_000
"""Tokens of a document's text that are shown."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Nothing is fetched and nothing runs, whatever a sample says."""
VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(0x20)},
    ord("\t"): "\u21e5\t",
    ord("\n"): "\u21b5\n",
    0x7F: "\u2421",
    **{
        code: f"\u2039U+{code:04X}\u203a"
        for code in (*range(0x80, 0xA0), 0x61C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F),
                     *range(0x2066, 0x206A), 0xFEFF)
    },
}  # fmt: skip
"""What would not be seen, or would turn the text around it."""
REPEATED = (
    "equal_samples", "similar_samples", "equal_texts", "similar_texts", "equal_pictures", "similar_pictures",
)  # fmt: skip
"""What is counted of a source that came before; equal ids are refused."""
BINDS = {True: "binds", False: ""}
ROLES = {"picture": "picture tokens", "loss": "loss tokens", "rest": "other text tokens"}


@dataclass(frozen=True)
class Look:
    """What the page shows besides figures.

    Attributes:
        shown: documents drawn at random, by dataset.
        rejects: ledgers of the stages that made a dataset, by dataset.
        words: texts of tokens; without them their ids are shown.
        repeats: what :func:`plait.tokens.repeats.told` gives; None: nothing was compared.
    """

    shown: Mapping[str, Sequence[Shown]]
    rejects: Mapping[str, Sequence[rejected.Row]]
    words: Words | None
    repeats: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of page.json."""
        samples = {name: [one.to_json() for one in several] for name, several in self.shown.items()}
        return {
            "schema": files.SCHEMA,
            "seed": shown.SEED,
            "samples": samples,
            "rejects": {name: [*rows] for name, rows in self.rejects.items()},
        }


def look_at(counted: Sequence[Counted], repeats: Mapping[str, Any] | None = None) -> Look:
    """Documents of packed shards, and what was rejected before them.

    The shards' manifests name their tokenizer; one that is gone is done without.
    """
    datasets = by_dataset(counted)
    folders = {name: [Path(str(one.source)) for one in several] for name, several in datasets.items()}
    made_from = [path for one in counted for path in files.read_manifest(str(one.source))["inputs"]]
    tokenizer = next((Path(path) for path in made_from if layout.Tokenizer.read(path)), None)
    return Look(
        {name: shown.of_packs(name, several) for name, several in datasets.items()},
        {name: rejected.stages(several) for name, several in folders.items()},
        Words(tokenizer) if tokenizer and tokenizer.is_dir() else None,
        repeats,
    )


def page(name: str, tokens: Mapping[str, Any], mixed: Mapping[str, Any], line: str, look: Look) -> str:
    """The whole page.

    Args:
        name: the mixture.
        tokens: the content of tokens.json.
        mixed: the content of mixture.yaml.
        line: the content of mixture.txt.
        look: what is shown besides.
    """
    datasets = tokens["datasets"]
    classes = {each: _class(number) for number, each in enumerate(datasets)}
    anchors = {each: f"source-{number}" for number, each in enumerate(datasets, 1)}
    links = {"mixture": "Mixture", "tokens": "Tokens", "lengths": "Lengths"}
    links |= {"repeats": "Repeats"} if look.repeats else {}
    links |= {anchors[each]: each for each in datasets}
    sources = "1 source" if len(datasets) == 1 else f"{_number(len(datasets))} sources"
    parts = [
        f"<h1>{_text(name)}</h1><p>Tokens and mixture of {sources}</p>",
        _links(links),
        _key_figures(tokens["total"], mixed["total_instances"]),
        _mixture(mixed, line, classes),
        _solved(mixed.get("solved")),
        _tokens(tokens),
        _lengths(datasets, classes, _sequence(mixed)),
        _repeats(look.repeats, datasets),
    ]
    for each, counts in datasets.items():
        rows, documents = look.rejects.get(each, ()), look.shown.get(each, ())
        parts += [
            _dataset(each, counts, classes[each], anchors[each]),
            _rejects(rows),
            _samples(documents, look.words, "packs" in counts),
        ]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{_text(name)}: tokens and mixture</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _links(links: Mapping[str, str]) -> str:
    return f"<nav>{''.join(f'<a href=#{to}>{_text(words)}</a>' for to, words in links.items())}</nav>"


# The mixture


def _key_figures(total: Mapping[str, int], instances: int) -> str:
    figures = {
        "total instances": _number(instances),
        **{name: _number(total[name]) for name in HOW_MANY[1:] if name in total and name != "samples"},
        "tokens": _number(total["tokens"]),
        "image tokens": _percent(total["image_tokens"], total["tokens"]),
        "loss tokens": _percent(total["loss_tokens"], total["tokens"]),
        "pictures": _number(total["images"]),
    }
    items = "".join(f"<li><b>{figure}</b>{name}</li>" for name, figure in figures.items())
    return f'<ul class="figures">{items}</ul>'


def _sequence(mixed: Mapping[str, Any]) -> str:
    """What a sequence is."""
    clipped = mixed.get("decoder_seq_length")
    return f"one document, clipped to {_number(clipped)} tokens" if clipped else "a pack of documents"


def _mixture(mixed: Mapping[str, Any], line: str, classes: Mapping[str, str]) -> str:
    """How often each source is drawn from, by dataset, and by shard where there are more of them."""
    sources, total = mixed["sources"], mixed["total_instances"]
    of = {name: [one for one in sources if one["dataset"] == name] for name in classes}
    weights = {name: sum(one["weight"] for one in several) for name, several in of.items()}
    bar = "".join(f'<span class="{c}" style="flex:{weights[n]:.6f}"></span>' for n, c in classes.items())
    key = "".join(_keyed(c, f"{_text(n)} {weights[n]:.2%}") for n, c in classes.items())
    heads = ("sequences", "tokens", "weight", "reads an epoch")
    sums = [
        (name, *(sum(one[key] for one in several) for key in ("packs", "tokens")), weights[name])
        for name, several in of.items()
    ]
    rows = [
        (
            _text(name),
            _number(packs),
            _number(tokens),
            f"{weight:.6f}",
            f"{weight * total / max(packs, 1):.6g}",
        )
        for name, packs, tokens, weight in sums
    ]
    shards = [
        (
            _text(s["prefix"]),
            _number(s["packs"]),
            _number(s["tokens"]),
            f"{s['weight']:.6f}",
            f"{s['epochs']:g}",
        )
        for s in sources
    ]
    every = f"Weights of all {_number(len(shards))} folders"
    folders = _folded(every, _table(("folder", *heads), shards)) if len(shards) > len(classes) else ""
    return (
        f'<h2 id="mixture">Mixture</h2><p>How often training draws from each source. '
        f"A sequence is {_sequence(mixed)}.</p>"
        f'<div class="bar">{bar}</div><div class="key">{key}</div>{_table(("source", *heads), rows)}'
        f"{folders}<pre>{_text(line)}</pre>"
    )


def _solved(solved: Mapping[str, Any] | None) -> str:
    """The limits that the weights were solved from, and what came of them."""
    if not solved:
        return ""
    rows = [
        (
            _text(one["key"]),
            f"at {one['side']} {one['bound']:,.12g}",
            f"{one['value']:,.6g}",
            BINDS[one["binds"]],
        )
        for one in solved["limits"]
    ]
    return (
        f"<h3>Limits</h3><p>The weights were solved from these: an epoch reads {_number(solved['tokens'])} "
        "tokens, as many as they allow. A limit that binds is met exactly; widening it changes the mixture."
        "</p>"
        f"{_table(('limit', 'bound', 'is', ''), rows)}"
    )


def _tokens(tokens: Mapping[str, Any]) -> str:
    """Tokens of pictures, tokens that are learnt and other text, by source."""
    bars, rows = [], []
    for name, counts in tokens["datasets"].items():
        parts = _parts(counts)
        bar = "".join(
            f'<span class="{part}" style="flex:{count}" title="{_number(count)} {ROLES[part]}"></span>'
            for part, count in parts.items()
            if count
        )
        bars.append(
            f'<span>{_text(name)}</span><div class="bar">{bar}</div><span>{_number(counts["tokens"])}</span>'
        )
        rows.append(_row_of(_text(name), counts))
    rows.append(_row_of("all", tokens["total"]))
    heads = ("source", "tokens", "of pictures", "of text", "learnt (loss)", "learnt share", "pictures")
    key = "".join(_keyed(part, words) for part, words in ROLES.items())
    return (
        '<h2 id="tokens">Tokens by source</h2><p>Loss tokens are those of answers: the model learns to write '
        "them. Tokens of pictures are patches or features; marks around them count as text.</p>"
        f'<div class="key">{key}</div><div class="parts">{"".join(bars)}</div>'
        f"{_table(heads, rows, sums=True)}"
    )


def _parts(counts: Mapping[str, int]) -> dict[str, int]:
    loss = counts["loss_tokens"]
    return {"picture": counts["image_tokens"], "loss": loss, "rest": counts["text_tokens"] - loss}


def _row_of(name: str, counts: Mapping[str, int]) -> tuple[str, ...]:
    figures = (counts[key] for key in ("tokens", "image_tokens", "text_tokens", "loss_tokens"))
    share = _percent(counts["loss_tokens"], counts["tokens"])
    return (name, *map(_number, figures), share, _number(counts["images"]))


def _lengths(datasets: Mapping[str, Any], classes: Mapping[str, str], sequence: str) -> str:
    """The distribution functions of all sources, a chart a measure."""
    drawn = []
    for key, words in MEASURES.items():
        has = {name for name, one in datasets.items() if _varies(one, key)}
        quantiles = {name: one["quantiles"][key] for name, one in datasets.items() if name in has}
        if quantiles:
            drawn.append(charts.curves(words, quantiles, classes))
    key = "".join(_keyed(c, _text(n)) for n, c in classes.items())
    return (
        f'<h2 id="lengths">Lengths</h2><p>Share of all documents or sequences that have at most so many. '
        f"A sequence is {sequence}.</p>"
        f'<div class="key">{key}</div><div class="charts">{"".join(drawn)}</div>'
    )


def _varies(dataset: Mapping[str, Any], key: str) -> bool:
    """Whether a measure says something of a dataset that no other says."""
    same = key == "n_text_tokens" and not dataset["image_tokens"]
    return dataset["statistics"][key]["max"] > 0 and not same


def _repeats(repeats: Mapping[str, Any] | None, datasets: Iterable[str]) -> str:
    """Samples, texts and pictures that came before, by source, and what validates and trains too."""
    if not repeats:
        return ""
    unknown = dict.fromkeys(("samples", *REPEATED))
    counts = [(_text(name), repeats["datasets"].get(name, unknown)) for name in datasets]
    counts += [("all, as one", repeats["all"])] if "all" in repeats else []
    rows = [
        (name, *("not known" if one[key] is None else _number(one[key]) for key in unknown))
        for name, one in counts
    ]
    heads = ("source", *(key.replace("_", " ") for key in unknown))
    return (
        '<h2 id="repeats">Repeats</h2><p>How many of a source\'s samples, texts and pictures came before in '
        "it. Similar ones are not equal, but nearly all of their text is, and their pictures look alike."
        f"</p>{_table(heads, rows, sums='all' in repeats)}{_leaks(repeats['leaks'], repeats['first'])}"
    )


def _leaks(leaks: Mapping[str, int], first: Sequence[Mapping[str, str]]) -> str:
    if not leaks:
        return (
            "<p>Nothing of this mixture validates. A run that evaluates another mixture compares both when "
            "it starts; what it evaluates and trains is in leaks.jsonl beside its checkpoints.</p>"
        )
    rows = [(_text(one["id"]), one["like"], _text(one["train"])) for one in first]
    some = _table(("validates", "is", "to one that trains"), rows, class_="plain") if rows else ""
    return (
        f"<h3>Validated and trained</h3><p>Of {_number(leaks['validation'])} samples that validate, "
        f"{_number(leaks['equal'])} are equal to one that trains and {_number(leaks['similar'])} similar"
        f"{'; leaks.jsonl has them all. The first:' if rows else '.'}</p>{some}"
    )


# A source


def _dataset(name: str, dataset: Mapping[str, Any], class_: str, anchor: str) -> str:
    statistics, fill = dataset["statistics"], dataset["fill"]
    columns = tuple(next(iter(statistics.values())))
    rows = [
        (words, *(_number(statistics[key][column]) for column in columns))
        for key, words in MEASURES.items()
        if _varies(dataset, key)
    ]
    counted = [word for word in (*HOW_MANY, *TOTALS) if dataset.get(word)]
    total = ((word.replace("_", " "), _number(dataset[word])) for word in counted)
    drawn = [
        charts.bars(MEASURES[key], **dataset["histograms"][key], class_=class_, of=of)
        for key, of in HISTOGRAMS.items()
    ]
    what = "pack fill" if "packs" in dataset else "share of a sequence's length that is used"
    drawn.append(charts.bars(what, fill["edges"], fill["counts"], class_, percent=True))
    filled = f"{fill['mean']:.2%} of {_number(fill['limit'])} tokens a sequence are used"
    return (
        f'<h2 id="{anchor}"><b class="dot {class_}"></b>{_text(name)}</h2>'
        f"<p>{', '.join(f'{number} {word}' for word, number in total)}; {filled}.</p>"
        f'<div class="charts">{"".join(drawn)}</div>{_table(("", *columns), rows)}'
        f"{_shards(dataset['shards'])}"
    )


def _shards(shards: Mapping[str, Mapping[str, Any]]) -> str:
    if len(shards) < 2:
        return ""
    words = [word for word in (*HOW_MANY, *TOTALS) if word in next(iter(shards.values()))]
    heads = ("shard", *(word.replace("_", " ") for word in words), "fill")
    rows = [
        (
            _text(path.rsplit("/", 1)[-1]),
            *(_number(shard[word]) for word in words),
            f"{shard['fill']:.2%}",
        )
        for path, shard in shards.items()
    ]
    return _folded(f"All {_number(len(shards))} shards", _table(heads, rows))


def _rejects(stages: Sequence[rejected.Row]) -> str:
    """What became of all that was read, stage by stage, and why some of it was rejected."""
    if not stages:
        return "<h3>Rejected</h3><p>Nothing here says what was rejected: plait did not make this source.</p>"
    keys = ("read", "kept", "rejected", "blank")
    ledger = [(row["stage"], *(_number(row[key]) for key in keys)) for row in stages]
    head = ("stage", "read", "kept", "rejected", "blank lines")
    reasons = [
        (
            _text(reason),
            _number(entry["count"]),
            _percent(entry["count"], row["read"]),
            row["stage"],
            _examples(entry["examples"]),
        )
        for row in stages
        for reason, entry in sorted(row["reasons"].items(), key=lambda item: (-item[1]["count"], item[0]))
    ]
    heads = ("reason", "count", "of read", "stage", f"examples, at most {rejected.EXAMPLES}")
    why = _table(heads, reasons, class_="why") if reasons else "<p>Nothing was rejected.</p>"
    return f"<h3>Rejected</h3>{_table(head, ledger)}{why}"


def _examples(examples: Sequence[Mapping[str, str]]) -> str:
    items = "".join(f"<li><code>{_text(one['where'])}</code>{_text(one['message'])}</li>" for one in examples)
    return f"<ul>{items}</ul>"


# Samples


def _samples(documents: Sequence[Shown], words: Words | None, packed: bool) -> str:
    where = "Drawn from all documents of all packs" if packed else "Drawn from all samples"
    marks = " Below a picture its tokens are counted with the marks between its rows." if packed else ""
    cut = "" if words else " The tokenizer is not here: tokens are shown by their ids."
    return (
        f"<h3>{_number(len(documents))} samples</h3><p>{where} with seed {shown.SEED}. Shown are the first "
        f"{MOST_TOKENS:,} tokens of text and {shown.MOST_PICTURES} pictures of each, pictures at most "
        f"{shown.SIDE} pixels wide and high. Point at a token to see its id.{marks}{cut}</p>"
        '<div class="key"><span class="y"><i>learnt</i><i> in</i><i> the</i><i> loss</i></span>'
        '<span class="n"><i>only</i><i> read</i></span><span class="n"><em>special</em></span></div>'
        f'<div class="samples">{"".join(_sample(one, words) for one in documents)}</div>'
    )


def _sample(one: Shown, words: Words | None) -> str:
    facts = one.to_json()
    counts = [f"{_number(facts['tokens'])} tokens", f"{_number(facts['loss_tokens'])} learnt"]
    if facts["images"]:
        pictures = "1 picture" if facts["images"] == 1 else f"{_number(facts['images'])} pictures"
        counts.append(f"{_number(facts['image_tokens'])} of {pictures}")
    said = " \u00b7 ".join([_text(one.place), *counts])
    return (
        f"<article><header><b>{_text(one.source)}</b>{said}</header>"
        f'<div class="said">{"".join(_said(one, words))}</div></article>'
    )


def _said(one: Shown, words: Words | None) -> Iterable[str]:
    """Runs of text and pictures, in their order, up to the first that is too much."""
    text = np.cumsum(one.picture < 0)
    end = int(np.searchsorted(text, MOST_TOKENS, "right"))
    bounds = [0, *(np.flatnonzero(np.diff(one.picture[:end])) + 1), end]
    for start, stop in pairwise(bounds):
        if stop == start:
            continue
        number = int(one.picture[start])
        if number < 0:
            yield _run(one.ids[start:stop].tolist(), one.trained[start:stop].tolist(), words)
        else:
            yield _picture(number, one.pictures, int(stop - start))
    if end < len(one.ids):
        yield f'<div class="more-of">{_number(len(one.ids) - end)} more tokens are not shown.</div>'


def _run(ids: list[int], trained: list[bool], words: Words | None) -> str:
    """Tokens of text: what is learnt together, each token apart, special ones marked."""
    special = words.special if words else {}
    texts = words.texts(ids) if words else [([number], f"{number} ") for number in ids]
    place, shaded = 0, []
    for numbers, text in texts:
        tag = "em" if numbers[-1] in special else "i"
        said = special.get(numbers[-1], text)
        shaded.append((trained[place], f'<{tag} data-i="{_ids(numbers)}">{_text(said)}</{tag}>'))
        place += len(numbers)
    return "".join(
        f'<span class="{"y" if learnt else "n"}">{"".join(each for _, each in several)}</span>'
        for learnt, several in groupby(shaded, key=lambda each: each[0])
    )


def _ids(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _picture(number: int, pictures: Sequence[Thumbnail], tokens: int) -> str:
    said = f"{_number(tokens)} tokens"
    if number >= len(pictures):
        return f"<figure><figcaption>picture {number + 1}, not shown, {said}</figcaption></figure>"
    one = pictures[number]
    size = f"{_number(one.width)} \u00d7 {_number(one.height)} px"
    data = base64.b64encode(one.jpeg).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="picture {number + 1}">'
        f"<figcaption>{size}, {said}</figcaption></figure>"
    )


# Words


def _class(number: int) -> str:
    """The colour of a source; when all are taken, they begin anew with broken lines."""
    return f"c{number % len(COLOURS)}{' more' if number >= len(COLOURS) else ''}"


def _keyed(class_: str, words: str) -> str:
    return f'<span><b class="dot {class_}"></b>{words}</span>'


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, sums: bool = False, class_: str = ""
) -> str:
    """A table of cells that are HTML; ``sums``: its last row sums up the others."""
    head = "".join(f"<th>{text}</th>" for text in heads)
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    last = f'<tr class="sum">{lines.pop()}</tr>' if sums else ""
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table class="{class_}"><tr>{head}</tr>{body}{last}</table></div>'


def _text(words: str) -> str:
    """Words as HTML that says nothing else, with what would not be seen made visible."""
    return escape(words.translate(VISIBLE))


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "0.00%"
