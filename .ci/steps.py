"""Run what the workflow runs on Linux, step by step, as it does: in a shell of its own each."""

import subprocess
import sys
from pathlib import Path

import yaml

workflow = yaml.safe_load(Path(".github/workflows/test.yml").read_text(encoding="utf-8"))
for name, job in workflow["jobs"].items():
    if "== 'schedule'" in job.get("if", ""):
        continue  # The newest release is for the weekly run.
    for step in job["steps"]:
        if "run" in step and step.get("if") != "runner.os == 'Windows'":
            print(f"{name}: {step['name']}", flush=True)
            if code := subprocess.run(["bash", "-e", "-c", step["run"]], check=False).returncode:
                sys.exit(f"{name}: {step['name']}: exit code {code}")
