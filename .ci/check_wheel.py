"""Check that a wheel holds the three packages as they lie in this checkout, and nothing else.

Usage: python .ci/check_wheel.py WHEEL
"""

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(wheel: str) -> int:
    """Print what is missing or should not be there; 0 when nothing is."""
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    there = {
        file.relative_to(ROOT).as_posix()
        for package in ("dynamics", "models", "sims")
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    for name in sorted(there - shipped):
        print(f"error: {name} is missing from the wheel", file=sys.stderr)
    for name in sorted(shipped - there):
        print(f"error: {name} must not be in the wheel", file=sys.stderr)
    return int(shipped != there)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
