"""What type checkers say of the script and the examples, in the environment of the hosts."""

import os
import sys

from conftest import skip_unless_installed
from families import ROOT, SCRIPT
from programs import EXAMPLES, run_program

skip_unless_installed("mypy", "pyright", "gradio")
PROGRAMS = sorted(EXAMPLES.glob("*.py"))


def test_mypy_finds_nothing():
    options = ["--strict", "--ignore-missing-imports", "--allow-subclassing-any"]
    process = run_program("-m", "mypy", *options, SCRIPT)
    assert process.returncode == 0, process.stdout
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    options = ["--ignore-missing-imports", "--explicit-package-bases"]
    process = run_program("-m", "mypy", *options, *PROGRAMS, environment=environment)
    assert process.returncode == 0, process.stdout


def test_pyright_finds_nothing():
    assert len(PROGRAMS) >= 7
    options = ["--pythonpath", sys.executable]
    process = run_program("-m", "pyright", *options, SCRIPT, *PROGRAMS, seconds=300)
    assert process.returncode == 0, process.stdout
