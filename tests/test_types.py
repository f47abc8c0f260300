"""What type checkers say of the script, and of each program in README.md.

They need the environment of the recipes for other hosts: README.md, on development, makes it.
"""

import sys

from conftest import skip_unless_installed
from families import ROOT, SCRIPT
from recipes import RECIPES, run_program, save

skip_unless_installed("mypy", "pyright", "gradio")


def test_mypy_finds_nothing_in_the_script():
    options = ["--strict", "--ignore-missing-imports", "--allow-subclassing-any"]
    process = run_program("-m", "mypy", *options, SCRIPT)
    assert process.returncode == 0, process.stdout


def test_pyright_finds_nothing_in_the_script_and_the_recipes(tmp_path):
    environment = save(tmp_path, *RECIPES)
    (tmp_path / "pyrightconfig.json").write_text(
        f'{{"typeCheckingMode": "basic", "extraPaths": ["{ROOT.as_posix()}"]}}', encoding="utf-8"
    )
    options = ["--pythonpath", sys.executable, "--project", tmp_path]
    process = run_program("-m", "pyright", *options, environment=environment, seconds=300)
    assert process.returncode == 0, process.stdout
    process = run_program("-m", "pyright", "--pythonpath", sys.executable, SCRIPT, seconds=300)
    assert process.returncode == 0, process.stdout
