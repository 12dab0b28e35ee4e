"""Which layout fits in memory, and which is the fastest."""
