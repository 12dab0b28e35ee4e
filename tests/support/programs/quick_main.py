"""`python -m ddp_eval` without lm_eval's index of its own 14,000 task files, which takes 8 s to read and no test here needs."""

import os

from ddp_eval.__main__ import command as main

if os.environ.get("RANK", "0") == "0":
    os.environ.setdefault("TQDM_DISABLE", "1")  # main does, but too late for what this imports
    from ddp_eval.tasks import select

    load_index = select.TaskManager
    select.TaskManager = lambda **options: load_index(**{**options, "include_defaults": False})

if __name__ == "__main__":
    main()
