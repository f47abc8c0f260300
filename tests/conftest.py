import os
import subprocess
import sys
import time

import openvino_genai
import pytest
from families import MODELS, SCRIPT

from multinomial_causal_lm import IterableStreamer

# With it, the second run of a prompt computes a little differently, and may choose other tokens.
NO_PREFIX_CACHING = openvino_genai.SchedulerConfig()
NO_PREFIX_CACHING.enable_prefix_caching = False
posix = pytest.mark.skipif(os.name == "nt", reason="signals, pipes and shells of POSIX")
PROPERTIES = {
    "paged attention": {"ATTENTION_BACKEND": "PA", "scheduler_config": NO_PREFIX_CACHING},
    "SDPA": {"ATTENTION_BACKEND": "SDPA"},
    "prompt lookup": {"prompt_lookup": True, "scheduler_config": NO_PREFIX_CACHING},
}


@pytest.fixture
def run_script():
    """Run the script as a user does, and return the finished process."""

    def run(*arguments: object, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, SCRIPT, *map(str, arguments)]
        environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
        options = {"env": environment, "encoding": "utf-8", "timeout": 60} | options
        return subprocess.run(command, capture_output=True, check=False, **options)

    return run


@pytest.fixture(scope="session")
def load_pipe():
    """Load a model of tests/models, once for all the tests that use it in the same way."""
    pipes = {}

    def load(family: str, **properties) -> openvino_genai.LLMPipeline:
        key = family, *properties.items()
        if key not in pipes:
            pipes[key] = openvino_genai.LLMPipeline(MODELS / family, "CPU", **properties)
        return pipes[key]

    return load


@pytest.fixture
def writes(monkeypatch):
    """Count the tokens that streamers get."""
    tokens = []
    write = IterableStreamer.write

    def counting_write(self, token, last=False):
        tokens.extend([token] if isinstance(token, int) else token)
        return write(self, token, last)

    monkeypatch.setattr(IterableStreamer, "write", counting_write)
    return tokens


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds  # The answers would take many minutes.
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
