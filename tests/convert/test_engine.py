"""Laws of conversion on tiny checkpoints."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import grids, spec_of, specs, tiny_checkpoints, weights

from plait.convert import engine, forms, tables
from plait.convert.ops import COLUMN, ROW, VOCAB, Column, FuseGateUp, FuseQKV, Part
from plait.errors import CheckpointError, ConfigError
from plait.models.weights import merkle
from plait.parallel.grid import Grid


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def cut_all(mcore, spec, grid):
    return {(tp, pp): dict(engine.cut(mcore, spec, grid, tp, pp)) for tp, pp in grid}


@given(tiny_checkpoints())
def test_hf_to_shards_and_back_is_the_identity(case):
    mcore = engine.to_mcore(case.hf, case.spec)
    ranks = cut_all(mcore, case.spec, case.grid)

    back = engine.to_hf(engine.join(ranks, case.spec, case.grid), case.spec)

    assert equal(dict(back), case.hf)
    assert merkle(back) == merkle(case.hf)


def filled(held, hf):
    """A tensor from its boxes, by plain indexing."""
    rows = np.zeros(held.matrix, dtype=np.float64)
    for p in held.pieces:
        box = (
            hf[p.hf]
            .double()
            .numpy()
            .reshape(len(hf[p.hf]), -1)[p.row : p.row + p.rows, p.col : p.col + p.cols]
        )
        rows[p.at_row : p.at_row + p.rows, p.at_col : p.at_col + p.cols] = box
    return torch.from_numpy(rows.reshape(held.shape))


@given(tiny_checkpoints())
def test_a_cut_of_fused_tensors_is_what_their_cut_parts_fuse_to(case):
    """Round trips forgive a wrong cut that is undone by an equally wrong join; this law does not."""
    spec, tp = case.spec, case.grid.tp
    small = dataclasses.replace(spec, num_key_value_heads=spec.num_key_value_heads // tp)
    experts = ("block_sparse_moe.experts.1.w1", "block_sparse_moe.experts.1.w3")
    attention = [f"model.layers.0.self_attn.{one}_proj.weight" for one in "qkv"]
    names = experts if spec.num_experts else ("mlp.gate_proj", "mlp.up_proj")
    for op, parts in ((FuseQKV(), attention), (FuseGateUp(), [f"model.layers.0.{n}.weight" for n in names])):
        shapes = [tuple(case.hf[name].shape) for name in parts]
        for rank in range(tp):
            pieces = {name: case.hf[name].chunk(tp)[rank] for name in parts}
            cut = op.held(parts, shapes, spec, Part(rank, tp))
            fused = op.held(parts, [tuple(piece.shape) for piece in pieces.values()], small, Part())
            assert torch.equal(filled(cut, case.hf), filled(fused, pieces))


@given(tiny_checkpoints())
def test_fused_tensors_are_laid_out_as_megatron_reads_them(case):
    """Written out head by head, as Megatron's attention and its gated unit split what they multiply."""
    spec = case.spec
    mcore = engine.to_mcore(case.hf, spec)
    size, heads = spec.head_dim, spec.num_attention_heads // spec.num_key_value_heads
    q, k, v = (case.hf[f"model.layers.0.self_attn.{one}_proj.weight"] for one in "qkv")
    expected = []
    for group in range(spec.num_key_value_heads):
        expected += [q[(group * heads + head) * size :][:size] for head in range(heads)]
        expected += [k[group * size :][:size], v[group * size :][:size]]
    assert torch.equal(mcore["decoder.layers.0.self_attention.linear_qkv.weight"], torch.cat(expected))
    if not spec.num_experts:
        gate, up = (case.hf[f"model.layers.0.mlp.{one}_proj.weight"] for one in ("gate", "up"))
        assert torch.equal(mcore["decoder.layers.0.mlp.linear_fc1.weight"], torch.cat((gate, up)))


@given(tiny_checkpoints(), st.sampled_from([COLUMN, ROW, VOCAB, FuseGateUp()]))
def test_a_cut_of_a_cut_is_a_finer_cut(case, op):
    names = ["a", "b"] if isinstance(op, FuseGateUp) else ["a"]
    hf = {name: torch.randn(1024, 8) for name in names}

    def cut(tensors, rank):
        held = op.held(names, [tuple(t.shape) for t in tensors.values()], case.spec, Part(rank, 2, 128))
        return filled(held, tensors)

    halves = [cut(hf, outer) for outer in range(2)]
    if isinstance(op, FuseGateUp):
        parted = [dict(zip(names, half.chunk(2), strict=True)) for half in halves]
    else:
        parted = [{"a": half} for half in halves]
    twice = [cut(one, inner) for one in parted for inner in range(2)]

    shapes = [tuple(t.shape) for t in hf.values()]
    once = [filled(op.held(names, shapes, case.spec, Part(rank, 4, 128)), hf) for rank in range(4)]
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))


