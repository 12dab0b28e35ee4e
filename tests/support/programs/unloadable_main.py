"""`quick_main.py` where the last rank cannot load its stage of a model whose layers are split."""

import os
from typing import NoReturn

import quick_main

from ddp_eval.engines.hf import pipeline_parallel
from ddp_eval.errors import UserError

if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise UserError("the model does not fit into the memory of cpu")

    pipeline_parallel.load_layers_engine = refuse

if __name__ == "__main__":
    quick_main.main()
