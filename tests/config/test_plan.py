"""What follows from a config."""

from pathlib import Path

import pytest

from plait import layout
from plait.config import Plan, Schedule, load
from plait.config.model import load_file
from plait.config.plan import INPUTS, SLICES, STAGE_OF, VERSIONS
from plait.config.schedule import train_iters
from plait.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plan():
    return Plan(load_file(ROOT / "config/config.yaml"))


@pytest.mark.parametrize(
    ("instances", "size", "epochs", "iterations"),
    [
        (195_122, 128, 1, 1525),
        (445_565, 128, 1, 3481),
        (38_324, 128, 1, 300),
        (4_833, 32, 5, 760),
        (19_379, 32, 5, 3030),
    ],
)
def test_worked_numbers_of_both_systems(instances, size, epochs, iterations):
    assert train_iters(instances=instances, global_batch_size=size, epochs=epochs) == iterations


@pytest.mark.parametrize(
    ("mixture", "dataset", "shards"),
    [
        ("talk", "dialogues", layout.Indexed(format="chatml", dataset="dialogues", seq=256, shard=0)),
        ("english", "emoji-en", layout.Energon(dataset="emoji-en")),
    ],
)
def test_a_solved_mixture_is_made_of_the_datasets_that_its_limits_name(mixture, dataset, shards):
    base = load_file(ROOT / "config/config.yaml").model_dump()
    limits = {"tokens": [1, 10**9], "datasets": {dataset: {"epochs": [1, 3]}}}
    base["mixtures"][mixture] |= {"datasets": [], "solve": limits}
    inputs = Plan(load(base)).inputs(layout.Analysis(mixture=mixture))

    assert [str(one) for several in inputs.values() for one in several].count(str(shards)) == 1
    assert inputs == Plan(load_file(ROOT / "config/config.yaml")).inputs(layout.Analysis(mixture=mixture))


def test_legal_iterations_of_1525_at_50():
    schedule = Schedule(train_iters=1525, save_interval=50)

    assert schedule.steps() == [*range(50, 1501, 50), 1525]
    assert [step for step in range(2000) if schedule.saves(step)] == schedule.steps()
    assert [schedule.previous(step) for step in (50, 100, 1500, 1525)] == [0, 50, 1450, 1500]
    with pytest.raises(ConfigError, match=r"iteration 77 of run x is never saved.*nearest: 50 or 100"):
        schedule.check(77, run="x")


def test_legal_iterations_by_epoch():
    assert Schedule(train_iters=760, save_interval=152).steps() == [152, 304, 456, 608, 760]


@pytest.mark.parametrize(
    ("epochs", "train_iterations", "known"),
    [(None, 1525, Schedule(1525, 50)), (2, None, None)],
)
def test_a_schedule_waits_for_data_only_where_it_follows_from_them(epochs, train_iterations, known):
    base = load_file(ROOT / "config/config.yaml").model_dump()
    base["runs"]["chat-tiny"] |= {"epochs": epochs, "train_iters": train_iterations}

    assert Plan(load(base)).schedule("chat-tiny") == known


def test_a_chain_starts_from_the_sharded_model(plan):
    def starts(step, schedule=None):
        return str(plan.start(layout.Iteration(run="chat-tiny", iteration=step), schedule))

    assert starts(50) == "data/models/sharded/chat-tiny-megatron-tp1-pp2"
    assert starts(100) == "data/ckpts/chat-tiny/iter_0000050"
    assert starts(101, Schedule(101, 50)) == "data/ckpts/chat-tiny/iter_0000100"


