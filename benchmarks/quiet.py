"""Timings on a shared machine: waits until it is quiet, and marks disturbed timings. Linux only."""

import os
import pathlib
import statistics
import time

BUSY = 0.12  # cores that other processes may use during a clean timing


class Timer:
    """Times calls when the machine is quiet, and separates the calls during which it was not."""

    def __init__(self, patience: float):
        self.patience = patience

    def _cpu(self) -> tuple[float, float]:
        """CPU seconds used by all processes, and by this one."""
        jiffies = [int(n) for n in pathlib.Path("/proc/stat").read_text().split()[1:9]]
        own = os.times()
        everyone = (sum(jiffies) - jiffies[3] - jiffies[4]) / os.sysconf("SC_CLK_TCK")
        return everyone, own.user + own.system

    def _measure(self, call) -> tuple[float, float, float]:
        """(seconds, cores that others used, CPU seconds of this process)"""
        everyone, own = self._cpu()
        start = time.perf_counter()
        call()
        wall = time.perf_counter() - start
        everyone, own = self._cpu()[0] - everyone, self._cpu()[1] - own
        return wall, (everyone - own) / wall, own

    def time(self, call, times: int) -> dict:
        """Median and minimum of the clean calls, or of all if none is clean; own CPU seconds."""
        rows = []
        for _ in range(times):
            while self.patience > 0:
                wall, others, _ = self._measure(lambda: time.sleep(0.2))
                self.patience -= wall
                if others < 0.03:
                    break
            rows.append(self._measure(call))
        clean = [wall for wall, others, _ in rows if others < BUSY]
        used = clean or [wall for wall, *_ in rows]
        return {"s": statistics.median(used), "min_s": min(used), "clean": len(clean),
                "of": times, "cpu_s": statistics.median(own for *_, own in rows)}  # fmt: skip
