"""What is installed: one top-level name, with the data that the code reads."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, tracked):  # a copy, so that the build writes nothing into the checkout
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return archive.namelist()


def test_the_wheel_has_one_top_level_name(wheel_names: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel_names if ".dist-info" not in name} == {"requant"}


@pytest.mark.parametrize(
    "name",
    [
        "requant/papers/gptq.yaml", "requant/catalog/schema/paper.schema.json", "requant/catalog/vocab/protocols.yaml",
        "requant/reference_impls/evidence/quip.py",
        "requant/reference_impls/parts/rptq_clusters.py",
        "requant/catalog/reference/weights/reference.safetensors",
        "requant/catalog/reference/weights/reference-sink.safetensors",
        "requant/catalog/reference/weights/tokenizer.json",
        "requant/catalog/reference/splits.json",
        "requant/catalog/py.typed",
    ],
    ids=lambda name: name.replace("paper", "entry"),
)  # fmt: skip
def test_the_wheel_holds_the_data_the_code_reads(wheel_names: list[str], name: str) -> None:
    assert name in wheel_names


def test_nothing_else_is_in_the_wheel(wheel_names: list[str]) -> None:
    assert not [name for name in wheel_names if "/tests/" in name or name.endswith((".log", ".pyc"))]


def test_data_is_found_through_the_installed_package() -> None:
    assert (resources.files("requant.papers") / "gptq.yaml").is_file()


def test_the_standard_library_keeps_its_site_module() -> None:
    command = [sys.executable, "-c", "import site; print(site.__file__)"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not Path(found.strip()).is_relative_to(ROOT)


def test_every_dependency_is_pinned() -> None:
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(item for extra in project["optional-dependencies"].values() for item in extra),
    ]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    names = {re.split(r"[\s\[<>=;]", item)[0].lower().replace("_", "-") for item in wanted}
    assert names <= pinned, f"not in constraints.txt: {sorted(names - pinned)}"
