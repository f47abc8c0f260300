"""From a checkpoint to a running model, with the commands of the README, for each family.

The checkpoints are tiny and made on the spot. Their environment is that of export-requirements.txt,
or the README's one for newer models, which exports other families:

    pip install --upgrade-strategy eager -r export-requirements.txt \\
        -r requirements.txt -r tests/requirements.txt
"""

import importlib.util
import json
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

import transformers
from make_models import (
    chatglm,
    chatglm3,
    llama,
    llama3,
    qwen,
    qwen3,
    training_lines,
    use_sentencepiece_operations,
)
from multinomial_causal_lm import stream

OWN_CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "orion"  # The exporter knows this architecture, transformers does not.


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()
"""


def own_code(text: list[str], checkpoint: Path) -> None:
    """A checkpoint that brings the code of its architecture, as ChatGLM and the first Qwen do."""
    llama3(text, checkpoint)
    (checkpoint / "own.py").write_text(OWN_CODE, encoding="utf-8")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "orion", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.OwnForCausalLM",
    }
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")


NEWER = not transformers.__version__.startswith("4.55.")
CASES = {"LLaMA 3": (llama3, ""), "Qwen3": (qwen3, "")}
if not NEWER:
    CASES |= {
        "LLaMA": (llama, ""),
        "LLaMA int8": (llama, "--weight-format int8"),
        "LLaMA int4": (llama, "--weight-format int4"),
        "Qwen": (qwen, ""),
        "ChatGLM": (chatglm, ""),
        "ChatGLM3": (chatglm3, ""),
        "own code": (own_code, "--trust-remote-code"),
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
    if make_checkpoint in (chatglm, chatglm3):
        use_sentencepiece_operations(folder / "my-checkpoint", folder / "my-model")
    return folder / "my-model"


def test_the_script_runs_what_was_exported(run_script, exported):
    process = run_script(exported, SUN)
    assert process.returncode == 0
    assert process.stdout.strip()
    assert process.stderr.startswith(f"Loading {exported} on CPU ...\n")


def test_stream_yields_what_generate_returns(load_pipe, exported):
    pipe = load_pipe(str(exported), ATTENTION_BACKEND="SDPA")
    config = pipe.get_generation_config()
    config.max_new_tokens = 100
    config.do_sample = True
    for config.rng_seed in range(5):
        assert "".join(stream(pipe, SUN, config)) == pipe.generate(SUN, config)


if not NEWER:  # The environment of the first Qwen is the other one.

    @pytest.mark.parametrize("name", ["einops", "tiktoken", "transformers_stream_generator"])
    def test_what_the_code_of_the_first_qwen_imports_is_there(name):
        importlib.import_module(name)


def test_code_of_a_checkpoint_does_not_run_unless_it_is_trusted(tmp_path):
    own_code(training_lines(), tmp_path)
    command = ["optimum-cli", "export", "openvino", "--task", "text-generation-with-past"]
    command += ["--model", str(tmp_path), str(tmp_path / "model")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode != 0
    assert "trust" in process.stderr
