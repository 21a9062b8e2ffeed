"""The typed plan: what config/ may say, its defaults, and what follows from it."""

from plait.config.model import Config, load
from plait.config.plan import Plan
from plait.config.schedule import Schedule

__all__ = ["Config", "Plan", "Schedule", "load"]
