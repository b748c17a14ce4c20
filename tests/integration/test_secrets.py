"""A daemon never shows its token, whatever the Hub answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.daemon import EMBEDDED, running
from tests.support.loopback_hub import LoopbackHub

SECRET = "hf_abcdefghijkl"


def test_log_status_and_report_of_a_daemon(hub: LoopbackHub, tmp_path: Path) -> None:
    """A token in the Hub's error does not reach notifications, log, status, reload and report."""
    hub.fault("/api/models/", status=403, headers={"X-Error-Message": f"Bearer {SECRET} may not"})
    text = f'models = ["{EMBEDDED}", "org/model"]\n[reconcile]\nendpoint = "{hub.endpoint}"\nmetadata_timeout_s = 1.0'
    with running(tmp_path, text, environ={"HF_TOKEN": SECRET}) as daemon:
        assert hub.tokens_seen == {SECRET}
        status = json.dumps(daemon.client.status())
        assert "org/model" in json.dumps(daemon.client.status()["problems"])
        report = daemon.client.reconcile({"models": ["org/model"]}, lambda _kind, _data: None)
        assert report["models"][0]["outcome"] == "failed"
        shown = subprocess.run(
            [
                sys.executable,
                "-m",
                "whisperd",
                "status",
                "--socket",
                str(tmp_path / "whisperd.sock"),
                "-c",
                "/dev/null",
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        everything = [status, json.dumps(report), shown.stdout, shown.stderr, daemon.log, *daemon.messages]
    assert "may not" in status
    assert "may not" in daemon.log
    assert not [text for text in everything if SECRET in text]


def test_a_daemon_with_a_token_of_two_lines(tmp_path: Path) -> None:
    """The daemon exits with the code of a wrong configuration; neither the log nor the status line quotes the token."""
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/hf-token").write_text(f"{SECRET}\n{SECRET[::-1]}\n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")}
    with running(tmp_path, ready=False, environ=environ) as daemon:
        assert daemon.wait() == 78
        told = daemon.wait_for("STATUS=")
        assert "got 2 lines" in told
        assert "got 2 lines" in daemon.log
    assert not [text for text in (daemon.log, *daemon.messages) if SECRET in text or SECRET[::-1] in text]
