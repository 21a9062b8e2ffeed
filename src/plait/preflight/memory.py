"""How much memory each rank of a run takes, by what Megatron Core allocates.

Weights, gradients and the optimizer's state follow from the sizes of a rank's parameters, to the byte.
Activations are counted as in Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
Transformer Models" (section 4): each tensor that the backward pass needs, for each layer and each
micro-batch that is under way; here for layers of Mistral, Llama and Qwen without fused kernels. What is left
out: buffers of NCCL and of kernels, fragments, the driver. They take 1 to 3 GB more on a GPU.

S = tokens of a sequence, s = those of a rank (S / context parallel size), b = sequences of a micro-batch,
e = bytes of a value, t = tensor parallel size.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from plait.config.run import SCORED_TOKENS, attends_by_documents
from plait.models.specs import Spec
from plait.models.towers import Tower
from plait.parallel.grid import Grid
from plait.preflight.ranks import Rank
from plait.tokens.vocabulary import padded_vocab_size

GIGA = 1e9
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FULL = 4
"""Bytes of a gradient, of a master weight and of each moment: all are fp32."""
ALIGNED, BUCKET_ALIGNED = 64, 128
"""Where Megatron's distributed optimizer lets a parameter and a bucket begin, in elements."""
BUCKET = 40_000_000
"""Elements of a bucket at least, where gradients are reduced while others are computed."""
ROWS = ("weights", "gradients", "masters", "moments", "activations", "recomputed", "logits")


