"""Reading in training through megatron-energon: one sample a sequence, its pictures by the model's processor.

B = sequences of a micro-batch, S = tokens of the longest of them, I = its pictures.
"""

import math
import multiprocessing
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import (
    SkipSample,
    WorkerConfig,
    get_loader,
    get_savable_loader,
    get_train_dataset,
    get_val_dataset,
    stateless,
)
from megatron.energon.errors import reraise_exception
from numpy.typing import NDArray

from plait import files
from plait.data import rejects
from plait.data.reader import Conversations, conversation, place_of
from plait.errors import CheckpointError, DataError, RecordError
from plait.layout import HF_PREPROCESSOR
from plait.tokens.llava import Encoded, LlavaRenderer, pixels
from plait.train.batches import Batch, masked_out, padded, positions, shifted
from plait.train.loader_state import from_json, loader_file, to_json
from plait.train.signals import shielded


def image_processor(folder: Path) -> Any:
    """The image processor that goes along with a Megatron model.

    Raises:
        CheckpointError: none does.
    """
    import transformers

    path = folder / HF_PREPROCESSOR
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", hint="convert the model again")
    values = files.read_json(path)
    name = values.get("image_processor_type") or values.get("feature_extractor_type")
    kind = getattr(transformers, str(name).removesuffix("Fast"), None)
    if kind is None:
        raise CheckpointError(f"{path} is of type {name!r}, which transformers has not")
    return kind.from_dict(values)


