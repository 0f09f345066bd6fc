"""Runs the command line again and again in forked children, so that none of them has to import torch anew.

Says "ready". Reads a line of JSON for each child, {"args": [...], "cwd": ..., "log": ...}, answers with its process id
and, once it has ended, with its exit code, negative for a signal.
"""

import json
import os
import sys

import torch

import dms_fastai.report.page
import dms_fastai.runs.stage  # noqa: F401  (what the command line imports late)
from dms_fastai import cli

torch.set_num_threads(1)  # a second thread would not survive the fork


def child(order):
    os.chdir(order["cwd"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["dms-fastai", *order["args"]]
    try:
        cli.main()
    except SystemExit as stop:
        sys.stdout.flush()
        os._exit(stop.code or 0)
    sys.stdout.flush()
    os._exit(0)


print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        child(json.loads(line))
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
