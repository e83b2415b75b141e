"""`hf-diffusion demo` as a user starts and ends it."""

import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from hf_diffusion.cli import main
from tests.launching import REPO


pytest.importorskip("gradio", reason="gradio is missing: pip install 'hf-diffusion[space]'")


def test_demo_prints_its_address_serves_and_ends_cleanly_at_ctrl_c(saved, tmp_path):
    # Where the folder is, as a user types it.
    command = [sys.executable, "-m", "hf_diffusion.cli", "demo", "tiny_points"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(
        command, cwd=saved, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as demo:
        try:
            said = demo.stdout.readline()
            assert said.startswith("open http://127.0.0.1:") and said.endswith("/ in a browser; Ctrl-C ends it\n"), (
                said
            )
            page = urllib.request.urlopen(said.split()[1], timeout=30).read().decode()
            assert "tiny points" in page
            demo.send_signal(signal.SIGINT)
            out, errors = demo.communicate(timeout=30)
        finally:
            demo.kill()
    assert demo.returncode == 0 and out.strip() == "ended" and "Traceback" not in errors, errors


def test_a_port_that_is_taken_is_refused_in_a_sentence(saved, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["demo", str(saved / "tiny_points"), "--port", str(port)]) == 2
    assert f"--port {port}: 127.0.0.1 has no free port there" in capsys.readouterr().err
