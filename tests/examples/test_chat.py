"""`chat.py`: its page as a process, and what a browser sends to it."""

import json
import re
import subprocess
import sys
import threading

import httpx
import pytest
from conftest import posix, skip_unless_installed, wait_for
from families import FUNCTION, MODELS, ROOT, SUN
from programs import save
from servers import SLOWLY

skip_unless_installed("gradio")


MODEL = MODELS / "tiny-llama"


class Page:
    """`chat.py` as a process, and a browser's calls."""

    def __init__(self, folder, changes=None) -> None:
        environment = save(folder, "batch.py", changes=SLOWLY)
        save(folder, "chat.py", changes=changes)
        environment |= {"GRADIO_ANALYTICS_ENABLED": "False"}
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(folder / "chat.py")],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )
        try:
            self.connect()
        except BaseException:
            self.process.kill()
            raise

    def connect(self) -> None:
        wait_for(lambda: self.process.poll() is not None or self.address(), seconds=60)
        address = self.address()[0]
        self.url = f"{address}/gradio_api/queue"
        dependencies = httpx.get(f"{address}/config").json()["dependencies"]
        self.functions = {call["api_name"]: call["id"] for call in dependencies}

    def address(self):
        return re.search(r"http://127.0.0.1:\d+", self.log.read_text(encoding="utf-8"))

    def events(self, session: str, message: str, history: list):
        """Yield what the page gets. It sends the message first, and then asks for the answer."""
        list(self.call(session, "lambda", [history]))
        list(self.call(session, "_clear_and_save_textbox", [message]))
        yield from self.call(session, "_submit_fn", [None, None])

    def call(self, session: str, name: str, data: list):
        call = {"fn_index": self.functions[name], "session_hash": session, "data": data}
        httpx.post(f"{self.url}/join", json=call, timeout=60).raise_for_status()
        parameters = {"session_hash": session}
        with httpx.stream("GET", f"{self.url}/data", params=parameters, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if event["msg"] in ("process_generating", "process_completed"):
                        yield event
                    if event["msg"] == "process_completed":
                        return


def user(text: str) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("page"))
    yield page
    page.process.kill()
    page.process.wait()


def last_text(events) -> str:
    *_, event = events
    assert event["success"], event
    return json.dumps(event["output"]["data"], ensure_ascii=False)


def test_gradio_streams_an_answer_with_its_indentation(page):
    events = list(page.events("one", FUNCTION, []))
    assert len(events) > 2
    assert r"\n    for " in last_text(events)


def test_gradio_answers_many_tabs_at_once(page):
    results = {}

    def ask(number: int) -> None:
        results[number] = last_text(page.events(f"tab {number}", SUN, []))

    threads = [threading.Thread(target=ask, args=[number]) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 5 and all("yellow" in text for text in results.values())


@pytest.fixture
def changed_page(tmp_path):
    pages = []

    def make(changes):
        pages.append(Page(tmp_path, changes))
        return pages[0]

    yield make
    for page in pages:
        page.process.kill()
        page.process.wait()


def test_gradio_gives_the_history_to_the_model_and_shows_errors(changed_page):
    page = changed_page(
        {
            r"max_new_tokens=MAX_TOKENS": "max_new_tokens=MAX_TOKENS, "
            "**(print('messages', messages) or {'top_p': 7.0, 'do_sample': message == 'fail'})"
        }
    )
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Hello!"}]}
    assert last_text(page.events("a", SUN, [user("Hi"), answer]))
    expected = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": SUN},
    ]
    assert f"messages {expected}" in page.log.read_text(encoding="utf-8")
    assert "Error: " in last_text(page.events("b", "fail", []))
    assert "yellow" in last_text(page.events("c", SUN, []))


def test_stop_in_gradio_stops_the_generation(changed_page):
    page = changed_page(
        {
            r"max_new_tokens=MAX_TOKENS": "max_new_tokens=1_000_000, ignore_eos=True",
            r"chat\.launch": "import threading, time\n"
            "def watch():\n    while True:\n        time.sleep(0.1)\n"
            "        print('requests', len(batch.engine.answers))\n"
            "threading.Thread(target=watch, daemon=True).start()\nchat.launch",
        }
    )

    def wait_for_requests(count: int) -> None:
        text = str(count)
        wait_for(lambda: re.findall(r"requests (\d+)\n", page.log.read_text())[-1:] == [text])

    events = page.events("stop", "Hi", [])
    event = next(events)
    wait_for_requests(1)
    cancel = {
        "session_hash": "stop",
        "fn_index": page.functions["_submit_fn"],
        "event_id": event["event_id"],
    }
    httpx.post(page.url.replace("queue", "cancel"), json=cancel).raise_for_status()
    wait_for_requests(0)


@posix
def test_control_c_ends_the_page(changed_page):
    page = changed_page({})
    page.process.send_signal(2)
    assert page.process.wait(timeout=30) in (0, 130, -2)
