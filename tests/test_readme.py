"""The commands and snippets of README.md, as they are written there."""

import asyncio
import re
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import httpx
import pytest
import uvicorn
from families import MODELS, ROOT, SCRIPT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT_SOURCE = SCRIPT.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]


def snippet(word: str) -> str:
    (code,) = (block for language, block in BLOCKS if language == "python" and word in block)
    return code


# Run by .ci/run; by tests/test_export.py; by hand, because they take minutes or need the hub.
ELSEWHERE = [
    r"python3 -m venv .*",
    r"optimum-cli export openvino .*",
    r"\. \.venv/bin/activate",
    r"hf download OpenVINO/.*",
    r"pip install -r requirements.txt -r tests/requirements.txt && pytest tests",
    r"(pip install gguf==\S+ && )?python tests/(benchmark_streaming|make_models)\.py",
    r".* --device GPU",
]
HERE = [line for line in COMMANDS if not any(re.fullmatch(other, line) for other in ELSEWHERE)]


def test_commands_are_found():
    assert len(HERE) >= 4
    assert all(line.startswith("python multinomial_causal_lm.py ") for line in HERE)


@pytest.mark.parametrize("command", HERE)
def test_a_command_works_as_written(command, tmp_path):
    """The model that ships stands in for one from the hub."""
    for name in "multinomial_causal_lm.py", "tests":
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "TinyLlama-1.1B-Chat-v1.0").symlink_to(MODELS / "tiny-llama")
    command = command.replace("python", f'"{sys.executable}"', 1)
    process = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, timeout=60, check=True
    )
    assert process.stdout.strip()
    assert len(process.stderr.splitlines()) == 1


def test_options_and_settings_are_those_of_the_script():
    for name, value in re.findall(r"^\| `(\w+)` \| `(.+?)` \|", README, re.MULTILINE):
        if name not in ("fp16", "int8", "int4"):
            assert f"config.{name} = {value} " in SCRIPT_SOURCE
    assert 'default="CPU"' in SCRIPT_SOURCE


def test_files_exist():
    names = re.findall(r"`((?:tests/|\.ci/)[\w./-]*|[\w-]+\.(?:py|txt))`", README)
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists(), name


def test_the_example_loses_a_space_with_the_usual_approach_only(tmp_path):
    process = run_snippet(snippet("TextStreamer"), tmp_path)
    expected = BLOCKS[BLOCKS.index(("python", snippet("TextStreamer"))) + 1][1]
    assert process.stdout == expected


def run_snippet(code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    (tmp_path / "snippet.py").write_text(code, encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, tmp_path / "snippet.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    )


def test_the_plain_loop(tmp_path):
    assert "yellow" in run_snippet(snippet('for chunk in stream(pipe, "Why'), tmp_path).stdout


def test_the_class_and_stream_work_in_an_empty_file(tmp_path):
    """Copy from the one to the other with the imports, as the README says, and nothing else."""
    start, end = SCRIPT_SOURCE.index("class IterableStreamer"), SCRIPT_SOURCE.index("def check")
    imports = re.findall(r"^(?:import|from) .*", SCRIPT_SOURCE, re.MULTILINE)
    wanted = SCRIPT_SOURCE[start:end]
    (tmp_path / "pasted.py").write_text("\n".join([*imports, wanted]), encoding="utf-8")
    loop = snippet('for chunk in stream(pipe, "Why').replace("multinomial_causal_lm", "pasted")
    assert (
        "yellow"
        in run_snippet(f"import sys\nsys.path[0] = {str(tmp_path)!r}\n{loop}", tmp_path).stdout
    )


@pytest.fixture
def names(load_pipe):
    """What the snippets take from the plain loop, with an answer that does not end."""
    from multinomial_causal_lm import stream

    pipe = load_pipe("tiny-llama")
    config = pipe.get_generation_config()
    config.max_new_tokens = 1_000_000
    config.ignore_eos = True
    return {"pipe": pipe, "config": config, "stream": stream}


def run_with(names: dict, word: str) -> None:
    exec(snippet(word), names)  # noqa: S102 - our own README.


def wait_until_no_thread_generates(threads: int) -> None:
    deadline = time.monotonic() + 30  # The answer would take many minutes.
    while threading.active_count() > threads:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_fastapi_streams_and_stops_when_the_client_goes_away(names):
    run_with(names, "FastAPI")
    server = uvicorn.Server(uvicorn.Config(names["app"], port=free_port(), log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.config.port}/"
    try:
        with httpx.stream("GET", url, params={"prompt": "Hi"}, timeout=60) as response:
            assert response.headers["content-type"].startswith("text/plain")
            assert next(response.iter_text())
        assert names["lock"].acquire(timeout=30)  # The first generation has ended.
        names["lock"].release()
        names["config"].max_new_tokens = 10
        assert httpx.get(url, params={"prompt": "Hi"}, timeout=60).text
    finally:
        server.should_exit = True
        thread.join()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_asyncio_streams_and_stops_when_the_task_is_cancelled(names):
    run_with(names, "stream_async")
    received = []

    async def read():
        async for chunk in names["stream_async"](names["pipe"], "Hi", names["config"]):
            received.append(chunk)

    async def main():
        task = asyncio.create_task(read())
        while not received:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # Leaving asyncio.run waits for the threads that to_thread started.

    asyncio.run(main())

    received.clear()
    names["config"].max_new_tokens = 10
    asyncio.run(read())
    assert "".join(received)


def test_asyncio_raises_what_generate_raises(names):
    run_with(names, "stream_async")
    names["config"].top_p = 7.0
    names["config"].do_sample = True

    async def read():
        return [
            chunk async for chunk in names["stream_async"](names["pipe"], "Hi", names["config"])
        ]

    with pytest.raises(RuntimeError):
        asyncio.run(read())


def test_gradio_gets_a_generator_and_closing_it_stops_the_generation(names, monkeypatch):
    """Gradio itself is too heavy here: its protocol is a function that yields the text so far."""
    launched = []
    gradio = types.ModuleType("gradio")
    gradio.ChatInterface = lambda function: types.SimpleNamespace(
        launch=lambda: launched.append(function)
    )
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    run_with(names, "gradio")
    threads = threading.active_count()
    answer = launched[0]("Hi", [])
    first, second = next(answer), next(answer)
    assert second.startswith(first) and len(second) > len(first)
    answer.close()
    wait_until_no_thread_generates(threads)


def test_snippets_have_at_most_fifteen_lines():
    for language, block in BLOCKS:
        if language == "python":
            assert len([line for line in block.splitlines() if line]) <= 15


def test_the_measured_numbers_say_how_to_make_them_again():
    section = README.split("## Measured")[1].split("\n## ")[0]
    assert "python tests/benchmark_streaming.py" in section
    for name in "does nothing", "TextStreamer", "IterableStreamer":
        assert f"| {name} " in section
