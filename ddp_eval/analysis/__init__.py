"""Reads finished runs: compare and report. Never torch."""
