"""The trainer's own reading and model give, greedily, the tokens that transformers generates."""

import pytest
from greedy import asked, drawn_picture, trained_tokens

from plait.models.specs import Spec
from plait.parallel.grid import Grid
from plait.report import answers
from plait.tokens.llava import LlavaRenderer
from plait.tokens.templates import chat_template
from plait.verify import parity
from plait.verify.ranks import run_ranks  # noqa: F401 - loaded before ranks are forked

STEPS = 6


@pytest.mark.parametrize("grid", [Grid(2, 1), Grid(1, 2)], ids=str)
@pytest.mark.parametrize(("kind", "template"), [("clip", "llava"), ("siglip", "jp_alpaca")])
def test_the_same_picture_and_prompt_give_the_same_greedy_tokens(maker, grid, kind, template, tmp_path):
    source = maker.llava() if kind == "clip" else maker.llava("siglip", tower=maker.tower("siglip"))
    shards = maker.shards(source, grid.tp, grid.pp)
    for path in source.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(chat_template(template), encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(drawn_picture())
    served = answers.Model(tmp_path).ask("what?", str(tmp_path / "picture.png"), max_new_tokens=STEPS)
    expected = [token.id for token in served.tokens]

    form = {"template": template, "instruction": "keep", "language": "ja", "picture_tokens": 9}
    renderer = LlavaRenderer(maker.image, form)
    spec = Spec.of(source)
    sample, load = asked(drawn_picture(), "what?"), parity.Sharded(shards, spec, grid)
    assert trained_tokens(shards, load, grid, renderer, [(sample, expected)]) == [expected]
