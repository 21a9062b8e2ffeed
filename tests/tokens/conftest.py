from pathlib import Path

import pytest
from tokenizer_folders import ADDED, PACKAGE, make


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    """The default plan's tokenizers: base, solo (33,031 tokens), chatml (32,002)."""
    root = tmp_path_factory.mktemp("tokenizers")
    base = make(root / "base", PACKAGE)
    extended = {name: {"kind": "extend", "base": "base", "add": add} for name, add in ADDED.items()}
    return {"base": base} | {name: make(root / name, source, base) for name, source in extended.items()}
