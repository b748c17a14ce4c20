"""The cache on disk is what the file says."""
