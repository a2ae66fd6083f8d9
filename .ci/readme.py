"""Renews the table of simulations in README.md."""

import re
import subprocess
import sys
from pathlib import Path

TABLE = re.compile(r"(<!-- python -m sims list --markdown -->\n).*?(?=<!-- end -->)", re.DOTALL)

readme = Path("README.md")
command = [sys.executable, "-m", "sims", "list", "--markdown"]
table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
readme.write_text(
    TABLE.sub(lambda match: match[1] + table, readme.read_text(encoding="utf-8")), encoding="utf-8"
)
