"""The runs of `gm.train` in TensorBoard."""

from __future__ import annotations

from gramian.integrations.extras import load
from gramian.integrations.loggers import TensorBoardLogger
from gramian.training import Run

__all__ = ["RunBoard"]

FOLDER = "tensorboard"  # in the run's


class RunBoard:
    """Logs each evaluation of runs of `gm.train` to the folder `tensorboard` in their own.

    A run that is resumed takes back what was logged after its checkpoint.

    Raises:
        UnsupportedError: tensorboard is not installed.

    Cost: one write for each evaluation.
    Source: `torch.utils.tensorboard`.

    >>> import gramian as gm, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> board = RunBoard()
    >>> run = gm.train(gm.tasks.diabetes(), steps=2, out=folder, on_step=board.stepped, progress=board.evaluated)
    """

    def __init__(self) -> None:
        load("tensorboard", "tensorboard")
        self._run: Run | None = None
        self._logger: TensorBoardLogger | None = None

    def stepped(self, run: Run, share: float) -> None:
        """Note the run; pass this as `on_step`.

        Args:
            run: so far.
            share: of its budget that is spent.
        """
        if run is self._run or run.out is None:
            return
        boards = load("torch.utils.tensorboard", "tensorboard")
        writer = boards.SummaryWriter(str(run.out / FOLDER), purge_step=run.steps + 1)
        self._run, self._logger = run, TensorBoardLogger(writer)

    def evaluated(self, row: dict[str, float], share: float) -> None:
        """Log an evaluation; pass this as `progress`.

        Args:
            row: of `Run.history`.
            share: of the budget that is spent.
        """
        if self._run is not None and self._logger is not None:
            numbers = {name: value for name, value in row.items() if name != "step"}
            self._logger.log(numbers | {"rate": self._run.rate}, int(row["step"]))
