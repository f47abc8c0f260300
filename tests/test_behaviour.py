"""What happens when things go wrong: real processes, real signals, real pipes, real pipelines."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import PROPERTIES, make_config, posix
from families import HELLO, MODELS, SCRIPT, SUN
from multinomial_causal_lm import IterableStreamer, stream
from programs import ENDLESS, read_terminal, run_program

MODEL = MODELS / "tiny-llama"
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@pytest.fixture
def endless_script(changed_script):
    return changed_script(ENDLESS)


@pytest.fixture
def start():
    """Start the script, or a shell that does; kill what still runs when the test ends."""
    processes = []

    def start(*command, **options) -> subprocess.Popen:
        if command[0] != "sh":
            command = [sys.executable, *command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen([*map(str, command)], **(pipes | options)))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def interrupt(process) -> tuple[bytes, bytes]:
    """Press Ctrl+C, once, and return what else the process printed."""
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=10)  # The script would go on for many minutes.
    assert process.returncode == -signal.SIGINT
    return rest


@posix
def test_control_c_while_it_generates(start, endless_script):
    process = start(endless_script, MODEL, SUN)
    assert process.stdout.read(20)
    _, errors = interrupt(process)
    assert errors.decode() == f"Loading {MODEL} on CPU ...\n"


@posix
def test_control_c_while_the_model_loads(start, tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "model")
    (model / "openvino_model.bin").unlink()
    os.mkfifo(model / "openvino_model.bin")  # Whoever opens it waits for ever.
    process = start(SCRIPT, model, SUN)
    assert process.stderr.readline().startswith(b"Loading")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    assert interrupt(process) == (b"", b"")


@posix
def test_control_c_while_the_prompt_is_processed(start, changed_script):
    loop = "    for chunk in stream("
    marker = {re.escape(loop): f"    print('prompt', flush=True)\n{loop}"}
    process = start(changed_script(marker), MODEL, "Why? " * 20_000)
    assert process.stdout.read(7) == b"prompt\n"
    output, errors = interrupt(process)
    assert output == b""
    assert errors.decode() == f"Loading {MODEL} on CPU ...\n"


@posix
def test_the_shell_sees_status_130(start, endless_script):
    shell = ["sh", "-c", 'trap : INT; "$@"; echo "status $?"', "sh", sys.executable]
    process = start(*shell, endless_script, MODEL, SUN, start_new_session=True)
    assert process.stdout.read(5)
    os.killpg(process.pid, signal.SIGINT)  # To the shell and the script, as a terminal does.
    assert process.communicate(timeout=10)[0].endswith(b"status 130\n")


@posix
def test_control_c_that_was_ignored_stays_ignored(start, endless_script):
    """As behind `nohup`, or "&" in a script of a shell: a Ctrl+C for another program."""
    shell = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable]
    process = start(*shell, endless_script, MODEL, SUN)
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)


@posix
def test_a_closed_pipe_ends_it_silently(endless_script):
    command = f'"{sys.executable}" "{endless_script}" "{MODEL}" "{SUN}" | head -c 20'
    process = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, check=True)
    assert len(process.stdout) == 20
    assert process.stderr.decode() == f"Loading {MODEL} on CPU ...\n"


@posix
def test_a_full_disk_is_an_error_of_one_line():
    command = f'"{sys.executable}" "{SCRIPT}" "{MODEL}" "{SUN}" > /dev/full'
    process = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 1
    assert re.fullmatch(r"Loading .*\nerror: .*No space left on device\n", process.stderr)


@pytest.fixture(params=["paged attention", "SDPA"])
def pipe(request, load_pipe):
    return load_pipe("tiny-llama", **PROPERTIES[request.param])


@pytest.fixture
def config(pipe):
    return make_config(pipe, 20_000)


def leave_by_break(chunks):
    for _ in chunks:
        break


def leave_by_exception(chunks):
    with pytest.raises(ZeroDivisionError):
        for _ in chunks:
            raise ZeroDivisionError


def leave_by_close(chunks):
    next(chunks)
    chunks.close()


def join_all_but(before: set[threading.Thread]) -> None:
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=20)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_exception, leave_by_close])
def test_leaving_early_stops_the_generation_and_its_thread(pipe, config, writes, leave):
    before = set(threading.enumerate())
    leave(stream(pipe, SUN, config))
    join_all_but(before)
    written = len(writes)
    assert written < 1000
    config.max_new_tokens = 30
    assert "".join(stream(pipe, SUN, config)) == pipe.generate(SUN, config)
    assert len(writes) >= written + 30 - 1


def test_cancel_from_any_thread_stops_the_generation(pipe, config, writes):
    streamer = IterableStreamer(pipe.get_tokenizer())
    generation = threading.Thread(target=pipe.generate, args=[SUN, config, streamer])
    generation.start()
    next(streamer)
    cancelling = threading.Thread(target=streamer.cancel)
    cancelling.start()
    generation.join(timeout=20)
    assert not generation.is_alive()
    assert len(writes) < 1000
    assert isinstance("".join(streamer), str)  # It ends.


class BrokenTokenizer:
    """Decodes so many times, then fails."""

    def __init__(self, tokenizer, decodes: int) -> None:
        self.tokenizer, self.decodes = tokenizer, decodes
        self.encode = tokenizer.encode

    def decode(self, tokens):
        self.decodes -= 1
        if self.decodes < 0:
            raise LookupError("broken")
        return self.tokenizer.decode(tokens)


class BrokenPipeline:
    """A real pipeline with a tokenizer that fails in Python."""

    def __init__(self, pipe, decodes: int) -> None:
        self.generate = pipe.generate
        self.tokenizer = BrokenTokenizer(pipe.get_tokenizer(), decodes)
        self.get_tokenizer = lambda: self.tokenizer


@pytest.mark.parametrize("decodes", [0, 1, 2, 5])
def test_an_exception_in_the_streamer_is_raised_where_the_chunks_are_read(
    pipe, config, writes, decodes
):
    broken = BrokenPipeline(pipe, decodes)
    received, before = [], set(threading.enumerate())
    with pytest.raises(LookupError, match="broken"):
        received.extend(stream(broken, SUN, config))
    join_all_but(before)
    assert len(writes) < 1000
    if decodes:  # The text that was complete before is there.
        whole = "".join(stream(pipe, SUN, make_config(pipe, 1000)))
        assert received and whole.startswith("".join(received))


def test_an_exception_in_end_is_raised_where_the_chunks_are_read(pipe, config):
    config.max_new_tokens = 1
    with pytest.raises(LookupError):
        list(stream(BrokenPipeline(pipe, 1), SUN, config))


@pytest.mark.parametrize(
    ("setting", "value"), [("num_beams", 4), ("top_p", 7.0), ("num_return_sequences", 2)]
)
def test_what_generate_refuses_is_raised_where_the_chunks_are_read(pipe, config, setting, value):
    config.do_sample = setting != "num_beams"
    setattr(config, setting, value)
    with pytest.raises(RuntimeError):
        list(stream(pipe, SUN, config))


@pytest.mark.parametrize("prompt", [None, 7, "\ud800"])
def test_a_prompt_of_a_wrong_type_is_raised_where_the_chunks_are_read(pipe, config, prompt):
    with pytest.raises(TypeError):
        list(stream(pipe, prompt, config))


@pytest.mark.parametrize("name", ["chunks", "sys.chunks"])
def test_a_program_that_ends_with_an_unfinished_stream_ends_at_once(name):
    program = f"""if True:
        import sys, time
        sys.path[:0] = ["", "tests"]
        from conftest import make_config
        from multinomial_causal_lm import stream
        from openvino_genai import LLMPipeline
        pipe = LLMPipeline({str(MODEL)!r}, "CPU")
        {name} = stream(pipe, "Hi", make_config(pipe, 1_000_000))
        next({name})
        print(time.time())
    """
    process = run_program("-c", program)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert time.time() - float(process.stdout) < 10  # It would go on for many minutes.


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode there")
def test_a_folder_whose_name_is_not_unicode(run_script, tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xff"
    assert_one_clear_line(run_script(os.fsdecode(folder), SUN), "does not exist", r"\udcff")
    shutil.copytree(os.fsencode(MODEL), folder)
    assert run_script(os.fsdecode(folder), SUN).stdout.strip()
    os.unlink(folder + b"/openvino_model.xml")
    assert_one_clear_line(run_script(os.fsdecode(folder), SUN), r"\udcff")


def remove(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def cut(name, size):
    def damage(folder):
        os.truncate(folder / name, size)

    return damage


def overwrite(name, content):
    def damage(folder):
        (folder / name).write_bytes(content)

    return damage


NONE = "Give a folder with a model, or a GGUF file"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
BAD_MODELS = {
    "does not exist": (shutil.rmtree, NONE),
    "is empty": (lambda folder: [file.unlink() for file in folder.iterdir()], "find a model"),
    "never converted": (remove("openvino_model.xml", "openvino_model.bin"), "find a model"),
    "no tokenizer": (remove("openvino_tokenizer.xml"), "openvino_tokenizer.xml was not provided"),
    "no detokenizer": (remove("openvino_detokenizer.xml"), "Detokenizer model has not been"),
    "cut xml": (cut("openvino_model.xml", 200_000), "tags mismatch"),
    "cut bin": (cut("openvino_model.bin", 100_000), "Incorrect weights"),
    "no bin": (cut("openvino_model.bin", 0), "Incorrect weights"),
    "Git LFS pointer": (overwrite("openvino_model.bin", LFS_POINTER), "Incorrect weights"),
    "cut tokenizer": (cut("openvino_tokenizer.xml", 5_000), "tags mismatch"),
    "empty xml": (cut("openvino_model.xml", 0), "Unable to read the model"),
    "damaged generation config": (overwrite("generation_config.json", b"{"), "parse error"),
}


def assert_one_clear_line(process, *words: str) -> None:
    """With a line that says how it is called, or what was loaded, in front of it."""
    assert process.returncode in (1, 2)
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) <= 2
    assert "Traceback" not in process.stderr
    assert not re.search(r"\.[ch]pp\b", process.stderr)
    for word in words:
        assert word in process.stderr.splitlines()[-1]


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_is_explained_in_one_line(run_script, tmp_path, case):
    damage, words = BAD_MODELS[case]
    folder = shutil.copytree(MODEL, tmp_path / "model")
    damage(folder)
    process = run_script(folder, SUN)
    assert_one_clear_line(process, "error: ", words)
    assert str(folder) in process.stderr


@pytest.mark.parametrize("path", ["x" * 5000, "~/model", "Qwen/Qwen3-8B", "x.gguf"])
def test_a_path_that_does_not_exist_is_explained_in_one_line(run_script, path):
    process = run_script(path, SUN)
    assert process.stderr == f"error: {path} does not exist. {NONE}\n"
    assert process.returncode == 1 and process.stdout == ""


def test_a_file_of_a_model_is_no_model(run_script):
    path = MODEL / "openvino_model.xml"
    assert_one_clear_line(run_script(path, SUN), f"cannot load {path}", "find a model")


@pytest.mark.parametrize("content", [b"", b"x" * 1000])
def test_a_bad_gguf_file_is_explained_in_one_line(run_script, tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    assert_one_clear_line(run_script(tmp_path / "x.gguf", SUN), "x.gguf", "Failed to open")


def test_an_error_of_any_kind_while_the_model_loads_is_explained_in_one_line(run_script, tmp_path):
    """A GGUF file without merges raises an `IndexError`."""
    content = (MODELS / "tiny-qwen.gguf").read_bytes()
    without = content.replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.nothin")
    (tmp_path / "x.gguf").write_bytes(without)
    assert_one_clear_line(run_script(tmp_path / "x.gguf", SUN), "cannot load", "map::at")


def test_a_template_that_the_library_cannot_run_is_explained(run_script, tmp_path):
    """With the library's reason, and not only the last line of it, which is "^"."""
    folder = shutil.copytree(MODELS / "tiny-qwen", tmp_path / "model")
    template = "{{ raise_exception('no roles, please') }}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    process = run_script(folder, SUN)
    assert process.returncode == 1 and process.stdout == ""
    _, message = process.stderr.split("\nerror: ")
    assert "no roles, please" in message
    assert not re.search(r"\.[ch]pp\b|Traceback", message)


