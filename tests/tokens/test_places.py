"""Where each text begins among the tokens of a whole, for tokenizers that add and take away spaces.

gigatoken gives no places. They follow from the bytes of tokens, but not where spaces come and go beside
added tokens.
"""

import json
import random

import numpy as np
import pytest

from plait.tokens import encode

PARTS = (
    "<s>", "</s>", "[INST] ", " [/INST]", " Hello", " ", "  ", "\n", "a", "日本", "\U0001f600",
    "<|im_start|>user\n", "<|im_end|>\n", "<|im_end|>", "", "word", "don't", "\t", " <s>", "</s> ", "e\u0301",
)  # fmt: skip
STRIPPING = ("</s>", "<|im_end|>")


def described(folder, scheme, **keys):
    """A tokenizer with spaces by a scheme, and added tokens that take those beside them."""
    content = json.loads((folder / encode.FAST).read_text())
    content["pre_tokenizer"]["prepend_scheme"] = scheme
    for token in content["added_tokens"]:
        token.update(keys if token["content"] in STRIPPING else {})
    return content


@pytest.mark.parametrize("specials", [True, False])
@pytest.mark.parametrize("keys", [{}, {"rstrip": True}, {"lstrip": True}], ids=["none", "behind", "before"])
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_places_are_those_of_tokenizers(tokenizers, tmp_path, scheme, keys, specials):
    content = described(tokenizers["chatml"], scheme, **keys)
    (tmp_path / encode.FAST).write_text(json.dumps(content))
    slow = encode.Slow(tmp_path, specials=specials)
    fast, draw = encode.Fast(content, slow), random.Random(5)
    documents = [
        ["".join(draw.choices(PARTS, k=draw.randint(0, 4))) for _ in range(draw.randint(1, 6))]
        for _ in range(300)
    ]
    for texts, first, second in zip(documents, fast.whole(documents), slow.whole(documents), strict=True):
        assert np.array_equal(first[0], second[0]), texts
        assert first[1] == second[1], texts


@pytest.mark.parametrize(
    ("scheme", "keys"), [("first", {"rstrip": True}), ("first", {"lstrip": True}), ("always", {})]
)
def test_places_that_are_not_understood_are_found_when_a_tokenizer_is_made(
    tokenizers, tmp_path, monkeypatch, scheme, keys
):
    (tmp_path / encode.FAST).write_text(json.dumps(described(tokenizers["chatml"], scheme, **keys)))
    slow = encode.Slow(tmp_path, specials=True)
    assert not encode._compared(slow, slow.samples())[1]
    monkeypatch.setattr(encode.Fast, "_unclear", lambda *_: False)
    assert "gigatoken gives other ids" in encode._compared(slow, slow.samples())[1]
