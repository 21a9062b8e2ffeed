"""The snippet of every model card, run as a reader of it would: in the export, beside a picture."""

import os
import shutil
import subprocess
import sys

import pytest
from folders import tokenizer_folder
from makers import made
from PIL import Image

from plait import files
from plait.convert.export import _card
from plait.models.build import build
from plait.models.specs import Spec
from plait.tokens.templates import chat_template


@pytest.fixture(scope="module")
def talking(maker):
    """SOLO over a tokenizer with vision and chat tokens."""
    tokenizer = tokenizer_folder(maker.root / "talking", vision=True, chatml=True)
    source = {"kind": "solo", "base": "b", "tokenizer": "t", "patch_size": 4}
    return made(maker.root / "solo-talking", "hf_model", lambda f: build(f, source, [maker.hf(), tokenizer]))


KINDS = {
    "chat": (lambda maker, _: maker.hf(), "chatml", False, "text-generation"),
    "solo": (lambda maker, _: maker.solo(), "pretrain", True, "image-text-to-text"),
    "solo, chatting": (lambda _, talking: talking, "chatml", True, "image-text-to-text"),
    "llava": (lambda maker, _: maker.llava(), "llava", False, "image-text-to-text"),
    "llava, a projector of its own size": (
        lambda maker, _: maker.llava("wide", projector_hidden_size=24),
        "llava",
        True,
        "image-text-to-text",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_cards_snippet_runs(maker, talking, tmp_path, kind):
    source, template, trusts, task = KINDS[kind]
    folder = shutil.copytree(source(maker, talking), tmp_path / "export")
    text = chat_template(template)
    if text is not None:
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    card = _card(folder, Spec.of(folder), "iter_0000007", recipe="any", template=text or "")
    Image.radial_gradient("L").resize((20, 14)).convert("RGB").save(folder / "picture.png")
    snippet = card.partition("```python\n")[2].partition("```")[0]

    offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", snippet],
        cwd=folder,
        env={**os.environ, **offline},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert f"pipeline_tag: {task}" in card
    carries_code = "auto_map" in files.read_json(folder / "config.json")
    assert ("trust_remote_code=True" in snippet) == carries_code == trusts
    assert ("<|im_start|>" in done.stdout) == (template == "chatml")
