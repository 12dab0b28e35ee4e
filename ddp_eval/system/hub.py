"""What to say when files of the Hugging Face hub cannot be had, and when to give up."""

from __future__ import annotations

import time

_PAUSES_S = (1.0, 2.0, None)  # between tries to reach it
# As transformers ("We couldn't connect to …") and datasets ("Couldn't reach …") say it, cached files looked for and not found.
_OUT_OF_REACH = ("couldn't connect to", "couldn't reach", "offline mode", "offlinemodeisenabled", "localentrynotfound")


def check_reach(name: str, file: str, revision: str | None = None, cache: str | None = None) -> None:
    """Raise ConnectionError if nobody answers at the hub and the cache (None: the usual one) lacks this file of the model `name`.

    The hub's own client would try again for 23 s. One that is slow to answer is left to it.
    """
    import huggingface_hub
    from huggingface_hub import constants

    cached = huggingface_hub.try_to_load_from_cache(name, file, cache_dir=cache, revision=revision)
    if constants.HF_HUB_OFFLINE or isinstance(cached, str):
        return
    for pause_s in _PAUSES_S:
        try:
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=5)
            return
        except Exception as error:
            if type(error).__name__ != "ConnectError":  # httpx's or its successor's, whichever the client takes
                return
            if pause_s is None:
                raise ConnectionError(f"couldn't reach {constants.ENDPOINT} ({error})") from error
        time.sleep(pause_s)


def advice(error: BaseException) -> str:
    """The end of a sentence over an error: what to do where the hub was out of reach, else nothing."""
    from huggingface_hub import constants

    text = str(error).lower()
    if not any(mark in text for mark in _OUT_OF_REACH):
        return ""
    if constants.HF_HUB_OFFLINE:
        return "; HF_HUB_OFFLINE is set and the cache lacks them: unset it, or fetch them first"
    return "; the hub is out of reach and the cache lacks them: fetch them first where there is a network"


def describe_source(name: str) -> str:
    """A model's name, and the hub's address where that is not a directory here. Asks no file system that may hang."""
    from huggingface_hub import constants

    return name if name.startswith(("/", "./", "../", "~")) else f"{name}, from the cache or {constants.ENDPOINT}"
