"""What to say when files of the Hugging Face hub cannot be had."""

from __future__ import annotations

# As transformers ("We couldn't connect to …") and datasets ("Couldn't reach …") say it, cached files looked for and not found.
_OUT_OF_REACH = ("couldn't connect to", "couldn't reach", "offline mode", "offlinemodeisenabled", "localentrynotfound")


def advice(error: BaseException) -> str:
    """The end of a sentence over an error: what to do where the hub was out of reach, else nothing."""
    from huggingface_hub import constants

    text = str(error).lower()
    if not any(mark in text for mark in _OUT_OF_REACH):
        return ""
    if constants.HF_HUB_OFFLINE:
        return "; HF_HUB_OFFLINE is set and the cache lacks them: unset it, or fetch them first"
    return "; the hub is out of reach and the cache lacks them: fetch them first where there is a network"
