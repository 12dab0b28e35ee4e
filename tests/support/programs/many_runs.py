"""Several command lines, one after the other, by the same ranks: `many_runs.py FILE`, a JSON list of lists of flags.

What `ddp_eval.__main__` does with each. The imports, which take longer than the runs, are paid once, and lm_eval does not ask
pip and lscpu about the machine, which takes it a second for each.
"""

import json
import sys
from pathlib import Path

import quick_main  # noqa: F401  spares the leader the index of lm_eval's own tasks

from ddp_eval.cli import flags as cli
from ddp_eval.distributed.world import join_group, leave_group
from ddp_eval.run import runner


def main() -> None:
    command_lines = [cli.parse(flags)[0] for flags in json.loads(Path(sys.argv[1]).read_text())]
    world = join_group()
    if world.is_leader:
        import lm_eval.evaluator

        lm_eval.evaluator.add_env_info = lambda results: None
    for config in command_lines:
        results = runner.run(config, world)
        assert (results is None) == (world.rank > 0)
    leave_group(world)


if __name__ == "__main__":
    main()
