"""Texts to token ids: by gigatoken where it gives the ids of Hugging Face's tokenizer, else by that one.

gigatoken is some ten times as quick. Samples are read by both, when a tokenizer is made: where one id or one
place of a token differs, or gigatoken does not know such a tokenizer, tokenizers does the work. A tokenizer
that was not compared, or with another gigatoken, is compared before its first texts are read, and with them.
"""

import ctypes
import logging
import mmap
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import orjson
from msgspec import Raw
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.models import BPE

from plait import files
from plait.layout import FAST, MANIFEST

SPACE = "▁"
"""What SentencePiece writes for a space."""
PLANES = (0x20, 0x7F, 0x250, 0x3000, 0xD7FF, 0x2FFFF)
"""Below which of these characters a letter of a mixed string is."""
MIXED = 4000
"""Mixed strings that a tokenizer is compared by."""
PROBED = 40
"""Added tokens that are looked at in samples: of a thousand locations not every one."""
SAMPLES = (
    "", " ", "  ", "a", " a", "a ", "Hello, world!", "two  spaces\tand a tab", "\n", "a\n\nb\r\n c",
    "x" * 70, "don't we'll I'M", "3.14159 1,000,000 2\u00b2", "naïve café e\u0301 \ufb01 \u212b", "ＦＵＬＬ",
    "привет мир", "日本語のテキスト。", "한국어 문장", "مرحبا بالعالم", "नमस्ते दुनिया", "ไทย",
    "\U0001f600 \U0001f1ef\U0001f1f5",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f3fd", "\x00\x01\x7f\x80", "\u200b\u200d\ufeff\u00a0x",
    "def f(x):\n    return x**2  # ok\n", "<|im_start|>user\n", "<s>[INST] a [/INST] b</s>",
    "<0x0A> \u2581 \u2581a", "Ġ Ċ", "https://example.org/a?b=c&d=%20",
    "\U0001d518 \U0002070e \U0010ffff", "----====____....", "\t\t  \n \n  end  ",
)  # fmt: skip
MOST, MORE = 285_000_000, 32_000_000
"""Bytes that this process may have until gigatoken has to forget the words that it has seen, and by how many
it must have grown since it last had."""
NEWER = {
    r"": "88f c5c cdc 1acf-1add 1ae0-1aeb a7ce-a7cf a7d2 a7d4 a7f1 10940-10959 10ec5-10ec7 10efa-10efb "
    "11b60-11b67 11db0-11ddb 11de0-11de9 16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 187f8-187ff 18d09-18d1e "
    "18d80-18df2 1e6c0-1e6de 1e6e0-1e6f5 1e6fe-1e6ff 2b73a-2b73f 2cea2-2cead 323b0-33479",
    r"\\p\{\^?L[lo]": "295",
    r"\\p\{\^?[PS]": "20c1 2b96 fbc3-fbd2 fd90-fd91 fdc8-fdce 10ed0-10ed8 1ccfa-1ccfc 1ceba-1ced0 "
    "1cee0-1cef0 1f6d8 1f777-1f77a 1f8d0-1f8d8 1fa54-1fa57 1fa8a 1fa8e 1fac8 1facd 1faea 1faef 1fbfa",
}
"""What Unicode 17, which gigatoken 0.10 has, puts into other classes than 16, which tokenizers 0.23 has: new
letters, marks and numbers; a small letter that has no case now; new punctuation and symbols. Each by how it
is found that a tokenizer's patterns tell them apart; those of byte-level BPE always do it for letters."""
UNKNOWN = (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError)
"""What gigatoken raises for a tokenizer that it does not know."""
Ids = NDArray[np.int32]
log = logging.getLogger(__name__)


