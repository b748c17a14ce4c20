"""``python -m whisperd``."""

from whisperd.cli import main

main()