def test_a_saved_schedule_of_other_settings_does_not_count(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text('{"train_iters": 760, "save_interval": 152, "settings": {"epochs": 5}}')

    assert Schedule.read(path) == Schedule(760, 152)
    assert Schedule.read(path, {"epochs": 5}) == Schedule(760, 152)
    assert Schedule.read(path, {"epochs": 6}) is None
    path.write_text('{"train_iters": "many"}')
    with pytest.raises(DataError, match=r"schedule.json is not a schedule"):
        Schedule.read(path)


def test_a_mixtures_page_quotes_the_rejects_of_all_its_shards_but_not_of_adopted_ones(
    plan, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    def quoted(mixture):
        return plan.quoted(layout.Analysis(mixture=mixture))

    names = [f"data/processed/emoji/shard_{n:05d}" for n in range(3)]
    assert quoted("captions") == {
        "words": ["data/tokenizers/mistral-solo"],
        "rejects": [f"{name}.rejects.jsonl" for name in names],
        "ledgers": ["data/tokenizers/mistral-solo/plait.json", *(f"{name}.ledger.json" for name in names)],
    }
    assert quoted("english")["rejects"] == ["data/processed/emoji-en/shard_00000.rejects.jsonl"]
    taken = layout.Chat(dataset="emoji", shard=1)
    monkeypatch.setattr(plan, "adopted", lambda one: one == taken)
    assert quoted("captions")["rejects"] == [f"{names[0]}.rejects.jsonl", f"{names[2]}.rejects.jsonl"]
    monkeypatch.setattr(plan, "adopted", lambda one: isinstance(one, layout.Indexed))
    assert quoted("captions") == {"words": [], "rejects": [], "ledgers": []}


def test_every_stage_of_an_artifact_has_inputs_a_version_and_settings(plan):
    assert set(STAGE_OF) == set(INPUTS) == set(layout.KINDS)
    assert set(STAGE_OF.values()) | {"verify"} == set(VERSIONS)
    assert set(SLICES) <= set(VERSIONS)
    text = plan.settings_text(layout.Megatron(model="chat-tiny"), "verify")
    assert text == f'{{"stage":"verify","version":{VERSIONS["verify"]}}}'


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"lr": 1.0}, {"train"}),
        ({"exports": [50]}, set()),
        ({"epochs": 3}, {"schedule"}),
        ({"save_interval": 25}, {"schedule"}),
        ({"global_batch_size": 8}, {"schedule", "train"}),
        ({"params_dtype": "bf16"}, {"train"}),
    ],
)
def test_a_changed_key_of_a_run_changes_the_settings_of_its_stages_only(plan, change, stages):
    base = plan.config.model_dump()
    base["runs"]["chat-tiny"] |= change
    other = Plan(load(base))
    asked = {
        "schedule": layout.Run(run="chat-tiny"),
        "train": layout.Iteration(run="chat-tiny", iteration=50),
        "export": layout.Export(run="chat-tiny", step=50),
    }

    changed = {stage for stage, it in asked.items() if plan.settings(it) != other.settings(it)}

    assert changed == stages


