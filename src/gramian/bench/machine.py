"""The features of a machine that its timings depend on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

import gramian

# Processor flags for vector width and for matrix units of half-precision types.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_fp16", "bf16", "asimd")


def features() -> dict[str, Any]:
    """Return processor, threads, vector and matrix units, accelerator, and versions.

    >>> sorted(features())[:3]
    ['accelerator', 'bf16_matrix_unit', 'blas']
    """
    cpu = _cpuinfo()
    words = cpu.get("flags", cpu.get("Features", "")).split()
    return {
        "processor": cpu.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "units": [flag for flag in _FLAGS if flag in words],
        "bf16_matrix_unit": "amx_bf16" in words,
        "blas": "MKL" if torch.backends.mkl.is_available() else "OpenBLAS or other",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gramian": gramian.__version__,
    }


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's entries in /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
