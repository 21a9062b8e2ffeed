"""Solved mixtures against exact arithmetic: Fourier and Motzkin's elimination; all mixtures one by one."""

import re
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from plait.config.model import load
from plait.config.solve import Solve
from plait.errors import ConfigError, DataError
from plait.tokens import mixture, solver
from plait.tokens.mixture import Shard

NAMES = ("a", "b", "c")
CLOSE = 2e-6


def asked(**keys):
    return Solve(**keys).model_dump(mode="json")


def exact(number):
    """The number that a decimal was written as."""
    return Fraction(repr(number))


# What the limits mean, written down again


def totals(shards):
    """Tokens and tokens of pictures by dataset."""
    names = dict.fromkeys(shard.dataset for shard in shards)
    return {
        name: [
            sum(getattr(s, key) for s in shards if s.dataset == name) for key in ("tokens", "picture_tokens")
        ]
        for name in names
    }


def bounds(wanted):
    """Key, side and bound of each limit."""
    ranges = {"tokens": wanted["tokens"], "picture_to_text": wanted["picture_to_text"]}
    for name, part in wanted["datasets"].items():
        ranges |= {f"datasets.{name}.share": part["share"], f"datasets.{name}.epochs": part["epochs"]}
    ranges |= {f"languages.{name}": (share, None) for name, share in wanted["languages"].items()}
    return [
        (key, side, exact(bound))
        for key, range_ in ranges.items()
        for side, bound in zip(("least", "most"), range_, strict=True)
        if bound is not None
    ]


def quotient(key, shards, wanted):
    """What a limit is about: numbers by dataset above and below the line, and a constant below."""
    there = totals(shards)
    tokens = {name: Fraction(whole) for name, (whole, _) in there.items()}
    pictures = {name: Fraction(part) for name, (_, part) in there.items()}
    if key == "tokens":
        return tokens, {}, 1
    if key == "picture_to_text":
        return pictures, {name: tokens[name] - pictures[name] for name in tokens}, 0
    section, name, *rest = key.split(".")
    if rest == ["epochs"]:
        return {name: tokens[name]}, {}, tokens[name]
    chosen = [name]
    if section == "languages":
        chosen = [one for one, part in wanted["datasets"].items() if part["language"] == name]
    return {one: tokens[one] for one in chosen}, tokens, 0


def value(key, reads, shards, wanted):
    over, under, constant = quotient(key, shards, wanted)
    above = sum(rate * reads[name] for name, rate in over.items())
    below = constant + sum(rate * reads[name] for name, rate in under.items())
    return above / below if below else None


def value_of_whole(key, times, shards, wanted):
    """The same where each shard is read so many times: shards of a dataset have not the same pictures."""
    read = [(shard, Fraction(time)) for shard, time in zip(shards, times, strict=True)]
    tokens = sum(shard.tokens * time for shard, time in read)
    if key == "tokens":
        return tokens
    if key == "picture_to_text":
        pictures = sum(shard.picture_tokens * time for shard, time in read)
        return pictures / (tokens - pictures) if tokens != pictures else None
    section, name, *rest = key.split(".")
    parts = wanted["datasets"]
    chosen = [one for one in parts if parts[one]["language"] == name] if section == "languages" else [name]
    own = sum(shard.tokens * time for shard, time in read if shard.dataset in chosen)
    return own / (totals(shards)[name][0] if rest == ["epochs"] else tokens)


def keeps(key, side, bound, reads, shards, wanted, close=CLOSE):
    return is_kept(value(key, reads, shards, wanted), side, bound, close)


def is_kept(found, side, bound, close):
    if found is None:
        return side == "least" or not bound
    away = found - bound if side == "most" else bound - found
    return away <= close * max(bound, 1 if not bound else 0)


# Whether a mixture exists: elimination of one unknown after the other, in fractions


def rows_of(limits, shards, wanted):
    """Rows [a1, .., an, c], a x <= c, of limits over the readings of each dataset."""
    names = list(totals(shards))
    rows = [[Fraction(-(one == name)) for one in names] + [Fraction(0)] for name in names]
    tokens = [Fraction(totals(shards)[name][0]) for name in names]
    rows.append([-t for t in tokens] + [-min(Fraction(wanted["tokens"][0]), sum(tokens)) / 1000])
    for key, side, bound in limits:
        over, under, constant = quotient(key, shards, wanted)
        sign = 1 if side == "most" else -1
        row = [sign * (over.get(name, 0) - bound * under.get(name, 0)) for name in names]
        rows.append([*map(Fraction, row), Fraction(sign * bound * constant)])
    return rows


