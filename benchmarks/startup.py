"""Measures the time from the start of the command to its first text.

Prints one JSON line for each start. Only the first has an empty compilation cache.

    python benchmarks/startup.py [--checkpoint FOLDER] [--repeat N]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", help="default: the bundled model")
    parser.add_argument("--repeat", type=int, default=3, help="starts with a warm cache")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "mistral_jax.sample", "def main(", "--max-tokens", "8"]
    if arguments.checkpoint:
        command += ["--checkpoint", arguments.checkpoint]
    with tempfile.TemporaryDirectory() as cache:
        for start in range(1 + arguments.repeat):
            line = {
                "benchmark": "startup",
                "cache": "warm" if start else "cold",
                "seconds_to_first_text": round(seconds_to_first_text(command, cache), 2),
            }
            print(json.dumps(line), flush=True)


def seconds_to_first_text(command: list[str], cache: str) -> float:
    """Runs the command; returns the seconds until its first byte of output."""
    start = time.perf_counter()
    environment = {**os.environ, "XDG_CACHE_HOME": cache}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return seconds


if __name__ == "__main__":
    main()
