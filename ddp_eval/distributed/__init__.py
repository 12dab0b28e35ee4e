"""Ranks: launch environment, process group, messages, watchdog, progress. The only importer of torch.distributed."""
