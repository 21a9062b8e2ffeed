"""Digests of bases, from a real server that speaks the registry's routes."""

import json
import shutil
from pathlib import Path

import pytest
from envs.registries import TOKEN, Registry, served

from plait.cli.main import main
from plait.envs.registry import Reference
from plait.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def registry():
    return Registry()


@pytest.fixture
def host(registry):
    with served(registry) as name:
        yield name


@pytest.fixture
def image(tmp_path):
    (tmp_path / "image").mkdir()
    (tmp_path / "image/hello").write_text("hello")
    return tmp_path / "image"


@pytest.mark.parametrize("wants_token", [False, True])
def test_the_digest_of_a_tag_is_what_the_registry_says(wants_token, registry, host, image):
    registry.wants_token = wants_token
    digest = registry.push("nvidia/pytorch", "25.11-py3", image)

    assert Reference.parse(f"{host}/nvidia/pytorch:25.11-py3").digest() == digest
    assert [method for method, path, _ in registry.asked if "/manifests/" in path] == ["HEAD"] * (
        1 + wants_token
    )
    tokens = [path for _, path, _ in registry.asked if path.startswith("/token")]
    assert tokens == ["/token?scope=repository%3Anvidia%2Fpytorch%3Apull&service=loopback"] * wants_token


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (404, ConfigError, "it has no such image or tag"),
        (403, ConfigError, "gives it to nobody without a name"),
        (429, ConfigError, "asked too often"),
        (503, ConfigError, "it answers 503"),
        (307, ConfigError, "it answers 307"),
    ],
)
def test_a_registry_that_gives_nothing_is_a_sentence(status, kind, said, registry, host):
    registry.status = status

    with pytest.raises(kind, match=f"{host} does not give {host}/a/b:c: .*{said}"):
        Reference.parse(f"{host}/a/b:c").digest()
    assert len(registry.asked) == 1


def test_no_token_is_asked_of_a_realm_without_https(registry, host, image):
    registry.push("a/b", "c", image)
    registry.wants_token, registry.realm = True, "http://registry.invalid/token"

    with pytest.raises(DataError, match="not https"):
        Reference.parse(f"{host}/a/b:c").digest()


def test_a_registry_without_digests_or_without_a_server_is_a_sentence(registry, image):
    registry.says_digest = False
    with served(registry) as host:
        registry.push("a/b", "c", image)
        with pytest.raises(DataError, match="gives no sha256"):
            Reference.parse(f"{host}/a/b:c").digest()
    with pytest.raises(DataError, match=r"cannot be asked for .*refused"):
        Reference.parse(f"{host}/a/b:c").digest()


@pytest.mark.parametrize("text", ["python", "docker.io/python", "docker.io/UPPER/x:1", "docker.io/x:1; rm"])
def test_what_is_no_image_is_refused(text):
    with pytest.raises(ConfigError, match="is no image"):
        Reference.parse(text)


def list_of(folder, host):
    folder.mkdir()
    (folder / "images.yaml").write_text(
        f"cpu: {{base: {host}/python:3.11}}\ngpu: {{base: {host}/torch:25}}\n"
    )
    return folder


def test_lock_writes_digests_once_and_recipes_pull_by_them(registry, host, image, tmp_path):
    registry.wants_token = True
    first = {f"{host}/{name}": registry.push(*name.split(":"), image) for name in ("python:3.11", "torch:25")}
    envs = list_of(tmp_path / "envs", host)

    assert main(["env", "lock", "--folder", str(envs)]) == 0
    assert json.loads((envs / "images.lock.json").read_text()) == first
    assert f"From: {host}/torch@{first[f'{host}/torch:25']}\n" in (envs / "gpu.def").read_text()
    assert f"FROM {host}/python@{first[f'{host}/python:3.11']} AS cpu\n" in (envs / "Dockerfile").read_text()
    assert not [path for path in envs.iterdir() if TOKEN in path.read_text()]

    (image / "hello").write_text("the tag moves")
    moved = registry.push("torch", "25", image)
    asked = len(registry.asked)
    assert main(["env", "lock", "--folder", str(envs)]) == 0
    assert len(registry.asked) == asked
    assert json.loads((envs / "images.lock.json").read_text()) == first
    assert main(["env", "lock", "--update", "--folder", str(envs)]) == 0
    assert json.loads((envs / "images.lock.json").read_text())[f"{host}/torch:25"] == moved
    assert moved in (envs / "gpu.def").read_text()


def test_a_lock_that_fails_leaves_what_was(registry, host, image, tmp_path, capsys):
    registry.push("python", "3.11", image)
    envs = list_of(tmp_path / "envs", host)

    assert main(["env", "lock", "--folder", str(envs)]) == 2
    assert f"does not give {host}/torch:25: it has no such image or tag" in capsys.readouterr().err
    assert [path.name for path in envs.iterdir()] == ["images.yaml"]


def test_the_recipes_are_in_step_with_the_list(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    assert main(["env", "render", "--check"]) == 0

    envs = shutil.copytree(ROOT / "envs", tmp_path / "envs", ignore=shutil.ignore_patterns("*.sif*"))
    (envs / "images.yaml").write_text((envs / "images.yaml").read_text().replace("25.11-py3", "25.12-py3"))
    assert main(["env", "render", "--check", "--folder", str(envs)]) == 2
    assert "gpu.def is not what" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpu: {base: python}", "cpu.base: String should match"),
        ("tpu: {base: docker.io/library/python:3}", "tpu"),
        ("cpu: {base: docker.io/library/python:3, run: x}", "cpu.run: Extra inputs"),
        ("cpu: [", "is not YAML"),
    ],
)
def test_a_wrong_list_is_a_sentence(text, said, tmp_path, capsys):
    (tmp_path / "images.yaml").write_text(text)

    assert main(["env", "render", "--folder", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
