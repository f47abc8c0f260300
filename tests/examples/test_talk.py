"""`talk.py`, at a terminal, with the keys that its user presses."""

import os
import re
import select
import sys
import threading
import time

import pytest
from conftest import posix
from families import ROOT, SUN
from programs import ENDLESS, read_terminal, save


class Terminal:
    def __init__(self, folder, changes=None) -> None:
        import pty

        environment = save(folder, "talk.py", changes=changes)
        self.process, self.keys = pty.fork()
        if not self.process:
            os.chdir(ROOT)
            os.execve(sys.executable, [sys.executable, str(folder / "talk.py")], environment)
        self.shown = ""

    def press(self, keys: str) -> None:
        os.write(self.keys, keys.encode())

    def wait_for(self, pattern: str) -> str:
        """Return what is shown up to it, and forget it."""
        deadline = time.monotonic() + 60
        while not (match := re.search(pattern, self.shown, re.DOTALL)):
            seconds = max(0, deadline - time.monotonic())
            ready, _, _ = select.select([self.keys], [], [], seconds)
            assert ready, self.shown
            self.shown += os.read(self.keys, 10_000).decode(errors="replace").replace("\r", "")
        text, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return text

    def end_by(self, key: str) -> int:
        """Press a key until it ends, and return its status.

        Python's `input` shows its prompt a moment before it notices Ctrl+C.
        """
        reader = threading.Thread(target=self.read_all, daemon=True)
        reader.start()
        while reader.is_alive():
            self.press(key)
            reader.join(timeout=5)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def read_all(self) -> None:
        for part in read_terminal(self.keys):
            self.shown += part.decode(errors="replace")


CONTROL_C, CONTROL_D = "\x03", "\x04"


@posix
@pytest.mark.parametrize("key", [CONTROL_C, CONTROL_D])
def test_it_answers_and_ends_at_the_prompt(tmp_path, key):
    terminal = Terminal(tmp_path)
    terminal.wait_for("> ")
    terminal.press(SUN + "\n")
    assert "yellow" in terminal.wait_for("\n> ").replace(SUN, "")
    terminal.press("Say hello in Chinese, Russian and emoji.\n")
    assert "усски" in terminal.wait_for("\n> ")
    assert terminal.end_by(key) == 0 and "Traceback" not in terminal.shown


def told(terminal) -> list[str]:
    """Return the roles of the messages that are not empty."""
    return terminal.wait_for(r"\nmessages [a-z ]+\n> ").splitlines()[-2].split()[1:]


@posix
def test_control_c_ends_an_answer_and_keeps_what_has_come(tmp_path):
    """The next prompt is another message, behind the part of an answer."""
    tell = {
        r"        messages\.append\(answer\)": "        messages.append(answer)\n"
        "        config.max_new_tokens, config.ignore_eos = 40, False\n"
        "        print('messages', *(m['role'] for m in messages if m['content']))"
    }
    terminal = Terminal(tmp_path, ENDLESS | tell)
    terminal.wait_for("> ")
    terminal.press(SUN + "\n")
    terminal.wait_for("yellow.*yellow")
    terminal.press(CONTROL_C)
    assert told(terminal) == ["system", "user", "assistant"]
    terminal.press("Say hello in Chinese, Russian and emoji.\n")
    assert told(terminal) == ["system", "user", "assistant"] + ["user", "assistant"]
    assert terminal.end_by(CONTROL_D) == 0
