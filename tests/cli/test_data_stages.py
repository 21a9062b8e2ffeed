import gzip
import json
from pathlib import Path

import pytest
import yaml

from plait import files, layout
from plait.cli.main import main
from plait.tokens.indexed import PackedShard

TWICE = {"datasets": {"talk": {"epochs": [1, 2]}}}
CONFIG = {
    "datasets": {"talk": {"source": {"kind": "chat-jsonl", "path": "."}, "shards": 2}},
    "tokenizers": {
        "base": {"kind": "package", "package": "mistral_common", "file": "data/tokenizer.model.v1"},
        "chat": {"kind": "extend", "base": "base", "add": ["chatml"]},
    },
    "formats": {"chatml": {"tokenizer": "chat", "template": "chatml"}},
    "mixtures": {
        "all": {"format": "chatml", "pack": 64, "datasets": ["talk"]},
        "twice": {"format": "chatml", "pack": 64, "solve": TWICE | {"tokens": [1, 10**7]}},
        "never": {"format": "chatml", "pack": 64, "solve": TWICE | {"tokens": [10**7, 10**7]}},
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
        for number, shard in enumerate(SHARDS):
            records(number)
            run("index", "data/tokenizers/chat", chat(number), shard)
        run("analyse", *SHARDS, "data/analysis/all")
        yield root


def chat(number):
    return f"data/processed/talk/shard_0000{number}.jsonl.gz"


def records(number):
    Path("data/processed/talk").mkdir(parents=True, exist_ok=True)
    with gzip.open(chat(number), "wt") as file:
        for turn in range(20):
            messages = [
                {"role": "user", "content": f"question {number} {turn}"},
                {"role": "assistant", "content": "答え " * (turn + 1)},
            ]
            file.write(json.dumps({"id": f"{number}-{turn}", "messages": messages}) + "\n")


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
    assert "<td>datasets.talk.epochs</td><td>most 2</td><td>2</td><td>binds</td>" in page
    assert "<td>tokens</td><td>most 10,000,000</td>" in page
    assert "<h3>Limits</h3>" not in Path("data/analysis/all/tokens.html").read_text()


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


@pytest.mark.parametrize("stage", ["tokenizer", "index", "analyse", "schedule"])
def test_help_ends_with_an_example_whose_paths_are_artifacts(stage, capsys):
    with pytest.raises(SystemExit):
        main([stage, "--help"])

    example = capsys.readouterr().out.split("example:\n")[1].replace("\\\n", " ").split()
    assert example[:2] == ["plait", stage]
    for path in example[2:]:
        whole = path.replace("{0,1,2}", "0").removesuffix("/schedule.json")
        assert isinstance(layout.parse(whole), layout.Artifact)
