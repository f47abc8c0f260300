"""`notebook.ipynb`, in a real kernel."""

import itertools
import json
import random
import shutil
import time

import pytest
from conftest import skip_unless_installed, wait_for
from families import MODELS, SCRIPT, SUN
from programs import ENDLESS, EXAMPLES, change

skip_unless_installed("ipykernel", "jupyter_client")

import jupyter_client

MODEL = MODELS / "tiny-llama"


# A notebook, in a real kernel.


class Kernel:
    def __init__(self, folder) -> None:
        # Jupyter starts a kernel in the folder of its notebook.
        self.manager, self.client = jupyter_client.manager.start_new_kernel(
            kernel_name="python3", cwd=str(folder)
        )

    def start(self, code: str) -> str:
        """Begin to run it, and return the identity of the request once it runs."""
        request = self.client.execute(code)
        while self.message(request)["msg_type"] != "execute_input":
            pass
        return request

    def message(self, request: str, timeout: float = 60) -> dict:
        while True:
            message = self.client.get_iopub_msg(timeout=timeout)
            if message["parent_header"].get("msg_id") == request:
                return message

    def finish(self, request: str) -> tuple[list[dict], str]:
        """Return the messages until it ends, and what it raised, or nothing."""
        messages = []
        while True:
            messages.append(message := self.message(request))
            content = message["content"]
            if message["msg_type"] == "status" and content["execution_state"] == "idle":
                errors = [m["content"]["ename"] for m in messages if m["msg_type"] == "error"]
                return messages, "".join(errors)

    def run(self, code: str) -> tuple[list[dict], str]:
        return self.finish(self.start(code))


@pytest.fixture
def start_kernel():
    kernels = []

    def start(folder=EXAMPLES) -> Kernel:
        kernels.append(Kernel(folder))
        return kernels[-1]

    yield start
    for kernel in kernels:
        kernel.client.stop_channels()
        kernel.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(start_kernel):
    return start_kernel()


IN_NOTEBOOK = f"""
import sys
sys.path.append("..")
from multinomial_causal_lm import stream
from openvino_genai import LLMPipeline
pipe = LLMPipeline({str(MODEL)!r}, "CPU")
endless = pipe.get_generation_config()
endless.max_new_tokens, endless.ignore_eos = 1_000_000, True
short = pipe.get_generation_config()
short.max_new_tokens = 3
"""


@pytest.mark.parametrize("place", ["clone", "copied"])
def test_the_notebook_shows_an_answer_that_grows(start_kernel, tmp_path, monkeypatch, place):
    if place == "copied":  # Beside the script.
        shutil.copy(SCRIPT, tmp_path)
        monkeypatch.setenv("MODEL", str(MODEL))
    kernel = start_kernel(EXAMPLES if place == "clone" else tmp_path)
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    messages = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            more, error = kernel.run("".join(cell["source"]))
            assert not error
            messages += more
    texts = [
        message["content"]["data"]["text/markdown"]
        for message in messages
        if message["msg_type"] in ("display_data", "update_display_data")
    ]
    assert texts[0] == "" and "yellow" in texts[-1] and len(texts) >= 3
    assert all(new.startswith(old) for old, new in itertools.pairwise(texts))


def test_chunks_come_one_after_another_in_a_notebook(kernel):
    assert kernel.run(IN_NOTEBOOK)[1] == ""
    request = kernel.start("for chunk in stream(pipe, 'Hi', endless): print(chunk, flush=True)")
    for _ in range(3):
        while kernel.message(request)["msg_type"] != "stream":
            pass
    kernel.manager.interrupt_kernel()
    assert kernel.finish(request)[1] == "KeyboardInterrupt"


def test_50_interrupts_in_a_notebook_leave_the_pipeline_free(kernel):
    assert kernel.run(IN_NOTEBOOK)[1] == ""
    for _ in range(50):
        request = kernel.start("print('begun')\nfor chunk in stream(pipe, 'Hi', endless): pass")
        while kernel.message(request)["msg_type"] != "stream":
            pass  # Before, the kernel itself would be interrupted.
        time.sleep(random.random() * 0.1)
        kernel.manager.interrupt_kernel()
        assert kernel.finish(request)[1] == "KeyboardInterrupt"
        assert kernel.run("assert list(stream(pipe, 'Hi', short))")[1] == ""


def test_run_in_a_notebook_answers_and_survives_an_interrupt(kernel, tmp_path):
    messages, error = kernel.run(f"%run '{SCRIPT}' '{MODEL}' '{SUN}'")
    assert not error
    text = "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")
    assert "yellow" in text
    source = change(SCRIPT.read_text(encoding="utf-8"), ENDLESS)
    (tmp_path / "endless.py").write_text(source, encoding="utf-8")
    request = kernel.start(f"%run '{tmp_path / 'endless.py'}' '{MODEL}' '{SUN}'")
    while "Loading" not in kernel.message(request)["content"].get("text", ""):
        pass
    while kernel.message(request)["msg_type"] != "stream":
        pass
    kernel.manager.interrupt_kernel()
    assert kernel.finish(request)[1] == "KeyboardInterrupt"
    assert kernel.run("print('alive')")[1] == ""


def test_a_kernel_with_an_unfinished_stream_shuts_down(kernel):
    assert kernel.run(IN_NOTEBOOK + "chunks = stream(pipe, 'Hi', endless); next(chunks)")[1] == ""
    kernel.client.shutdown()
    wait_for(lambda: not kernel.manager.is_alive())
