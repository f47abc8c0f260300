"""From a checkpoint to a running model, with the commands of the README, for each family.

The checkpoints are tiny and made on the spot. Their environment is that of export-requirements.txt:

    pip install --upgrade-strategy eager -r export-requirements.txt \\
        -r requirements.txt -r tests/requirements.txt
"""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from families import ROOT, SUN

if not importlib.util.find_spec("optimum"):
    pytest.skip(
        "the exporter is not installed: pip install --upgrade-strategy eager "
        "-r export-requirements.txt -r requirements.txt -r tests/requirements.txt",
        allow_module_level=True,
    )

from make_models import chatglm, llama, llama3, qwen, training_lines, use_sentencepiece_operations

from multinomial_causal_lm import stream

CASES = {
    "LLaMA": (llama, ""),
    "LLaMA int8": (llama, "--weight-format int8"),
    "LLaMA int4": (llama, "--weight-format int4"),
    "LLaMA 3": (llama3, ""),
    "Qwen": (qwen, ""),
    "ChatGLM": (chatglm, ""),
}


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory) -> Path:
    """A model that the README's command for local checkpoints converted."""
    make_checkpoint, options = CASES[request.param]
    folder = tmp_path_factory.mktemp("export")
    (folder / "my-checkpoint").mkdir()
    make_checkpoint(training_lines(), folder / "my-checkpoint")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^optimum-cli .* my-checkpoint .* my-model$", readme, re.MULTILINE)[0]
    command = command.replace(" my-model", f" {options} my-model")
    subprocess.run(shlex.split(command), cwd=folder, check=True)
    if make_checkpoint is chatglm:
        use_sentencepiece_operations(folder / "my-checkpoint", folder / "my-model")
    return folder / "my-model"


def test_the_script_runs_what_was_exported(run_script, exported):
    process = run_script(exported, SUN)
    assert process.returncode == 0
    assert process.stdout.strip()
    assert process.stderr == f"Loading {exported} on CPU ...\n"


def test_stream_yields_what_generate_returns(load_pipe, exported):
    pipe = load_pipe(exported, ATTENTION_BACKEND="SDPA")
    config = pipe.get_generation_config()
    config.max_new_tokens = 100
    config.do_sample = True
    for config.rng_seed in range(5):
        assert "".join(stream(pipe, SUN, config)) == pipe.generate(SUN, config)
