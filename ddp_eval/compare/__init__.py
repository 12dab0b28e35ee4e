"""`python -m ddp_eval compare A B [C …]`: runs side by side, request by request.

Imports nothing of ours but the errors, the subcommands' parser, and what reads files back (read_back.py, shapes.py, and the
columns of results.py); never torch.

reading.py      a run directory of ours, or lm_eval's samples_*.jsonl -> Run
matching.py     which document of one run is which of the other
paired.py       statistics of paired documents
difference.py   two Runs -> one plain dict of all that differs
command.py      flags, tables, exit codes
"""
