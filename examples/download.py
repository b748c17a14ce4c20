"""``python download.py MODEL``: prints the directory of a complete, verified model; fetches only what is missing."""

from __future__ import annotations

import sys

from whisperd import download_model_if_needed

if __name__ == "__main__":
    sys.stdout.write(f"{download_model_if_needed(sys.argv[1])}\n")
