"""A run that the config has lost, as its manifests know it."""

import shlex
from pathlib import Path
from typing import Any

from plait.errors import DataError
from plait.files import canonical, read_manifest
from plait.layout import MANIFEST, Iteration


def remembered(run: str) -> str:
    """How the newest checkpoint of a run can be exported without a config; empty where there is none.

    Its manifest names what it was made from, and their manifests what those were: by that chain its
    Hugging Face model and the template of its conversations are found.
    """
    saved = sorted(Path("data/ckpts", run).glob(f"iter_*/{MANIFEST}"))
    if not saved:
        return ""
    newest = saved[-1].parent
    if read_manifest(newest).get("adopted"):
        return f"{newest} was adopted, and nothing says of what model: bring its entry in runs back"
    try:
        settings = _export_settings(newest)
        hf = _origin(newest, "hf_model")
    except (DataError, LookupError):
        return f"{newest} stands, and what it was made from does not: bring its entry in runs back"
    target = str(Iteration.parse(str(newest)).export)
    words = ["plait", "export", hf, str(newest), target, "--settings", canonical(settings)]
    return f"bring its entry in runs back, or export what stands: {shlex.join(words)}"


def _export_settings(iteration: Path) -> dict[str, Any]:
    analysis = _origin(iteration, "analysis")
    known = read_manifest(analysis)["settings"]
    form = known.get("format") or read_manifest(_origin(Path(analysis), "indexed"))["settings"]["format"]
    recipe = read_manifest(iteration)["settings"]["recipe"]
    return {"recipe": recipe, "template": form["template"]}


def _origin(artifact: Path, kind: str) -> str:
    """The nearest artifact of a kind that this one was made from, by way of others.

    Raises:
        DataError: a manifest on the way is not there.
        LookupError: it was made from no such artifact.
    """
    waiting = [*read_manifest(artifact)["inputs"]]
    while waiting:
        path: str = waiting.pop(0)
        if Path(path).suffix:
            continue
        manifest = read_manifest(path)
        if manifest["kind"] == kind:
            return path
        waiting += manifest["inputs"]
    raise LookupError(f"{artifact} was made from no {kind}")
