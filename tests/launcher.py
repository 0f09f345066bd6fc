"""Runs the command line in several processes at a time, as torchrun does, forked so that none imports torch anew.

Says "ready". Reads lines of JSON. {"start": ARGS, "processes": N, "port": P, "cwd": ..., "log": ...} is answered with
the numbers of the processes, {"wait": NUMBERS} with their exit codes, negative for a signal.
"""

import json
import os
import sys

import torch

import dms_fastai.report.page
import dms_fastai.runs.stage  # noqa: F401  (what the command line imports late)
from dms_fastai import cli

torch.set_num_threads(1)  # a second thread would not survive the fork


def child(order, rank):
    os.chdir(order["cwd"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["processes"] > 1:
        of_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["processes"]}
        of_torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": order["port"]}
        os.environ.update({name: str(value) for name, value in of_torchrun.items()})
    sys.argv = ["dms-fastai", *order["start"]]
    code = 1
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(code)


print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in order["wait"]]), flush=True)
        continue
    pids = []
    for rank in range(order["processes"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            child(order, rank)
    print(json.dumps(pids), flush=True)
