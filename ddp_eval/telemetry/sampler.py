"""A thread that samples processor, memory and GPU of this rank."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ddp_eval.telemetry.meter import Meter

if TYPE_CHECKING:
    import torch

# Of one sample: seconds since the rank's start; cores in use; resident bytes; and of the GPU: share busy, bytes used, watts.
COLUMNS = ("at_s", "cpu_cores", "rss_bytes", "gpu_busy", "gpu_memory_bytes", "gpu_power_w")


_MOST_SAMPLES = 600  # a longer run is sampled less often


class Sampler:
    """A thread that notes processor, memory and GPU of this rank in its meter while its block runs.

    GPU figures come from NVML where nvidia-ml-py is installed; those that the device does not tell are None.
    """

    def __init__(self, meter: Meter, device: torch.device, interval_s: float = 0.5) -> None:
        self._meter = meter
        self._interval_s = interval_s
        self._read_gpu = _gpu_reader(device)
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._finished.set()
        self._thread.join()

    def _run(self) -> None:
        then, used = time.perf_counter(), time.process_time()
        while not self._finished.wait(self._interval_s):
            started = time.thread_time()
            now, using = time.perf_counter(), time.process_time()
            cores = (using - used) / max(now - then, 1e-9)
            then, used = now, using
            samples = self._meter.samples
            samples.append([now - self._meter.phases.began, cores, resident_bytes(), *self._read_gpu()])
            if len(samples) > _MOST_SAMPLES:
                del samples[::2]
                self._interval_s *= 2
            self._meter.sampling_s += time.thread_time() - started


def resident_bytes() -> int:
    """Memory that this process holds; where the system does not tell, the most it ever held."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _gpu_reader(device: torch.device) -> Callable[[], list[float | None]]:
    """() -> [share busy, bytes used, watts] of this rank's GPU."""
    nothing: list[float | None] = [None, None, None]
    if device.type != "cuda":
        return lambda: nothing
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # no nvidia-ml-py, no driver's library, or a device that NVML has no handle for
        return lambda: nothing
    readings = (
        lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        lambda: float(pynvml.nvmlDeviceGetMemoryInfo(handle).used),
        lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    )

    def read() -> list[float | None]:
        row: list[float | None] = []
        for reading in readings:
            try:
                row.append(reading())
            except pynvml.NVMLError:
                row.append(None)
        return row

    return read