@dataclass(frozen=True)
class PictureCollator:
    """What turns samples into a micro-batch.

    Attributes:
        seq_length: no sequence is longer; what is cut off is counted.
        fixed: whether every sequence is padded to it, as pipeline stages need.
        pad_id: id under the padding, the model's; EOS's too, for no id decides what is trained.
        processor: transformers' image processor; None on stages that see no pixels.
        window: the model's sliding window, in tokens.
        multiple: what the length of sequences is a multiple of.
        by_documents: attention is told where documents begin: there is no mask.
    """

    seq_length: int
    fixed: bool
    pad_id: int
    processor: Any = None
    window: int | None = None
    multiple: int = 1
    by_documents: bool = False

    def _length(self, samples: Sequence[Encoded]) -> int:
        """Of the longest, as ranks that share sequences need it."""
        longest = max(len(sample.input_ids) for sample in samples)
        return -(-longest // self.multiple) * self.multiple

    def __call__(self, samples: Sequence[Encoded]) -> Batch:
        """Pad and stack; the answer's tokens and EOS are trained, padding and pictures never are."""
        kept = [sample.clip(self.seq_length) for sample in samples]
        length = self.seq_length if self.fixed else self._length(kept)
        ids_BS = padded([sample.input_ids for sample in kept], self.pad_id, length)
        trained_BS = padded([sample.trained for sample in kept], 0, length)
        document_BS = padded([np.zeros(len(sample.input_ids)) for sample in kept], -1, length)
        rows_BS = padded(_rows(kept, samples), -1, length)
        return Batch(
            input_ids=torch.from_numpy(ids_BS),
            labels=torch.from_numpy(shifted(ids_BS, self.pad_id)),
            loss_mask=torch.from_numpy(shifted(trained_BS, 0)).float(),
            position_ids=torch.from_numpy(positions(document_BS)),
            attention_mask=None
            if self.by_documents
            else masked_out(torch.from_numpy(document_BS), self.window),
            pictures=self._pixels(samples),
            picture_rows=torch.from_numpy(rows_BS),
            sees_pictures=torch.from_numpy((rows_BS >= 0).any(axis=1)).float(),
            clipped=sum(sample.clipped > 0 for sample in kept),
            samples=tuple(sample.place for sample in samples),
        )

    def _pixels(self, samples: Sequence[Encoded]) -> torch.Tensor | None:
        pictures = [picture for sample in samples for picture in sample.pictures]
        if self.processor is None or not pictures:
            return None
        return torch.from_numpy(pixels(pictures, self.processor))


def _end_workers() -> None:
    """End the loader's workers when this process ends, before it would wait for them.

    They are deaf to SIGTERM, by which Python ends its children: they were forked shielded.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it an error
    for worker in multiprocessing.active_children():
        worker.kill()


def _restore(loader: Any, state: Any) -> None:
    """Bring a loader to a place.

    Of a worker that gives nothing before the next save energon forgets how far behind its own state the place
    is, and would give those samples again: the number of its last one is put right.
    """
    loader.restore_state_rank(state)
    if state is not None and loader.num_workers:
        behind = [worker.offset for worker in state.worker_states]
        loader._worker_sample_counters = [  # noqa: SLF001
            last + more
            for last, more in zip(loader._worker_sample_counters, behind, strict=True)  # noqa: SLF001
        ]


def _rows(kept: Sequence[Encoded], whole: Sequence[Encoded]) -> list[NDArray[np.int64]]:
    """Rows of each sample among the features of the whole micro-batch."""
    features = [int(sample.picture_rows.max(initial=-1)) + 1 for sample in whole]
    firsts = np.cumsum([0, *features[:-1]])
    return [
        np.where(sample.picture_rows >= 0, sample.picture_rows + first, -1)
        for sample, first in zip(kept, firsts, strict=True)
    ]


class Encoder(Conversations):
    """Energon's task encoder: a sample of any dataset to tokens, several of them to a micro-batch."""

    def __init__(
        self, renderer: LlavaRenderer, collate: PictureCollator, rejected: frozenset[str] = frozenset()
    ) -> None:
        """Keep what renders and what collates, and the ids of what the analysis rejected."""
        super().__init__()
        self.renderer, self.collate, self.rejected = renderer, collate, rejected

    @stateless  # type: ignore[untyped-decorator]
    def encode_sample(self, sample: Any) -> Encoded:
        """One conversation, with the instruction that the format wants, as tokens.

        Raises:
            SkipSample: the analysis could not use it either, counted it and named it.
            RecordError: it cannot be written, and the analysis knows nothing of that.
        """
        found = conversation(sample)
        try:
            encoded = self.renderer.encode(self.renderer.instructed(found, found.id))
        except RecordError as error:
            if found.id in self.rejected:
                raise SkipSample from error
            raise
        if found.id in self.rejected and not encoded.teaches(self.collate.seq_length):
            raise SkipSample
        return replace(encoded, place=place_of(sample))

    @stateless  # type: ignore[untyped-decorator]
    def batch(self, samples: list[Encoded]) -> Batch:
        """A micro-batch."""
        return self.collate(samples)


@dataclass(frozen=True)
class EnergonFeed:
    """Micro-batches of one data parallel rank.

    Energon deals the samples out to streams, and the micro-batches of a run come from these in turn, however
    many copies of the model there are: micro-batch g, counted from the run's first, is the next of stream
    g % streams, and copy g % dp_size trains it. Every rank of a copy reads the same samples.

    Attributes:
        blend: energon's metadataset; beside it is what the analysis rejected.
        tokenizer: the tokenizer's folder.
        image_token_id: the model's token for a picture.
        form: the format of the config.
        collate: what makes a micro-batch.
        run: the run's settings.
        dp_rank: this rank.
        dp_size: number of data parallel ranks; it divides the micro-batches of an iteration.
        streams: number of streams.
    """

    blend: Path
    tokenizer: Path
    image_token_id: int | None
    form: Mapping[str, Any]
    collate: PictureCollator
    run: Mapping[str, Any]
    dp_rank: int
    dp_size: int
    streams: int

    @property
    def seq_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.collate.seq_length

    @property
    def micro(self) -> int:
        """Sequences of a micro-batch."""
        return int(self.run["micro_batch_size"])

    @property
    def total(self) -> int:
        """Sequences of an iteration, all ranks together."""
        return int(self.run["global_batch_size"])

    @property
    def apart(self) -> int:
        """A copy reads every so manieth stream; so many copies read them all, and others some of them too."""
        return math.gcd(self.streams, self.dp_size)

    @property
    def own(self) -> range:
        """The streams that this copy's micro-batches come from."""
        return range(self.dp_rank % self.apart, self.streams, self.apart)

    def workers(self, stream: int, number: int) -> WorkerConfig:
        """A stream, read by so many processes."""
        return WorkerConfig(
            rank=stream,
            world_size=self.streams,
            num_workers=number,
            seed_offset=self.run["seed"],
            global_error_handler=reraise_exception,
        )

    @property
    def encoder(self) -> Encoder:
        """What makes micro-batches of samples."""
        renderer = LlavaRenderer(self.tokenizer, self.form, self.image_token_id)
        return Encoder(renderer, self.collate, rejects.ids(self.blend.with_name(rejects.NAME)))

    @cached_property
    def loaders(self) -> dict[int, Any]:
        """Energon's loader of each own stream: shuffled by the run's seed, endless, savable."""
        if self.run["num_workers"]:
            util.Finalize(None, _end_workers, exitpriority=100)
        return {stream: self._loader(stream) for stream in self.own}

    def _loader(self, stream: int) -> Any:
        workers = self.workers(stream, self.run["num_workers"])
        dataset = get_train_dataset(
            self.blend,
            worker_config=workers,
            batch_size=self.micro,
            shuffle_buffer_size=self.run["shuffle_buffer_size"],
            max_samples_per_sequence=self.run["max_samples_per_sequence"],
            task_encoder=self.encoder,
            repeat=True,
        )
        return get_savable_loader(dataset)

    @cached_property
    def _iterators(self) -> dict[int, Iterator[Batch]]:
        return {stream: iter(loader) for stream, loader in self.loaders.items()}

    def batches(self, iteration: int) -> Iterator[Batch]:
        """The micro-batches of an iteration; it must be the next one, for the loaders keep their places.

        Torch's and energon's loaders draw from torch's own generator; the run's draws must not depend on it.
        """
        count = self.total // self.micro
        for first in range(iteration * count, (iteration + 1) * count, self.dp_size):
            with torch.random.fork_rng(devices=[]), shielded():  # its workers are forked here
                batch = self._of_turn(first)
            yield batch

    def _of_turn(self, first: int) -> Batch:
        """This copy's micro-batch of a turn, in which each copy has one.

        What others train of its own streams is read as well, so that all copies have a stream at one place.
        """
        turn = {number: number % self.streams for number in range(first, first + self.dp_size)}
        read = {number: self._next(stream) for number, stream in turn.items() if stream in self.own}
        return read[first + self.dp_rank]

    def _next(self, stream: int) -> Batch:
        batch = next(self._iterators[stream], None)
        if batch is None:
            raise DataError(
                f"the train splits of {self.blend} have no samples for stream {stream} of {self.streams}",
                hint="lower the run's data_streams, or its data_parallel_size where it has none",
            )
        return batch

    def leave_out(self, iteration: int) -> list[Any]:
        """Read the micro-batches of an iteration and give none; its samples."""
        return [sample for batch in self.batches(iteration) for sample in batch.samples]

    def state(self) -> dict[str, Any]:
        """The places of own streams, as JSON values by the names of their files; one copy gives each."""
        if self.dp_rank >= self.apart:
            return {}
        return {
            loader_file(stream): to_json(loader.save_state_rank()) for stream, loader in self.loaders.items()
        }

    def resume(self, start: Path) -> None:
        """Go on where a checkpoint stopped, on any number of copies.

        Raises:
            CheckpointError: it has no place of a stream.
        """
        for stream, loader in self.loaders.items():
            path = start / loader_file(stream)
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing: {start} has no place of stream {stream} of {self.streams}",
                    hint="bring its files back, or start from its weights by start_run",
                )
            _restore(loader, from_json(files.read_json(path)))


class EvaluationFeed(EnergonFeed):
    """The val splits of the blend, from their beginning at every evaluation, in the order of the shards."""

    def batches(self, iteration: int) -> Iterator[Batch]:
        """The micro-batches of an evaluation's batch; the first batch begins anew.

        Raises:
            DataError: the splits have not one micro-batch for a stream.
        """
        if iteration == 0:
            self.__dict__["_iterators"] = {stream: self._endless(stream) for stream in self.own}
        return super().batches(iteration)

    def _endless(self, stream: int) -> Iterator[Batch]:
        dataset = get_val_dataset(
            self.blend,
            worker_config=self.workers(stream, 0),
            batch_size=self.micro,
            batch_drop_last=True,
            task_encoder=self.encoder,
        )
        found = False
        while True:
            for batch in get_loader(dataset):
                found = True
                yield batch
            if not found:
                raise DataError(
                    f"the val splits of {self.blend} have no {self.micro} samples for stream {stream} of "
                    f"{self.streams}",
                    hint="raise the val part of `split` of their datasets, or lower micro_batch_size",
                )
