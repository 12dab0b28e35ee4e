"""What runs a pack: one module per engine. `hf` runs transformers models."""