@given(specs())
def test_every_hf_name_occurs_in_exactly_one_row(spec):
    listed = [name for entry in tables.entries(spec) for name in entry.hf]

    assert sorted(listed) == sorted(spec.shapes)


@given(tiny_checkpoints())
def test_any_grid_leads_to_any_other(case):
    other = Grid(tp=1, pp=case.spec.num_layers)
    mcore = engine.to_mcore(case.hf, case.spec)

    joined = engine.join(cut_all(mcore, case.spec, case.grid), case.spec, case.grid)

    for place in other:
        assert equal(
            dict(engine.cut(joined, case.spec, other, *place)),
            dict(engine.cut(mcore, case.spec, other, *place)),
        )


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_experts_are_dealt_out_in_order_and_all_else_is_held_by_all(ep):
    spec, grid = spec_of(num_experts=4, experts_per_token=2), Grid(tp=2, pp=2)
    hf = weights(spec)
    state = dict(engine.cut(engine.to_mcore(hf, spec), spec, grid, 1, 1))

    dealt = [
        dict(engine.own_experts(state, spec=spec, grid=grid, pp_rank=1, ep_rank=rank, ep=ep))
        for rank in range(ep)
    ]

    place = "decoder.layers.1.mlp.experts.local_experts.{}.linear_fc2.weight"
    for expert in range(4):
        rank, number = divmod(expert, 4 // ep)
        whole = hf[f"model.layers.3.block_sparse_moe.experts.{expert}.w2.weight"]
        assert torch.equal(dealt[rank][place.format(number)], whole.chunk(2, dim=1)[1])
    others = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    for own in dealt:
        assert equal({name: tensor for name, tensor in own.items() if ".experts." not in name}, others)
        assert len(own) == len(others) + 2 * 2 * 4 // ep


# Coverage


@given(tiny_checkpoints())
def test_coverage_counts_what_the_ranks_hold(case):
    ranks = cut_all(engine.to_mcore(case.hf, case.spec), case.spec, case.grid)

    counts = forms.coverage(case.spec, case.grid)

    assert counts["hf_tensors"] == len(case.hf)
    assert counts["hf_elements"] == sum(tensor.numel() for tensor in case.hf.values())
    assert counts["rank_tensors"] == sum(len(state) for state in ranks.values())
    assert counts["rank_elements"] == sum(t.numel() for state in ranks.values() for t in state.values())
    zeros = sum(int((t == 0).sum()) for state in ranks.values() for t in state.values())
    assert counts["padding_elements"] == sum(counts["padded"].values()) == zeros


class Doubled(Column):
    """Rank 1 gets what rank 0 has."""

    def held(self, names, shapes, sizes, part):
        return super().held(names, shapes, sizes, part._replace(rank=0))


class Overlaid(Column):
    """Both tensors are written to the same rows."""

    def held(self, names, shapes, sizes, part):
        held = super().held(names, shapes, sizes, part)
        pieces = tuple(piece._replace(at_row=0) for piece in held.pieces)
        return dataclasses.replace(held, pieces=pieces)


def test_coverage_finds_an_element_that_is_written_twice(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "MistralForCausalLM", _with(tables.MISTRAL, "linear_fc1", Doubled()))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight are lost or written twice"):
        forms.coverage(spec_of(), Grid(tp=2))
    monkeypatch.setitem(tables.TABLES, "MistralForCausalLM", _with(tables.MISTRAL, "linear_fc1", Overlaid()))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight are written over others'"):
        forms.coverage(spec_of(), Grid(tp=2))


def test_coverage_finds_a_row_that_is_missing(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "MistralForCausalLM", tables.MISTRAL[:-1])
    with pytest.raises(CheckpointError, match=r"lm_head.weight is in no row of the table"):
        forms.coverage(spec_of(), Grid())


boxes = st.tuples(*(st.integers(0, 4),) * 2, *(st.integers(1, 4),) * 2)


@given(st.lists(boxes, max_size=6))
def test_elements_are_counted_as_often_as_boxes_cover_them(found):
    size = (9, 9)
    plain = np.zeros(size, dtype=int)
    for row, col, rows, cols in found:
        plain[row : row + rows, col : col + cols] += 1
    expected = {int(n): int((plain == n).sum()) for n in np.unique(plain)}
    assert forms.times_covered(found, size) == expected


def test_a_box_beyond_its_tensor_is_refused():
    with pytest.raises(CheckpointError, match="does not lie in its tensor of 3 x 3"):
        forms.times_covered([(0, 1, 3, 3)], (3, 3))


def _with(table, name, op):
    return tuple(dataclasses.replace(row, op=op) if name in row.mcore else row for row in table)


# Grids and padding


@given(specs().flatmap(lambda spec: st.tuples(st.just(spec), grids(spec))))
def test_padding_is_zeros_behind_the_true_vocabulary(pair):
    spec, grid = pair
    hf = weights(spec)
    rows = torch.cat(
        [
            engine.cut(engine.to_mcore(hf, spec), spec, grid, tp, 0)["embedding.word_embeddings.weight"]
            for tp in range(grid.tp)
        ]
    )

    assert len(rows) % (128 * grid.tp) == 0
    assert len(rows) - spec.vocab_size < 128 * grid.tp
    assert torch.equal(rows[: spec.vocab_size], hf["model.embed_tokens.weight"])
    assert not rows[spec.vocab_size :].any()


def test_seed_9_a_vocabulary_that_divides_is_not_padded():
    for vocab, tp, rows in ((256, 1, 256), (256, 2, 128), (32768, 1, 32768), (33029, 2, 33280 // 2)):
        shapes = engine.rank_shapes(spec_of(vocab_size=vocab), Grid(tp=tp))
        assert shapes["embedding.word_embeddings.weight"][0] == rows, (vocab, tp)
        assert shapes["output_layer.weight"][0] == rows


def test_seed_5_the_patch_projection_is_on_the_first_stage_only():
    spec = spec_of(patch_dim=12)
    for pp in (2, 4):
        grid = Grid(tp=2, pp=pp)
        holders = [place for place in grid if "vision_patch.weight" in engine.rank_shapes(spec, grid, *place)]
        assert holders == [(0, 0), (1, 0)]
        shapes = engine.rank_shapes(spec, grid, 0, 0)
        assert shapes["vision_patch.weight"] == (spec.hidden_size // 2, 12)


def test_layers_of_a_stage_are_numbered_from_0_and_embeddings_stand_at_the_ends():
    spec, grid = spec_of(num_layers=4), Grid(pp=2)
    hf = weights(spec)
    mcore = engine.to_mcore(hf, spec)

    first, last = (dict(engine.cut(mcore, spec, grid, 0, stage)) for stage in range(2))

    assert {name.split(".")[2] for name in last if ".layers." in name} == {"0", "1"}
    assert torch.equal(
        last["decoder.layers.1.mlp.linear_fc2.weight"], hf["model.layers.3.mlp.down_proj.weight"]
    )
    assert "embedding.word_embeddings.weight" in first.keys() - last.keys()
    assert {"decoder.final_layernorm.weight", "output_layer.weight"} <= last.keys() - first.keys()


@pytest.mark.parametrize(
    ("change", "grid", "sentence"),
    [
        ({"num_key_value_heads": 1}, Grid(tp=2), "1 query groups do not divide among 2 tensor ranks"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, Grid(tp=2), "3 query groups do not divide"),
        ({"intermediate_size": 25}, Grid(tp=2), "25 features do not divide among 2"),
        ({"num_layers": 3}, Grid(pp=2), "3 layers do not divide into 2 pipeline stages"),
    ],
)
def test_a_grid_that_cannot_hold_a_model_is_refused_by_a_sentence(change, grid, sentence):
    with pytest.raises(ConfigError, match=sentence):
        engine.rank_shapes(spec_of(**change), grid)


def test_copies_of_a_norm_that_differ_are_refused_by_name():
    spec, grid = spec_of(), Grid(tp=2)
    ranks = cut_all(engine.to_mcore(weights(spec), spec), spec, grid)
    ranks[1, 0]["decoder.layers.2.input_layernorm.weight"] = torch.zeros(16)

    with pytest.raises(
        CheckpointError, match=r"decoder.layers.2.input_layernorm.weight: tensor ranks hold diff"
    ):
        dict(engine.join(ranks, spec, grid))


@settings(max_examples=20)
@given(tiny_checkpoints(), st.data())
def test_the_merkle_root_sees_every_byte_name_shape_and_type(case, data):
    name = data.draw(st.sampled_from(sorted(case.hf)))
    root = merkle(case.hf)
    other = {**case.hf, name: case.hf[name].clone()}

    other[name].flatten()[-1] += 1
    assert merkle(other) != root
    assert merkle({**case.hf, name: case.hf[name].flatten()[None]}) != root
    assert merkle({("x" if key == name else key): value for key, value in case.hf.items()}) != root
    assert merkle(dict(reversed(case.hf.items()))) == root
