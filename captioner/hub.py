"""Published weights, by a folder or by a name on the Hugging Face hub: why they cannot be had, in a sentence."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Timer

PATIENCE_SECONDS = 3.0  # until a user is told what is waited for
AWAY = ("LocalEntryNotFoundError", "OfflineModeIsEnabled")  # of huggingface_hub: not in its cache, and nobody to ask


@contextmanager
def asked(name: str, what: str) -> Iterator[None]:
    """ConnectionError where the hub would have to be asked and is away, FileNotFoundError where `name` has no `what`.

    What the hub's library says of each try is not told: the sentence says it. That a hub's name takes long is said.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    words = f"rescribe: {name} is being looked for, here and at {constants.ENDPOINT}, which may take a while."
    waiting = Timer(PATIENCE_SECONDS, partial(print, words, file=sys.stderr, flush=True))
    waiting.daemon = True
    if not os.path.isdir(name):
        waiting.start()
    try:
        yield
    except OSError as error:
        said = str(error).strip().split("\n")[0][:300]
        if os.path.isdir(name) or name.startswith(("/", ".", "~")):
            said = said if os.path.isdir(name) else "there is no such folder"
        elif any(kind in AWAY for kind in _kinds(error)):
            away = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
            raise ConnectionError(
                f"{name} is not on this machine, and the Hugging Face hub cannot be asked for it: {away}. "
                "If it is a folder, mend its path; else mend that, or fetch it elsewhere "
                f"(hf download {name} --local-dir FOLDER) and give the folder instead."
            ) from error
        raise FileNotFoundError(f"There is no {what} at {name}, or it lacks a file: {said.rstrip('.')}.") from error
    finally:
        waiting.cancel()
        logging.set_verbosity(before)


def _kinds(error: BaseException | None) -> Iterator[str]:
    """The classes of an error and of what it came from."""
    while error is not None:
        yield type(error).__name__
        error = error.__cause__ or error.__context__
