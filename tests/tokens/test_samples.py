"""The analysis of energon mixtures: what is counted is what training reads."""

import io
import json
import re
import shutil

import pandas as pd
import pytest
import yaml
from folders import tokenizer_folder
from msgspec.structs import replace
from PIL import Image

from plait import files
from plait.cli.main import main
from plait.data import energon, rejects, webdataset
from plait.data.chat import Message, Picture, Sample, Text
from plait.errors import DataError
from plait.tokens import samples
from plait.tokens.llava import LlavaRenderer
from plait.train import intact

TOKENIZER = "data/tokenizers/t"
FORM = {
    "template": "jp_alpaca", "instruction": "drawn", "language": "ja", "picture_tokens": 9,
    "reject_limit": 0.01, "no_loss": "count",
}  # fmt: skip
MIXTURE = {
    "format": "f", "pack": None, "decoder_seq_length": 360, "datasets": ["a", "b"], "weights": {},
    "validation": [], "leak_limit": 1.0,
}  # fmt: skip
KEYS = {
    "layout": "conversations", "shard_name": "{:06d}.tar", "samples_per_shard": 5, "split": [9, 1, 0],
    "split_parts": {}, "exclude": "", "sample_type": None, "field_map": {}, "reject_limit": 0.01,
}  # fmt: skip
SIZES = {"a": 20, "b": 50}


def jpeg(number):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "JPEG")
    return Picture(file.getvalue())


