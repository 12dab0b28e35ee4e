"""Evaluation from within training frameworks. Each module imports its framework, and is imported by its users alone."""
