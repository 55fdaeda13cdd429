"""Back into SLURM's queue. The job asks for a warning by `#SBATCH --signal=USR1@120`, which reaches `StopFlag`."""

from __future__ import annotations

import os
import re
import subprocess


def requeue() -> str:
    """Asks SLURM to start this job again later; returns a sentence on what came of it, never an error.

    One element of an array has a number of its own, by which it is asked for.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        job = f"{array}_{task}"
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job):  # it becomes an argument of a command
        return "not requeued: this is no SLURM job"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not requeued: scontrol requeue {job}: {error}"
    if done.returncode:
        return f"not requeued: scontrol requeue {job}: {' '.join(done.stderr.split())}"
    return f"SLURM will start job {job} again"