def talk(number):
    """About one picture or two, short or long; the longest question leaves no room for its answer."""
    seen = (jpeg(number), jpeg(number + 1))[: 1 + number % 2]
    words = "長い" * 120 if number == 3 else "何" * (number % 9 + 1)
    asked = Message("user", (*seen, Text(f"\n{words}")))
    answer = Message("assistant", (Text("赤" * (number % 30 + 1)),))
    more = (Message("user", (Text("?"),)), answer) if number % 3 else ()
    return Sample((asked, answer, *more), f"s-{number}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A working folder with two prepared datasets, of 20 and 50 samples."""
    root = tmp_path_factory.mktemp("root")
    tokenizer_folder(root / TOKENIZER, image=True)
    for name, size in SIZES.items():
        folder = root / f"data/energon/{name}"
        folder.mkdir(parents=True)
        facts = energon.build(folder, map(talk, range(size)), KEYS)
        files.write_manifest(folder, kind="energon", settings={}, facts=facts)
    return root


def analyse(root, monkeypatch, target="m", sources=("a", "b"), form=FORM, workers=1, **mixture):
    monkeypatch.chdir(root)
    settings = json.dumps({"mixture": {**MIXTURE, **mixture}, "format": form, "image_token_id": None})
    paths = [f"data/energon/{name}" for name in sources]
    words = [f"data/analysis/{target}", "--workers", str(workers), "--settings", settings]
    code = main(["analyse", TOKENIZER, *paths, *words])
    return code, root / "data/analysis" / target


@pytest.fixture(scope="module")
def made(root):
    with pytest.MonkeyPatch.context() as patch:
        code, folder = analyse(root, patch)
    assert code == 0
    return folder


def recount(root, name, rejected=frozenset(), part="train"):
    """Every training sample as energon's own loader and training's collator give it."""
    from megatron.energon import WorkerConfig, get_loader, get_val_dataset

    from plait.train.energon import Encoder, PictureCollator

    encoder = Encoder(
        LlavaRenderer(root / TOKENIZER, FORM), PictureCollator(360, fixed=False, pad_id=260), rejected
    )
    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_val_dataset(
        root / f"data/energon/{name}", split_part=part, worker_config=workers, batch_size=1,
        task_encoder=encoder,
    )  # fmt: skip
    return list(get_loader(dataset))


def test_figures_are_those_of_a_recount_of_what_training_reads(made, root):
    found = files.read_json(made / "tokens.json")
    for name in SIZES:
        batches, figures = recount(root, name), found["datasets"][name]
        assert figures["samples"] == len(batches) > 0
        lengths = [batch.input_ids.shape[1] for batch in batches]
        assert figures["tokens"] == sum(lengths)
        assert figures["image_tokens"] == sum(int((batch.picture_rows >= 0).sum()) for batch in batches)
        assert figures["loss_tokens"] == sum(int(batch.loss_mask.sum()) for batch in batches)
        assert figures["clipped"] == sum(batch.clipped for batch in batches) > 0
        assert figures["unanswered"] == sum(not batch.loss_mask.any() for batch in batches) == 1
        expected = pd.Series(lengths).describe().to_dict()
        assert figures["statistics"]["n_tokens"] == pytest.approx(expected, abs=1e-5)
        assert figures["statistics"]["document_tokens"]["max"] > 360
    assert found["total"]["samples"] == sum(one["samples"] for one in found["datasets"].values())


def test_the_mixture_weighs_by_samples_and_says_what_it_was_counted_with(made, root):
    mixed = yaml.safe_load((made / "mixture.yaml").read_text())
    counts = {
        name: files.read_manifest(root / f"data/energon/{name}")["facts"]["splits"]["train"] for name in SIZES
    }
    assert mixed["total_instances"] == sum(counts.values())
    assert {source["dataset"]: source["weight"] for source in mixed["sources"]} == pytest.approx(
        {name: count / sum(counts.values()) for name, count in counts.items()}
    )
    assert [source["epochs"] for source in mixed["sources"]] == [1, 1]
    assert (mixed["tokenizer"], mixed["decoder_seq_length"]) == (TOKENIZER, 360)
    assert mixed["format"] == FORM
    assert not (made / "mixture.txt").exists()  # Megatron's --data-path knows nothing of energon


def test_energon_opens_the_blend(made):
    from megatron.energon import WorkerConfig, get_loader, get_train_dataset

    from plait.data.reader import Conversations

    dataset = get_train_dataset(
        made / "metadataset.yaml",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Conversations(),
    )
    drawn = [sample.id for sample, _ in zip(get_loader(dataset), range(200), strict=False)]
    beyond = sum(int(key[2:]) >= SIZES["a"] for key in drawn)
    assert 60 < beyond < 160  # those that b alone has


def test_seed_24_no_weight_of_a_blend_is_rounded_away(root, monkeypatch):
    tiny = 3e-7
    code, folder = analyse(root, monkeypatch, "tiny", weights={"a": tiny, "b": 1 - tiny}, datasets=[])
    assert code == 0
    blend = yaml.safe_load((folder / "metadataset.yaml").read_text())["splits"]["train"]["blend"]
    assert [source["weight"] for source in blend] == [tiny, 1 - tiny]
    shown = re.search(
        r"<pre>(\S+) data/energon/a (\S+) data/energon/b</pre>", (folder / "tokens.html").read_text()
    )
    assert 0 < float(shown[1]) < 1e-6
    assert float(shown[1]) + float(shown[2]) == pytest.approx(1)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_equal_rebuild_is_equal_byte_for_byte(made, root, monkeypatch, workers):
    """By however many processes: their work comes back in order."""
    monkeypatch.setattr(samples, "SAMPLES", 3)
    _, again = analyse(root, monkeypatch, f"again-{workers}", workers=workers)
    for name in ("tokens.json", "page.json", "mixture.yaml", "metadataset.yaml", "duplicates.json"):
        assert (again / name).read_bytes() == (made / name).read_bytes()


def test_validation_has_a_blend_of_its_own(root, monkeypatch):
    code, folder = analyse(root, monkeypatch, "checked", datasets=["b"], validation=["a"])
    assert code == 0
    splits = yaml.safe_load((folder / "metadataset.yaml").read_text())["splits"]
    assert [source["path"] for source in splits["val"]["blend"]] == ["../../energon/a"]
    assert list(files.read_json(folder / "tokens.json")["datasets"]) == ["b"]


def test_a_dataset_may_be_named_as_a_part_is(root, monkeypatch):
    copied(root, "validation")
    code, folder = analyse(root, monkeypatch, "named", ["validation"], datasets=["validation"])
    assert code == 0
    assert list(files.read_json(folder / "tokens.json")["datasets"]) == ["validation"]


def test_no_worker_is_none(root, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        analyse(root, monkeypatch, "none", workers=0)
    assert "'0' is no number from 1" in capsys.readouterr().err


def test_the_page_speaks_of_samples_and_needs_no_network(made):
    page = (made / "tokens.html").read_text()
    assert "A sequence is one document, clipped to 360 tokens." in page
    assert "pack" not in re.sub(r"<svg.*?</svg>|<style.*?</style>|<img.*?>", "", page, flags=re.DOTALL)
    assert re.search(r"<b>\d+</b>clipped", page)
    assert "<b>2</b>unanswered" in page
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)([^"'#][^"']*)""", page)


@pytest.mark.parametrize(
    ("sources", "mixture", "form", "sentence"),
    [
        (("a",), {}, FORM, "the datasets are a; the mixture names a, b"),
        (
            ("b",),
            {"datasets": ["b"], "validation": ["a"]},
            FORM,
            "the datasets are b; the mixture names a, b",
        ),
        (("a", "b"), {}, FORM | {"template": "mistral"}, "the template mistral has no <image>"),
    ],
)
def test_mistakes_have_a_sentence(root, monkeypatch, capsys, sources, mixture, form, sentence):
    code, folder = analyse(root, monkeypatch, "wrong", sources, form, **mixture)
    assert code == 2
    assert sentence in capsys.readouterr().err
    assert not folder.exists()


def copied(root, name):
    """Dataset a under another name, and the facts of its manifest."""
    folder = root / "data/energon" / name
    shutil.copytree(root / "data/energon/a", folder)
    return folder, files.read_manifest(folder)["facts"]


def test_a_sample_that_cannot_be_written_is_named(root, monkeypatch, capsys):
    folder, _ = copied(root, "mute")
    asked = (Sample((Message("user", (jpeg(n), Text("\n?"))),), f"mute-{n}") for n in range(SIZES["a"]))
    webdataset.write(asked, folder, KEYS)

    assert analyse(root, monkeypatch, "mute", ["mute"], datasets=["mute"])[0] == 2
    assert re.search(r"sample 'mute-\d+': there is no answer", capsys.readouterr().err)


def test_a_few_samples_that_cannot_be_written_are_rejected_by_name_and_training_reads_the_rest(
    root, monkeypatch
):
    folder, _ = copied(root, "some")
    shutil.rmtree(folder)
    folder.mkdir()
    cut = {number: replace(talk(number), messages=talk(number).messages[:1]) for number in (2, 9)}
    facts = energon.build(folder, (cut.get(n, talk(n)) for n in range(20)), {**KEYS, "split": [1, 0, 0]})
    files.write_manifest(folder, kind="energon", settings={}, facts=facts)

    assert (
        analyse(root, monkeypatch, "few", ["some"], FORM | {"reject_limit": 0.09}, datasets=["some"])[0] == 2
    )
    code, made = analyse(root, monkeypatch, "few", ["some"], FORM | {"reject_limit": 0.1}, datasets=["some"])

    assert code == 0
    assert files.read_manifest(made)["facts"]["reasons"] == {"no_answer": 2}
    figures = files.read_json(made / "tokens.json")
    assert (figures["total"]["samples"], figures["total"]["rejected"]) == (18, 2)
    assert yaml.safe_load((made / "mixture.yaml").read_text())["total_instances"] == 18
    lines = [json.loads(line) for line in (made / rejects.NAME).read_text().splitlines()]
    assert [line["id"] for line in lines] == ["s-2", "s-9"]
    assert all((root / line["file"]).suffix == ".tar" and line["reason"] == "no_answer" for line in lines)
    assert "<b>2</b>rejected" in (made / "tokens.html").read_text()
    read = recount(root, "some", rejects.ids(made / rejects.NAME), "train")
    assert sum(batch.input_ids.shape[1] for batch in read) == figures["total"]["tokens"]
    assert len(read) == 18


def test_a_sample_whose_answer_is_clipped_off_is_rejected_and_training_skips_it(root, monkeypatch):
    form = FORM | {"no_loss": "reject", "reject_limit": 0.1}
    code, made = analyse(root, monkeypatch, "silent", ["a"], form, datasets=["a"])

    assert code == 0
    assert files.read_manifest(made)["facts"]["reasons"] == {"no_loss": 1}
    assert files.read_json(made / "tokens.json")["total"]["unanswered"] == 0
    assert rejects.ids(made / rejects.NAME) == {"s-3"}
    read = recount(root, "a", rejects.ids(made / rejects.NAME), "train")
    mixed = yaml.safe_load((made / "mixture.yaml").read_text())
    intact.check_mixed(made, mixed)
    intact.check_bytes(made, "all", seed="a")
    (made / rejects.NAME).write_bytes(b"")
    with pytest.raises(DataError, match="mixture -> training, data/energon/a does not balance"):
        intact.check_mixed(made, mixed)
    assert all(batch.loss_mask.any() for batch in read)
    assert len(read) == len(recount(root, "a", frozenset(), "train")) - 1 > 0


def test_what_trains_and_validates_is_listed_and_more_than_the_limit_fails(root, monkeypatch, capsys):
    """Datasets a and b have the samples 0 to 19 both."""
    mixed = {"datasets": ["b"], "validation": ["a"]}
    assert analyse(root, monkeypatch, "leaking", ["a", "b"], leak_limit=0.1, **mixed)[0] == 2
    assert re.search(
        r"\d+ of \d+ samples that validate train too, .* s-\d+ is equal to s-", capsys.readouterr().err
    )
    code, made = analyse(root, monkeypatch, "leaking", ["a", "b"], leak_limit=1.0, **mixed)

    assert code == 0
    held = {sample.id for sample in energon.read(root / "data/energon/a", "val")}
    trained = {sample.id for sample in energon.read(root / "data/energon/b")}
    lines = [json.loads(line) for line in (made / "leaks.jsonl").read_text().splitlines()]
    equal = {line["id"] for line in lines if line["like"] == "equal"}
    assert equal == held & trained != set()
    assert all(line["id"] == line["train"] for line in lines if line["like"] == "equal")
    leaks = files.read_manifest(made)["facts"]["duplicates"]["leaks"]
    assert (leaks["validation"], leaks["equal"]) == (len(held), len(equal))
    page = (made / "tokens.html").read_text()
    assert f"Of {len(held)} samples that validate, {len(equal)} are equal to one that trains" in page
    for line in lines[:10]:
        assert f"<td>{line['id']}</td><td>{line['like']}</td><td>{line['train']}</td>" in page


def test_counts_that_contradict_the_manifest_are_found(root, monkeypatch, capsys):
    folder, facts = copied(root, "other")
    facts["splits"]["train"] += 1
    files.write_manifest(folder, kind="energon", settings={}, facts=facts)

    assert analyse(root, monkeypatch, "other", ["other"], datasets=["other"])[0] == 2
    assert re.search(
        r"energon -> mixture, training samples of \S+ does not balance: \d+ came in", capsys.readouterr().err
    )
