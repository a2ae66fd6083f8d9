"""What is shipped and what is pinned."""

import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines()]


def test_what_ships_is_every_package_on_disk_and_nothing_else():
    folders = {
        file.parent
        for package in ("dynamics", "models", "sims")
        for file in (ROOT / package).rglob("*.py")
        if "__pycache__" not in file.parts
    }
    found = sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)
    options = dict(PYPROJECT["tool"]["setuptools"]["packages"]["find"])
    # A folder without __init__.py would be no package.
    assert not options.pop("namespaces")
    assert sorted(find_packages(str(ROOT), **options)) == found


@pytest.mark.parametrize("package", ["dynamics", "models", "sims"])
def test_every_file_of_a_package_that_is_no_code_ships(package):
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"][package]
    kept = (file for file in (ROOT / package).rglob("*.*") if "__pycache__" not in file.parts)
    data = [file for file in kept if file.suffix not in ("", ".py")]
    assert data
    assert all(file.parent == ROOT / package for file in data), "patterns are of a package's own folder"
    assert not [file.name for file in data if not any(file.match(pattern) for pattern in patterns)]


def test_the_lock_names_no_address_and_one_version_each():
    assert LOCK
    for pin in LOCK:
        assert pin.url is None
        (specifier,) = pin.specifier
        assert specifier.operator == "=="


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.14.0"])
def test_the_lock_satisfies_every_requirement(python):
    release = python.rsplit(".", 1)[0]
    environment = {**default_environment(), "python_version": release, "python_full_version": python}
    pins = {
        pin.name: next(iter(pin.specifier)).version
        for pin in LOCK
        if pin.marker is None or pin.marker.evaluate(environment)
    }
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["dev"], *extras["xarray"]]:
        needed = Requirement(line)
        applies = needed.marker is None or needed.marker.evaluate(environment)
        if needed.name != project["name"] and applies:
            assert needed.specifier.contains(pins[needed.name]), f"{needed} with {pins[needed.name]} locked"