@dataclass(frozen=True)
class Run:
    """What of a run decides its memory.

    Attributes:
        settings: the run's settings.
        grid: its grid.
        copies: data parallel size.
        sequence: S.
        gpu: whether kernels are those of a GPU: their dropouts keep a byte of each value, their attention no
            scores, their rotation cosines and sines of queries and of keys.
    """

    settings: Mapping[str, Any]
    grid: Grid
    copies: int
    sequence: int
    gpu: bool = True

    @property
    def size(self) -> int:
        """Bytes of a value, e."""
        return BYTES[self.settings["params_dtype"]]

    @property
    def cp(self) -> int:
        """Ranks that share a sequence."""
        return int(self.settings["context_parallel_size"])

    @property
    def micro_batches(self) -> int:
        """Of an iteration, for each copy."""
        return int(self.settings["global_batch_size"] // (self.settings["micro_batch_size"] * self.copies))

    @property
    def chunks(self) -> int:
        """Chunks of layers that a stage is cut into."""
        return int(self.settings["virtual_pipeline_model_parallel_size"] or 1)

    def waiting(self, stage: int) -> Iterator[tuple[int, ...]]:
        """How many passes of each chunk wait to go backward, whenever a stage has gone forward once more.

        By 1F1B; with several chunks by Megatron's interleaved form of it, which goes forward by as many
        micro-batches of a chunk as there are stages, then by those of the next, and backward from the last.
        """
        chunks, stages = self.chunks, self.grid.pp
        later = stages - stage - 1
        ahead = later if chunks == 1 else 2 * later + (chunks - 1) * stages
        group = [chunk for chunk in range(chunks) for _ in range(stages if chunks > 1 else 1)]
        order = group * (self.micro_batches * chunks // len(group))
        counts = [0] * chunks
        for number, chunk in enumerate(order):
            counts[chunk] += 1
            yield tuple(counts)
            if number >= ahead:
                counts[chunks - 1 - order[number - ahead]] -= 1


def estimate(chunks: Sequence[Rank], spec: Spec, run: Run) -> dict[str, float]:
    """Bytes of a rank at its fullest, by :data:`ROWS`; its chunks are given."""
    parts = [static(one, run) for one in chunks]
    found = {row: sum(part[row] for part in parts) for row in parts[0]}
    found |= activations(chunks[0].pp, spec, run)
    return {row: found[row] for row in ROWS}


def worst(ranks: Iterable[Rank], spec: Spec, run: Run) -> tuple[Rank, dict[str, float]]:
    """The rank that needs most, and what it needs; of several chunks the first is given."""
    places: dict[tuple[int, int, int], list[Rank]] = {}
    for one in ranks:
        places.setdefault(one.place, []).append(one)
    found = [(chunks[0], estimate(chunks, spec, run)) for chunks in places.values()]
    return max(found, key=lambda one: sum(one[1].values()))


# Weights, gradients, optimizer


def static(rank: Rank, run: Run) -> dict[str, float]:
    """Bytes of a chunk that stay: weights, gradients in fp32, fp32 masters and the optimizer's moments.

    With a distributed optimizer the copies, and the ranks that share sequences, have a part each of masters
    and moments; the mean of them is given. Trained weights are then views of a padded buffer.
    """
    settings = run.settings
    shares = run.copies * run.cp
    dense = _optimized(rank, run, shares, experts=False)
    expert = _optimized(rank, run, shares // int(settings.get("expert_model_parallel_size", 1)), experts=True)
    found = {row: dense[row] + expert[row] for row in dense}
    return {**found, "weights": found["weights"] + rank.kept * run.size}


def _optimized(rank: Rank, run: Run, shares: int, *, experts: bool) -> dict[str, float]:
    """Bytes of the trained parameters that have one optimizer, shared by so many ranks."""
    settings, sizes = run.settings, rank.trained(experts=experts)
    distributed = settings["use_distributed_optimizer"]
    trained, buffer = sum(sizes), sum(sizes)
    if distributed:
        overlaps = settings["overlap_grad_reduce"] and rank.stage(run.grid) == 0
        bucket = max(BUCKET, 1_000_000 * run.copies * run.cp) if overlaps else None
        buffer = padded(sizes, shares, bucket)
    own = trained / (shares if distributed else 1) * _on_device(settings)
    return {
        "weights": float(buffer * run.size),
        "gradients": float(buffer * FULL),
        "masters": own * FULL if run.size < FULL else 0.0,
        "moments": own * FULL * _moments(settings),
    }


def _on_device(settings: Mapping[str, Any]) -> float:
    """The part of the optimizer's state that is not moved to the host."""
    moved = settings["optimizer_offload_fraction"] if settings["optimizer_cpu_offload"] else 0.0
    return 1.0 - float(moved)


def _moments(settings: Mapping[str, Any]) -> int:
    return 2 if settings["optimizer"] == "adam" else int(settings["sgd_momentum"] > 0)


def padded(sizes: Sequence[int], shares: int, bucket: int | None = None) -> int:
    """Elements of the buffer that Megatron lays parameters in for a distributed optimizer, last one first.

    >>> padded([100, 10], 2)
    256

    Args:
        sizes: elements of each.
        shares: ranks that share it.
        bucket: elements from which a bucket is full; None: there is one bucket.
    """
    step = math.lcm(shares, BUCKET_ALIGNED)
    begun = end = 0
    for size in reversed(sizes):
        end = _up(end, ALIGNED) + size
        if bucket is not None and end - begun >= bucket:
            begun = end = _up(end, step)
    return _up(end, step)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


# Activations


@dataclass(frozen=True)
class Layer:
    """The sizes that a layer's activations follow from, whole, and on how many values each rank works.

    Attributes:
        hidden, query, key, inner: D, O, K and F.
        heads: attention heads.
        gated: whether the feed-forward part has a gate.
        rotary: size of a head whose angles are kept, 0 where there are none.
        mask: bytes that a dropout keeps of each value.
        own: s x b, tokens of a rank.
        seen: S, keys that each of them sees.
        batch: b.
        tp: t.
        parted: t where norms are shared by sequence, else 1.
        size: e.
        drops: whether hidden states and attention are dropped out.
        experts: experts that each token is sent to, 0 where there are none. They are taken as used evenly.
        heads_normed: whether queries and keys have norms of their own.
        masked: whether attention has a mask of every token; another kernel is told of documents.
        weighed: whether attention keeps the weight of every key for every query; a kernel that does not
            keeps a sum for each query, and repeats no keys.
        gates: widths of ``inner`` that a gated product keeps: both halves, the opened gate, the product; and
            a copy of the half that is let through, where Megatron adds its offset.
        angles: cosines and sines that queries and keys keep of each angle; none where layers share them.
        scored: tokens side by side whose scores are kept where attention is computed by documents, 0 where
            a kernel computes it. As many are counted, though shorter documents have fewer; masks in numbers
            too, as of one document.
    """

    hidden: int
    query: int
    key: int
    inner: int
    heads: int
    gated: bool
    rotary: int
    mask: int
    own: int
    seen: int
    batch: int
    tp: int
    parted: int
    size: int
    drops: tuple[bool, bool] = field(default=(False, False))
    experts: int = 0
    heads_normed: bool = False
    masked: bool = True
    weighed: bool = True
    gates: int = 5
    angles: int = 4
    scored: int = 0

    @property
    def passed(self) -> float:
        """A hidden state, as it is passed from layer to layer."""
        return self.own * self.hidden * self.size / self.parted

    @property
    def projected(self) -> float:
        """Queries, keys and values as they come out of one product: while a part is kept, all of it is."""
        return self.own * (self.query + 2 * self.key) * self.size / self.tp

    @property
    def viewed(self) -> float:
        """The same, where norms of heads have not kept it already."""
        return 0.0 if self.heads_normed else self.projected

    @property
    def of_heads(self) -> float:
        """What norms of heads keep: their keys within all of it, queries cut out of groups, and sums."""
        cut = self.query * self.size * (self.key < self.query)
        sums = FULL * (self.query + self.key) / max(self.rotary, 1)
        return self.heads_normed * (self.projected + self.own * (cut + sums) / self.tp)

    @property
    def scores(self) -> float:
        """Attention's weights in fp32 as softmax gives them, and in the run's type; a mask if some drop.

        A kernel that keeps none has its mask in numbers.
        """
        if self.weighed:
            each = FULL + (self.size if self.size < FULL else 0) + (self.mask + self.size) * self.drops[1]
            return self.own * self.seen * self.heads / self.tp * each
        return self.own * (self.heads / self.tp * FULL + self.seen * self.size * self.masked)

    @property
    def attention(self) -> float:
        """Queries, and keys and values of the whole sequence, one a query head where weighed; scores."""
        queries = self.own * self.query * self.size / self.tp
        if self.scored:
            weights = self.own * min(self.scored, self.seen) * self.heads * self.size / self.tp
            return 3 * queries + weights
        if not self.masked:
            return queries + self.viewed + self.scores
        each = self.query if self.weighed else self.key
        keys = self.batch * self.seen * each * self.size / self.tp
        copied = self.key < each or self.own < self.batch * self.seen
        return queries + keys + (keys if copied else self.viewed) + self.scores

    @property
    def recalled(self) -> float:
        """What selective recomputation keeps in place of :attr:`attention`: its inputs."""
        return self.own * (self.query + self.key) * self.size / self.tp + self.viewed

    @property
    def outside(self) -> float:
        """All but attention: inputs of norms and linears, rotary angles, gates, dropout masks."""
        context = self.own * self.query * self.size / self.tp
        angles = self.angles * self.own * self.rotary * self.size
        inner = self.own * self.inner * self.size / self.tp * (self.gates if self.gated else 2)
        if self.experts:
            inner = self.experts * (inner + 2 * self.own * self.hidden * self.size)
        masks = 2 * self.passed / self.size * self.mask * self.drops[0]
        return 4 * self.passed + self.of_heads + context + angles + inner + masks

    @property
    def whole(self) -> float:
        """Everything."""
        return self.outside + self.attention


def language_layer(spec: Spec, run: Run) -> Layer:
    """A layer of the language model."""
    settings = run.settings
    tp = run.grid.tp
    return Layer(
        hidden=spec.hidden_size,
        query=spec.query_size,
        key=spec.key_size,
        inner=spec.intermediate_size,
        heads=spec.num_attention_heads,
        gated=True,
        rotary=spec.head_dim,
        mask=1 if run.gpu else run.size,
        own=run.sequence // run.cp * settings["micro_batch_size"],
        seen=run.sequence,
        batch=settings["micro_batch_size"],
        tp=tp,
        parted=tp if settings["sequence_parallel"] else 1,
        size=run.size,
        drops=(settings["hidden_dropout"] > 0, settings["attention_dropout"] > 0),
        experts=spec.experts_per_token,
        heads_normed=spec.qk_norm,
        masked=not attends_by_documents(settings),
        weighed=_weighs(settings),
        gates=5 if spec.num_experts or settings["transformer_impl"] != "local" else 4,
        angles=4 if run.gpu else 0,
        scored=0 if run.gpu or run.cp > 1 or _weighs(settings) else SCORED_TOKENS,
    )


def _weighs(settings: Mapping[str, Any]) -> bool:
    """Whether attention keeps weights: some are dropped, or Transformer Engine has a mask of tokens."""
    if settings["transformer_impl"] == "transformer_engine":
        return not attends_by_documents(settings)
    return bool(settings["attention_dropout"] > 0)


def tower_layer(tower: Tower, run: Run) -> Layer:
    """A layer of a vision tower, with a picture for each sequence of a micro-batch."""
    pictures = run.settings["micro_batch_size"]
    width = tower.hidden_size
    return Layer(
        hidden=width,
        query=width,
        key=width,
        inner=tower.intermediate_size,
        heads=tower.num_attention_heads,
        gated=False,
        rotary=0,
        mask=0,
        own=tower.positions * pictures,
        seen=tower.positions,
        batch=pictures,
        tp=run.grid.tp,
        parted=1,
        size=run.size,
    )


def activations(stage: int, spec: Spec, run: Run) -> dict[str, float]:
    """Bytes that a stage keeps between forward and backward, computes again at once, and has as logits."""
    layer = language_layer(spec, run)
    layers = len(run.grid.interleaved(run.chunks).layers(stage, num_layers=spec.num_layers))
    kept, again = _recomputed(layer, layers, run.settings)
    read_again = layer.masked and (layer.weighed or run.settings["recompute_granularity"] is not None)
    mask = layer.own * layer.seen * (read_again + layer.size * (layer.scored > 0))
    angles = layer.own * layer.rotary * (FULL + (0 if run.gpu else layer.size))
    each, sight = kept + mask + angles, _sight(spec, run) if stage == 0 else 0.0
    held = max(each * sum(passes) + sight * passes[0] for passes in run.waiting(stage))
    last = stage == run.grid.pp - 1
    vocabulary = padded_vocab_size(spec.vocab_size, layer.tp) // layer.tp
    logits = layer.own * vocabulary * (FULL + (layer.size if layer.size < FULL else 0))
    return {
        "activations": held + 2 * layer.passed * last,
        "recomputed": again,
        "logits": float(logits * last),
    }


def _recomputed(layer: Layer, layers: int, settings: Mapping[str, Any]) -> tuple[float, float]:
    """Bytes that the layers of a chunk keep of a micro-batch, and those that are computed again at once."""
    granularity, number = settings["recompute_granularity"], settings["recompute_num_layers"] or 0
    if granularity == "selective":
        return layers * (layer.outside + layer.recalled), layer.attention
    if granularity == "full" and settings["recompute_method"] == "uniform":
        return -(-layers // number) * layer.passed, min(number, layers) * layer.whole
    if granularity == "full":
        again = min(number, layers)
        return again * layer.passed + (layers - again) * layer.whole, layer.whole * (again > 0)
    return layers * layer.whole, 0.0


def _sight(spec: Spec, run: Run) -> float:
    """What SOLO's patches, at most one a token, or a tower and a projector keep on the first stage."""
    tokens = run.sequence * run.settings["micro_batch_size"]
    if spec.vision is None or spec.projector is None:
        return float(tokens * spec.patch_dim * run.size)
    layer = tower_layer(spec.vision, run)
    frozen = "vision_model" in run.settings["freeze"]
    features = spec.vision.tokens * run.settings["micro_batch_size"]
    inner = 2 * spec.projector.hidden_size / run.grid.tp
    projected = features * (spec.vision.hidden_size + inner) * run.size
    return float(projected) + (0.0 if frozen else spec.vision.used_layers * layer.whole)
