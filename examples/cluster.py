"""Replicas of serve.py on several machines, which Ray Serve starts, restarts and updates.

    pip install "ray[serve]"
    ray start --head --num-cpus 0
    python examples/cluster.py

README.md beside this file has the commands for all machines. Ray sends the folder in which this is
started to the others, so keep the model out of it, and let `MODEL` be a path that each of them has.
"""

import os
import sys

import ray
from ray import serve

MODEL = os.environ.get("MODEL", "tests/models/tiny-llama")


def load():
    """Run on each machine that answers, so that the model is loaded only there."""
    sys.path.append("examples")  # In a clone of the repository.
    from serve import app

    return app


ray.init(runtime_env={"working_dir": ".", "env_vars": {"MODEL": MODEL}})
serve.start(http_options={"host": "0.0.0.0"})
deploy = serve.deployment(
    num_replicas=2,
    max_replicas_per_node=1,
    max_ongoing_requests=100,  # Ray's own limit is 5.
    graceful_shutdown_timeout_s=300,
)
chat = deploy(serve.ingress(load)())
serve.run(chat.bind())
