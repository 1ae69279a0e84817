"""Hugging Face's Trainer: roles, resuming to the bit, schedules, health in its logs, inspections on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import seeded
from gramian import integrations
from gramian.errors import FindingError, InputError
from gramian.integrations import Inspector, JsonlLogger
from gramian.optim import Muon

transformers = pytest.importorskip("transformers")


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


DATA = [{"input_ids": row, "labels": row} for row in torch.randint(32, (32, 8), generator=seeded(0))]


def trainer(folder: Path, model: Any = None, **arguments: Any) -> Any:
    options: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5,
        "warmup_steps": 2, "lr_scheduler_type": "cosine", "logging_steps": 2, "save_steps": 3, "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    make = integrations.trainer_optimizer("muon", lr=0.02, weight_decay=0.1)
    args = transformers.TrainingArguments(output_dir=str(folder), **(options | arguments))
    return transformers.Trainer(model or llama(), args, train_dataset=DATA, optimizer_cls_and_kwargs=make)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def inner(run: Any) -> Muon:
    optimizer = run.optimizer.optimizer
    assert isinstance(optimizer, Muon)
    return optimizer


def test_a_run_keeps_roles_logs_health_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    before = weights(whole.model)
    whole.train()
    roles = {row["name"]: row["direction"] for row in inner(whole).explain()}
    assert roles["model.embed_tokens.weight"] == roles["lm_head.weight"] == "adamw"
    assert roles["model.layers.0.self_attn.q_proj.weight"] == "matrix"
    assert all(not torch.equal(p, before[name]) for name, p in whole.model.named_parameters())

    again = trainer(tmp_path / "again")
    inspector = Inspector(every=4)
    integrations.attach_to_trainer(again, inspector, [JsonlLogger(tmp_path / "log.jsonl")])
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_equal(weights(whole.model), weights(again.model))  # inspections change nothing either
    assert list(inspector.reports) == [3, 4, 6]
    entry = next(entry for entry in again.state.log_history if entry["step"] == 4)
    assert entry["optimizer/skipped"] == entry["optimizer/fallbacks"] == 0.0
    assert {"loss", "learning_rate", "grad_norm", "inspect/errors"} <= entry.keys()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {3, 4, 6}

    rates = {entry["step"]: entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry}
    assert rates[4] / 0.02 == pytest.approx(inner_factor(4))


def inner_factor(step: int) -> float:
    """Of the cosine after two steps of warm-up, at the rate that a step was made with or the next."""
    from math import cos, pi

    return 0.5 * (1 + cos(pi * (step - 1 - 2) / (6 - 2)))


def test_every_reporter_of_the_trainer_sees_the_health(tmp_path: Path) -> None:
    """Also one that was there before the callback."""
    seen: list[dict[str, float]] = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            seen.append(dict(logs))

    run = trainer(tmp_path, max_steps=2, save_strategy="no", bf16=True)
    run.add_callback(Reporter())
    callback = integrations.attach_to_trainer(run)
    assert isinstance(callback, transformers.TrainerCallback)
    run.train()
    assert seen[0]["optimizer/skipped"] == 0.0
    assert "loss" in seen[0]
    assert run.pop_callback(callback) is callback


def test_parameters_of_lora_alone_are_trained(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    run = trainer(tmp_path, model, max_steps=3, save_strategy="no", lr_scheduler_type="constant", warmup_steps=0)
    before = weights(run.model)
    run.train()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert {row["direction"] for row in inner(run).explain() if "lora_" in row["name"]} == {"matrix"}


def test_the_optimizer_itself_and_the_trainers_groups_work_too(tmp_path: Path) -> None:
    """`optimizers=(…, None)`, and the Trainer's own groups together with the model."""
    model = llama()
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    groups = transformers.Trainer(model, args, train_dataset=DATA).create_optimizer().param_groups
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups]
    optimizer = Muon(groups, model=model)
    assert {n: row["direction"] for row in optimizer.explain() if (n := row["name"]).endswith("head.weight")} == {
        "lm_head.weight": "adamw"
    }
    transformers.Trainer(model, args, train_dataset=DATA, optimizers=(optimizer, None)).train()
    assert optimizer.state


def test_what_is_not_known_is_one_line() -> None:
    with pytest.raises(InputError, match="unknown optimizer 'lion'; wanted auto, "):
        integrations.trainer_optimizer("lion")
    make, options = integrations.trainer_optimizer(Muon, lr=0.1)
    assert (make(), options) == (Muon, {"lr": 0.1})


def test_a_watched_run_logs_its_numbers_and_is_the_same_to_the_bit(tmp_path: Path) -> None:
    options = {"save_strategy": "no", "logging_steps": 2, "gradient_accumulation_steps": 2}
    plain = trainer(tmp_path / "plain", **options)
    plain.train()
    run = trainer(tmp_path / "watched", **options)
    callback = integrations.watch_trainer(run, [JsonlLogger(tmp_path / "log.jsonl")], every=3, share=None)
    run.train()
    assert_equal(weights(plain.model), weights(run.model))
    assert callback.watching.step == 6
    assert callback.watching.looks == 3
    assert "modules" not in callback.watching.not_looked_at
    assert not [f for f in callback.watching.findings if f.severity == "error"]
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert all(entry["watch/gradient"] > 0 for entry in entries)
    assert [entry["watch/change"] > 0 for entry in entries] == [False, True, True]  # the warm-up starts at zero
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 6]
    assert not run.model._forward_hooks


def test_a_fault_stops_the_trainer_at_its_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="no")
    told: list[tuple[str, int]] = []

    class Poison(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 2:
                with torch.no_grad():
                    model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")

    run.add_callback(Poison())
    integrations.watch_trainer(run, raise_on="error", on_finding=lambda f, step: told.append((f.where, step)))
    with pytest.raises(FindingError, match="up_proj"):
        run.train()
    assert [one for one in told if "up_proj" in one[0]] == [("model.layers.0.mlp.up_proj.weight", 3)]
    assert run.state.global_step == 2


@pytest.mark.slow
def test_a_compiled_trainer_is_watched(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="no", max_steps=2, torch_compile=True, torch_compile_backend="eager")
    callback = integrations.watch_trainer(run)
    run.train()
    assert "modules" not in callback.watching.not_looked_at
    assert callback.watching.looks == 1
