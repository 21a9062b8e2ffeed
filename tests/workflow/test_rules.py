"""Rules are thin: names, files, one command."""

import re
from pathlib import Path

from plait.config.jobs import RULES

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT / "Snakefile", *sorted((ROOT / "workflow").rglob("*.smk"))]
RULE = re.compile(r"^(?:rule|checkpoint) (\w+):\n((?:    .*\n|\n(?=    ))*)", re.MULTILINE)


def rules():
    for source in SOURCES:
        for name, body in RULE.findall(source.read_text()):
            if name not in {"all", "unmade", "prefetch"}:
                yield name, body


def test_every_rule_has_a_log_a_benchmark_and_one_command():
    found = dict(rules())

    assert len(found) == 24
    for name, body in found.items():
        assert body.count("    log:\n") == body.count("    benchmark:\n") == 1, name
        command = r"^    shell:\n        (HUGE_PAGES\n        \+ \" |\")(plait|ln) "
        assert len(re.findall(command, body, re.MULTILINE)) == 1, name
        assert "run:\n" not in body, name
        assert "data/logs/" in body, name
        assert body.startswith('    """'), name


def test_every_rule_asks_a_cluster_in_its_own_name_and_has_a_class():
    for name, body in rules():
        assert body.count(f'        **asks("{name}"),\n') == body.count("asks(") == 1, name
        assert name in RULES, name


def test_rules_are_at_most_twenty_two_lines_and_their_docstring():
    for name, body in rules():
        lines = [line for line in body.splitlines() if line.strip() and '"""' not in line]
        assert len(lines) + 1 <= 22, name


def test_rules_share_at_most_twelve_functions():
    helpers = (ROOT / "workflow/common.smk").read_text()

    assert len(re.findall(r"^def ", helpers, re.MULTILINE)) <= 12
    for source in SOURCES:
        if source.name != "common.smk":
            assert "def " not in source.read_text()
            assert "lambda" not in source.read_text()