def test_how_a_model_is_proven_changes_what_is_proven_and_nothing_else(plan):
    """What decides a cut model, or a trained one, is as it was."""
    base = plan.config.model_dump()
    base["models"]["chat-tiny"] = {**base["models"]["chat-tiny"], "proof": "bytes"}
    other = Plan(load(base))
    sharded = layout.Sharded(model="chat-tiny", tp=1, pp=2)
    asked = {
        "convert": (layout.Megatron(model="chat-tiny"), ""),
        "shard": (sharded, ""),
        "verify": (sharded, "verify"),
        "verify an iteration": (layout.Iteration(run="chat-tiny", iteration=50), "verify"),
        "train": (layout.Iteration(run="chat-tiny", iteration=50), ""),
        "export": (layout.Export(run="chat-tiny", step=50), ""),
    }

    changed = {stage for stage, one in asked.items() if plan.settings(*one) != other.settings(*one)}

    assert changed == {"verify", "verify an iteration", "export"}
    assert other.settings(sharded, "verify")["proof"] == "bytes"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"dataset": {}}, "dataset: no such key"),
        ({"datasets": {"a b": {}}}, "datasets"),
        ({"datasets": {"a": {}}}, "either `source` or `pack_together`"),
        ({"models": {"m": {"source": "gone"}}}, "models.m.source names 'gone'"),
        ({"formats": {"f_x": {"tokenizer": "t", "template": "chatml"}}}, "formats"),
    ],
)
def test_a_wrong_config_gets_a_sentence(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(values)


def default(**changes):
    """The default plan with some keys changed: ``section__name={key: value}``."""
    values = load_file(ROOT / "config/config.yaml").model_dump()
    for where, change in changes.items():
        section, name = where.split("__")
        values[section].setdefault(name.replace("_", "-"), {}).update(change)
    return values


@pytest.mark.parametrize("format_", ["mmistral", "other"])
def test_a_run_on_data_of_another_tokenizer_is_refused_whatever_its_size(format_):
    values = default(
        tokenizers__twin={"kind": "extend", "base": "mistral-v1", "add": ["chatml"]},
        formats__other={"tokenizer": "twin", "template": "chatml"},
        mixtures__talk={"format": format_},
    )
    theirs = values["formats"][format_]["tokenizer"]

    with pytest.raises(ConfigError) as refused:
        load(values)

    assert f"tokenizer is 'mistral-chatml', on formats.{format_}, whose tokenizer is '{theirs}'" in str(
        refused.value
    )


def test_the_tokenizer_of_a_linked_model_is_left_to_the_trainer():
    values = default()
    values["raw_hf"]["Mistral-tiny-chatml"] = {"kind": "folder", "path": "my/model"}

    assert load(values)


@pytest.mark.parametrize(
    ("run", "change", "sentence"),
    [
        ("chat-tiny", {"recipe": "solo"}, "of kind 'extend' over 'init'; recipe 'solo' trains kinds solo"),
        ("solo-tiny", {"recipe": "chat"}, "raw_hf.MultimodalMistral-tiny of kind 'solo'; .* trained by solo"),
    ],
)
def test_a_recipe_that_does_not_fit_its_model_is_refused(run, change, sentence):
    values = default()
    values["runs"][run] |= change

    with pytest.raises(ConfigError, match=sentence):
        load(values)


def test_a_recipe_chat_over_a_lengthened_solo_model_is_refused():
    values = default(
        raw_hf__longer={"kind": "extend", "base": "MultimodalMistral-tiny", "tokenizer": "mistral-chatml"},
        runs__chat_tiny={"model": "longer"},
    )

    with pytest.raises(ConfigError, match=r"trains raw_hf.longer of kind 'extend' over 'solo'"):
        load(values)


@pytest.mark.parametrize(("key", "ours"), [("patch_size", 32), ("max_resolution", 1024)])
def test_a_solo_run_sees_pictures_as_its_data_have_them(key, ours):
    sentence = f"with {key} {ours} on formats.mmistral with {key} 64; they must be equal"
    with pytest.raises(ConfigError, match=sentence):
        load(default(formats__mmistral={key: 64}))

    both = default(formats__mmistral={key: 64}, raw_hf__MultimodalMistral_tiny={key: 64})
    assert load(both).raw_hf["MultimodalMistral-tiny"].model_dump()[key] == 64


def test_an_export_that_is_never_saved_is_refused_where_the_length_is_known():
    known = {"epochs": None, "train_iters": 130, "save_interval": 50}

    assert load(default(runs__chat_tiny=known | {"exports": [50, 130]}))
    for step in (120, 150):
        with pytest.raises(ConfigError, match=rf"iteration {step}, but it saves .*50, 100, 130.*nearest"):
            load(default(runs__chat_tiny=known | {"exports": [step]}))
    assert load(default(runs__chat_tiny={"exports": [120]})), "120 may be the last of an epoch"


def test_a_config_that_is_no_text_file_gets_a_sentence(tmp_path):
    broken = tmp_path / "latin.yaml"
    broken.write_bytes("runs: {é: 1}".encode("latin-1"))

    with pytest.raises(ConfigError, match=r"latin.yaml is not text in UTF-8"):
        load_file(broken)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_file(tmp_path)


def folders_plan(path):
    values = default(
        datasets__own={"source": {"kind": "chat-jsonl", "path": path}},
        tokenizers__own={"kind": "folder", "path": path},
        raw_hf__own={"kind": "folder", "path": path},
    )
    return Plan(load(values))


ASKED = [layout.Raw(dataset="own"), layout.Tokenizer(tokenizer="own"), layout.HfModel(model="own")]


@pytest.mark.parametrize("artifact", ASKED, ids=str)
def test_a_path_may_start_at_home_and_must_be_there(artifact, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text('{"num_hidden_layers": 3}')

    plan = folders_plan("~/mine")

    assert not [one for inputs in plan.inputs(artifact).values() for one in inputs]
    assert plan.shape("own") == {"num_hidden_layers": 3}
    with pytest.raises(ConfigError, match=r"own.*path: ~/gone does not exist"):
        folders_plan("~/gone").inputs(artifact)
    with pytest.raises(ConfigError, match="there is no such home folder"):
        folders_plan("~nobody-of-this-name/x").inputs(artifact)


PREPARED = {"source": {"kind": "energon", "path": "wds"}}
IGNORED = {
    "an instruction of packs": ("formats", "chatml", {"instruction": "none"}, "has instruction 'none'"),
    "a picture's tokens in packs": ("formats", "mmistral", {"picture_tokens": 16}, "has picture_tokens 16"),
    "packing for energon": ("formats", "llava", {"packing": "next_fit"}, "has packing 'next_fit'"),
    "patches for energon": ("formats", "alpaca", {"patch_size": 16}, "has patch_size 16"),
    "no instruction's language": ("formats", "alpaca", {"language": "en"}, "its `instruction` is not drawn"),
    "frozen parts of chat": ("runs", "chat-tiny", {"freeze": ["language_model"]}, "which nothing reads"),
    "the workers of packs": ("runs", "solo-tiny", {"num_workers": 2}, "runs.solo-tiny has num_workers 2"),
    "who is trained and was rejected": (
        "runs", "chat-tiny", {"loss_roles": ["user"]}, "give it `no_loss: count`",
    ),
    "the roles of llava": ("runs", "llava-tiny-stage1", {"loss_roles": ["user"]}, "trains answers"),
    "tars of packs": ("datasets", "emoji", {"energon": {"samples_per_shard": 3}}, "mixtures only pack its"),
    "split of packs": ("datasets", "dialogues", {"energon": {"split": [8, 2, 0]}}, "mixtures only pack its"),
    "shards of a prepared set": ("datasets", "theirs", {**PREPARED, "shards": 9}, "is prepared already"),
    "rejects of a prepared set": ("datasets", "theirs", {**PREPARED, "reject_limit": 0.9}, "is prepared"),
    "pictures of a prepared set": (
        "datasets", "theirs", {**PREPARED, "pictures": {"max_side": 8}}, "theirs has pictures"),
    "layout of a prepared set": (
        "datasets", "theirs", {**PREPARED, "energon": {"layout": "question_answer"}}, "energon has layout"),
    "names of a prepared set": (
        "datasets", "theirs", {**PREPARED, "energon": {"shard_name": "{}.tar"}}, "energon has shard_name"),
    "tars of a prepared set": (
        "datasets", "theirs", {**PREPARED, "energon": {"samples_per_shard": 3}}, "has samples_per_shard 3"),
    "rejects of records packed together": (
        "datasets", "both", {"pack_together": ["emoji-en", "emoji-ja"], "reject_limit": 0.5}, "it packs"),
    "a field map of crude samples": (
        "datasets", "emoji-en", {"energon": {"sample_type": "CrudeWebdataset", "field_map": {"image": "x"}}},
        "a CrudeWebdataset is read whole"),
    "two splits": (
        "datasets", "emoji-en", {"energon": {"split": [8, 2, 0], "split_parts": {"train": "x"}}},
        "`split_parts` stands in its place"),
    "the std of no random start": ("runs", "chat-tiny", {"init_method_std": 0.1}, "`init` is not random"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("train", "validation", "fits"),
    [
        ({"part": "train"}, {"part": "validation"}, True),
        ({"part": "train"}, {"part": "train"}, False),
        ({"part": "train"}, {"part": "validation", "validation": 0.2}, False),
        (None, {"part": "validation"}, False),
    ],
)
@pytest.mark.parametrize("length", [{"pack": 256}, {"decoder_seq_length": 64}])
def test_the_parts_of_one_source_do_not_overlap(train, validation, fits, length):
    base = load_file(ROOT / "config/config.yaml").model_dump()
    parts = {"a": train, "b": validation}
    for name, part in parts.items():
        base["datasets"][name] = {"pack_together": ["dialogues"], "shards": 2, "by_hash": part}
    form = {"format": "chatml" if "pack" in length else "llava", **length}
    base["mixtures"]["own"] = {**form, "datasets": ["a"]}
    if "pack" in length:
        base["mixtures"]["other"] = {**form, "datasets": ["b"]}
        length_of = {"mixture": "own", "eval_mixture": "other", "eval_interval": 5}
        base["runs"]["r"] = {**base["runs"]["chat-tiny"], **length_of}
    else:
        base["mixtures"]["own"]["validation"] = ["b"]
    if fits:
        assert load(base)
    else:
        with pytest.raises(
            ConfigError, match="both are of the records of dialogues: give each the `by_hash`"
        ):
            load(base)


@pytest.mark.parametrize("name", IGNORED)
def test_seed_15_a_key_that_nothing_would_read_is_refused(name):
    section, entry, change, sentence = IGNORED[name]
    base = load_file(ROOT / "config/config.yaml").model_dump()
    base[section].setdefault(entry, {}).update(change)

    with pytest.raises(ConfigError, match=sentence):
        load(base)


def test_a_split_beside_someones_own_is_refused(tmp_path):
    base = default(datasets__theirs={"source": {"kind": "energon", "path": str(tmp_path)}})
    base["datasets"]["theirs"]["energon"] = {"split": [8, 2, 0]}
    assert load(base)
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta/split.yaml").write_text("split_parts: {}")
    with pytest.raises(
        ConfigError, match=r"energon has split \(8.0, 2.0, 0.0\), .* split_parts goes before it"
    ):
        load(base)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"split": [0, 1, 0]}, "gives training no share"),
        ({"split": [0, 0, 0]}, "gives training no share"),
        ({"split": [1, float("inf"), 0]}, "gives training no share"),
        ({"split": [float("nan"), 1, 0]}, "split"),
        ({"split_parts": {"train": "("}}, r"'\(' is not a regular expression"),
        ({"exclude": "*.tar"}, "is not a regular expression"),
        ({"split_parts": {"val": "x"}}, "leaves train no shard"),
        ({"field_map": {"bild": "jpg"}}, "field_map.bild"),
    ],
)
def test_what_no_dataset_can_be_prepared_by_is_found_in_planning(keys, sentence):
    with pytest.raises(ConfigError, match=rf"datasets.emoji-en.energon.*{sentence}"):
        load(default(datasets__emoji_en={"energon": keys}))


