"""tokens.html: one page without a network, for eyes; tokens.json has the same figures."""

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plait.tokens.analysis import HOW_MANY, MEASURES, TOTALS

COLOURS = ("#3b6ea8", "#d9822b", "#4f9d69", "#a8527a", "#7a68b3", "#8a7a4d", "#3f9aa6", "#c0504d")
POINTS = 400
"""Points of a curve: more would not be seen."""

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; background: #fff; margin: 0 auto;
  max-width: 68rem; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
p { margin: .2rem 0 1rem; color: #56616d; max-width: 46rem; }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0; padding: 0; list-style: none; }
.figures li { flex: 1 1 8rem; background: #f4f6f8; border-radius: .5rem; padding: .7rem 1rem; color: #56616d;
  font-size: .82rem; }
.figures b { display: block; font-size: 1.35rem; color: #1d2733; font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 1.1rem; border-radius: .3rem; overflow: hidden; gap: 1px; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .85rem; margin: .5rem 0 1rem; }
.key i { display: inline-block; width: .7rem; height: .7rem; border-radius: .15rem; margin-right: .4rem; }
.wide { overflow-x: auto; margin-bottom: 1.4rem; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e8ec; }
th { color: #56616d; font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
pre { background: #f4f6f8; padding: .8rem 1rem; border-radius: .5rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .82rem; }
svg { width: 100%; height: auto; display: block; margin: .6rem 0 1.6rem; }
"""


def page(
    name: str,
    tokens: Mapping[str, Any],
    mixed: Mapping[str, Any],
    line: str,
    measures: Mapping[str, Mapping[str, NDArray[np.int64]]],
) -> str:
    """The whole page.

    Args:
        name: the mixture.
        tokens: the content of tokens.json.
        mixed: the content of mixture.yaml.
        line: the content of mixture.txt.
        measures: what the curves show, by dataset.
    """
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(tokens["datasets"])}
    parts = [
        f"<h1>{escape(name)}</h1><p>Tokens and mixture</p>",
        _key_figures(tokens["total"], mixed["total_instances"]),
        _mixture(mixed, line, colours),
    ]
    for dataset, counts in tokens["datasets"].items():
        parts.append(_dataset(dataset, counts, measures[dataset], colours[dataset]))
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(name)}: tokens and mixture</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _key_figures(total: Mapping[str, int], instances: int) -> str:
    shown = {
        "total instances": _number(instances),
        **{name: _number(total[name]) for name in HOW_MANY[1:] if name in total and name != "samples"},
        "tokens": _number(total["tokens"]),
        "image tokens": _percent(total["image_tokens"], total["tokens"]),
        "loss tokens": _percent(total["loss_tokens"], total["tokens"]),
        "pictures": _number(total["images"]),
    }
    items = "".join(f"<li><b>{figure}</b>{name}</li>" for name, figure in shown.items())
    return f'<ul class="figures">{items}</ul>'


def _mixture(mixed: Mapping[str, Any], line: str, colours: Mapping[str, str]) -> str:
    sources = mixed["sources"]
    weights = {name: sum(s["weight"] for s in sources if s["dataset"] == name) for name in colours}
    bar = "".join(f'<span style="flex:{weights[n]:.6f};background:{c}"></span>' for n, c in colours.items())
    key = "".join(
        f'<span><i style="background:{c}"></i>{escape(n)} {weights[n]:.2%}</span>' for n, c in colours.items()
    )
    rows = [
        (
            escape(s["prefix"]),
            _number(s["packs"]),
            _number(s["tokens"]),
            f"{s['weight']:.6f}",
            f"{s['epochs']:g}",
        )
        for s in sources
    ]
    table = _table(("source", "sequences", "tokens", "weight", "reads an epoch"), rows)
    clipped = mixed.get("decoder_seq_length")
    sequence = f"one document, clipped to {_number(clipped)} tokens" if clipped else "a pack of documents"
    return (
        f"<h2>Mixture</h2><p>How often training draws from each source. A sequence is {sequence}.</p>"
        f'<div class="bar">{bar}</div><div class="key">{key}</div>{table}<pre>{escape(line)}</pre>'
    )


def _dataset(
    name: str, dataset: Mapping[str, Any], measures: Mapping[str, NDArray[np.int64]], colour: str
) -> str:
    statistics = dataset["statistics"]
    same = () if dataset["image_tokens"] else ("n_text_tokens",)
    shown = [key for key in MEASURES if statistics[key]["max"] > 0 and key not in same]
    columns = tuple(next(iter(statistics.values())))
    rows = [(MEASURES[key], *(_number(statistics[key][column]) for column in columns)) for key in shown]
    counted = [word for word in (*HOW_MANY, *TOTALS) if dataset.get(word)]
    total = ((word.replace("_", " "), _number(dataset[word])) for word in counted)
    return (
        f"<h2>{escape(name)}</h2><p>{', '.join(f'{number} {word}' for word, number in total)}.</p>"
        f"{_table(('', *columns), rows)}"
        f"<p>Share of all documents or sequences that have at most so many:</p>"
        f"{figure({MEASURES[key]: measures[key] for key in shown}, colour)}"
        f"{_shards(dataset['shards'])}"
    )


def _shards(shards: Mapping[str, Mapping[str, Any]]) -> str:
    if len(shards) < 2:
        return ""
    words = [word for word in (*HOW_MANY, *TOTALS) if word in next(iter(shards.values()))]
    heads = ("shard", *(word.replace("_", " ") for word in words), "fill")
    rows = [
        (
            escape(path.rsplit("/", 1)[-1]),
            *(_number(shard[word]) for word in words),
            f"{shard['fill']:.2%}",
        )
        for path, shard in shards.items()
    ]
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def figure(measures: Mapping[str, NDArray[np.int64]], colour: str) -> str:
    """Empirical distribution functions side by side, as SVG text; equal input gives equal text."""
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {"svg.hashsalt": "plait", "svg.fonttype": "path", "font.size": 8, "axes.linewidth": 0.6}
    with style.context(["default", settings]):
        canvas = Figure(figsize=(9.6, 2.2 * -(-len(measures) // 3)), layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.subplots(-(-len(measures) // 3), 3, squeeze=False, sharey=True).ravel()
        for axis, (words, values) in zip(axes, measures.items(), strict=False):
            _curve(axis, words, values, colour)
        for axis in axes[len(measures) :]:
            axis.set_axis_off()
        out = io.StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _curve(axis: Any, words: str, values: NDArray[np.int64], colour: str) -> None:
    shares = np.linspace(0, 1, min(POINTS, len(values)) + 1)[1:]
    edges = np.quantile(values, shares, method="inverted_cdf")
    axis.step([edges[0], *edges], [0, *shares], where="post", color=colour, linewidth=1.4)
    axis.set_xlabel(words)
    axis.set_ylim(0, 1.03)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    plain(axis)


def plain(axis: Any) -> None:
    """Let the curve of a matplotlib axis stand out: a light grid, thin grey axes, no frame."""
    axis.grid(color="#e4e8ec", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#8a949e")
    axis.tick_params(color="#8a949e", labelcolor="#56616d", width=0.6)


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.2%}"
