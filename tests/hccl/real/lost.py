"""One end of a plain pair whose rank 1 exits after its first send: ``lost.py RANK STORE_FILE SWITCHED``.

Shows why blocking wait is set. Rank 0 prints the error that it got and ends with status 0, if it survives.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from datetime import timedelta

import torch
import torch_npu
from torch._C._distributed_c10d import FileStore
from torch_npu._C._distributed_c10d import ProcessGroupHCCL

from netloader.transports.hccl.devices import blocking_wait


def main() -> None:
    rank, path, switched = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "1"
    device = f"npu:{rank}"
    torch.get_device_module("npu").set_device(device)
    options = ProcessGroupHCCL.Options()
    options._timeout = timedelta(seconds=5)
    options.global_ranks_in_group = [0, 1]
    with blocking_wait() if switched else contextlib.nullcontext():
        group = ProcessGroupHCCL(FileStore(path, 2), rank, 2, options)
    tensor = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    if rank == 1:
        group.send([tensor], 0, 0).wait()
        torch.get_device_module("npu").synchronize()
        os._exit(0)
    group.recv([tensor], 1, 0).wait()
    try:
        group.recv([tensor], 1, 0).wait()
    except RuntimeError as error:
        print(f"raised {error}", flush=True)
        os._exit(0)
    print(f"nothing was raised by torch_npu {torch_npu.__version__}", flush=True)
    time.sleep(60)  # gives the watchdog time to act


if __name__ == "__main__":
    main()