def test_energons_own_folders_are_not_packed():
    base = load_file(ROOT / "config/config.yaml").model_dump()
    base["datasets"]["theirs"] = {"source": {"kind": "energon", "path": "wds"}}
    base["mixtures"]["talk"] |= {"datasets": ["theirs"]}

    with pytest.raises(
        ConfigError, match=r"mixtures.talk packs datasets.theirs, which is prepared for energon"
    ):
        load(base)


@pytest.mark.parametrize("name", ["{}.zip", "same.tar", "../{}.tar", "{x}.tar"])
def test_names_of_shards_are_checked_in_planning(name):
    base = load_file(ROOT / "config/config.yaml").model_dump()
    base["datasets"]["emoji-en"]["energon"] |= {"shard_name": name}

    with pytest.raises(ConfigError, match=r"datasets.emoji-en.energon: energon.shard_name"):
        load(base)


def test_a_tokenizer_is_taken_from_a_model_that_brings_one():
    base = load_file(ROOT / "config/config.yaml").model_dump()
    base["raw_hf"]["real"] = {"kind": "hub", "repo": "mistralai/Mistral-7B-v0.1"}
    base["tokenizers"]["real"] = {"kind": "model", "model": "real"}
    plan = Plan(load(base))
    assert plan.base_tokenizer(layout.Tokenizer(tokenizer="real")) == [layout.HfModel(model="real")]

    base["tokenizers"]["real"] = {"kind": "model", "model": "Mistral-tiny"}
    with pytest.raises(ConfigError, match=r"tokenizers.real is that of raw_hf.Mistral-tiny, whose kind is"):
        load(base)


