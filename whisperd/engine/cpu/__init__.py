"""Whisper on the CPU: CTranslate2, with OpenVINO's encoder where it is installed."""
