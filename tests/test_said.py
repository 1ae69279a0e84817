"""What errors and results say where somebody is about to go wrong."""

import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import gramian as gm
from gramian.cli import main
from gramian.compression.units.narrowing import may_narrow
from gramian.errors import GramianWarning, InputError, TaskError
from gramian.report.compression import Outcome
from gramian.report.contenders import Contender, Ratio

CLASSIFY = gm.Objective.classification()


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.gru(x)[0][:, -1])


def test_a_file_without_the_hooks_of_its_model_is_told(tmp_path: Path) -> None:
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)))  # whose hook computes from what is in the file
    gm.save_compressed(net, tmp_path / "plain.safetensors")
    net[0].register_forward_pre_hook(lambda module, args: (args[0] / 255,))
    with pytest.warns(GramianWarning, match="forward hooks on 0. What they change is lost"):
        gm.save_compressed(net, tmp_path / "hooked.safetensors")


def test_reasons_of_layers_that_are_not_narrowed() -> None:
    x = torch.randn(64, 8)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    plan = gm.narrow(net, [(x, torch.randint(3, (64,)))], CLASSIFY)
    assert plan.reasons == {"0": "its inputs are the model's own"}
    with pytest.raises(InputError, match="leaves one unit in each layer that can be narrowed"):
        plan.at(keep=0.01)
    with pytest.raises(InputError, match=r"gru: .* recurrent modules are not narrowed; out: .* recurrent module's"):
        gm.narrow(Tagger(), [(torch.randn(16, 5, 6), torch.randint(3, (16,)))], CLASSIFY)
    assert may_narrow(net)
    assert not may_narrow(Tagger())


def test_batches_of_a_task_take_an_epoch_and_a_generator() -> None:
    def mine() -> list:
        return []

    with pytest.raises(TaskError, match=r"train_batches=lambda epoch, generator: mine\(\)"):
        gm.Task(Tagger, CLASSIFY, mine, lambda model: {})


def test_an_interrupted_run_says_how_it_goes_on(tmp_path: Path, request) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    x, out = torch.randn(8, 4), tmp_path / "run"

    def batches(epoch: int, generator: torch.Generator):
        while True:
            yield x, x
            signal.raise_signal(signal.SIGINT)

    task = gm.Task(lambda: nn.Linear(4, 4), gm.Objective.regression(), batches, lambda model: {"zero": 0.0})
    with pytest.raises(KeyboardInterrupt, match=r"interrupted at step \d+; continue .* resume=True \(out='.*run'\)"):
        gm.train(task, steps=9, optimizer="adamw", out=out)


def test_a_command_or_a_task_that_is_nearly_right(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tagger.py").write_text("task = None\n")
    for args, told in (
        (["watch"], "gramian train --watch"),
        (["inspect", "tagger"], "gramian inspect tagger.py:task"),
        (["inspect", "tagger:mine"], "gramian inspect tagger.py:mine"),
        (["compress", "tagger.py:task"], "give one of --keep, --max-drop"),
    ):
        assert main(args) == 2
        assert told in capsys.readouterr().err


def test_the_sign_of_a_compression_agrees_with_its_speed() -> None:
    def outcome(speed: float, **more) -> Outcome:
        ratio = Ratio(speed, speed - 0.01, speed + 0.01)
        kept = {"speed_one": ratio, "speed_many": ratio}
        made = (Contender("dense", 9, 90, 0.9), Contender("kept", 5, 50, 0.9, **kept))
        return Outcome("net", "keep", "accuracy", "higher", 0.5, made, (), (), 32, 0.0, 1.0, **more)

    slow, fast = outcome(0.54), outcome(1.5, remarks=("layers were refit",))
    assert slow.to_document(plots=False).status == "warning"
    assert slow.verdict.endswith("slower than the dense model at batch 1 and at batch 32.")
    assert fast.to_document(plots=False).status == "good"
    assert "- layers were refit" in fast.to_document(plots=False).sections[0].text
    assert outcome(1.5, notes=("busy",)).verdict.endswith("; 1 note below.")


def test_the_state_of_a_generator_is_no_quantized_weight(tmp_path: Path) -> None:
    torch.save({"w": torch.randn(8, 8), "rng": torch.get_rng_state()}, tmp_path / "state.pt")
    assert gm.inspect(tmp_path / "state.pt").notes == ["Left out, bytes (uint8), as the state of a generator: rng"]
