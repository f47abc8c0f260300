"""The programs in README.md: those whose first line is a comment with the name of their file."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from families import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
RECIPES = {
    match[1]: block for _, block in BLOCKS if (match := re.match(r"# (\S+\.(?:py|cfg))\n", block))
}
ENDLESS = {
    r"config\.max_new_tokens = \d+": "config.max_new_tokens = 1_000_000; config.ignore_eos = True"
}


def change(source: str, changes: dict[str, str]) -> str:
    """Change lines of a program, as its readers are told to do. Each key is a regex."""
    for old, new in changes.items():
        source, count = re.subn(old, lambda _, new=new: new, source)
        assert count == 1, old
    return source


def save(folder: Path, *names: str, changes: dict[str, str] | None = None) -> dict[str, str]:
    """Save recipes as a reader does; return an environment to run them in. Change the last one.

    They run in the folder of the repository, which has the script and the models that they load.
    """
    for name in names:
        source = change(RECIPES[name], changes or {}) if name == names[-1] else RECIPES[name]
        (folder / name).write_text(source, encoding="utf-8")
    path = os.pathsep.join([str(folder), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}


def import_recipe(name: str, folder: Path, changes: dict[str, str] | None = None):
    save(folder, name, changes=changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        sys.modules.pop(name.removesuffix(".py"), None)
        return importlib.import_module(name.removesuffix(".py"))


def run(folder: Path, name: str, changes: dict[str, str] | None = None) -> str:
    """Run a recipe as a program, and return what it prints."""
    environment = save(folder, name, changes=changes)
    process = run_program(folder / name, environment=environment)
    assert process.returncode == 0, process.stderr
    return process.stdout


def run_program(
    *arguments: object, seconds: int = 100, environment: dict | None = None
) -> subprocess.CompletedProcess:
    """Run Python in a process of its own, that may freeze, with these arguments."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=seconds,
        check=False,
    )


def read_terminal(terminal: int) -> Iterator[bytes]:
    """Yield what a program writes to a pseudo-terminal, until it has gone."""
    with contextlib.suppress(OSError):  # By which some systems say so.
        while part := os.read(terminal, 10_000):
            yield part
