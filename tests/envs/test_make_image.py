"""Images built from the recipes and pulled from a registry, for real."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from envs.containers import ROOT, STDLIB, script, small_system
from envs.registries import Registry, served

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def system(scratch):
    if not STDLIB.is_dir():
        pytest.skip("no python3.11 of the system to make an image of")
    folder = small_system(scratch / "system")
    wheel(folder / "wheels")
    (folder / "etc/pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    return folder


@pytest.fixture
def registry(monkeypatch, tmp_path):
    monkeypatch.setenv("APPTAINER_NOHTTPS", "true")
    monkeypatch.setenv("APPTAINER_CACHEDIR", str(tmp_path / "cache"))
    found = Registry()
    with served(found) as found.host:
        yield found


@pytest.fixture
def checkout(commands, tmp_path, monkeypatch):
    """What `make image` needs of a checkout, with a package of the test's own in the lock."""
    folder = tmp_path / "checkout"
    (folder / "envs").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copytree(ROOT / "src", folder / "src")
    (folder / "envs/cpu.lock").write_text("torch==2.13.0\nhello-image==1.0\n")
    # Root here may have lost rights that a build wants; as somebody else it has them in a namespace.
    (tmp_path / "bin").mkdir()
    mapped = f'exec unshare --user --map-root-user --mount {commands}/apptainer "$@"'
    script(tmp_path / "bin/apptainer", mapped)
    folders = [tmp_path / "bin", Path(sys.executable).parent, commands, os.environ["PATH"]]
    monkeypatch.setenv("PATH", ":".join(map(str, folders)))
    return folder


def wheel(folder):
    """A package of one module."""
    folder.mkdir()
    info = "hello_image-1.0.dist-info"
    with zipfile.ZipFile(folder / "hello_image-1.0-py3-none-any.whl", "w") as whole:
        whole.writestr("hello_image.py", "print('hello')\n")
        whole.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: hello-image\nVersion: 1.0\n")
        whole.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        whole.writestr(f"{info}/RECORD", "")


def make_image(folder, *words):
    """`make image` without the environment that it would make first."""
    return subprocess.run(
        ["make", "-o", "env", "image", "IMAGES=cpu", *words],
        cwd=folder, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


def said(image, *words):
    done = subprocess.run(
        ["apptainer", "exec", "--cleanenv", image, *words],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def recipe(host, **more):
    base = f"  base: {host}/small:1\n  given: [torch]\n"
    return f"cpu:\n{base}  expected: {{hello-image: '{more.get('version', '1.')}'}}\n"


def test_make_image_builds_the_recipe_on_the_digest_of_its_base(registry, checkout, system):
    digest = registry.push("small", "1", system)
    (checkout / "envs/images.yaml").write_text(recipe(registry.host))

    done = make_image(checkout)

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"From: {registry.host}/small@{digest}" in (checkout / "envs/cpu.def").read_text()
    image = checkout / "envs/cpu.sif"
    assert said(image, "python", "-c", "import hello_image") == "hello"
    assert said(image, "plait", "--version") == f"plait {importlib.metadata.version('plait')}"
    assert said(image, "python", "-c", "import plait; print(plait.__file__)").startswith("/opt/plait/src/")


def test_an_image_with_a_package_of_another_version_is_none(registry, checkout, system):
    registry.push("small", "1", system)
    (checkout / "envs/images.yaml").write_text(recipe(registry.host, version="2."))

    done = make_image(checkout)

    assert done.returncode == 2
    assert "AssertionError: hello-image" in done.stdout + done.stderr
    assert not (checkout / "envs/cpu.sif").exists()


def test_make_image_pulls(registry, checkout, image, monkeypatch):
    registry.push("plait", "cpu", image)

    done = make_image(checkout, f"PULL=docker://{registry.host}/plait")

    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.setenv("APPTAINER_BIND", "/usr")
    assert "exec /image/bin/python" in said(checkout / "envs/cpu.sif", "cat", "/image/bin/plait")
    assert not list(checkout.glob("envs/*.part"))
