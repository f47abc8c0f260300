import importlib.util
import os
import subprocess
import sys
import threading
import time
import weakref

import hypothesis
import openvino_genai
import pytest
from families import SCRIPT, path_of
from multinomial_causal_lm import IterableStreamer
from programs import change

# With it, the second run of a prompt computes a little differently, and may choose other tokens.
NO_PREFIX_CACHING = openvino_genai.SchedulerConfig()
NO_PREFIX_CACHING.enable_prefix_caching = False
posix = pytest.mark.skipif(os.name == "nt", reason="signals, pipes and shells of POSIX")
# Some processors compute with 16 bits: then each backend, and each batch, has other answers.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
PROPERTIES = {
    "paged attention": {"ATTENTION_BACKEND": "PA", "scheduler_config": NO_PREFIX_CACHING, **EXACT},
    "SDPA": {"ATTENTION_BACKEND": "SDPA", **EXACT},
    "prompt lookup": {"prompt_lookup": True, "scheduler_config": NO_PREFIX_CACHING, **EXACT},
}


def pytest_addoption(parser) -> None:
    parser.addoption("--thorough", action="store_true", help="all examples and repetitions")


def pytest_configure(config) -> None:
    hypothesis.settings.register_profile("quick", max_examples=12)
    hypothesis.settings.register_profile("thorough", max_examples=2000)
    thorough = config.getoption("--thorough")
    hypothesis.settings.load_profile("thorough" if thorough else "quick")
    config.addinivalue_line("markers", "runs(quick, thorough): run it so many times, as `run`")


def pytest_generate_tests(metafunc) -> None:
    for mark in metafunc.definition.iter_markers("runs"):
        count = mark.args[metafunc.config.getoption("--thorough")]
        metafunc.parametrize("run", range(count))


@pytest.fixture
def choose(request):
    """Return the first of two numbers, or the second in a thorough run."""
    return lambda quick, thorough: thorough if request.config.getoption("--thorough") else quick


@pytest.fixture(autouse=True)
def no_generation_is_left_behind(monkeypatch):
    """Also when the test has failed, and its traceback holds the generator of a stream."""
    streamers = weakref.WeakSet()
    make = IterableStreamer.__init__

    def note_and_make(self, *arguments) -> None:
        make(self, *arguments)
        streamers.add(self)

    monkeypatch.setattr(IterableStreamer, "__init__", note_and_make)
    before = set(threading.enumerate())
    yield
    for streamer in [*streamers]:
        streamer.cancel()
    for thread in set(threading.enumerate()) - before:
        if thread.name.endswith("(generate)"):
            thread.join(timeout=30)
            assert not thread.is_alive()


@pytest.fixture
def run_script():
    """Run the script as a user does, and return the finished process."""

    def run(*arguments: object, script=SCRIPT, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, script, *map(str, arguments)]
        environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
        options = {"env": environment, "encoding": "utf-8", "timeout": 60} | options
        return subprocess.run(command, capture_output=True, check=False, **options)

    return run


@pytest.fixture
def changed_script(tmp_path):
    def make(changes: dict[str, str]):
        source = change(SCRIPT.read_text(encoding="utf-8"), changes)
        (tmp_path / "changed.py").write_text(source, encoding="utf-8")
        return tmp_path / "changed.py"

    return make


@pytest.fixture(scope="session")
def load_pipe():
    """Load a model of tests/models, once for all the tests that use it in the same way."""
    pipes = {}

    def load(family: str, **properties) -> openvino_genai.LLMPipeline:
        key = family, *properties.items()
        if key not in pipes:
            pipes[key] = openvino_genai.LLMPipeline(path_of(family), "CPU", **properties)
        return pipes[key]

    return load


@pytest.fixture
def writes(monkeypatch):
    """Count the tokens that streamers get."""
    tokens = []
    write = IterableStreamer.write

    def counting_write(self, token):
        tokens.extend([token] if isinstance(token, int) else token)
        return write(self, token)

    monkeypatch.setattr(IterableStreamer, "write", counting_write)
    return tokens


def make_config(pipe, tokens: int) -> openvino_genai.GenerationConfig:
    """Return the settings of the model for so many tokens; from 1,000 on, also behind the end."""
    of_batches = isinstance(pipe, openvino_genai.ContinuousBatchingPipeline)
    config = pipe.get_config() if of_batches else pipe.get_generation_config()
    config.max_new_tokens = tokens
    config.ignore_eos = tokens >= 1000
    return config


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds  # The answers would take many minutes.
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def skip_unless_installed(*names: str) -> None:
    """Skip a module whose tests need the environment of the hosts."""
    for name in names:
        if not importlib.util.find_spec(name):
            pytest.skip(
                f"{name} is not installed: pip install -r requirements.txt "
                "-r tests/requirements.txt -r tests/hosts-requirements.txt",
                allow_module_level=True,
            )
