"""One request: audio to windows, windows to a shared engine, results to a transcript."""
