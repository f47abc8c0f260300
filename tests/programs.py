"""The programs in `examples`, which tests run as they stand or change in one place; the pages."""

import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from families import ROOT

EXAMPLES = ROOT / "examples"
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "examples/README.md", "tests/README.md")
}
README = PAGES["README.md"]
BLOCKS = [
    block
    for page in PAGES.values()
    for block in re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
]
ENDLESS = {
    r"config\.max_new_tokens = \w+": "config.max_new_tokens = 1_000_000; config.ignore_eos = True"
}


def change(source: str, changes: dict[str, str]) -> str:
    """Change lines of a program, as its readers are told to do. Each key is a regex."""
    for old, new in changes.items():
        source, count = re.subn(old, lambda _, new=new: new, source)
        assert count == 1, old
    return source


def save(folder: Path, *names: str, changes: dict[str, str] | None = None) -> dict[str, str]:
    """Copy examples, and return an environment to run them in. Change the last one.

    They run in the folder of the repository, which has the script and the models that they load.
    """
    for name in names:
        shutil.copy(EXAMPLES / name, folder)
    if changes:
        source = (EXAMPLES / names[-1]).read_text(encoding="utf-8")
        (folder / names[-1]).write_text(change(source, changes), encoding="utf-8")
    path = os.pathsep.join([str(folder), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}


def import_changed(name: str, folder: Path, changes: dict[str, str] | None = None):
    """Import an example that is changed, from a folder of its own."""
    save(folder, name, changes=changes)
    module = name.removesuffix(".py")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.delitem(sys.modules, module, raising=False)
        return importlib.import_module(module)


def run(program: Path, environment: dict[str, str] | None = None) -> str:
    """Run a program, and return what it prints."""
    process = run_program(program, environment=environment)
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
