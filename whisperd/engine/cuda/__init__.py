"""Whisper in PyTorch, made for one GPU: fixed slots, and windows that join while others are decoded.

Modules that need torch import it at their top; whoever is above imports those modules late. ``memory``,
``onnxfile`` and ``presence`` work without torch.
"""
