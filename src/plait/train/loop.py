"""The training loop: Megatron's schedule, gradients, optimizer and learning rate, in that order."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from plait.config.schedule import skipped
from plait.train import signals
from plait.train.balance import balance
from plait.train.batches import Batch, Feed
from plait.train.figures import TERA, Timed, measured_peak, memory
from plait.train.lineage import SampleLog
from plait.train.metrics import Metrics
from plait.train.saves import Saves
from plait.train.state import TrainState

if TYPE_CHECKING:
    from plait.train.energon import EnergonFeed

Keep = Callable[[bool], None]


def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
    """One micro-batch through this rank's stage, and what makes its loss."""
    device = torch.device(torch.cuda.current_device())
    batch = next(batches).part(
        parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    )
    batch = batch.to(device)
    output = model(
        batch.input_ids,
        batch.position_ids,
        batch.attention_mask,
        pictures=batch.pictures,
        picture_rows=batch.picture_rows,
        labels=batch.labels,
    )

    def loss(losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        losses_B = (losses_BS.float() * batch.loss_mask).sum(dim=1)
        tokens_B = batch.loss_mask.sum(dim=1)
        total, tokens, sees = losses_B.sum(), tokens_B.sum(), batch.sees_pictures.to(device)
        sums = torch.stack(
            (
                total.detach(),
                tokens,
                (losses_B.detach() * sees).sum(),
                (tokens_B * sees).sum(),
                tokens.new_tensor(batch.input_ids.numel()),
                tokens.new_tensor(batch.clipped),
            )
        )
        return total, tokens.int(), {"lm loss": sums}

    return output, loss


@dataclass
class Trainer:
    """A run on this rank.

    Attributes:
        model: Megatron's data parallel wrappers of this rank's chunks of the model.
        state: what a checkpoint holds.
        feed: this rank's micro-batches.
        run: the run's settings.
        around: what the run tells while it trains, and how often it is kept safe.
        flops: operations of one token, forward and backward.
        evaluation: this rank's micro-batches of an evaluation, from its first batch on.
        length: iterations of the whole run: it is evaluated after its last.
        saves: iterations that are kept as checkpoints.
    """

    model: list[Any]
    state: TrainState
    feed: "Feed | EnergonFeed"
    run: Mapping[str, Any]
    around: Mapping[str, Any]
    flops: float = 0.0
    evaluation: "Feed | EnergonFeed | None" = None
    length: int = 0
    saves: Collection[int] = ()
    samples: SampleLog | None = None
    """What this rank's copy of the model saw, where this rank writes it down."""

    def train(
        self, stop: int, *, folder: Path, keep: Keep | None = None, saving: Saves | None = None
    ) -> bool:
        """Train up to iteration ``stop``; metrics go into the run's folder.

        Args:
            stop: the last iteration.
            folder: the run's folder.
            keep: saves a checkpoint or a state against a crash, and is told whether training goes on; all
                ranks call it at the same iteration.
            saving: what it saves with; looked at between iterations.

        Returns:
            Whether it got there; it was asked to stop otherwise, and all that it did is kept.
        """
        with ExitStack() as stack:
            metrics = None
            if self._speaks_for_copy():
                self.samples = stack.enter_context(self._sample_log(folder, stop))
            if self._reports():
                metrics = stack.enter_context(
                    Metrics(folder, start=self.state.iteration, stop=stop, logged=self.around)
                )
            kept = self.state.iteration
            while self.state.iteration < stop:
                asked = _asked(saving)
                if kept < self.state.iteration and (asked or self._is_due()):
                    self._keep(keep, metrics, goes_on=not asked)
                    kept = self.state.iteration
                if asked:
                    return False
                row = self._row()
                if metrics is not None:
                    metrics.write(row)
            if kept < stop and stop in self.saves:
                self._keep(keep, metrics, goes_on=False)
        if self.run["overlap_param_gather"]:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)
        return True

    def _row(self) -> dict[str, Any]:
        """The next iteration, trained or left out, and what is to be told of it."""
        leave_out = any(self.state.iteration + 1 in one for one in self.skipped)
        row = self._leave_out() if leave_out else self._iteration()
        if self.evaluation is not None and self._is_evaluated():
            row |= self._evaluate(self.evaluation)
        return row

    def _is_due(self) -> bool:
        """Whether a checkpoint or a state is written here unasked."""
        every, done = self.around["non_persistent_save_interval"], self.state.iteration
        return done in self.saves or (bool(every) and done % every == 0)

    def _is_evaluated(self) -> bool:
        """Whether the run is evaluated here: every so often, and at its end."""
        done = self.state.iteration
        return done % self.around["eval_interval"] == 0 or done == self.length

    def _keep(self, keep: Keep | None, metrics: Metrics | None, *, goes_on: bool) -> None:
        """Save a checkpoint or a state; the rows before it are durable, all weights gathered."""
        if keep is None:
            return
        for told in (metrics, self.samples):
            if told is not None:
                told.sync()
        with self._gathered():
            keep(goes_on)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """All weights are here; none is gathered while others compute."""
        gathering = self.model if self.run["overlap_param_gather"] else []
        for chunk in gathering:
            chunk.disable_forward_pre_hook()
        yield
        for chunk in gathering:
            chunk.enable_forward_pre_hook()

    @torch.no_grad()
    def _evaluate(self, feed: "Feed | EnergonFeed") -> dict[str, float]:
        """The losses of the same batches every time, by their names in training."""
        for chunk in self.model:
            chunk.eval()
        with self._gathered():
            reduced = [
                sums
                for batch in range(self.around["eval_iters"])
                for sums in self._pass(feed, feed.batches(batch), forward_only=True)
            ]
        for chunk in self.model:
            chunk.train()
        return {f"validation {name}": value for name, value in _sums(reduced).losses().items()}

    def _pass(
        self, feed: "Feed | EnergonFeed", batches: Iterator[Batch], *, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        """A batch through the model by Megatron's schedule; what the last stage knows of its losses.

        Each chunk sees all micro-batches, some before others have: those are read once and kept meanwhile.
        """
        found: list[dict[str, Tensor]] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[*tee(batches, len(self.model))],
            model=self.model,
            num_microbatches=feed.total // (feed.micro * feed.dp_size),
            seq_length=feed.seq_length,
            micro_batch_size=feed.micro,
            forward_only=forward_only,
        )
        return found

    def _reports(self) -> bool:
        """The loss is known on the last stage; one rank of it writes."""
        return self._speaks_for_copy() and parallel_state.get_data_parallel_rank() == 0

    @staticmethod
    def _speaks_for_copy() -> bool:
        """Whether this rank writes what its copy of the model saw: one of the last stage does."""
        first_of_stage = (
            parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )
        return first_of_stage and bool(parallel_state.is_pipeline_last_stage())

    def _sample_log(self, folder: Path, stop: int) -> SampleLog:
        feed = self.feed
        return SampleLog(
            folder,
            start=self.state.iteration,
            stop=stop,
            micro=feed.micro,
            copy=feed.dp_rank,
            copies=feed.dp_size,
        )

    def _noted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches of an iteration; their samples are remembered."""
        self._seen: list[Any] = []
        for batch in batches:
            self._seen += batch.samples
            yield batch

    def _note(self, samples: Sequence[Any], *, skipped: bool = False) -> None:
        """Write down what this iteration saw; before the losses are summed up, which waits for all copies."""
        if self.samples is not None:
            self.samples.note(self.state.iteration + 1, samples, skipped=skipped)

    @cached_property
    def skipped(self) -> tuple[range, ...]:
        """The iterations that are left out."""
        return skipped(self.run["skip_train_iteration_range"])

    def _leave_out(self) -> dict[str, Any]:
        """An iteration whose samples are consumed and train nothing; the schedule goes on."""
        self._note(self.feed.leave_out(self.state.iteration), skipped=True)
        self.state.schedule.step(self.feed.total)
        self.state.iteration += 1
        return {"iteration": self.state.iteration, "skipped samples": self.feed.total}

    def _iteration(self) -> dict[str, Any]:
        """One optimizer step."""
        began = time.perf_counter()
        batches = Timed(self._noted(self.feed.batches(self.state.iteration)))
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.state.optimizer.zero_grad()
        reduced = self._pass(self.feed, batches, forward_only=False)
        self._note(self._seen)
        stepped, grad_norm, _ = self.state.optimizer.step()
        lr = self.state.optimizer.param_groups[0]["lr"]
        self.state.schedule.step(self.feed.total)
        self.state.iteration += 1
        sums = _sums(reduced)
        balanced = self.run.get("moe_aux_loss_coeff")
        seconds = time.perf_counter() - began
        return {
            "iteration": self.state.iteration,
            **sums.losses(),
            **(balance(self.feed.total // self.feed.micro) if balanced else {}),
            "clipped samples": sums.clipped,
            "skipped steps": int(not stepped),
            "grad norm": float(grad_norm or 0.0),
            "learning-rate": lr,
            "iteration-time": seconds,
            "data-time": batches.seconds,
            **self._speed(sums.all_tokens / seconds),
            "memory GB": memory(),
        }

    def _speed(self, tokens: float) -> dict[str, float]:
        """Tokens a second of the run, and what each of its devices computes for them."""
        flops = tokens * self.flops / dist.get_world_size()
        return {"tokens/s": tokens, "TFLOP/s": flops / TERA, "MFU": flops / self.peak}

    @cached_property
    def peak(self) -> float:
        """Operations a second that a device can do at most."""
        if self.around["peak_tflops"]:
            return float(self.around["peak_tflops"]) * TERA
        return measured_peak(self.model[0].config.params_dtype, torch.device(torch.cuda.current_device()))


def _asked(saving: Saves | None) -> bool:
    """Whether any rank was asked to stop; where one could not write a save, all of them end."""
    asked, failed = signals.agreed(saving is not None and saving.look())
    if saving is not None and failed:
        saving.settle()
    return asked


class Sums(NamedTuple):
    """Of all ranks' micro-batches."""

    loss: float
    tokens: float
    picture_loss: float
    picture_tokens: float
    all_tokens: float
    clipped: float

    def losses(self) -> dict[str, float]:
        """The mean loss of the trained tokens: of all, of sequences with pictures, of those without."""
        text_loss, text_tokens = self.loss - self.picture_loss, self.tokens - self.picture_tokens
        found = {"lm loss": self.loss / max(self.tokens, 1.0), "loss tokens": self.tokens}
        if self.picture_tokens:
            found["img lm loss"] = self.picture_loss / self.picture_tokens
            if text_tokens:
                found["txt lm loss"] = text_loss / text_tokens
        return found


def _sums(reduced: list[dict[str, Tensor]]) -> Sums:
    """The sums of all ranks; only the last stage has any."""
    if not reduced:
        return Sums(*[0.0] * len(Sums._fields))
    total = torch.stack([found["lm loss"] for found in reduced]).sum(dim=0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return Sums(*total.tolist())