class Encoder(Protocol):
    """Turns texts into ids."""

    def apart(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text."""

    def whole(self, documents: Sequence[Sequence[str]]) -> list[tuple[Ids, list[int]]]:
        """Of texts that are tokenised as one: its ids, the first token of each text, and their number."""


class Slow:
    """Hugging Face's own library."""

    def __init__(self, folder: Path, *, specials: bool) -> None:
        """Take a tokenizer's folder, and whether special tokens that a text has are read as such."""
        self.folder, self.specials = folder, specials

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        found = _loaded(self.folder)
        _trim()
        found.encode_special_tokens = not self.specials
        return found

    def samples(self) -> list[Sequence[str]]:
        """Texts of many scripts, each alone and in a row, and added tokens in the midst of them."""
        added = [one.content for one in self._tokenizer.get_added_tokens_decoder().values()]
        some = [*added[:PROBED], *added[-1:]]
        near = [text for name in some for text in (name, f"a{name}b", f" {name} {name}{name}\n")]
        beside = [["日本", *more] for name in some for more in ([f"回{name} "], [f"回 {name}"])]
        beside += [[name, "日本"] for name in some]
        return [*([text] for text in (*SAMPLES, *near)), SAMPLES, some, [*SAMPLES, *near], *beside]

    def let_go(self) -> None:
        """Give the tokenizer's memory back; it is read again if it is needed again."""
        if self.__dict__.pop("_tokenizer", None) is not None:
            _trim()

    @property
    def is_loaded(self) -> bool:
        """Whether the tokenizer is in memory."""
        return "_tokenizer" in self.__dict__

    def apart(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in found]

    def whole(self, documents: Sequence[Sequence[str]]) -> list[tuple[Ids, list[int]]]:
        """Of texts that are tokenised as one: its ids, the first token of each text, and their number."""
        found = self._tokenizer.encode_batch(list(map("".join, documents)), add_special_tokens=False)
        return [
            (np.array(one.ids, np.int32), starts(one, texts))
            for one, texts in zip(found, documents, strict=True)
        ]


class Bpe(msgspec.Struct, tag_field="type", tag="BPE", forbid_unknown_fields=True):
    """The model of a tokenizer.json, as far as it is a BPE and its merges are written as pairs."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


def _loaded(folder: Path) -> Tokenizer:
    """A folder's tokenizer; a BPE by its parts, which takes a sixth less memory and half the time."""
    parts = _parts(folder)
    try:
        model = msgspec.json.decode(parts["model"], type=Bpe)
    except msgspec.ValidationError:
        return Tokenizer.from_file(str(folder / FAST))
    added = msgspec.json.decode(parts.get("added_tokens", b"[]"))
    nothing = Bpe(vocab={}, merges=[])
    found = Tokenizer.from_str(msgspec.json.encode(parts | {"added_tokens": [], "model": nothing}).decode())
    del parts
    keys = {name: value for name, value in msgspec.structs.asdict(model).items() if value is not None}
    found.model = BPE(**keys)
    found.add_tokens([AddedToken(**{key: one[key] for key in one.keys() - {"id"}}) for one in added])
    return found


class Fast:
    """gigatoken; where a token begins follows from the bytes that each one stands for."""

    _encode: Callable[[str], NDArray[np.uint32]]

    def __init__(self, described: Mapping[str, Any], slow: Slow) -> None:
        """Take the content of a tokenizer.json, and who reads what this one cannot place.

        Raises:
            Exception: one of :data:`UNKNOWN`, gigatoken does not know its kind.
        """
        _check_kind(described)
        self._slow = slow
        added = [one for one in described["added_tokens"] if slow.specials or not one["special"]]
        self._added = added
        self._stripping = [one["id"] for one in added if one["lstrip"] or one["rstrip"]]
        self._parting = [one["id"] for one in added if _puts_spaces(described["pre_tokenizer"])]
        self._by_class = not described["model"].get("byte_fallback")
        self._newer = _newer(described["pre_tokenizer"])
        self._make()

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        return _sizes(read(self._slow.folder))

    def _make(self) -> None:
        """Begin with a tokenizer that remembers nothing: it keeps each word that it has read, for ever."""
        import gigatoken

        self.__dict__.pop("_encode", None)
        _trim_if_full()
        content = msgspec.json.encode(_parts(self._slow.folder) | {"added_tokens": self._added})
        self._encode = gigatoken.Tokenizer.from_json(content).backend.encode
        del content
        _trim_if_full()
        self._most = max(_resident() + MORE, MOST)

    def _forget(self) -> None:
        if _resident() > self._most:
            self._make()

    def _other(self) -> Slow:
        """The other library; until it has loaded its vocabulary it needs 160 MB, which words give up."""
        if not self._slow.is_loaded:
            self.__dict__.pop("_encode")
            _trim()
            self._slow.apart([""])
            self._make()
        return self._slow

    def apart(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text."""
        self._forget()
        return [self._other().apart([text])[0] if self._unknown(text) else self._ids(text) for text in texts]

    def whole(self, documents: Sequence[Sequence[str]]) -> list[tuple[Ids, list[int]]]:
        """Of texts that are tokenised as one: its ids, the first token of each text, and their number."""
        self._forget()
        return [self._placed(texts) for texts in documents]

    def _ids(self, text: str) -> Ids:
        ids: Ids = self._encode(text).view(np.int32)
        return ids

    def _placed(self, texts: Sequence[str]) -> tuple[Ids, list[int]]:
        whole = "".join(texts)
        if self._unknown(whole):
            return self._other().whole([texts])[0]
        ids = self._ids(whole)
        bounds = [0, *accumulate(len(text.encode()) for text in texts)]
        ends = np.cumsum(self._sizes[ids])
        more = int(ends[-1]) - bounds[-1] if len(ids) else -bounds[-1]
        if more not in (0, 1) or self._unclear(ids, more):
            return self._other().whole([texts])[0]  # only the other library says where each token begins
        # one more is the space that is put before the first character
        places = [bound + more if bound else 0 for bound in bounds[1:-1]]
        return ids, [0, *np.searchsorted(ends, places, side="right").tolist(), len(ids)]

    def _unknown(self, text: str) -> bool:
        """Whether texts are cut by classes of letters, and one of its is of two, one for each library."""
        if not self._by_class or text.isascii():
            return False
        letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        return bool(self._newer[letters].any())

    def _unclear(self, ids: Ids, more: int) -> bool:
        """Whether spaces were taken away beside added tokens, or may have been put behind them."""
        told = self._stripping + (self._parting if more else [])
        return bool(told) and bool(np.isin(ids, told).any())


def _newer(pre_tokenizer: Mapping[str, Any] | None) -> NDArray[np.bool_]:
    """(1114112,) whether a letter is one of NEWER that a tokenizer's patterns tell from others."""
    found, patterns = np.zeros(sys.maxunicode + 1, bool), orjson.dumps(pre_tokenizer).decode()
    for named, ranges in NEWER.items():
        if re.search(named, patterns):
            for first, last in (one.split("-") if "-" in one else (one, one) for one in ranges.split()):
                found[int(first, 16) : int(last, 16) + 1] = True
    return found


def _trim() -> None:
    """Give the system back what was freed: glibc keeps it else."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _trim_if_full() -> None:
    """What was freed is better kept, for the next words, as long as there is room for them."""
    if _resident() + MORE > MOST:
        _trim()


def _resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


class Choice:
    """The quicker one of those that give the ids of Hugging Face's tokenizer."""

    def __init__(self, folder: Path, *, specials: bool, described: Mapping[str, Any] | None = None) -> None:
        """Take a tokenizer's folder, and whether special tokens that a text has are read as such.

        The content of its tokenizer.json is kept until a text is read, where it is given.
        """
        self._folder, self._specials, self._described = folder, specials, described
        self._chosen: Encoder | None = None

    def apart(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text."""
        return self._encoder([[text] for text in texts[:PROBED]]).apart(texts)

    def whole(self, documents: Sequence[Sequence[str]]) -> list[tuple[Ids, list[int]]]:
        """Of texts that are tokenised as one: its ids, the first token of each text, and their number."""
        return self._encoder(documents[:PROBED]).whole(documents)

    def _encoder(self, first: Sequence[Sequence[str]]) -> Encoder:
        if self._chosen is None:
            self._chosen = chosen(self._folder, first, specials=self._specials, described=self._taken())
        return self._chosen

    def let_go(self) -> None:
        """Give the memory of a tokenizer and of its words back; it is read again if it is needed again."""
        self._chosen = None
        _trim()

    def _taken(self) -> Mapping[str, Any] | None:
        found, self._described = self._described, None
        return found


def chosen(
    folder: Path,
    first: Sequence[Sequence[str]],
    *,
    specials: bool,
    described: Mapping[str, Any] | None = None,
) -> Encoder:
    """gigatoken, if it was found to read as tokenizers does, or reads samples and first documents so now."""
    slow, different = Slow(folder, specials=specials), found_before(folder, specials=specials)
    if different is None:
        del described  # tokenizers needs the room
        fast, different = _compared(slow, [*slow.samples(), *first])
    else:
        fast = None if different else Fast(described or read(folder), slow)
    if fast:
        return fast
    log.warning("%s is read by tokenizers, some ten times slower than by gigatoken: %s", folder, different)
    return slow


def found_before(folder: Path, *, specials: bool) -> str | None:
    """What differed when a tokenizer was made, in words; None if these two were not compared then."""
    if not (folder / MANIFEST).is_file():
        return None
    found = files.read_manifest(folder)["facts"].get(COMPARED, {})
    now = found and {**_compared_with(folder), DIFFERS: found[DIFFERS]}
    return str(found[DIFFERS][NAMES[specials]]) if found and found == now else None


def compared(folder: Path) -> dict[str, Any]:
    """What a tokenizer's manifest says of gigatoken: what differs, in words, empty where nothing does."""
    differs = {}
    for specials, name in NAMES.items():
        slow = Slow(folder, specials=specials)
        differs[name] = _compared(slow, [*slow.samples(), *([text] for text in mixed(MIXED))])[1]
    return {COMPARED: {**_compared_with(folder), DIFFERS: differs}}


COMPARED, DIFFERS = "compared", "differs"
NAMES = {True: "specials", False: "plain"}
"""Whether special tokens in a text are read as such."""


def _compared_with(folder: Path) -> dict[str, str]:
    libraries = {name: version(name) for name in ("gigatoken", "tokenizers")}
    return {**libraries, FAST: files.digest(folder / FAST)}


def _compared(slow: Slow, documents: Sequence[Sequence[str]]) -> tuple[Encoder | None, str]:
    """Gigatoken if it reads documents as tokenizers does; what differs, in words.

    Only one of both is in memory at a time: a large vocabulary takes 160 MB in tokenizers.
    """
    expected = slow.whole(documents)
    slow.let_go()
    try:
        fast = Fast(read(slow.folder), slow)
        different = _different(fast, documents, expected)
    except UNKNOWN as error:
        return None, f"{type(error).__name__}: {error}"
    slow.let_go()
    return (None if different else fast), different


def mixed(count: int, seed: int = 0) -> Iterator[str]:
    """Strings of a few characters of all planes, control characters among them."""
    draw = random.Random(seed)  # noqa: S311 - for samples
    for _ in range(count):
        places = (int(draw.random() * draw.choice(PLANES)) for _ in range(draw.randint(1, 12)))
        yield "".join(" " if 0xD800 <= place < 0xE000 else chr(place) for place in places)


def read(folder: Path) -> dict[str, Any]:
    """The content of a folder's tokenizer.json; its merges, the most of it, as they stand there."""
    found = _parts(folder)
    model = msgspec.json.decode(found.pop("model"), type=dict[str, Raw])
    merges = {"merges": model.pop("merges")} if "merges" in model else {}
    decoded = {key: msgspec.json.decode(part) for key, part in model.items()}
    return {key: msgspec.json.decode(part) for key, part in found.items()} | {"model": decoded | merges}


def _parts(folder: Path) -> dict[str, Any]:
    """The parts of a folder's tokenizer.json as they stand there."""
    found: dict[str, Any] = msgspec.json.decode((folder / FAST).read_bytes(), type=dict[str, Raw])
    return found


def ids_by_name(described: Mapping[str, Any]) -> dict[str, int]:
    """All tokens of a tokenizer.json, those that were added among them."""
    words = described["model"]["vocab"]
    own = words if isinstance(words, dict) else {name: place for place, (name, _) in enumerate(words)}
    return {one["content"]: one["id"] for one in described["added_tokens"]} | own


def _different(
    fast: Encoder, documents: Sequence[Sequence[str]], expected: Sequence[tuple[Ids, list[int]]]
) -> str:
    """What the first document is that is read differently, in words; empty if none is."""
    for texts, first, second in zip(documents, fast.whole(documents), expected, strict=True):
        if not np.array_equal(first[0], second[0]) or first[1] != second[1]:
            return f"gigatoken gives other ids for {''.join(texts)[:60]!r}"
    return ""


def _check_kind(described: Mapping[str, Any]) -> None:
    """Refuse tokens of which it is not known what text they stand for.

    Raises:
        ValueError: they are neither byte-level ones nor SentencePiece's.
    """
    if described["model"]["type"] != "BPE" or described["normalizer"]:
        raise ValueError("it is no BPE without a normaliser")


def _puts_spaces(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether a space is put before what stands behind an added token, not only before a text."""
    found = pre_tokenizer or {}
    if any(map(_puts_spaces, found.get("pretokenizers", ()))):
        return True
    return bool(found.get("prepend_scheme", "always" if found.get("add_prefix_space") else "") == "always")


def _sizes(described: Mapping[str, Any]) -> NDArray[np.int64]:
    """Bytes of a text that each id stands for, for byte-level tokens and for those of SentencePiece."""
    model = described["model"]
    added = {one["id"]: len(one["content"].encode()) for one in described["added_tokens"]}
    measure = _piece if model.get("byte_fallback") else len
    sizes = np.zeros(max([*model["vocab"].values(), *added], default=-1) + 1, np.int64)
    for name, token in model["vocab"].items():
        sizes[token] = measure(name)
    for token, size in added.items():
        sizes[token] = size
    return sizes


def _piece(name: str) -> int:
    """Bytes of a SentencePiece token, of which those for a byte are written <0x0A>."""
    is_byte = len(name) == len("<0x0A>") and name.startswith("<0x") and name.endswith(">")
    return 1 if is_byte else len(name.replace(SPACE, " ").encode())


def starts(encoding: Encoding, texts: Sequence[str]) -> list[int]:
    """The first token of each text within the whole, and the number of tokens."""
    ends = list(accumulate(map(len, texts)))
    total, count = (ends[-1] if ends else 0), len(encoding)
    found = [0]
    for end, following in pairwise([*ends, total]):
        tokens = (encoding.char_to_token(place) for place in range(end, max(following, end)))
        # a character that a normaliser drops belongs to no token: look at the one after it
        found.append(next((token for token in tokens if token is not None), -1))
    found[-1] = count
    for number in range(len(found) - 2, 0, -1):
        if found[number] < 0:
            found[number] = found[number + 1]
    return found
