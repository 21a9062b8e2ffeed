"""Draw docs/dag.svg: the rules and edges of `snakemake --rulegraph`, at the places given here.

snakemake --rulegraph | python docs/draw_dag.py > docs/dag.svg
"""

import re
import sys
from html import escape

WIDTH, HEIGHT, RADIUS = 124, 46, 8
PITCH_X, PITCH_Y, LEFT, TOP = 160, 84, 16, 16
INK, GREY, LINE = "#1d2733", "#56616d", "#98a3ae"
COLOURS = {
    "data": ("#eaf1f9", "#3b6ea8"),
    "model": ("#fcf2e6", "#c9741f"),
    "proof": ("#e9f5ec", "#3f8a58"),
    "run": ("#f2eef8", "#6d5aa6"),
}
# What a rule makes, its colour, its column and its row.
RULES = {
    "raw": ("raw source", "data", 0, 0),
    "chat": ("chat records", "data", 1, 0),
    "index": ("packed tokens", "data", 2, 0),
    "analyse": ("counts, mixture", "data", 3, 0),
    "schedule": ("length of a run", "data", 4, 0),
    "tokenizer": ("ids of all tokens", "data", 0, 1),
    "model": ("Hugging Face folder", "model", 1, 2),
    "convert": ("Megatron model", "model", 2, 2),
    "shard": ("cut for TP x PP", "model", 3, 2),
    "verify_megatron": ("equal logits", "proof", 2.5, 3),
    "verify_sharded": ("equal logits", "proof", 4, 3),
    "train": ("checkpoints", "run", 4.5, 1.5),
    "energon": ("webdataset shards", "data", 2, 1),
    "report": ("loss curve", "run", 5.6, 0.5),
    "generate": ("answers", "run", 6.6, 1.5),
    "export": ("Hugging Face folder", "run", 5.6, 1.5),
    "verify_iteration": ("proof of a checkpoint", "proof", 5.6, 2.5),
}
# Sides by which an edge leaves and enters, where they are not right and left, and how far from the middle.
SIDES = {
    ("tokenizer", "model"): ("b", 0, "l", 0),
    ("tokenizer", "index"): ("t", 20, "l", 12),
    ("tokenizer", "analyse"): ("r", -14, "b", -44),
    ("chat", "analyse"): ("r", 14, "l", 14),
    ("chat", "energon"): ("b", 10, "l", 0),
    ("energon", "analyse"): ("r", -8, "b", -20),
    ("model", "verify_megatron"): ("b", 14, "l", 0),
    ("convert", "verify_megatron"): ("b", 0, "t", -20),
    ("verify_megatron", "shard"): ("t", 20, "b", -20),
    ("shard", "verify_sharded"): ("b", 20, "l", 0),
    ("verify_sharded", "train"): ("t", 0, "b", -20),
    ("schedule", "train"): ("b", 0, "t", -38),
    ("analyse", "train"): ("b", 0, "l", -10),
    ("shard", "train"): ("r", 0, "l", 10),
    ("export", "verify_iteration"): ("b", 0, "t", 0),
    ("train", "report"): ("t", 42, "l", 0),
    ("train", "verify_iteration"): ("b", 30, "l", 0),
}
# Edges that run below all boxes: where they leave, the side they enter, their row.
BELOW = {("model", "verify_sharded"): (-10, "b", 3.72), ("model", "export"): (-26, "r", 3.92)}


def edges(rulegraph: str) -> list[tuple[str, str]]:
    """The edges of a rule graph in Graphviz' language, by the rules' names; `all` is left out."""
    names = dict(re.findall(r'(\d+)\[label = "(\w+)"', rulegraph))
    found = {(names[a], names[b]) for a, b in re.findall(r"(\d+) -> (\d+)", rulegraph)}
    return sorted(edge for edge in found if "all" not in edge)


