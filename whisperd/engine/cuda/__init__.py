"""Whisper in PyTorch for one GPU: fixed slots, and windows that join while others are decoded.

Modules that need torch import it at their top; the factory imports them late. ``memory``, ``jobs``, ``coalesce`` and
``onnxfile`` work without torch.
"""
