import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from plait import files, layout
from plait.cli.main import main
from plait.errors import DataError
from plait.tokens.indexed import PackedShard
from plait.tokens.lineage import Lineage
from plait.train import intact

TWICE = {"datasets": {"talk": {"epochs": [1, 2]}}}
ONE = {"tokens": [1, 10**7], "datasets": {"talk": {"epochs": [1, 2]}, "again": {"share": [0, 0]}}}
CONFIG = {
    "datasets": {
        "talk": {
            "source": {"kind": "chat-jsonl", "path": "records.jsonl"},
            "shards": 2,
            "energon": {"samples_per_shard": 5},
        },
        "again": {"pack_together": ["talk"], "shards": 2},
        **{
            part: {
                "pack_together": ["talk"],
                "shards": 2,
                "energon": {"samples_per_shard": 5, "split": [1, 0, 0]},
                "by_hash": {"part": part, "validation": 0.4},
            }
            for part in ("train", "validation")
        },
    },
    "tokenizers": {
        "base": {"kind": "package", "package": "mistral_common", "file": "data/tokenizer.model.v1"},
        "chat": {"kind": "extend", "base": "base", "add": ["chatml"]},
    },
    "formats": {"chatml": {"tokenizer": "chat", "template": "chatml"}},
    "mixtures": {
        "all": {"format": "chatml", "pack": 64, "datasets": ["talk"]},
        "twice": {"format": "chatml", "pack": 64, "solve": TWICE | {"tokens": [1, 10**7]}},
        "one": {"format": "chatml", "pack": 64, "solve": ONE},
        "never": {"format": "chatml", "pack": 64, "solve": TWICE | {"tokens": [10**7, 10**7]}},
        "read": {"format": "chatml", "decoder_seq_length": 64, "datasets": ["talk"]},
        "parts": {
            "format": "chatml",
            "decoder_seq_length": 64,
            "datasets": ["train"],
            "validation": ["validation"],
        },
    },
}
SHARDS = [f"data/megatron_format/chatml_talk_pack64/shard_0000{number}" for number in (0, 1)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Tokenizers, two indexed shards and their analysis, each made by its command."""
    root = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
        run("tokenizer", "data/tokenizers/base")
        run("tokenizer", "data/tokenizers/base", "data/tokenizers/chat")
        records()
        run("raw", "data/raw/talk")
        for number, shard in enumerate(SHARDS):
            run("chat", "data/raw/talk", chat(number))
            run("index", "data/tokenizers/chat", chat(number), shard)
        run("analyse", *SHARDS, "data/analysis/all")
        yield root


def chat(number):
    return f"data/processed/talk/shard_0000{number}.jsonl.gz"


def records():
    with Path("records.jsonl").open("w") as file:
        for turn in range(40):
            messages = [
                {"role": "user", "content": f"question {turn}"},
                {"role": "assistant", "content": "答え " * (turn // 2 + 1)},
            ]
            file.write(json.dumps({"id": f"s-{turn}", "messages": messages}) + "\n")


def run(*words):
    assert main([*words, "--config", "config.yaml"]) == 0


def test_each_artifact_says_what_it_is_and_what_it_was_made_from(workplace):
    chain = [
        ("data/tokenizers/base", "tokenizer", []),
        ("data/tokenizers/chat", "tokenizer", ["data/tokenizers/base"]),
        (SHARDS[1], "indexed", ["data/tokenizers/chat", chat(1)]),
        ("data/analysis/all", "analysis", SHARDS),
    ]
    for path, kind, inputs in chain:
        manifest = files.check_manifest(path)
        assert manifest["kind"] == kind
        assert manifest["inputs"] == {name: files.digest_of_input(name) for name in inputs}
        assert manifest["settings"]["version"] >= 1


def test_a_bit_of_a_shard_of_chat_records_that_differs_is_found_by_its_ledger(workplace, tmp_path, capsys):
    folder = tmp_path / "data/processed/talk"
    shutil.copytree("data/processed/talk", folder)
    shard = folder / "shard_00001.jsonl.gz"
    assert main(["verify", str(shard)]) == 0
    assert "bytes as they were made; sha256 " in capsys.readouterr().out
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)

    assert main(["verify", str(shard)]) == 2
    said = capsys.readouterr().err
    assert f"{shard} does not have the sha256 that shard_00001.ledger.json records" in said


def test_the_analysis_counts_what_the_shards_hold(workplace):
    facts = files.read_manifest("data/analysis/all")["facts"]

    assert facts["total_instances"] == sum(len(PackedShard(shard)) for shard in SHARDS)
    assert facts["documents"] == 40


def test_a_solved_mixture_reads_what_its_limits_allow_and_names_those_that_bind(workplace, caplog):
    caplog.set_level("INFO")
    run("analyse", *SHARDS, "data/analysis/twice")
    natural, solved = (files.read_manifest(f"data/analysis/{name}")["facts"] for name in ("all", "twice"))
    mixed = yaml.safe_load(Path("data/analysis/twice/mixture.yaml").read_text())

    assert solved["total_instances"] == mixed["total_instances"] == 2 * natural["total_instances"]
    assert solved["binding"] == ["datasets.talk.epochs at most 2"]
    assert [source["epochs"] for source in mixed["sources"]] == [2, 2]
    assert mixed["solved"]["tokens"] == 2 * natural["tokens"]
    assert mixed["solved"] == files.read_json("data/analysis/twice/tokens.json")["solved"]
    assert "binding: datasets.talk.epochs at most 2" in caplog.text
    page = Path("data/analysis/twice/tokens.html").read_text()
    assert "<td>datasets.talk.epochs</td><td>at most 2</td><td>2</td><td>binds</td>" in page
    assert "<td>tokens</td><td>at most 10,000,000</td>" in page
    assert "<h3>Limits</h3>" not in Path("data/analysis/all/tokens.html").read_text()


def test_a_dataset_that_the_limits_leave_out_is_named_and_shown_as_not_read(workplace, caplog):
    caplog.set_level("INFO")
    again = [shard.replace("_talk_", "_again_") for shard in SHARDS]
    for number, shard in enumerate(again):
        run("index", "data/tokenizers/chat", chat(number), shard)
    run("analyse", *SHARDS, *again, "data/analysis/one")
    mixed = yaml.safe_load(Path("data/analysis/one/mixture.yaml").read_text())

    assert [source["prefix"] for source in mixed["sources"]] == SHARDS
    assert mixed["solved"]["left_out"] == again
    assert f"Left out, for no limit wants them: {', '.join(again)}" in caplog.text
    page = Path("data/analysis/one/tokens.html").read_text()
    assert "<td>again</td><td>0</td><td>0</td><td>0.000000</td><td>0</td>" in page


def test_limits_that_cannot_be_kept_to_end_in_a_sentence_and_no_analysis(workplace, capsys):
    assert main(["analyse", *SHARDS, "data/analysis/never", "--config", "config.yaml"]) == 2
    said = capsys.readouterr().err
    assert "mixtures.never.solve asks for what its data cannot give: tokens at least 10000000 and" in said
    assert "datasets.talk.epochs at most 2 exclude one another; the smallest change that helps: lower" in said
    assert not Path("data/analysis/never").exists()


def test_a_format_names_its_tokenizer(workplace, capsys):
    assert main(["index", "data/tokenizers/base", chat(0), SHARDS[0], "--config", "config.yaml"]) == 2
    assert "format chatml uses the tokenizer 'chat', not 'base'" in capsys.readouterr().err
    assert files.check_manifest(SHARDS[0])


def another(path, **counts):
    """Other counts in a file of JSON; what it was comes back."""
    was = files.read_json(path)
    now = {**was, **counts} if "facts" not in was else {**was, "facts": {**was["facts"], **counts}}
    files.write_json(path, now)
    return was


ANALYSE = ("analyse", *SHARDS, "data/analysis/all")
LEDGER = "data/processed/talk/shard_00000.ledger.json"
EDGES = {
    "chat to index": (LEDGER, {"kept": 21}, ("index", "data/tokenizers/chat", chat(0), SHARDS[0]),
                      "chat -> index, .*shard_00000 does not balance: 21 came in, 20 packed"),
    "chat to energon": (LEDGER, {"kept": 19}, ("energon", chat(0), chat(1), "data/energon/talk"),
                        r"chat -> energon, .*shard_00000.jsonl.gz does not balance: 19 came in, 20 read"),
    "raw to chat to energon": (LEDGER, {"blank": 1}, ("energon", chat(0), chat(1), "data/energon/talk"),
                               "raw -> chat of talk does not balance: 40 came in, 40 read . 1 blank"),
    "packs to mixture": (f"{SHARDS[1]}/plait.json", {"packs": 9999}, ANALYSE,
                         "index -> mixture, packs of .*shard_00001 does not balance: 9999 came in"),
    "tokens to mixture": (f"{SHARDS[1]}/plait.json", {"tokens": 1}, ANALYSE,
                          "index -> mixture, tokens of .*shard_00001 does not balance: 1 came in"),
}  # fmt: skip


@pytest.mark.parametrize("edge", EDGES)
def test_an_edge_that_does_not_balance_is_refused(workplace, capsys, edge):
    path, counts, words, sentence = EDGES[edge]
    was = another(path, **counts)
    try:
        assert main([*words, "--config", "config.yaml"]) == 2
    finally:
        files.write_json(path, was)

    assert re.search(sentence, capsys.readouterr().err)
    assert main([*words, "--config", "config.yaml"]) == 0


def test_training_wants_the_sequences_that_were_counted(workplace):
    folder = Path("data/analysis/all")
    mixed = yaml.safe_load((folder / "mixture.yaml").read_text())
    intact.check_mixed(folder, mixed)
    was = another(f"{SHARDS[0]}/plait.json", packs=3)
    with pytest.raises(
        DataError, match=r"mixture -> training: .* counted .*shard_00000 of digest \w+, it is"
    ):
        intact.check_mixed(folder, mixed)
    inputs = files.read_json("data/analysis/all/plait.json")
    renewed = {**inputs["inputs"], SHARDS[0]: files.digest_of_input(SHARDS[0])}
    files.write_json("data/analysis/all/plait.json", {**inputs, "inputs": renewed})
    with pytest.raises(DataError, match=r"mixture -> training, .*shard_00000 does not balance: 3 came in"):
        intact.check_mixed(folder, mixed)
    files.write_json(f"{SHARDS[0]}/plait.json", was)
    files.write_json("data/analysis/all/plait.json", inputs)
    mixed["total_instances"] += 1
    with pytest.raises(DataError, match="mixture -> training, total_instances of data/analysis/all does not"):
        intact.check_mixed(folder, mixed)


def lines_of(shard):
    """The raw lines of the documents that an indexed shard has."""
    lineage = Lineage(shard)
    return {origin.raw_line for pack in range(len(lineage)) for origin in lineage[pack]}


def test_the_parts_of_a_dataset_are_the_same_for_both_readers(workplace):
    found = {}
    for part in ("train", "validation"):
        shards = [f"data/megatron_format/chatml_{part}_pack64/shard_0000{number}" for number in (0, 1)]
        for number, shard in enumerate(shards):
            run("index", "data/tokenizers/chat", chat(number), shard)
        run("energon", chat(0), chat(1), f"data/energon/{part}")
        found[part] = set.union(*map(lines_of, shards))
        listed = Path(f"data/energon/{part}/samples.jsonl").read_text().splitlines()
        assert {json.loads(line)["raw_line"] for line in listed} == found[part]
        facts = files.read_manifest(f"data/energon/{part}")["facts"]
        assert facts["other_part"] == 40 - len(found[part]) == 40 - facts["read"]

    assert found["train"] | found["validation"] == set(range(1, 41))
    assert not found["train"] & found["validation"]
    assert 6 < len(found["validation"]) < 26


@pytest.mark.parametrize("reader", ["index", "energon"])
def test_a_part_that_gets_no_sample_says_what_helps(workplace, capsys, reader):
    Path("other.yaml").write_text(
        Path("config.yaml").read_text().replace("validation: 0.4", "validation: 1.0e-9")
    )
    words = {
        "index": (
            "data/tokenizers/chat",
            chat(0),
            "data/megatron_format/chatml_validation_pack64/shard_00000",
        ),
        "energon": (chat(0), chat(1), "data/energon/validation"),
    }[reader]
    assert main([reader, *words, "--config", "other.yaml"]) == 2
    said = capsys.readouterr().err
    assert f"{20 if reader == 'index' else 40} are of the dataset's other part" in said
    assert (
        "fewer `shards`, or another `by_hash.validation`, give each shard of this part some records" in said
    )


@pytest.mark.parametrize("stage", ["tokenizer", "index", "analyse", "schedule"])
def test_help_ends_with_an_example_whose_paths_are_artifacts(stage, capsys):
    with pytest.raises(SystemExit):
        main([stage, "--help"])

    example = capsys.readouterr().out.split("example:\n")[1].replace("\\\n", " ").split()
    assert example[:2] == ["plait", stage]
    for path in example[2:]:
        whole = path.replace("{0,1,2}", "0").removesuffix("/schedule.json")
        assert isinstance(layout.parse(whole), layout.Artifact)
