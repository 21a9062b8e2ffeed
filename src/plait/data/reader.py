"""What megatron-energon gives a task encoder, as conversations. Imports torch: planning never comes here."""

from typing import Any

from megatron.energon import DefaultTaskEncoder, SampleDecoder, VQASample, stateless
from megatron.energon.source_info import get_source_info
from megatron.energon.task_encoder.cooking import Cooker

from plait.data.chat import Sample
from plait.data.fields import of_fields
from plait.data.webdataset import decoded, to_sample
from plait.layout import inside


class AsBytes(SampleDecoder):  # type: ignore[misc]
    """Decodes text and json; pictures stay files, for the model's own processor, and nothing is unpickled."""

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A tar entry with its text and json decoded."""
        return {name: decoded(name, content, sample["__key__"]) for name, content in sample.items()}


@stateless  # type: ignore[untyped-decorator]
def as_it_is(sample: dict[str, Any]) -> dict[str, Any]:
    """A crude sample: all parts of a tar entry."""
    return sample


class Conversations(DefaultTaskEncoder):  # type: ignore[misc]
    """Gives every sample of a dataset of VQASample or CrudeWebdataset as a conversation."""

    decoder = AsBytes()
    cookers = (Cooker(as_it_is),)

    @stateless  # type: ignore[untyped-decorator]
    def encode_sample(self, sample: Any) -> Any:
        """A conversation; its id is the sample's key within its tar."""
        return conversation(sample)


def conversation(sample: Any) -> Sample:
    """The conversation of energon's sample, as :func:`plait.data.energon.read` gives it.

    Raises:
        RecordError: it is none.
    """
    if isinstance(sample, VQASample):
        return of_fields(
            {"image": sample.image, "context": sample.context, "answers": sample.answers},
            key_of(sample.__key__),
        )
    parts = {name: value for name, value in dict(sample).items() if not name.startswith("__")}
    return to_sample(parts, key_of(sample["__key__"]))


def place_of(sample: Any) -> str:
    """Where energon found a sample: dataset, tar and key as one path, from the working folder."""
    source, key = (
        get_source_info(sample)[0],
        sample["__key__"] if isinstance(sample, dict) else sample.__key__,
    )
    return f"{inside(str(source.dataset_path))}/{source.shard_name}/{key_of(key)}"


def key_of(key: str) -> str:
    """The key within the tar; energon puts the tar's name before it."""
    return key.rpartition(".tar/")[2]
