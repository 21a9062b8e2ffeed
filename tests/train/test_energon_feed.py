"""Reading by energon: blends, disjoint ranks, and a place in the data that is restored exactly."""

import io
import json
import tarfile
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from makers import Maker
from msgspec.structs import replace
from PIL import Image
from test_loop import AROUND, RUN
from tokenizers import Tokenizer
from transformers import AutoImageProcessor

from plait import files
from plait.convert import engine
from plait.data import energon
from plait.data.chat import Message, Picture, Sample, Text
from plait.errors import CheckpointError
from plait.layout import HF_CONFIG
from plait.models.specs import Spec
from plait.models.weights import FolderTensors
from plait.parallel.grid import Grid
from plait.train.energon import EnergonFeed, PictureCollator, image_processor
from plait.train.loader_state import from_json, loader_file, to_json
from plait.verify.ranks import run_ranks

FORM = {"template": "llava", "instruction": "keep", "language": "en", "picture_tokens": 9}
KEYS = {
    "layout": "conversations", "shard_name": "{:06d}.tar", "samples_per_shard": 4, "split": [9, 1, 0],
    "split_parts": {}, "exclude": "", "sample_type": None, "field_map": {}, "reject_limit": 0.01,
}  # fmt: skip
STEPS = 6


def jpeg(number):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (10, 12, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def sample(source, number):
    """One exchange of source a; of source b two, about two pictures."""
    answer = Message("assistant", (Text(f"{source}{number}"),))
    first = Message("user", (Picture(jpeg(number)), Text("\nwhat?")))
    if source == "a":
        return Sample((first, answer), f"{source}-{number}")
    more = Message("user", (Text("and "), Picture(jpeg(number + 1)), Text("?")))
    return Sample((first, answer, more, answer), f"{source}-{number}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("energon")
    for source in "ab":
        (root / source).mkdir()
        energon.build(root / source, (sample(source, n) for n in range(40)), KEYS)
    blend = energon.blend({str(root / "a"): 0.75, str(root / "b"): 0.25}, relative_to=root)
    (root / "blend.yaml").write_text(yaml.safe_dump(blend))
    return Maker(root), root / "blend.yaml"


def feed(made, rank=0, size=1, *, streams=None, processor=None, fixed=False, **keys):
    maker, blend = made
    run = {
        "micro_batch_size": 2, "global_batch_size": 4, "num_workers": 0, "seed": 3,
        "shuffle_buffer_size": 8, "max_samples_per_sequence": 4, **keys,
    }  # fmt: skip
    collate = PictureCollator(96, fixed, 260, processor)
    made_ = EnergonFeed(blend, maker.image, 259, FORM, collate, run, rank, size, streams or size)
    if run["num_workers"]:
        HELD.append(made_)
    return made_


HELD = []
"""Workers end with their process at once, with their loader after ten seconds."""


def ids(one, iterations, after=0):
    """Token ids of the micro-batches of the iterations after so many."""
    return [
        batch.input_ids.tolist() for step in range(after, after + iterations) for batch in one.batches(step)
    ]


def kept(one, folder):
    """Keep a feed's places as a checkpoint does."""
    for name, place in one.state().items():
        files.write_json(folder / name, place)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_restored_place_gives_the_same_batches(made, workers, tmp_path):
    whole = ids(feed(made, num_workers=workers), 9)
    before = feed(made, num_workers=workers)
    assert ids(before, 4) == whole[:8]
    kept(before, tmp_path)
    after = feed(made, num_workers=workers)
    after.resume(tmp_path)
    assert ids(after, 5, after=4) == whole[8:]


def test_what_is_left_out_is_one_iteration_of_every_rank(made):
    for rank in (0, 1):
        whole = ids(feed(made, rank, 2), 3)
        skipping = feed(made, rank, 2)
        skipping.leave_out(0)
        assert ids(skipping, 2) == whole[1:]


def test_another_seed_is_another_order(made):
    assert ids(feed(made), 4) != ids(feed(made, seed=4), 4)


def answers(one, iterations, maker):
    """The first answer of every sequence."""
    tokenizer = Tokenizer.from_file(str(maker.image / "tokenizer.json"))
    texts = [
        tokenizer.decode(row, skip_special_tokens=False) for batch in ids(one, iterations) for row in batch
    ]
    return [text.split("[/INST]", 1)[1].split("</s>")[0].strip() for text in texts]


def test_a_blend_draws_by_weight(made):
    drawn = Counter(answer[0] for answer in answers(feed(made), 100, made[0]))
    assert drawn.total() == 400
    assert drawn["a"] / 400 == pytest.approx(0.75, abs=0.07)


def test_data_parallel_ranks_read_disjoint_samples(made):
    first, second = (set(answers(feed(made, rank, 2), 9, made[0])) for rank in (0, 1))
    assert first
    assert second
    assert not first & second


def test_an_undecodable_picture_ends_training_by_name(made, tmp_path):
    maker, _ = made
    broken = tmp_path / "broken"
    broken.mkdir()
    energon.build(broken, (sample("a", n) for n in range(40)), KEYS)
    for tar in broken.glob("*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b"\xff\xd8\xff", b"\xff\xd8 "))
    blend = tmp_path / "blend.yaml"
    blend.write_text(yaml.safe_dump(energon.blend({str(broken): 1.0}, relative_to=tmp_path)))
    processor = image_processor_of(maker)
    with pytest.raises(Exception, match=r"cannot be decoded|is none of"):
        ids(feed((maker, blend), processor=processor), 1)


MUTE = {"a-3", "a-20", "a-21", "a-30"}


@pytest.fixture(scope="module")
def mute(made, tmp_path_factory):
    """A dataset some of whose records have no answer, and what is said of them beside its blend."""
    maker, _ = made
    root = tmp_path_factory.mktemp("mute")
    (root / "d").mkdir()
    records = [sample("a", n) for n in range(40)]
    cut = [replace(one, messages=one.messages[:1]) if one.id in MUTE else one for one in records]
    energon.build(root / "d", cut, {**KEYS, "split": [1, 0, 0]})
    blend = energon.blend({str(root / "d"): 1.0}, relative_to=root)
    (root / "blend.yaml").write_text(yaml.safe_dump(blend))
    return maker, root / "blend.yaml"


def test_what_the_analysis_rejected_is_passed_over_and_nothing_else(mute, tmp_path):
    """40 samples, of which 36 are left: nine iterations of four; the next ones are the second epoch."""
    _, blend = mute
    with pytest.raises(Exception, match="there is no answer to learn from"):
        ids(feed(mute), 9)
    lines = [json.dumps({"id": id_}) + "\n" for id_ in sorted(MUTE)]
    blend.with_name("rejects.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(Exception, match="there is no answer to learn from"):
        ids(feed(mute), 9)
    blend.with_name("rejects.jsonl").write_text("".join(lines))
    for workers in (0, 1):
        whole = ids(feed(mute, num_workers=workers), 18)
        read = Counter(tuple(row) for batch in whole for row in batch)
        assert sum(read.values()) == 72
        before = feed(mute, num_workers=workers)
        assert ids(before, 5) == whole[:10]
        kept(before, tmp_path)
        after = feed(mute, num_workers=workers)
        after.resume(tmp_path)
        assert ids(after, 13, after=5) == whole[10:]


def image_processor_of(maker):
    return AutoImageProcessor.from_pretrained(maker.tower())


def test_a_state_that_no_state_can_be_is_refused():
    with pytest.raises(CheckpointError, match="holds a PosixPath"):
        to_json([files.Path()])
    with pytest.raises(CheckpointError, match=r"'os\.system', which plait does not know"):
        from_json({"__kind__": "os.system", "of": "true"})


def test_a_place_that_is_missing_is_named(made, tmp_path):
    kept(feed(made, 0, 2), tmp_path)
    with pytest.raises(CheckpointError, match=r"dprank001.json is missing: .* stream 1 of 2"):
        feed(made, 1, 2).resume(tmp_path)


# Copies


def global_order(made, copies, streams, steps, workers=0, folder=None, after=0):
    """The samples of each step in the order of the global batch, as so many copies see them.

    They go on from the places in a folder, and leave theirs there.
    """
    keys = {"num_workers": workers, "global_batch_size": 16}
    ranks = [feed(made, rank, copies, streams=streams, **keys) for rank in range(copies)]
    if after:
        for one in ranks:
            one.resume(folder)
    found = []
    for step in range(after, after + steps):
        turns = zip(*(one.batches(step) for one in ranks), strict=True)
        found.append([batch.samples for turn in turns for batch in turn])
    if folder:
        for one in ranks:
            kept(one, folder)
    return found


def seen(made, copies, streams, steps, workers=0, **place):
    """The same in a process of its own where there are workers: with it, these end at once."""
    if not workers:
        return global_order(made, copies, streams, steps, **place)
    return run_ranks(partial(global_order, **place), Grid(), made, copies, streams, steps, workers)[0]


STREAMS = pytest.mark.parametrize(
    ("streams", "workers"),
    [
        (1, 0),
        (3, 0),
        *(pytest.param(*one, marks=pytest.mark.long) for one in ((2, 0), (8, 0), (2, 1), (1, 2))),
    ],
    ids=str,
)


@STREAMS
def test_the_order_is_the_same_for_any_number_of_copies(made, streams, workers):
    alone = seen(made, 1, streams, 3, workers)
    assert all(len(step) == 8 for step in alone)
    for copies in (2, 4, 8) if not workers else (2,):
        assert seen(made, copies, streams, 3, workers) == alone


@STREAMS
def test_it_goes_on_so_on_other_numbers_of_copies(made, streams, workers, tmp_path):
    whole, parts = seen(made, 1, streams, 6, workers), []
    for copies in (1, 2, 8, 4, 1, 2) if not workers else (2, 1, 2):
        steps = 1 if not workers else 2
        parts += seen(made, copies, streams, steps, workers, folder=tmp_path, after=len(parts))
    assert parts == whole
    assert len(list(tmp_path.iterdir())) == streams


@pytest.mark.long
def test_workers_that_give_nothing_between_two_saves_give_nothing_twice(made, tmp_path):
    """Two workers take turns; each save follows the micro-batch of one of them."""

    def parts(*steps):
        found = []
        for number in steps:
            one = feed(made, num_workers=2, global_batch_size=2)
            if found:
                one.resume(tmp_path)
            after = len(found)
            found += [b.samples for s in range(after, after + number) for b in one.batches(s)]
            kept(one, tmp_path)
        return found

    whole, cut = (run_ranks(parts, Grid(), *steps)[0] for steps in ((8,), (3, 1, 1, 1, 2)))
    assert whole == cut


def test_another_number_of_streams_is_another_order(made):
    orders = [global_order(made, 1, streams, 2) for streams in (1, 2, 4)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def segment(made, folder, grid, run, start, stop):
    """Train from a checkpoint, or from the folder's weights, to the next checkpoint."""
    from megatron.core import parallel_state

    from plait.train.build import build_model, freeze, load_weights, optimizer_of, schedule_of, wrap
    from plait.train.loop import Trainer
    from plait.train.saves import Saves
    from plait.train.state import TrainState
    from plait.train.writer import Origin

    spec = Spec.of(folder / "megatron", HF_CONFIG)
    inner = build_model(spec, grid, dtype=torch.float32)
    place = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    if not start:
        weights = engine.to_mcore(FolderTensors(folder / "hf"), spec)
        load_weights(inner, dict(engine.cut(weights, spec, grid, *place)))
    freeze([inner], ("vision_model",))
    model = wrap([inner])
    optimizer = optimizer_of(model, RUN)
    state = TrainState([inner], optimizer, schedule_of(optimizer, RUN, train_iters=STEPS, sequence=24))
    processor = image_processor(folder / "megatron") if parallel_state.is_pipeline_first_stage() else None
    data = feed(made, processor=processor, fixed=grid.pp > 1)
    if start:
        state.load(run / f"iter_{start:07d}")
        data.resume(run / f"iter_{start:07d}")
    Trainer(model, state, data, RUN, AROUND).train(stop, folder=run)
    origin = Origin(folder / "megatron", spec, grid, RUN, {}, "")
    Saves().save(state, run / f"iter_{stop:07d}", origin, data.state())


@pytest.mark.parametrize(
    "grid", [pytest.param(Grid(2, 1), marks=pytest.mark.long), Grid(1, 2, first=1)], ids=str
)
def test_segments_end_where_one_piece_ends(made, grid, tmp_path):
    maker, _ = made
    source = maker.llava("segments")
    (tmp_path / "hf").symlink_to(source)
    (tmp_path / "megatron").symlink_to(maker.megatron(source))
    for run, stops in (("whole", [STEPS]), ("parts", [2, 3, STEPS])):
        (tmp_path / run).mkdir()
        for start, stop in zip([0, *stops], stops, strict=False):
            run_ranks(segment, grid, made, tmp_path, grid, tmp_path / run, start, stop)
    last = f"iter_{STEPS:07d}"
    whole, parts = (files.check_manifest(tmp_path / run / last) for run in ("whole", "parts"))
    assert whole["files"] == parts["files"]  # weights, moments, schedule, and energon's place
    assert loader_file(0) in whole["files"]
    assert whole["facts"]["grid"] == grid.facts
    losses = [
        [json.loads(row)["lm loss"] for row in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_a_batch_names_the_tar_and_the_key_of_each_sample(made, monkeypatch):
    """The answers of the samples that it names, as the tars have them, are those that it teaches."""
    maker, blend = made
    monkeypatch.chdir(blend.parent)
    tokenizer = Tokenizer.from_file(str(maker.image / "tokenizer.json"))
    for rank in (0, 1):
        for batch in feed(made, rank, 2, num_workers=rank).batches(0):
            for row, place in zip(batch.input_ids.tolist(), batch.samples, strict=True):
                tar, _, key = place.rpartition("/")
                with tarfile.open(tar) as parts:
                    turns = json.load(parts.extractfile(f"{key}.json"))
                said = tokenizer.decode(row, skip_special_tokens=False).split("[/INST]", 1)[1]
                assert said.split("</s>")[0].strip() == turns[1]["value"]
