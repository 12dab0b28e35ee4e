"""The end of a command that went well."""

import subprocess
import sys

COMMAND = """
import sys
sys.argv = ["ddp_eval", "--tasks", "demo_lambada", "--limit", "2", "--model_args", "pretrained=demo", "--bootstrap_iters", "0"]
from ddp_eval.__main__ import command
command()
"""
PROGRAM = f"""
{COMMAND}
import atexit, threading, time
import joblib
joblib.Parallel(n_jobs=2)(joblib.delayed(abs)(number) for number in range(4))  # it keeps its workers
atexit.register(print, "registered by another library")
threading.Thread(target=lambda: (time.sleep(1), print("said by a thread"))).start()
"""


def test_everything_is_said_and_what_others_have_to_do_is_done():
    """Catches a quick end that drops lines which wait in a pipe's buffer, or waits for workers whom nobody tells to end."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("|") and "Tasks" in lines[0]
    assert lines[-2:] == ["said by a thread", "registered by another library"], done.stdout


def test_nobody_reads():
    """Catches a traceback, or the exit code of a defect, where what the output went to has ended."""
    running = subprocess.Popen([sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    running.stdout.close()
    try:
        _, said = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode in (0, 120) and "Traceback" not in said, said
