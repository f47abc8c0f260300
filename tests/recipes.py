"""The programs in README.md: those whose first line is a comment with the name of their file."""

import os
import re
import subprocess
import sys
from pathlib import Path

from families import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
RECIPES = {
    block.splitlines()[0].removeprefix("# "): block
    for language, block in BLOCKS
    if language == "python"
}
ENDLESS = {
    "config.max_new_tokens = 500": "config.max_new_tokens = 1_000_000; config.ignore_eos = True"
}


def save(folder: Path, *names: str, changes: dict[str, str] | None = None) -> dict[str, str]:
    """Save recipes as a reader does, changed if so told; return an environment to run them in.

    They run in the folder of the repository, which has the script and the models that they load.
    """
    for name in names:
        source = RECIPES[name]
        for old, new in (changes or {}).items():
            source = source.replace(old, new)
        (folder / name).write_text(source, encoding="utf-8")
    path = os.pathsep.join([str(folder), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}


def run(folder: Path, name: str, changes: dict[str, str] | None = None) -> str:
    """Run a recipe as a program, and return what it prints."""
    return run_program(folder / name, save(folder, name, changes=changes), check=True).stdout


def run_program(path: Path, environment: dict, check=False) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
        check=check,
    )
