"""What a host lacks is said in a line each; the shell's command can be seen, and opens."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait.cli.main import main

ROOT = Path(__file__).parents[2]


def checked(capsys, *words):
    code = main(["env", "check", *words])
    said = capsys.readouterr()
    found = {line[9:25].strip(): (line[:8].strip(), line[26:]) for line in said.out.splitlines()}
    return code, found, said.err


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A folder with a lock of one package, and a PATH with nothing on it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs/cpu.lock").write_text("pytest==1.0\n# a comment\nno-such-package==2.0\n")
    return tmp_path


def test_packages_of_another_version_are_named_and_missing(bare, capsys):
    code, found, error = checked(capsys)

    assert code == 2
    assert found["pytest"] == ("missing", f"{pytest.__version__}, expected 1.0: make env")
    assert found["no-such-package"] == ("missing", "not installed, expected 2.0: make env")
    assert "this host lacks what is needed: pytest, no-such-package" in error


@pytest.mark.parametrize(
    ("need", "names"), [("apptainer", ["apptainer"]), ("slurm", ["sbatch", "srun", "slurmctld"])]
)
def test_what_is_missing_is_an_error_only_where_it_is_needed(need, names, bare, capsys):
    (bare / "envs/cpu.lock").write_text(f"pytest=={pytest.__version__}\n")

    code, found, _ = checked(capsys)
    assert code == 0
    assert all(found[name][0] == "note" for name in names)
    assert found["packages"] == ("ok", "1 as in envs/cpu.lock")

    code, found, error = checked(capsys, need)
    assert code == 2
    assert all(found[name][0] == "missing" for name in names)
    assert all(name in error for name in names)


def test_a_need_that_nobody_has_is_refused(bare, capsys):
    assert main(["env", "check", "docker"]) == 2
    assert "'docker' is no need" in capsys.readouterr().err


def test_a_folder_one_may_not_write_is_missing(bare, capsys):
    if os.getuid() == 0:
        (bare / "data").symlink_to("/proc/sys")  # nobody writes there
    else:
        (bare / "data").symlink_to("/")

    code, found, _ = checked(capsys)

    assert code == 2
    assert found["data"][0] == "missing"


def printed(*words, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "plait.cli.main", "shell", "--print", *words],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.parametrize("words", [("--apptainer", "--image", "x.sif"), ("--docker",), ("--slurm",), ()])
def test_tokens_are_never_in_a_command(words):
    said = printed(*words, HF_TOKEN="hf_secret", WANDB_API_KEY="key_secret")

    assert "secret" not in said
    if words and words[0] == "--docker":
        assert " --env=HF_TOKEN --env=WANDB_API_KEY " in said
    if words and words[0] == "--apptainer":
        assert 'APPTAINERENV_HF_TOKEN="$HF_TOKEN" APPTAINERENV_WANDB_API_KEY="$WANDB_API_KEY" ' in said


def test_slurm_and_apptainer_go_together_and_words_go_to_srun():
    said = printed("--slurm", "--apptainer", "--image", "x.sif", "--", "--partition=gpu", "--gpus=1")

    assert said.endswith("srun --pty --nodes=1 --ntasks=1 --partition=gpu --gpus=1 apptainer shell x.sif")


def test_docker_is_no_way_to_another_node(capsys):
    assert main(["shell", "--docker", "--slurm"]) == 2
    assert "take --apptainer" in capsys.readouterr().err


def test_a_shell_in_an_image_that_is_not_there_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text("images: {gpu: nowhere.sif}\n")

    assert main(["shell", "--apptainer"]) == 2
    assert "images.gpu: nowhere.sif does not exist" in capsys.readouterr().err


def test_a_program_that_is_not_there_is_a_sentence(bare, capsys):
    assert main(["shell", "--docker"]) == 2
    assert "docker is not on PATH" in capsys.readouterr().err
