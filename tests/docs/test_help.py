"""Every command explains itself, fast."""

import re
import subprocess
import sys

import pytest

from plait.cli.main import STAGES, TOOLS, parser
from plait.config.plan import VERSIONS


@pytest.mark.parametrize("stage", [*STAGES, *TOOLS])
def test_help_ends_with_an_example_that_the_command_understands(stage, capsys):
    with pytest.raises(SystemExit) as end:
        parser().parse_args([stage, "--help"])
    examples = re.split(r"\n  (?=plait )", capsys.readouterr().out.partition("example:\n")[2].strip())

    assert end.value.code == 0
    assert examples
    for words in map(str.split, examples):
        assert words[:2] == ["plait", stage]
        assert parser().parse_args(words[1:]).run.__module__ == f"plait.cli.{stage}"


def test_help_lists_every_stage(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    said = capsys.readouterr().out

    assert all(f"\n    {stage}  " in said for stage in (*STAGES, *TOOLS))
    assert set(STAGES) == set(VERSIONS)


def test_the_command_line_loads_no_library():
    code = "import sys; from plait.cli.main import parser; before = set(sys.modules); parser(); "
    code += "print(*{name.partition('.')[0] for name in sys.modules.keys() - before})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)

    assert set(done.stdout.split()) <= {"plait", *sys.stdlib_module_names}