def other_tokens(**keys):
    """The default plan, with the models of LLaVA whose pictures are other tokens of a tokenizer."""
    base = default()
    base["tokenizers"]["mistral-llava"]["add"] = ["chatml"]
    for name in ("LLaVA-tiny", "LLaVA-JP-tiny"):
        base["raw_hf"][name] |= {"image_token_id": 5, "pad_token_id": 2} | keys.get(name, {})
    return base


def test_a_model_may_name_its_tokens_for_pictures_and_padding():
    plan = Plan(load(other_tokens()))

    assert plan.settings(layout.Analysis(mixture="english"))["image_token_id"] == 5
    assert "image_token_id" not in plan.settings(layout.Analysis(mixture="talk"))


def test_the_tokens_own_name_needs_the_tokenizer_to_have_it():
    with pytest.raises(ConfigError, match="a LLaVA needs <image> and <pad>, or ids of others"):
        load(other_tokens(**{"LLaVA-tiny": {"pad_token_id": None}}))


def test_one_token_cannot_be_both():
    with pytest.raises(ConfigError, match="LLaVA-tiny has 5 as image_token_id and as pad_token_id"):
        load(other_tokens(**{"LLaVA-tiny": {"pad_token_id": 5}}))


def test_models_that_read_one_mixture_have_one_token_for_a_picture():
    base = default()
    base["models"]["another"] = {"source": "Another"}
    base["raw_hf"]["Another"] = base["raw_hf"]["LLaVA-tiny"] | {"image_token_id": 5}
    base["runs"]["another"] = base["runs"]["llava-tiny-stage1"] | {"model": "another"}
    with pytest.raises(ConfigError, match=r"image_token_id \w+ and \w+; give each a mixture of its own"):
        load(base)


def test_what_a_model_is_evaluated_on_has_its_token_for_a_picture():
    base = other_tokens()
    base["mixtures"]["held-out"] = base["mixtures"]["english"] | {"datasets": ["emoji-ja"]}
    base["runs"]["llava-tiny-stage1"] |= {"eval_interval": 10, "eval_mixture": "held-out"}

    assert Plan(load(base)).settings(layout.Analysis(mixture="held-out"))["image_token_id"] == 5
