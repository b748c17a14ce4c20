"""Sound and text: what a recording is, what a transcript is, and the rules between them. Knows no engine."""
