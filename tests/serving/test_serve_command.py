"""The command serves the bundled model, says where, and ends after a signal."""

import re
import signal
import subprocess
import sys

import httpx2
import processes
import pytest

from mistral_jax.cli import serve


@pytest.mark.slow
@pytest.mark.parametrize("logs", [[], ["--json-logs"]])
def test_the_command_serves_until_a_signal(logs):
    command = [sys.executable, "-m", "mistral_jax.serve", "--port", "0", "--slots", "2", *logs]
    options = {"stderr": subprocess.PIPE, "text": True, "env": processes.environment()}
    with subprocess.Popen([*command, "--length", "64"], **options) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving at (http://127\.0\.0\.1:\d+) ", line):
                break
        url = found[1]
        assert any("2 slots of 64 tokens" in line for line in lines)
        asked = {"prompt": "def main", "max_tokens": 5}
        answer = httpx2.post(f"{url}/v1/completions", json=asked, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 5
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) == 0
    assert "shutting down" in rest
    assert ('"tokens_out": 5' if logs else "tokens_out=5") in rest
    assert "Traceback" not in rest


def test_an_address_in_use_is_one_sentence(capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main(["--port", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot listen on 127.0.0.1, port {port}: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "is not a port"),
        (["--slots", "0"], "is not a whole number above 0"),
        (["--temperature", "-1", "--port", "0"], "temperature is -1.0; expected a number from 0"),
        (["--api-keys", "nothing.txt", "--port", "0"], "nothing.txt"),
    ],
)
def test_options_that_make_no_sense(options, message, capsys):
    # argparse exits by itself.
    with pytest.raises(SystemExit, match="2"):
        raise SystemExit(serve.main(options))
    assert message in capsys.readouterr().err
