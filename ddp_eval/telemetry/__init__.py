"""Where each rank's time and bytes go. No torch at import."""
