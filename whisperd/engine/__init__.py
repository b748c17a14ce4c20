"""Engines: whatever runs a model behind the contract of ``base``."""
