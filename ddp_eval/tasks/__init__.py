"""lm_eval: prompts out, metrics back. With lm.py the only importer of lm_eval."""
