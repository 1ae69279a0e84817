"""`gramian doctor`."""

from __future__ import annotations

import importlib.util
import json as as_json
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gramian.cli.common import path

__all__ = ["EXTRAS", "command"]

# What each extra of the package is for, and the module and distribution that it brings.
EXTRAS = {
    "tasks": ("the demo and the built-in tasks on digits", "sklearn", "scikit-learn"),
    "mnist1d": ("the task of that name", "mnist1d", "mnist1d"),
    "hf": ("Hugging Face folders and Trainer", "transformers", "transformers"),
    "lightning": ("Lightning", "lightning", "lightning"),
    "tensorboard": ("TensorBoard logs", "tensorboard", "tensorboard"),
    "wandb": ("Weights & Biases logs", "wandb", "wandb"),
    "mlflow": ("MLflow logs", "mlflow", "mlflow-skinny"),
}


def command(
    json: Annotated[Path | None, typer.Option(parser=path, help="Write what was found.")] = None,
) -> None:
    """Show versions, the processor, where gm.linalg's costs come from, and which extras are installed."""
    from gramian import report
    from gramian.bench.machine import features
    from gramian.linalg.engine.cost import cache_file, constants
    from gramian.report.terminal import unpadded

    if json is not None:
        report.check_target(json, (".json",))
    found: dict[str, Any] = features()
    found["costs"] = constants().source
    found["calibration"] = str(cache_file())
    found["extras"] = {extra: _version(module, name) for extra, (_, module, name) in EXTRAS.items()}
    if json is not None:
        report.write_text(json, as_json.dumps(found, indent=2) + "\n")
        return
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    rows = {
        "gramian": found["gramian"],
        "Python": found["python"],
        "torch": found["torch"],
        "processor": f"{found['processor']}, {found['cores']} cores; torch uses {found['threads']} of them",
        "units": ", ".join(found["units"]) or "none that matter here",
        "matrix unit": "bfloat16 (AMX)" if found["bf16_matrix_unit"] else "none for bfloat16",
        "BLAS": found["blas"],
        "accelerator": found["accelerator"] or "none that torch can use",
        "costs": "measured on this machine"
        if found["costs"] == "measured"
        else "defaults; measured here when gm.linalg first has work for which they matter",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for extra, (purpose, _, brought) in EXTRAS.items():
        version = found["extras"][extra]
        table.add_row(
            f"[{extra}]", f"{brought} {version}, for {purpose}" if version else f"not installed; for {purpose}"
        )
    with unpadded(console):
        console.print(table, markup=False)
    missing = [extra for extra in EXTRAS if not found["extras"][extra]]
    if missing:
        console.print(f"\nFor an extra: pip install 'gramian[{missing[0]}]'", markup=False, soft_wrap=True)


def _version(module: str, name: str) -> str | None:
    """The version of what an extra brings; `None` where it is not installed."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "installed"
