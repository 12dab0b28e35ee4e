"""Token ids -> packs and batches, the units of work. numpy and the standard library alone."""