def exists(rows):
    while len(rows[0]) > 1:
        zero = [row[1:] for row in rows if not row[0]]
        above = [[one / row[0] for one in row[1:]] for row in rows if row[0] > 0]
        below = [[one / row[0] for one in row[1:]] for row in rows if row[0] < 0]
        both = [[a - b for a, b in zip(up, low, strict=True)] for up in above for low in below]
        rows = [list(row) for row in {tuple(row) for row in zero + both}] or [
            [Fraction(0)] * len(rows[0][1:])
        ]
    return all(row[0] >= 0 for row in rows)


# Questions

tenths = st.integers(0, 10).map(lambda n: n / 10)
halves = st.integers(0, 6).map(lambda n: n / 2)


def ordered(values, *, most=False):
    pairs = st.tuples(values, values).map(sorted)
    return pairs.flatmap(lambda pair: st.sampled_from([pair, (pair[0], None)]) if most else st.just(pair))


@st.composite
def questions(draw, *, whole=False):
    names = NAMES[: draw(st.integers(2, 3))]
    shards = []
    for name in names:
        for number in range(draw(st.integers(1, 3 if whole and len(names) == 2 else 2))):
            tokens = draw(st.integers(20, 500))
            pictures = draw(st.integers(0, tokens // 2))
            shards.append(Shard(f"{name}{number}", name, max(tokens // 20, 1), tokens, pictures))
    parts = {
        name: {
            "share": draw(st.one_of(st.just((0, 1)), ordered(tenths))),
            "epochs": draw(st.one_of(st.just((0, None)), ordered(halves, most=True))),
            "language": draw(st.sampled_from([None, "ja"])),
        }
        for name in names
    }
    spoken = any(part["language"] for part in parts.values())
    least = draw(st.integers(100, 2000))
    keys = {
        "tokens": (least, least + draw(st.integers(10 if whole else 0, 500))),
        "datasets": parts,
        "picture_to_text": draw(st.one_of(st.just((0, None)), ordered(tenths, most=True))),
        "languages": {"ja": draw(tenths)} if spoken else {},
        "whole_shards": whole,
    }
    try:
        return shards, asked(**keys)
    except ValueError:
        assume(condition=False)


def solved(shards, wanted):
    """Readings by dataset, and the solution."""
    found = solver.solve(shards, wanted)
    tokens = totals(shards)
    read = dict.fromkeys(tokens, 0.0)
    for shard, reads in zip(shards, found.reads, strict=True):
        read[shard.dataset] += reads * shard.tokens / tokens[shard.dataset][0]
    return read, found


@settings(deadline=None, max_examples=40)
@given(questions())
def test_a_mixture_is_found_where_there_is_one_and_keeps_to_every_limit(question):
    shards, wanted = question
    every = bounds(wanted)
    if not exists(rows_of(every, shards, wanted)):
        with pytest.raises(DataError):
            solver.solve(shards, wanted)
        return
    read, found = solved(shards, wanted)

    assert all(keeps(*one, read, shards, wanted) for one in every)
    tight = {
        (key, side)
        for key, side, bound in every
        if (now := value(key, read, shards, wanted)) is not None
        and abs(now - bound) <= 1e-6 * float(bound or 1)
        and (side, bound) != ("least", 0)
        and not (side == "most" and bound == 1 and key.endswith("share"))
    }
    assert {(limit.key, limit.side) for limit in found.binding} == tight
    assert solver.solve(shards, wanted) == found

    # no mixture reads a thousandth more, nor is its largest deviation a thousandth smaller
    tokens = sum(read[name] * whole for name, (whole, _) in totals(shards).items())
    assert not exists(rows_of([*every, ("tokens", "least", exact(tokens * 1.001))], shards, wanted))
    natural = tokens / sum(whole for whole, _ in totals(shards).values())
    largest = max(abs(one / natural - 1) for one in read.values())
    if largest > 2e-3:
        nearer = largest - 1e-3
        within = [
            (f"datasets.{name}.epochs", side, exact(natural * (1 + sign * nearer)))
            for name in read
            for side, sign in (("most", 1), ("least", -1))
        ]
        as_many = ("tokens", "least", exact(tokens * 0.999999))
        assert not exists(rows_of([*every, as_many, *within], shards, wanted))


@settings(deadline=None, max_examples=25)
@given(questions())
def test_limits_that_exclude_one_another_are_few_and_the_change_helps_just_so(question):
    shards, wanted = question
    every = bounds(wanted)
    assume(not exists(rows_of(every, shards, wanted)))
    units = solver._datasets(shards)
    kept = solver.limits(units, wanted)
    conflict = solver.Question(units, solver.floor(units, wanted)).conflict(kept)
    named = [(limit.key, limit.side, exact(limit.bound)) for limit in conflict.limits]

    assert not exists(rows_of(named, shards, wanted))
    for one in named:
        assert exists(rows_of([other for other in named if other != one], shards, wanted))

    changed = {(one.limit.key, one.limit.side): one for one in conflict.changes}
    assert changed

    def after(*, less=None):
        """Whether there is a mixture after the change; with one bound changed a bit less."""
        found = []
        for key, side, bound in every:
            if one := changed.get((key, side)):
                size = max(bound, exact(one.bound))
                now = exact(one.bound) + (1 if side == "most" else -1) * size * exact(1e-6)
                back = size * exact(5e-3) * (1 if side == "least" else -1)
                bound = now + back if less == (key, side) else max(now, 0)  # noqa: PLW2901
            found.append((key, side, bound))
        return exists(rows_of(found, shards, wanted))

    assert after()
    for one in changed:
        assert not after(less=one)


@settings(deadline=None, max_examples=25)
@given(questions(whole=True))
def test_whole_shards_are_read_as_the_best_of_all_mixtures_reads_them(question):
    shards, wanted = question
    there = totals(shards)
    every = bounds(wanted)
    fits = []
    most_of = {name: [s.tokens for s in shards if s.dataset == name] for name in there}
    each = []
    for sizes in most_of.values():
        times = range(wanted["tokens"][1] // max(sum(sizes), 1) + 1)
        each.append([(k, ones) for k in times for ones in product((0, 1), repeat=len(sizes))])
    assume(len(each[0]) * len(each[1]) * (len(each[2]) if len(each) > 2 else 1) < 3000)
    for choice in product(*each):
        times = [k + one for k, ones in choice for one in ones]
        tokens = value_of_whole("tokens", times, shards, wanted)
        if wanted["tokens"][0] <= tokens <= wanted["tokens"][1] and all(
            is_kept(value_of_whole(key, times, shards, wanted), side, bound, 0) for key, side, bound in every
        ):
            read = {name: value_of_whole(f"datasets.{name}.epochs", times, shards, wanted) for name in there}
            away = deviations(read, tokens, there, wanted)
            fits.append((max(away), sum(away)))
    if not fits:
        with pytest.raises(DataError):
            solver.solve(shards, wanted)
        return
    read, found = solved(shards, wanted)
    tokens = sum(shard.tokens * reads for shard, reads in zip(shards, found.reads, strict=True))

    assert all(reads == int(reads) for reads in found.reads)
    for key, side, bound in every:
        assert is_kept(value_of_whole(key, found.reads, shards, wanted), side, bound, CLOSE), (key, side)
    away = deviations(read, tokens, there, wanted)
    assert max(away) <= float(min(fits)[0]) * (1 + 2.1 * solver.GAP) + 1e-6
    least = min(total for largest, total in fits if float(largest) <= max(away) + 1e-6)
    assert sum(away) <= float(least) * (1 + 2.1 * solver.GAP) + 1e-6 + len(away) * solver.GAP * max(away)


def deviations(read, tokens, there, wanted):
    """How far the readings are from their average, in readings of the budget."""
    total = sum(whole for whole, _ in there.values())
    return [abs(one * total - tokens) / wanted["tokens"][1] for one in read.values()]


# Answers known beforehand

ABC = [
    Shard("a0", "a", 100, 1000, 300),
    Shard("a1", "a", 120, 1200, 100),
    Shard("b0", "b", 50, 500),
    Shard("c0", "c", 400, 4000),
]


def part(**keys):
    return {"a": {}, "b": {}, "c": {}} | keys


def test_without_limits_but_the_budget_the_mixture_is_the_natural_one():
    found = solver.solve(ABC, asked(tokens=(13400, 13400), datasets=part()))
    weighed, instances = mixture.read(ABC, found.reads)

    assert found.reads == [2, 2, 2, 2]
    assert [w for _, w in weighed] == pytest.approx([w for _, w in mixture.natural(ABC)])
    assert instances == 1340


def test_who_is_not_held_by_a_limit_is_read_as_often_as_the_others():
    found = solver.solve(ABC, asked(tokens=(10000, 10000), datasets=part(b={"share": (0.3, 1)})))

    assert found.reads == pytest.approx([7000 / 6200, 7000 / 6200, 6, 7000 / 6200], rel=1e-6)
    assert "datasets.b.share at least 0.3" in map(str, found.binding)


def test_a_shard_that_is_not_read_has_no_weight_and_is_named():
    keys = {"tokens": (6000, 7000), "datasets": part(b={"epochs": (0, 0)}), "whole_shards": True}
    found = solver.solve(ABC, asked(**keys))
    weighed, _ = mixture.read(ABC, found.reads)

    assert found.to_json()["left_out"] == ["b0"]
    assert [shard.prefix for shard, _ in weighed] == ["a0", "a1", "c0"]
    assert min(w for _, w in weighed) > 0
    assert " 0.0000 " not in f" {mixture.classic(weighed)}"


def test_the_sentence_names_the_conflict_and_what_to_change():
    keys = {
        "tokens": (10000, 10000),
        "datasets": part(a={"epochs": (0, 2)}, b={"epochs": (0, 2)}, c={"epochs": (0, 1)}),
    }
    with pytest.raises(DataError) as error:
        solver.solve(ABC, asked(**keys), "mixtures.m.solve")
    assert re.match(
        r"mixtures\.m\.solve asks for what its data cannot give: tokens at least 10000, datasets\.a\.epochs "
        r"at most 2, datasets\.b\.epochs at most 2 and datasets\.c\.epochs at most 1 exclude one another; "
        r"the smallest change that helps: lower the least of tokens from 10000 to 9400\n",
        str(error.value),
    )


def test_a_share_is_raised_where_no_other_budget_would_help():
    keys = {"tokens": (6000, 9000), "datasets": part(a={"epochs": (0, 1)}, b={"epochs": (0, 1)})}
    keys["datasets"]["c"] = {"epochs": (1, 9), "share": (0, 0.5)}
    with pytest.raises(
        DataError, match=r"helps: raise the most of datasets\.c\.share from 0\.5 to 0\.5971\n"
    ):
        solver.solve(ABC, asked(**keys))  # 4000 / 6700


def config(**solve):
    source = {"kind": "emoji-captions"}
    return {
        "datasets": {name: {"source": source} for name in "ab"},
        "tokenizers": {"t": {"kind": "folder", "path": "t"}},
        "formats": {"f": {"tokenizer": "t", "template": "pretrain"}},
        "mixtures": {"m": {"format": "f", "pack": 64, "solve": solve}},
    }


TWO = {"a": {}, "b": {}}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"tokens": (5, 4)}, r"tokens is \[5, 4\]; write the least first"),
        ({"datasets": {"a": {"share": (0.5, 0.4)}, "b": {}}}, r"datasets.a.share is \[0.5, 0.4\]"),
        (
            {"datasets": {"a": {"share": (0.6, 1)}, "b": {"share": (0.5, 1)}}},
            "sum to 1.1, more than 1; lower",
        ),
        (
            {"datasets": {"a": {"share": (0, 0.4)}, "b": {"share": (0, 0.5)}}},
            "sum to 0.9, less than 1; raise",
        ),
        ({"languages": {"ja": 0.2}}, "no dataset has `language: ja`"),
        ({"datasets": {"a": {"language": "ja"}, "b": {}}}, "`language: ja`, which nothing reads"),
        (
            {"datasets": {"a": {"language": "ja", "share": (0, 0.1)}, "b": {}}, "languages": {"ja": 0.2}},
            "may have 0.1 together; raise",
        ),
        ({"tokens": (9, 9), "whole_shards": True}, "whole shards hardly ever add up"),
        ({"datasets": {"a": {}, "x": {}}}, "names 'x', which is not defined"),
        ({"datasets": {}}, "at least 1 item"),
    ],
)
def test_what_contradicts_itself_is_refused_in_planning(keys, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(config(**{"tokens": (9, 10), "datasets": TWO} | keys))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"weights": {"a": 1.0}}, "or `solve`"),
        ({"pack": None, "decoder_seq_length": 64}, "`solve.whole_shards` needs `pack`"),
    ],
)
def test_a_solved_mixture_has_no_other_weights_and_energon_reads_nothing_whole(keys, sentence):
    values = config(tokens=(9, 10), datasets=TWO, whole_shards=True)
    values["mixtures"]["m"] |= keys
    with pytest.raises(ConfigError, match=sentence):
        load(values)
