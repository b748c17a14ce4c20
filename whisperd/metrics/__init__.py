"""What is counted, and by whom."""
