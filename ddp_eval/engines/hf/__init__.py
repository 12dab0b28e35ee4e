"""Engines on transformers: one per layout, and loading, generation and checks that they share."""
