"""`app.py`, in Streamlit's own test host."""

import ast

import pytest
from conftest import skip_unless_installed, wait_for
from families import FUNCTION, HELLO, MODELS, ROOT, SUN
from programs import save
from servers import Server, serve_with

skip_unless_installed("streamlit", "openai")

from streamlit.testing.v1 import AppTest

MODEL = MODELS / "tiny-llama"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def make_app(tmp_path, monkeypatch):
    def make(server, changes=None):
        save(tmp_path, "app.py", changes=changes)
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
        return AppTest.from_file(str(tmp_path / "app.py"), default_timeout=60).run()

    monkeypatch.chdir(ROOT)
    return make


def ask(app, prompt: str) -> list[str]:
    """Return the texts of all messages."""
    app.chat_input[0].set_value(prompt).run()
    assert not app.exception
    return [message.children[0].value for message in app.chat_message]


def test_streamlit_answers_and_remembers(make_app, server):
    seen = {r"with client": "streamlit.session_state.seen = [*messages]\n    with client"}
    app = make_app(server, seen)
    prompt, code = ask(app, FUNCTION)
    assert prompt == FUNCTION
    ast.parse(code)  # Its indentation is there.
    assert len(ask(app, HELLO)) == 4
    history = app.session_state.messages
    assert [message["role"] for message in history] == ["user", "assistant"] * 2
    assert app.session_state.seen == history[:3]


def test_streamlit_keeps_the_answer_that_a_user_stops(make_app, tmp_path):
    """By the exception that Streamlit raises in the app when a user presses Stop."""
    stop = {
        r"for chunk in chunks:": "from streamlit.runtime.scriptrunner import StopException\n"
        "        for number, chunk in enumerate(chunks):\n"
        "            if number == 3 and len(messages) == 2:\n"
        "                raise StopException"
    }
    with Server(
        tmp_path, serve_with("max_new_tokens=200, ignore_eos=len(self.messages) == 1")
    ) as server:
        app = make_app(server, stop)
        _, partial = ask(app, SUN)
        assert partial
        wait_for(lambda: server.running() == 0)
        texts = ask(app, HELLO)
        assert texts[1] == partial and texts[3]
