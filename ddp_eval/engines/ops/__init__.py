"""Pure functions of tensors: masks, attention over trees, log-probabilities, linear layers."""
