"""Every key of config/, its type, unit and default. Unknown keys are errors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from plait.config.base import FormatName, Name, Share, Strict
from plait.config.fit import (
    check_dataset,
    check_energon,
    check_mixture,
    check_model,
    check_run,
    check_tokenizer,
)
from plait.config.gguf import GgufModel
from plait.config.given import Elsewhere, Target
from plait.config.hub import DRAWN, AsKind, HubData, HubModel, UrlData
from plait.config.images import Images
from plait.config.jobs import Jobs
from plait.config.paths import shard_name
from plait.config.run import Run
from plait.config.shapes import PICTURED, Shape
from plait.config.solve import Solve
from plait.errors import ConfigError

# Data


class EmojiCaptions(Strict):
    """Built-in pictures with captions: emoji drawn from an OFL font, named in many languages."""

    kind: Literal["emoji-captions"]
    languages: tuple[Literal["en", "ja", "zh", "ko", "de", "fr", "es", "it", "pt", "ru"], ...] = Field(
        ("en", "ja", "zh"), description="languages of the captions, one sample each a picture"
    )
    size: PositiveInt = Field(64, description="side of a picture, in pixels")


class ChatterbotDialogues(Strict):
    """Built-in short dialogues of the chatterbot corpus."""

    kind: Literal["chatterbot-dialogues"]
    languages: tuple[Literal["english", "japanese", "chinese"], ...] = Field(
        ("english", "japanese", "chinese"), description="languages of the dialogues"
    )


class ChatJsonl(Strict):
    """Your own chat records: .jsonl, plain or .gz, .lz4, .zst."""

    kind: Literal["chat-jsonl"]
    path: str = Field(description="a file, or a folder of such files, anywhere")


class LlavaJson(Strict):
    """A LLaVA json: a list of {id, image, conversations}, and the folder of its pictures."""

    kind: Literal["llava-json"]
    path: str = Field(description="the json file, e.g. blip_laion_cc_sbu_558k.json")
    images: str = Field(
        "", description="the folder of its pictures, or a zip of them; empty is the folder of the json"
    )


class Tars(Strict):
    """Webdataset tars: jpg + json (a list of turns), or jpg + txt + json {question}."""

    kind: Literal["tars"]
    path: str = Field(description="a tar, or a folder of tars")


class EnergonFolder(Strict):
    """A folder that `energon prepare` has prepared, by whatever version; it is linked, not copied."""

    kind: Literal["energon"]
    path: str = Field(description="the folder with .nv-meta")


class Files(Strict):
    """Files of a released dataset, or of yours, whose records are of a known shape."""

    kind: Literal["files"]
    path: str = Field(
        description="a file or a folder: .jsonl or .json, plain or .gz, .lz4, .zst; .parquet; .tar; or, of "
        "imagenet, a folder for each class"
    )
    pictures: str = Field(
        "",
        description="where the pictures are that records name: a folder, a zip or tar, or a folder of such; "
        "empty: where the records are",
    )
    shape: Shape
    share: Share = Field(1.0, description=DRAWN)

    @model_validator(mode="after")
    def _names_pictures(self) -> Self:
        if self.pictures and self.shape.name not in PICTURED:
            raise ValueError(f"pictures: records of shape {self.shape.name} name none that lie elsewhere")
        return self


class YouSupply(Strict):
    """Data that only you have: a dry run lists them, and the run stops until you name a source."""

    kind: Literal["you-supply"]
    what: str = Field(description="what they are, in a sentence")
    as_kind: AsKind | Literal["files"] = Field(
        "chat-jsonl", description="the kind of source that takes its place"
    )


Source = Annotated[
    EmojiCaptions
    | ChatterbotDialogues
    | ChatJsonl
    | LlavaJson
    | Tars
    | EnergonFolder
    | Files
    | HubData
    | UrlData
    | YouSupply,
    Field(discriminator="kind"),
]


class Pictures(Strict):
    """How pictures are resized when they become chat records."""

    rule: Literal["keep", "patches", "longest_side"] = Field(
        "keep", description="keep: as they are; patches: SOLO's grid; longest_side: shrink to max_side"
    )
    patch_size: PositiveInt = Field(32, description="side of a patch, in pixels (rule patches)")
    max_side: PositiveInt = Field(1024, description="longest side, in pixels")


class Energon(Strict):
    """How chat records become webdataset shards, prepared for megatron-energon."""

    layout: Literal["conversations", "question_answer"] = Field(
        "conversations",
        description="conversations: jpg + json, the list of turns; "
        "question_answer: jpg + txt + json {question}",
    )
    shard_name: str = Field(
        "{:06d}.tar",
        description="name of shard N, a Python format; it may have a folder, as wds/pretrain-{}.tar",
    )
    samples_per_shard: PositiveInt = Field(10_000, description="samples of a tar")
    split: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = Field(
        (9, 1, 0), description="shares of train, val and test; whole shards are dealt out"
    )
    split_parts: dict[Literal["train", "val", "test"], str] = Field(
        {}, description="instead of `split`: a regular expression of shard names for each part"
    )
    exclude: str = Field("", description="regular expression of shard names that are left out")
    reject_limit: Share = Field(
        0.01, description="share of rejected samples at which the dataset fails: those that no tar can hold"
    )
    sample_type: Literal["VQASample", "CrudeWebdataset"] | None = Field(
        None,
        description="energon's class; null: VQASample where every sample is one picture and one exchange",
    )
    field_map: dict[Literal["image", "context", "answers"], str] = Field(
        {},
        description="fields of a VQASample: part of the tar, e.g. context: json[0][value]; those not named "
        "are the layout's, or those of a prepared folder; image: jpg,png names alternatives",
    )

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        check_energon(self)
        try:
            shard_name(self.shard_name, 0)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self


class ByHash(Strict):
    """One of two parts of a dataset: each sample falls to one by a hash of its id."""

    part: Literal["train", "validation"] = Field(description="which of the two this dataset is")
    validation: Share = Field(
        0.05, description="share of the samples that are of the validation part; the same for both parts"
    )


class Dataset(Strict):
    """A raw source, or several packed together."""

    source: Source | None = Field(None, description="where the raw data come from")
    pack_together: tuple[Name, ...] = Field((), description="datasets whose records are packed jointly")
    shards: PositiveInt = Field(1, description="shards of its records")
    shards_per_job: PositiveInt = Field(
        1,
        description="consecutive shards that one job makes, where it is asked for more than single ones; "
        "changes only how jobs are cut",
    )
    pictures: Pictures = Field(Pictures(), description="how pictures are resized")
    reject_limit: Share = Field(0.01, description="share of rejected lines at which a shard fails")
    energon: Energon = Field(Energon(), description="webdataset shards, where a mixture reads them")
    duplicates: Literal["count", "reject"] = Field(
        "count",
        description="records equal to an earlier one of the dataset's shard (packs), or of the dataset "
        "(energon), are counted, or rejected; those of an id that came before are rejected always",
    )
    by_hash: ByHash | None = Field(
        None,
        description="only this part of its samples, by their ids alone: the same however many shards there "
        "are, and after data are appended. Two datasets that `pack_together` one source are its two parts; "
        "energon's own `split` is then [1, 0, 0]",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.source is None) == (not self.pack_together):
            raise ValueError("a dataset has either `source` or `pack_together`")
        return self


class PackageTokenizer(Strict):
    """A SentencePiece model shipped in an installed Python package."""

    kind: Literal["package"]
    package: str = Field(description="import name, e.g. mistral_common")
    file: str = Field(description="path inside it, e.g. data/tokenizer.model.v1")


class FolderTokenizer(Strict):
    """The tokenizer files of a local folder, e.g. a downloaded model."""

    kind: Literal["folder"]
    path: str = Field(description="a folder with tokenizer.json or tokenizer.model")


class ModelTokenizer(Strict):
    """The tokenizer of a model of this config, e.g. of one that is downloaded."""

    kind: Literal["model"]
    model: Name = Field(
        description="a model of raw_hf that has its tokenizer with it: of kind hub, folder or gguf"
    )


class ExtendedTokenizer(Strict):
    """Another tokenizer plus tokens appended to its vocabulary."""

    kind: Literal["extend"]
    base: Name = Field(description="a tokenizer of this config")
    add: tuple[Literal["vision", "locations", "chatml", "image"], ...] = Field(
        description="groups of tokens, appended in this order"
    )


TokenizerSource = Annotated[
    PackageTokenizer | FolderTokenizer | ModelTokenizer | ExtendedTokenizer, Field(discriminator="kind")
]


class Format(Strict):
    """What turns chat records into tokens: `{format}` in a path."""

    tokenizer: Name = Field(description="a tokenizer of this config")
    template: Literal["pretrain", "chatml", "mistral", "llama2", "llava", "jp_alpaca", "tokenizer"] = Field(
        description="markup of a conversation; tokenizer: the tokenizer's own chat_template"
    )
    instruction: Literal["keep", "none", "drawn"] = Field(
        "keep",
        description="keep: users' turns as they are; none: those with pictures are reduced to them; drawn: "
        "the first, if it has one, with a drawn instruction of the sample's category",
    )
    language: Literal["ja", "en"] | None = Field(
        None, description="language of drawn instructions; null: en (template llava), ja (jp_alpaca)"
    )
    picture_tokens: PositiveInt | None = Field(
        None, description="tokens of a picture before a tower's features replace them (LLaVA)"
    )
    packing: Literal["best_fit", "next_fit", "sorted_next_fit"] = Field(
        "best_fit", description="how documents share a sequence"
    )
    overlong: Literal["split", "drop"] = Field(
        "split", description="what happens to a document longer than a sequence; counted either way"
    )
    pictures: Literal["encoded", "patches"] = Field(
        "encoded", description="encoded: picture files as they are; patches: raw fp16, 6 KiB a token"
    )
    patch_size: PositiveInt = Field(32, description="side of a patch, in pixels")
    max_resolution: PositiveInt = Field(1024, description="longest side of a picture, in pixels")
    no_loss: Literal["reject", "count"] = Field(
        "reject",
        description="a sample in which no token is an assistant's is rejected; or counted and kept, for a "
        "run whose loss_roles train others",
    )
    reject_limit: Share = Field(
        0.01,
        description="share of rejected records at which a shard fails; of an energon dataset's, at which its "
        "mixture does",
    )


class Mixture(Strict):
    """Which datasets a run samples from, and how often: packed ones, or energon's."""

    format: FormatName = Field(description="a format of this config")
    pack: PositiveInt | None = Field(None, description="tokens of a packed sequence")
    decoder_seq_length: PositiveInt | None = Field(
        None,
        description="instead of `pack`: read by energon, one sample a sequence, clipped to so many tokens",
    )
    datasets: tuple[Name, ...] = Field((), description="datasets at their natural weights")
    weights: dict[Name, PositiveFloat] = Field({}, description="explicit weights by dataset; they sum to 1")
    solve: Solve | None = Field(
        None, description="instead of them: limits, from which `plait analyse` solves the weights"
    )
    validation: tuple[Name, ...] = Field(
        (),
        description="datasets of the validation blend (energon), by their val split; as a whole, where they "
        "have none and do not train; empty: the val splits of `datasets`",
    )

    leak_limit: Share = Field(
        0.01,
        description="share of the samples of `validation` that are equal or similar to one that trains, at "
        "which the mixture fails; of an `eval_mixture`, at which the run does",
    )

    @model_validator(mode="after")
    def _one_reader(self) -> Self:
        if (self.pack is None) == (self.decoder_seq_length is None):
            raise ValueError(
                "a mixture has either `pack` (packed sequences) or `decoder_seq_length` (energon)"
            )
        if self.validation and self.pack:
            raise ValueError(
                "`validation` needs `decoder_seq_length`: packed mixtures have no validation set"
            )
        return self

    @model_validator(mode="after")
    def _one_kind_of_weights(self) -> Self:
        if sum(map(bool, (self.datasets, self.weights, self.solve))) != 1:
            raise ValueError(
                "a mixture has either `datasets` (natural weights) or `weights`, or `solve` (limits)"
            )
        if self.weights and abs(sum(self.weights.values()) - 1) > 1e-6:
            raise ValueError(f"weights sum to {sum(self.weights.values()):g}, expected 1")
        if self.solve and self.solve.whole_shards and not self.pack:
            raise ValueError(
                "`solve.whole_shards` needs `pack`: energon draws samples by weight, and promises no whole "
                "reading of anything; leave it out"
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The datasets, in the order of the config."""
        return self.datasets or tuple(self.solve.datasets if self.solve else self.weights)


# Models


class InitSizes(Strict):
    """The sizes of a language model with random weights, by the names of its config.json."""

    kind: str
    tokenizer: Name = Field(description="a tokenizer of this config")
    num_hidden_layers: PositiveInt = 4
    hidden_size: PositiveInt = 64
    intermediate_size: PositiveInt = 160
    num_attention_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt = 2
    head_dim: PositiveInt = 16
    max_position_embeddings: PositiveInt = 4096
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-5
    initializer_range: PositiveFloat = Field(0.02, description="standard deviation of the weights")
    seed: NonNegativeInt = 0


class InitModel(InitSizes):
    """A Mistral-shaped model with random weights; its sizes, by the names of its config.json."""

    kind: Literal["init"]


class MixtralModel(InitSizes):
    """A Mixtral-shaped mixture of experts with random weights; its sizes, by the names of its config.json."""

    kind: Literal["init_mixtral"]
    num_local_experts: PositiveInt = Field(8, ge=2, description="experts of a layer")
    num_experts_per_tok: PositiveInt = Field(2, ge=2, description="experts that a token is sent to")

    @model_validator(mode="after")
    def _experts_are_enough(self) -> Self:
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is above num_local_experts "
                f"{self.num_local_experts}"
            )
        return self


class FolderModel(Strict):
    """A model folder that is already on this machine; it is linked, not copied."""

    kind: Literal["folder"]
    path: str = Field(description="a folder with config.json and its weights")


class TowerModel(Strict):
    """A CLIP or SigLIP vision tower with random weights; its sizes, by the names of its config.json."""

    kind: Literal["init_tower"]
    architecture: Literal["clip", "siglip"] = "clip"
    num_hidden_layers: PositiveInt = 3
    hidden_size: PositiveInt = 32
    intermediate_size: PositiveInt = 64
    num_attention_heads: PositiveInt = 4
    image_size: PositiveInt = Field(64, description="side of a picture, in pixels")
    patch_size: PositiveInt = Field(16, description="side of a patch, in pixels")
    initializer_range: PositiveFloat = Field(0.02, description="standard deviation of the weights")
    seed: NonNegativeInt = 0


class LlavaModel(Strict):
    """A language model, a vision tower and a new projector: LlavaForConditionalGeneration."""

    kind: Literal["llava"]
    base: Name = Field(description="the language model, of raw_hf")
    vision: Name = Field(description="the vision tower, of raw_hf")
    tokenizer: Name = Field(
        description="the language model's tokenizer extended by `image`, or with both ids among its own"
    )
    vision_feature_layer: Literal[-2, -1] = Field(
        -2, description="hidden state of the tower that is projected"
    )
    drop_class_token: bool = Field(True, description="leave CLIP's class token out of a picture's tokens")
    projector_hidden_size: PositiveInt | None = Field(
        None, description="inner size of the projector; null: the language model's hidden size"
    )
    projector_bias: bool = True
    initializer_range: PositiveFloat | None = Field(
        None, description="standard deviation of a drawn projector; null: the language model's own"
    )
    projector: str | None = Field(
        None, description="safetensors file with linear_1 and linear_2; null: it is drawn"
    )
    image_token_id: NonNegativeInt | None = Field(
        None,
        description="id of a special token of the tokenizer that stands for a picture; null: that of <image>",
    )
    pad_token_id: NonNegativeInt | None = Field(
        None, description="id of a special token that pads, also EOS's; null: that of <pad>"
    )
    new_rows: Literal["mean", "normal", "zeros"] = Field("mean", description="init of new token rows")
    dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="type of all weights; null: as each source has it"
    )
    seed: NonNegativeInt = 0


class SoloModel(Strict):
    """A base model plus vision tokens and a patch projection."""

    kind: Literal["solo"]
    base: Name = Field(description="a model of raw_hf")
    tokenizer: Name = Field(description="the base's tokenizer extended by `vision`")
    patch_size: PositiveInt = Field(32, description="side of a patch, in pixels")
    max_resolution: PositiveInt = Field(1024, description="longest side of a picture, in pixels")
    projection: str | None = Field(
        None, description="safetensors file with the patch projection; null: drawn with std 0.02"
    )
    new_rows: Literal["mean", "normal", "zeros"] = Field("mean", description="init of new token rows")
    seed: NonNegativeInt = 0


class ExtendedModel(Strict):
    """A base model with rows for the tokens its tokenizer gained."""

    kind: Literal["extend"]
    base: Name = Field(description="a model of raw_hf")
    tokenizer: Name = Field(description="the base's tokenizer, extended")
    new_rows: Literal["mean", "normal", "zeros"] = Field("mean", description="init of new token rows")
    seed: NonNegativeInt = 0


HfSource = Annotated[
    InitModel
    | MixtralModel
    | FolderModel
    | HubModel
    | GgufModel
    | SoloModel
    | ExtendedModel
    | TowerModel
    | LlavaModel,
    Field(discriminator="kind"),
]


class Model(Strict):
    """A model under data/models/raw and data/models/sharded."""

    source: Name = Field(description="the folder of data/models/raw_hf it is converted from")
    num_layers_in_first_pipeline_stage: PositiveInt | None = Field(
        None, description="layers of the first stage, where stages are uneven"
    )
    num_layers_in_last_pipeline_stage: PositiveInt | None = Field(
        None, description="layers of the last stage, where stages are uneven"
    )
    proof: Literal["logits", "bytes"] = Field(
        "logits",
        description="logits: what it computes is compared with transformers, layer by layer; bytes: coverage "
        "and Merkle root alone, and all that is made of it says so",
    )
    conversion_jobs: PositiveInt = Field(
        1,
        description="jobs that convert it and that cut it for a grid, each a part of its bytes, at once if "
        "there are cores or nodes; one more puts the parts into place. Changes nothing of what is made",
    )


Reference = tuple[str, str, str, str, Mapping[str, Any]]
"""A name that must be defined elsewhere: section, name, key, target, where it is looked for."""


class Config(Strict):
    """The whole of config/."""

    datasets: dict[Name, Dataset] = Field({}, description="`data/raw` and `data/processed`")
    tokenizers: dict[Name, TokenizerSource] = Field({}, description="`data/tokenizers`")
    formats: dict[FormatName, Format] = Field({}, description="the `{format}` of `data/megatron_format`")
    mixtures: dict[Name, Mixture] = Field({}, description="`data/analysis`")
    raw_hf: dict[Name, HfSource] = Field({}, description="`data/models/raw_hf`")
    models: dict[Name, Model] = Field(
        {}, description="names under `data/models/raw`, where they differ from `raw_hf`"
    )
    runs: dict[Name, Run] = Field({}, description="`data/ckpts`")
    given: dict[Target, Elsewhere] = Field(
        {},
        description="what stands elsewhere, by the target whose place it takes: packed shards, tars, a "
        "Megatron model, a checkpoint; `plait adopt TARGET` checks it and links it there, file by file",
    )
    images: Images = Field(Images(), description="containers, by class of rule")
    jobs: Jobs = Field(
        Jobs(), description="what jobs ask a Slurm cluster for; changes nothing of what is made"
    )

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for section, name, key, target, known in self._references():
            if target not in known:
                raise ValueError(
                    f"{section}.{name}.{key} names {target!r}, which is not defined; "
                    f"defined are: {', '.join(sorted(known)) or 'none'}"
                )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        for name in self.datasets:
            check_dataset(self, name)
        for name in self.tokenizers:
            check_tokenizer(self, name)
        for name in self.mixtures:
            check_mixture(self, name)
        for name in self.raw_hf:
            check_model(self, name)
        for name in self.runs:
            check_run(self, name)
        return self

    @model_validator(mode="after")
    def _packed_together_have_the_same_shards(self) -> Self:
        for name, dataset in self.datasets.items():
            for part in dataset.pack_together:
                if self.datasets[part].shards != dataset.shards:
                    raise ValueError(
                        f"datasets.{name} has {dataset.shards} shards and packs {part} with "
                        f"{self.datasets[part].shards} together; the numbers must be equal"
                    )
                if self.datasets[part].pack_together:
                    raise ValueError(f"datasets.{name} packs {part} together, which has no source itself")
        return self

    def _references(self) -> list[Reference]:
        """Every name that must be defined elsewhere."""
        found: list[Reference] = []
        for name, dataset in self.datasets.items():
            found += [("datasets", name, "pack_together", p, self.datasets) for p in dataset.pack_together]
        for name, tokenizer in self.tokenizers.items():
            if isinstance(tokenizer, ExtendedTokenizer):
                found.append(("tokenizers", name, "base", tokenizer.base, self.tokenizers))
            if isinstance(tokenizer, ModelTokenizer):
                found.append(("tokenizers", name, "model", tokenizer.model, self.raw_hf))
        for name, form in self.formats.items():
            found.append(("formats", name, "tokenizer", form.tokenizer, self.tokenizers))
        for name, mixture in self.mixtures.items():
            found.append(("mixtures", name, "format", mixture.format, self.formats))
            found += [("mixtures", name, "datasets", d, self.datasets) for d in mixture.names]
            found += [("mixtures", name, "validation", d, self.datasets) for d in mixture.validation]
        return found + self._references_of_models() + self._references_of_runs()

    def _references_of_models(self) -> list[Reference]:
        known: dict[str, Mapping[str, Any]] = {
            "base": self.raw_hf,
            "vision": self.raw_hf,
            "tokenizer": self.tokenizers,
        }
        found: list[Reference] = [
            ("raw_hf", name, key, getattr(hf, key), among)
            for name, hf in self.raw_hf.items()
            for key, among in known.items()
            if hasattr(hf, key)
        ]
        return found + [
            ("models", name, "source", model.source, self.raw_hf) for name, model in self.models.items()
        ]

    def _references_of_runs(self) -> list[Reference]:
        found: list[Reference] = []
        for name, run in self.runs.items():
            found.append(("runs", name, "model", run.model, self.raw_hf | self.models))
            found.append(("runs", name, "mixture", run.mixture, self.mixtures))
            if run.eval_mixture:
                found.append(("runs", name, "eval_mixture", run.eval_mixture, self.mixtures))
            if run.start_run:
                found.append(("runs", name, "start_run", run.start_run, self.runs))
        return found


def load(values: Mapping[str, Any]) -> Config:
    """Check a config.

    Raises:
        ConfigError: one sentence a mistake, each with the key it is at.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentences(error)), hint="config/README.md lists every key") from error


def load_file(path: Path | str) -> Config:
    """Check a config file.

    Raises:
        ConfigError: it is missing, is no file, is not UTF-8 or YAML, or a value in it is wrong.
    """
    return load_files([path])


def load_files(paths: Sequence[Path | str]) -> Config:
    """Check config files as Snakemake puts them together: each goes over the ones before, key by key.

    Raises:
        ConfigError: as :func:`load_file`.
    """
    values: dict[str, Any] = {}
    for path in paths:
        values = _over(values, _read(path))
    return load(values)


def _over(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _over(below.get(key), value) for key, value in above.items()}


def _read(path: Path | str) -> Any:
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist", hint="name a config file with --config") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint="--config names a file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error


def _sentences(error: ValidationError) -> list[str]:
    lines = []
    for found in error.errors():
        where = ".".join(str(part) for part in found["loc"]) or "config"
        if found["type"] == "extra_forbidden":
            lines.append(f"{where}: no such key")
        else:
            lines.append(f"{where}: {found['msg'].removeprefix('Value error, ')}")
    return lines