@pytest.mark.parametrize("device", ["XPU", "GPU.7", "NPU", "npu", "HETERO:XPU,CPU"])
def test_a_device_that_is_not_there_is_explained_in_one_line(run_script, device):
    process = run_script(MODEL, SUN, "--device", device)
    absent = re.search("[GNX]PU", device.upper())[0]
    assert process.stderr == f"error: there is no {absent} here. Available devices: CPU\n"
    assert process.returncode == 1


@pytest.mark.parametrize("device", ["CPU.7", ""])
def test_a_device_that_the_library_refuses_is_explained_in_one_line(run_script, device):
    process = run_script(MODEL, SUN, "--device", device)
    assert_one_clear_line(process, f"cannot load {MODEL} on {device}: ", "evice")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([""], "the prompt is empty"),
        ([" \n\t"], "the prompt is empty"),
        (["a\udcffb"], "not valid Unicode"),
        (["is", "the", "Sun", "yellow?"], "unrecognized arguments: the Sun yellow?"),
        (["--why?"], "unrecognized arguments: --why?"),
    ],
)
def test_a_bad_prompt_is_explained_in_one_line(run_script, prompt, message):
    process = run_script(MODEL, *prompt)
    assert_one_clear_line(process, f"error: {message}" if len(prompt) != 1 else message)
    assert process.stderr.splitlines()[0].endswith(' model_dir "prompt in quotes"')


