"""Timings on a machine that others use too: what to wait for, and what to leave out. Linux."""

import os
import pathlib
import statistics
import time

BUSY = 0.12  # cores that other processes may use during a clean timing


class Timer:
    """Times calls when the machine is quiet, and keeps apart those during which it was not."""

    def __init__(self, patience: float):
        self.patience = patience

    def _cpu(self) -> tuple[float, float]:
        """Seconds that all processes have used, and this one."""
        jiffies = [int(n) for n in pathlib.Path("/proc/stat").read_text().split()[1:9]]
        own = os.times()
        everyone = (sum(jiffies) - jiffies[3] - jiffies[4]) / os.sysconf("SC_CLK_TCK")
        return everyone, own.user + own.system

    def _measure(self, call) -> tuple[float, float, float]:
        """(seconds, cores that others used, CPU seconds of our own)"""
        everyone, own = self._cpu()
        start = time.perf_counter()
        call()
        wall = time.perf_counter() - start
        everyone, own = self._cpu()[0] - everyone, self._cpu()[1] - own
        return wall, (everyone - own) / wall, own

    def time(self, call, times: int) -> dict:
        """Median and min of the clean calls (of all, if none is clean), own CPU seconds a call."""
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
