"""``python -m tests.systemd.hub MODEL ENDPOINT_FILE JSON``: the loopback Hub inside the container, until it is stopped.

JSON may have: ``commits`` (how many org/tiny has), ``token`` (that org/tiny asks for), ``faults`` (of every transfer).
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from tests.support.loopback_hub import serving


def main(model: str, endpoint_file: str, wishes: str) -> None:
    """Serves org/tiny."""
    wanted: dict[str, Any] = json.loads(wishes)
    files = {path.name: path.read_bytes() for path in Path(model).iterdir()}
    with serving() as hub:
        tokens = frozenset({wanted["token"]} if "token" in wanted else ())
        repo = hub.add("org/tiny", files | {"README.md": b"1"}, private=bool(tokens), tokens=tokens)
        for number in range(1, wanted.get("commits", 1)):
            repo.commit(files | {"README.md": b"%d" % number, "preprocessor_config.json": b'{"n": %d}' % number})
        for fault in wanted.get("faults", ()):
            hub.fault(**fault)
        Path(endpoint_file).write_text(hub.endpoint, encoding="utf-8")
        signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    main(*sys.argv[1:])
