"""The typed plan: what config/ may say, its defaults, and what follows from it.

Its names are loaded when they are asked for: a stage that gets its settings as JSON needs no pydantic,
and a thousand small jobs would each wait for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.config.model import Config, load
    from plait.config.plan import Plan
    from plait.config.schedule import Schedule

__all__ = ["Config", "Plan", "Schedule", "load"]

HOMES = {"Config": "model", "Plan": "plan", "Schedule": "schedule", "load": "model"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
