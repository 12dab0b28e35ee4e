"""`quick_main` where ranks other than the first find no checkpoint to read."""

import os
from typing import NoReturn

from quick_main import main

from ddp_eval.engines.hf import engine


def refuse(*args: object, **kwargs: object) -> NoReturn:
    raise AssertionError("this rank reads the checkpoint")


if __name__ == "__main__":
    if os.environ["RANK"] != "0":
        engine.load_engine = refuse
    main()
