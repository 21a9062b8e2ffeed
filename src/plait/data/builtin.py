"""The corpora of the default plan, made from installed packages: no download, no stand-in text.

Pictures are drawn from the monochrome Noto Emoji font (OFL-1.1, package ``manimgx-fonts``) and
named by the Unicode CLDR short names in package ``emoji`` (BSD). Dialogues are those of package
``chatterbot-corpus`` (BSD). NOTICE holds the licences.
"""

import hashlib
import importlib.util
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from plait.errors import DataError
from plait.progress import bar

if TYPE_CHECKING:
    from PIL import ImageFont

RECORDS = "records.jsonl"
FONT_SIZE = 0.75
"""Share of a picture's side; the widest emoji then stays inside its frame."""
VARIANT = "\ufe0f"
SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
FULLY_QUALIFIED, UNQUALIFIED = 2, 4
PRIVATE_USE = 0xF0000


def package_folder(package: str) -> Path:
    """The folder of an installed package.

    Raises:
        DataError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"package {package} is not installed", hint="install the locked requirements")
    return Path(spec.origin).parent


def write_records(folder: Path, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> int:
    """Write rows in an order that follows from their keys and mixes them, so that shards are alike."""
    shuffled = sorted(rows, key=lambda row: hashlib.sha256(row[0].encode()).digest())
    lines = (orjson.dumps({"id": key, **row}) + b"\n" for key, row in shuffled)
    (folder / RECORDS).write_bytes(b"".join(lines))
    return len(shuffled)


# Pictures with captions


def emoji_captions(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Draw every emoji that the font holds as one glyph, and caption it in each language.

    Writes ``pictures/{code points}.png``, greyscale, ``size`` pixels a side, and one row
    ``{"id", "picture", "caption", "language"}`` a picture and language. Of emoji that the font
    draws alike, such as most trades of men and of women, the shortest sequence is kept.

    Args:
        source: ``languages`` and ``size``, as the config has them.
        folder: the raw source being made.
    """
    (folder / "pictures").mkdir()
    named = _emoji(source["languages"])
    font = _font(list(named), round(source["size"] * FONT_SIZE))
    rows: list[tuple[str, dict[str, Any]]] = []
    drawn: set[bytes] = set()
    left_out = Counter(not_in_font=0, drawn_alike=0)
    for number, (emoji, captions) in enumerate(bar(named.items(), "", "picture")):
        picture = _draw(font, chr(PRIVATE_USE + number), source["size"])
        if picture is None or picture in drawn:
            left_out["drawn_alike" if picture else "not_in_font"] += 1
            continue
        drawn.add(picture)
        name = "-".join(f"{ord(char):x}" for char in emoji)
        (folder / "pictures" / f"{name}.png").write_bytes(picture)
        for language, caption in captions.items():
            row = {"picture": f"pictures/{name}.png", "caption": caption, "language": language}
            rows.append((f"emoji-{name}-{language}", row))
    return {"pictures": len(drawn), **left_out, "records": write_records(folder, rows)}


def _emoji(languages: Iterable[str]) -> dict[str, dict[str, str]]:
    """Emoji without skin tones, shortest sequences first, each with its name in every language."""
    import emoji

    emoji.config.load_language()
    found: dict[str, dict[str, str]] = {}
    for char, entry in emoji.EMOJI_DATA.items():
        if entry["status"] in (FULLY_QUALIFIED, UNQUALIFIED) and not SKIN_TONES & set(char):
            names = {language: _words(entry[language]) for language in languages if language in entry}
            found.setdefault(char.replace(VARIANT, ""), {}).update(names)
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def _words(name: str) -> str:
    """A caption from a short name such as ``:red_apple:``."""
    return " ".join(name.strip(":").replace("_", " ").split())


def _font(sequences: list[str], size: int) -> "ImageFont.FreeTypeFont":
    """The font, with a private code point for each sequence that is one glyph in it.

    Shaping libraries differ between machines; looking ligatures up here needs none.
    """
    from fontTools.ttLib import TTFont
    from PIL import ImageFont

    font = TTFont(package_folder("manimgx_fonts") / "NotoEmoji[wght].ttf")
    glyphs = font.getBestCmap()
    ligatures = _ligatures(font)
    private = {}
    for number, sequence in enumerate(sequences):
        names = tuple(glyphs.get(ord(char), "") for char in sequence)
        glyph = names[0] if len(names) == 1 else ligatures.get(names, "")
        if glyph:
            private[PRIVATE_USE + number] = glyph
    for table in font["cmap"].tables:
        if table.isUnicode() and table.format == 12:
            table.cmap.update(private)
    out = io.BytesIO()
    font.save(out)
    out.seek(0)
    return ImageFont.truetype(out, size, layout_engine=ImageFont.Layout.BASIC)


def _ligatures(font: Any) -> dict[tuple[str, ...], str]:
    """Glyph names that the font replaces by one glyph."""
    return {
        (first, *ligature.Component): ligature.LigGlyph
        for lookup in font["GSUB"].table.LookupList.Lookup
        for table in lookup.SubTable
        for first, ligatures in getattr(getattr(table, "ExtSubTable", table), "ligatures", {}).items()
        for ligature in ligatures
    }


def _draw(font: "ImageFont.FreeTypeFont", char: str, size: int) -> bytes | None:
    """A PNG file of one character, dark on white; None if the font does not hold it."""
    from PIL import Image, ImageDraw

    missing = chr(PRIVATE_USE - 1)
    if font.getmask(char).getbbox() is None or bytes(font.getmask(char)) == bytes(font.getmask(missing)):
        return None
    image = Image.new("L", (size, size), 255)
    left, top, right, bottom = font.getbbox(char)
    corner = ((size - right - left) / 2, (size - bottom - top) / 2)
    ImageDraw.Draw(image).text(corner, char, font=font, fill=0)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


# Dialogues


def chatterbot_dialogues(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the short dialogues of the chatterbot corpus as chat records.

    Lists that are not two or more turns of text are left out and counted.

    Args:
        source: ``languages``, as the config has them.
        folder: the raw source being made.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    left_out = 0
    for language in source["languages"]:
        for name, turns in bar(list(_dialogues(language)), language, "dialogue"):
            if _is_dialogue(turns):
                rows.append((name, {"messages": _alternating(turns)}))
            else:
                left_out += 1
    return {"records": write_records(folder, rows), "left_out": left_out}


def _dialogues(language: str) -> Iterator[tuple[str, Any]]:
    import yaml

    files = sorted((package_folder("chatterbot_corpus") / "data" / language).glob("*.yml"))
    if not files:
        raise DataError(f"package chatterbot-corpus has no dialogues in {language}")
    for file in files:
        topic = yaml.load(file.read_text(encoding="utf-8"), Loader=_yaml_loader())  # noqa: S506 - a safe loader
        for number, turns in enumerate(topic["conversations"]):
            yield f"chatterbot-{language}-{file.stem}-{number:04d}", turns


def _yaml_loader() -> Any:
    """The safe loader, in C where PyYAML was built with it."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _is_dialogue(turns: Any) -> bool:
    several = isinstance(turns, list) and len(turns) > 1
    return several and all(isinstance(turn, str) and turn.strip() for turn in turns)


def _alternating(turns: list[str]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": turn.strip()} for number, turn in enumerate(turns)]