@pytest.mark.parametrize(
    ("encoding", "message"), [("utf-8", "decode"), ("utf-8:surrogateescape", "encode")]
)
def test_bad_bytes_on_stdin_are_explained_in_one_line(tmp_path, start, encoding, message):
    (tmp_path / "prompt").write_bytes(b"Why \xff?")
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    with (tmp_path / "prompt").open("rb") as stdin:
        process = start(SCRIPT, MODEL, "-", stdin=stdin, env=environment)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and output == b""
    assert "error: the prompt is not valid Unicode" in errors.decode()
    assert message in errors.decode()
    assert len(errors.splitlines()) == 2


@pytest.mark.parametrize("prompt", [HELLO, "你好，Привет 👋"])
def test_text_that_stdout_cannot_show_is_replaced_and_no_other(
    start, changed_script, choose, prompt
):
    script = changed_script({r"time\.time_ns\(\)": "7"})
    outputs = {}
    for encoding in choose(["utf-8", "cp932"], ["utf-8", "ascii", "cp1252", "cp932"]):
        process = start(script, MODEL, prompt, env=os.environ | {"PYTHONIOENCODING": encoding})
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        outputs[encoding] = output.replace(b"\r\n", b"\n")
    text = outputs["utf-8"].decode("utf-8")
    assert "\ufffd" not in text
    for encoding, output in outputs.items():
        assert output == text.encode(encoding, errors="replace")
        assert (b"?" in output) == (prompt == HELLO and encoding != "utf-8")


@posix
def test_control_characters_are_shown_on_a_terminal_and_unchanged_in_a_pipe(start, changed_script):
    import pty

    script = changed_script(
        {r"time\.time_ns\(\)": "7", "max_new_tokens = 100": "max_new_tokens = 400"}
    )
    model = MODELS / "tiny-qwen"  # Its weights are random: it emits any character.
    piped = start(script, model, SUN).communicate(timeout=60)[0].decode("utf-8")
    assert "\x1b" in piped or len(CONTROL.findall(piped)) > 3

    ours, theirs = pty.openpty()
    process = start(script, model, SUN, stdout=theirs)
    os.close(theirs)
    shown = b"".join(read_terminal(ours))
    os.close(ours)
    assert process.wait(timeout=10) == 0
    text = shown.decode("utf-8")
    assert not CONTROL.search(text)
    expected = CONTROL.sub(lambda character: ascii(character[0])[1:-1], piped)
    assert text.replace("\r\n", "\n") == expected.replace("\r\n", "\n")