def side(rule: str, where: str, shift: float = 0) -> tuple[float, float, float, float]:
    """A point on a side of a rule's box, so far from its middle, and the direction away from it."""
    _, _, column, row = RULES[rule]
    x, y = LEFT + column * PITCH_X, TOP + row * PITCH_Y
    return {
        "l": (x, y + HEIGHT / 2 + shift, -1, 0),
        "r": (x + WIDTH, y + HEIGHT / 2 + shift, 1, 0),
        "t": (x + WIDTH / 2 + shift, y, 0, -1),
        "b": (x + WIDTH / 2 + shift, y + HEIGHT, 0, 1),
    }[where]


def edge(start: str, end: str) -> str:
    """The path of one edge."""
    if start == end:
        path = loop(start)
    elif (start, end) in BELOW:
        path = lane(start, end)
    else:
        path = bend(start, end)
    return f'<path d="{path}" marker-end="url(#tip)"/>'


def loop(rule: str) -> str:
    """From a rule to itself."""
    x, y, _, _ = side(rule, "t")
    return f"M{x + 22:g},{y:g} c6,-24 -50,-24 -44,-4"


def lane(start: str, end: str) -> str:
    """Down, along below all boxes, and up again."""
    leave, enter, row = BELOW[start, end]
    x1, y1, _, _ = side(start, "b", leave)
    x2, y2, dx, _ = side(end, enter)
    down, out = TOP + row * PITCH_Y, x2 + 16 * dx
    up = f"V{y2 + 8:g} q0,-8 -8,-8 h-4" if dx else f"V{y2 + 4:g}"
    return f"M{x1:g},{y1:g} V{down - 8:g} q0,8 8,8 H{out - 8:g} q8,0 8,-8 {up}"


def bend(start: str, end: str) -> str:
    """From side to side, straight or in one curve."""
    leave, shift1, enter, shift2 = SIDES.get((start, end), ("r", 0, "l", 0))
    x1, y1, dx1, dy1 = side(start, leave, shift1)
    x2, y2, dx2, dy2 = side(end, enter, shift2)
    x2, y2 = x2 + 4 * dx2, y2 + 4 * dy2
    far = abs(x2 - x1) if {leave, enter} & {"l", "r"} else 0
    pull = min(max(far, abs(y2 - y1)) * 0.45, 70)
    return (
        f"M{x1:g},{y1:g} C{x1 + dx1 * pull:g},{y1 + dy1 * pull:g} "
        f"{x2 + dx2 * pull:g},{y2 + dy2 * pull:g} {x2:g},{y2:g}"
    )


def box(rule: str) -> str:
    """A rule's name over what it makes."""
    words, colour, column, row = RULES[rule]
    fill, stroke = COLOURS[colour]
    x, y = LEFT + column * PITCH_X, TOP + row * PITCH_Y
    middle = x + WIDTH / 2
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="{RADIUS}" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="1.3"/>\n'
        f'<text x="{middle:g}" y="{y + 20:g}" font-weight="600" fill="{INK}">{escape(rule)}</text>\n'
        f'<text x="{middle:g}" y="{y + 36:g}" font-size="10.5" fill="{GREY}">{escape(words)}</text>'
    )


def draw(rulegraph: str) -> str:
    """The whole picture.

    Raises:
        KeyError: a rule has no place in RULES yet.
    """
    width = int(LEFT * 2 + max(column for _, _, column, _ in RULES.values()) * PITCH_X + WIDTH + 14)
    height = int(TOP + 4.05 * PITCH_Y)
    lines = "\n".join(edge(*pair) for pair in edges(rulegraph))
    boxes = "\n".join(box(rule) for rule in RULES)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"
 width="{width}" height="{height}" role="img" aria-label="The rules of plait and what each is made from">
<defs><marker id="tip" viewBox="0 0 8 8" refX="5" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0,0.8 L7,4 L0,7.2 z" fill="{LINE}"/></marker></defs>
<rect width="{width}" height="{height}" rx="12" fill="#ffffff"/>
<g fill="none" stroke="{LINE}" stroke-width="1.3">
{lines}
</g>
<g font-family="-apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif" font-size="12"
 text-anchor="middle">
{boxes}
</g>
</svg>
"""


if __name__ == "__main__":
    sys.stdout.write(draw(sys.stdin.read()))
