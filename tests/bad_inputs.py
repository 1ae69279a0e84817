"""Inputs of the command line that are wrong, each in its own way, and the folder of files that they name.

`make(folder)` writes the files; `CASES` has the arguments by a name. Every case must end with one line and exit code 2,
and leave the folder as it was (`test_bad_inputs.py`).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

import gramian as gm
from gramian.checkpoint import save_tensors, save_tree
from gramian.tasks import load

GOOD = '''
import torch
import gramian as gm
from torch import nn

X = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()

class Net(nn.Module):
    """A network whose forward pass can be made to fail."""
    def __init__(self, forward=None, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 2))
        self.wrong = forward
    def forward(self, x):
        out = self.body(x)
        return out if self.wrong is None else self.wrong(out)

def batches(epoch, generator):
    for part in torch.randperm(48, generator=generator).split(16):
        yield X[part], Y[part]

def task(**changes):
    parts = dict(model=Net, objective=gm.Objective.classification(), train_batches=batches,
                 evaluate=lambda model: {"accuracy": float((model(X).argmax(1) == Y).float().mean())})
    return gm.Task(**(parts | changes))

def raising(error):
    def function(*args, **kwargs):
        raise error
    return function

def deeper(*args):
    return deeper(*args)

class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no text")

class Abort(BaseException):
    pass
'''

# What a user's function may raise; not Ctrl-C, which has an exit code of its own.
ERRORS = {
    "an error": "raising(ValueError('broken'))",
    "lines": "raising(ValueError('two\\nlines\\x1b[31m'))",
    "an empty message": "raising(AssertionError())",
    "a long message": "raising(ValueError('x' * 100_000))",
    "no text": "raising(Mute())",
    "a group": "raising(ExceptionGroup('several', [ValueError('a'), KeyError('b')]))",
    "sys.exit": "raising(SystemExit(0))",
    "sys.exit with text": "raising(SystemExit('done'))",
    "sys.exit without a code": "raising(SystemExit())",
    "a BaseException": "raising(Abort('gone'))",
    "GeneratorExit": "raising(GeneratorExit())",
    "StopIteration": "raising(StopIteration())",
    "recursion": "deeper",
    "no memory": "raising(MemoryError())",
    "too much memory": "lambda *args: torch.empty(2 ** 50)",
    "a keyword": "lambda: 3",
}

# A task's fields that are wrong from the beginning, or at their first use.
FIELDS = {
    "model": {
        "None": "None",
        "a number": "3",
        "a model": "Net()",
        "gives None": "lambda: None",
        "gives a class": "lambda: Net",
        "gives a number": "lambda: 3",
        "gives a tuple": "lambda: (Net(), Net())",
        "wants arguments": "lambda width: Net(width=width)",
        "no parameters": "lambda: nn.Identity()",
        "frozen": "lambda: Net().requires_grad_(False)",
        "lazy": "lambda: nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2))",
        "meta": "lambda: Net().to('meta')",
        "no forward": "lambda: nn.ModuleList([nn.Linear(8, 2)])",
        "other width": "lambda: Net(width=9)",
        "float64": "lambda: Net().double()",
        "complex": "lambda: Net().to(torch.complex64)",
        "integers": "lambda: nn.ParameterList([nn.Parameter(torch.ones(8, 2).long(), requires_grad=False)])",
        "an embedding": "lambda: nn.Embedding(8, 2)",
        "sparse": "lambda: nn.ParameterList([nn.Parameter(torch.eye(8).to_sparse())])",
        "a buffer on meta": "lambda: (lambda m: (m.register_buffer('b', torch.ones(3, device='meta')), m)[1])(Net())",
        "new parameters in a step": "lambda: (lambda m: (m.register_forward_pre_hook("
        "lambda m, x: setattr(m.body[0], 'weight', nn.Parameter(torch.ones(8, 8)))), m)[1])(Net())",
        "computed": "lambda: (lambda m: (m.body[0]._parameters.update(weight=m.body[0].weight * 1), m)[1])(Net())",
        "no module inside": "type('M', (nn.Module,), {'__init__': lambda self: None})",
        "one output for two classes": "lambda: nn.Linear(8, 1)",
    },
    "forward": {
        "None": "lambda out: None",
        "a number": "lambda out: 3",
        "text": "lambda out: 'text'",
        "a tuple": "lambda out: (out, out)",
        "a dict": "lambda out: {'output': out}",
        "detached": "lambda out: out.detach()",
        "integers": "lambda out: out.long()",
        "complex": "lambda out: out.to(torch.complex64)",
        "no dimensions": "lambda out: out.sum()",
        "fewer rows": "lambda out: out[:3]",
        "no rows": "lambda out: out[:0]",
        "numpy": "lambda out: out.detach().numpy()",
        "in place": "lambda out: out.add_(1).exp_().mul_(out.sigmoid_())",
        "meta": "lambda out: out.to('meta')",
    },
    "objective": {
        "a loss without values": "lambda model, batch: torch.ones((), device='meta', requires_grad=True)",
        "units without values": "lambda model, batch: (model(batch[0]).sum(), torch.ones((), device='meta'))",
        "infinite units": "lambda model, batch: (model(batch[0]).sum(), float('inf'))",
        "None": "None",
        "a number": "3",
        "text": "'classification'",
        "a class": "gm.Objective",
        "not called": "gm.Objective.classification",
        "too few arguments": "lambda model: 0",
        "too many arguments": "lambda model, batch, more: 0",
        "gives None": "lambda model, batch: None",
        "gives a float": "lambda model, batch: 1.0",
        "gives text": "lambda model, batch: 'low'",
        "gives a vector": "lambda model, batch: model(batch[0]).sum(1)",
        "gives integers": "lambda model, batch: model(batch[0]).sum().long()",
        "gives complex": "lambda model, batch: model(batch[0]).sum().to(torch.complex64)",
        "gives what has no gradient": "lambda model, batch: model(batch[0]).sum().detach()",
        "gives a bool": "lambda model, batch: model(batch[0]).sum() > 0",
        "criterion gives one": "gm.Objective(lambda m, b: m(b[0]), lambda o, b: o.sum())",
        "criterion gives units of None": "gm.Objective(lambda m, b: m(b[0]), lambda o, b: (o.sum(), None))",
        "criterion gives negative units": "gm.Objective(lambda m, b: m(b[0]), lambda o, b: (o.sum(), -1))",
        "criterion gives units of NaN": "gm.Objective(lambda m, b: m(b[0]), lambda o, b: (o.sum(), float('nan')))",
        "criterion gives a vector": "gm.Objective(lambda m, b: m(b[0]), lambda o, b: (o, 16))",
    },
    "train_batches": {
        "None": "None",
        "a number": "3",
        "text": "'batches'",
        "no batches": "[]",
        "an iterator": "iter([(X, Y)])",
        "no arguments": "lambda: [(X, Y)]",
        "gives None": "lambda epoch, generator: None",
        "gives a number": "lambda epoch, generator: 3",
        "gives nothing": "lambda epoch, generator: iter(())",
        "gives no batch later": "lambda epoch, generator: [(X, Y)] * (epoch == 0)",
        "the same iterator": "(lambda it: lambda epoch, generator: it)(iter([(X, Y)]))",
        "of None": "[None]",
        "of numbers": "[3]",
        "of text": "['text']",
        "of tensors alone": "[X]",
        "of empty tuples": "[()]",
        "of one part": "[(X,)]",
        "of lists": "[(X.tolist(), Y.tolist())]",
        "of other keys": "[{'a': X, 'b': Y}]",
        "without rows": "[(X[:0], Y[:0])]",
        "meta": "[(X.to('meta'), Y.to('meta'))]",
        "of unequal lengths": "[(X, Y[:7])]",
        "labels too large": "[(X, Y + 5)]",
        "labels below zero": "[(X, Y - 1)]",
        "labels of floats": "[(X, Y.float())]",
        "labels of shape": "[(X, Y[:, None])]",
        "labels of text": "[(X, ['a'] * 48)]",
        "labels of None": "[(X, None)]",
        "inputs of integers": "[(Y, Y)]",
        "inputs of bool": "[(X > 0, Y)]",
        "inputs of float64": "[(X.double(), Y)]",
        "inputs of another width": "[(X[:, :7], Y)]",
        "inputs swapped": "[(Y, X)]",
        "a class": "dict",
    },
    "evaluate": {
        "gives a number without a value": "lambda model: {'a': torch.ones((), device='meta')}",
        "None": "None",
        "a number": "3",
        "no arguments": "lambda: {}",
        "gives None": "lambda model: None",
        "gives a number": "lambda model: 0.5",
        "gives a list": "lambda model: [0.5]",
        "gives text": "lambda model: {'accuracy': 'high'}",
        "gives None by name": "lambda model: {'accuracy': None}",
        "gives complex": "lambda model: {'accuracy': 1j}",
        "gives a vector": "lambda model: {'accuracy': torch.ones(2)}",
        "gives a list by name": "lambda model: {'accuracy': [0.5]}",
        "gives a dict by name": "lambda model: {'accuracy': {'a': 1.0}}",
        "gives too large a number": "lambda model: {'accuracy': 10 ** 400}",
        "names by number": "lambda model: {1: 0.5}",
        "names by None": "lambda model: {None: 0.5}",
        "the loss": "lambda model: {'loss': 0.5}",
        "the step": "lambda model: {'step': 1}",
        "the seconds": "lambda model: {'seconds': 1.0}",
        "wrong shapes": "lambda model: {'accuracy': float(model(X[:, :3]).sum())}",
        "a generator": "lambda model: (x for x in ())",
    },
    "name": {"a number": "3", "None": "None"},
    "source": {"a number": "3"},
    "pictures": {"a number": "3", "gives text": "lambda model: 'abc'", "gives numbers": "lambda model: [1, 2]"},
}

# Files that are no good task files; each with what stands in it.
TASK_FILES = {
    "empty": "",
    "syntax": "def task(:\n",
    "indented": "  def task(): pass\n",
    "imports": "import absent_module\n",
    "relative": "from . import beside\n",
    "raises": "raise RuntimeError('at import')\n",
    "exits": "import sys\nsys.exit(0)\n",
    "aborts": "class Abort(BaseException): pass\nraise Abort('at import')\n",
    "recurses": "def f(): return f()\nf()\n",
    "null": "x = 1\0\n",
    "nested": "x = " + "(" * 400 + ")" * 400 + "\n",
    "constant": "task = 3\n",
    "cls": "class task: pass\n",
    "wants": "def task(depth): ...\n",
    "later": "async def task(): ...\n",
    "yields": "def task():\n    yield 3\n",
    "none": "def task(): ...\n",
    "text": "def task(): return 'digits'\n",
    "two": "import gramian as gm\ndef task(): return [gm.tasks.digits()] * 2\n",
    "kind": "import gramian as gm\ndef task(): return gm.Task\n",
    "partial": "import gramian as gm\ndef task(): return gm.Task(lambda: None)\n",
    "fails": "def task(): raise KeyError('key\\nwith a line')\n",
    "leaves": "def task(): raise SystemExit(3)\n",
    "closed": "import os\nos.close(0)\nopen('/nowhere/at/all')\ndef task(): ...\n",
}

ENDED = ["--steps", "3", "--optimizer", "adamw", "--init", "default"]


def train(*args: str, task: str = "good.py:task") -> list[str]:
    return ["train", task, "--steps", "3", *args]


# The values of each flag of `gramian train` that are wrong.
FLAGS = {
    "--steps": ["x", "", "1.5", "0", "-1", "nan", "1e3", " "],
    "--epochs": ["x", "", "1.5", "0", "-1", "nan"],
    "--seconds": ["x", "", "0", "-1", "nan", "inf", "0.01", "-inf"],
    "--lr": ["x", "", "-1", "nan", "inf", "1e400", "Auto", "1,0"],
    "--optimizer": ["adagrad", "", "Muon", "muon,adamw", " muon", "auto "],
    "--init": ["zeros", "", "Auto"],
    "--schedule": ["warm", "", "Linear", "cosine,linear"],
    "--warmup": ["x", "-1", "1.5", "4", "1000"],
    "--weight-decay": ["x", "-1", "nan", "inf"],
    "--regularize": [
        "l1",
        "l1=",
        "l1=x",
        "l1=nan",
        "l1=-1",
        "l1=inf",
        "=1",
        "l3=1",
        "l1=1;l2=1",
        "l1=1,nuclear=1",
        "nuclear=1,spectral=1",
        "l1=1=2",
        "l1=1,l1=2",
    ],
    "--augment": [
        "shift",
        "shift=x",
        "shift=-1",
        "shift=nan",
        "shift=inf",
        "shift=1.5",
        "zoom=1",
        "flip=2",
        "flip=-1",
        "cutout=2",
        "mask=2",
        "mask=-1",
        "noise=-1",
        "noise=nan",
        "mixup=-1",
        "mixup=nan",
        "rotate=nan",
        "scale=-1",
        "shift=1",
        "rotate=5",
        "noise=1,noise=2",
        "=1",
    ],
    "--clip": ["x", "0", "-1", "nan"],
    "--accumulate": ["x", "0", "-1", "1.5"],
    "--precision": ["float8", "", "float64", "bf16"],
    "--ema": ["x", "1", "1.5", "-0.1", "nan", "inf"],
    "--best": ["accuracy", "max:", ":accuracy", "max:nothing", "MAX:accuracy", "max accuracy", "max:accuracy:1", ""],
    "--seed": ["x", "-1", "1.5", "nan", "9223372036854775808"],
    "--timeout": ["x", "0", "-1", "nan", "inf"],
    "--compare": ["adamw,nothing", ",", "adamw,,sgd", "adamw;sgd", "adamw,adamw"],
    "--html": ["x.pdf", "x", "absent/x.html", "folder", "good.py/x.html", "a\0b.html", "y" * 5000 + ".html"],
    "--out": ["good.py", "good.py/run", "", "y" * 5000, "a\0b", "dangling", "/proc/self/run", "/dev/null"],
    "--config": ["absent.toml", "folder", "good.py", "latin.toml", "fifo", "/dev/zero"],
    "--text": ["good.py"],
    "--model": ["lstm"],
    "--frobnicate": ["1"],
}

# TOML files for `--config`, by name.
CONFIGS = {
    "unknown": "stepz = 3\n",
    "far": "frobnicate = 3\n",
    "twice": "weight-decay = 0.1\nweight_decay = 0.2\n",
    "repeated": "steps = 3\nsteps = 4\n",
    "text for a number": 'steps = "many"\n',
    "a float for a number": "steps = 3.5\n",
    "true for a number": "steps = true\n",
    "a number for true": "resume = 1\n",
    "text for true": 'shard = "yes"\n',
    "a list for a number": "steps = [3]\n",
    "a table for a number": "[steps]\na = 3\n",
    "a date": "seconds = 2026-01-01\n",
    "a number for a name": "optimizer = 3\n",
    "numbers in a list": "compare = [1, 2]\n",
    "text in a table": 'augment = {shift = "far"}\n',
    "true in a table": "augment = {shift = true}\n",
    "tables in a table": "augment = {shift = {x = 1}}\n",
    "below the least": "steps = 0\n",
    "nan": "lr = nan\n",
    "inf": "seconds = inf\n",
    "a huge number": "seed = " + "9" * 30 + "\n",
    "control characters": 'optimizer = "\\u001b[31m"\n',
    "itself": 'config = "itself.toml"\n',
    "deep": "augment = " + "[" * 2000 + "]" * 2000 + "\n",
    "a list for a folder": 'out = ["a"]\n',
    "a table for a folder": "out = {a = 1}\n",
    "an empty key": '"" = 3\n',
    "a section": "[train]\nsteps = 3\n",
    "not closed": 'optimizer = "muon\n',
    "null": 'optimizer = "a\0b"\n',
    "json": '{"steps": 3}\n',
    "two budgets": "epochs = 3\n",
}

# Commands other than those above.
COMMANDS = [
    "frobnicate",
    "--frobnicate",
    "train",
    "train good.py:task",
    "train good.py:task more --steps 3",
    "train good.py:task --steps",
    "train good.py:task --steps 3 --epochs 3",
    "train good.py:task --steps 3 --seconds 3",
    "train good.py:task --steps 3 --resume",
    "train good.py:task --steps 3 --tensorboard",
    "train good.py:task --steps 3 --patience 2",
    "train good.py:task --steps 3 --best max:accuracy --patience 0",
    "train good.py:task --steps 3 --best max:accuracy --patience -1",
    "train good.py:task --steps 3 --best max:accuracy --patience x",
    "train good.py:task --steps 3 --compare adamw,sgd --optimizer muon",
    "train good.py:task --steps 3 --compare adamw,sgd --lr 0.1",
    "train good.py:task --steps 3 --lr auto --optimizer nothing",
    "train chars --steps 3",
    "train chars --steps 3 --text absent",
    "train chars --steps 3 --text folder",
    "train chars --steps 3 --text empty.txt",
    "train chars --steps 3 --text short.txt",
    "train chars --steps 3 --text fifo",
    "train chars --steps 3 --text /dev/zero",
    "train chars --steps 3 --text good.py --model gru",
    "train digits-9 --steps 3",
    "train Digits --steps 3",
    "train good.py --steps 3",
    "train good.py: --steps 3",
    "train good.py:task: --steps 3",
    "train :task --steps 3",
    "train .py:task --steps 3",
    "train good:task --steps 3",
    "train good.py:absent --steps 3",
    "train good.py:X --steps 3",
    "train absent.py:task --steps 3",
    "train absent/good.py:task --steps 3",
    "train folder.py:task --steps 3",
    "train fifo.py:task --steps 3",
    "train dangling.py:task --steps 3",
    "train good.safetensors --steps 3",
    "inspect",
    "inspect absent",
    "inspect absent.safetensors",
    "inspect folder",
    "inspect fifo",
    "inspect /dev/zero",
    "inspect /dev/null",
    "inspect /proc/self/mem",
    "inspect good.py",
    "inspect good.py:absent",
    "inspect good.safetensors more",
    "inspect good.safetensors --task nothing",
    "inspect good.safetensors --task absent.py:task",
    "inspect good.safetensors --task good.py",
    "inspect other.safetensors --task good.py:task",
    "inspect half.safetensors --task good.py:task",
    "inspect vectors.safetensors",
    "inspect nan.safetensors",
    "inspect good.safetensors --against absent",
    "inspect good.safetensors --against other.safetensors",
    "inspect good.safetensors --against good.safetensors --task good.py:task",
    "inspect good.safetensors --against good.safetensors --verify",
    "inspect good.safetensors --against good.safetensors --curvature",
    "inspect good.safetensors --extract-lora 2",
    "inspect good.safetensors --against good.safetensors --extract-lora 0",
    "inspect good.safetensors --against good.safetensors --extract-lora x",
    "inspect good.safetensors --verify",
    "inspect good.safetensors --curvature",
    "inspect good.py:task --no-checksums",
    "inspect good.safetensors --task good.py:task --no-checksums",
    "inspect good.safetensors --input-size 0",
    "inspect good.safetensors --input-size x",
    "inspect good.safetensors --fail-on sometimes",
    "inspect good.safetensors --html x.pdf",
    "inspect good.safetensors --html absent/x.html",
    "inspect good.safetensors --html folder",
    "inspect good.safetensors --json x.txt",
    "inspect good.safetensors --json absent/x.json",
    "inspect good.safetensors --layouts absent.json",
    "inspect good.safetensors --layouts folder",
    "inspect good.safetensors --layouts good.py",
    "inspect good.safetensors --layouts fifo",
    "inspect good.safetensors --layouts list.json",
    "inspect good.safetensors --layouts numbers.json",
    "inspect good.safetensors --layouts nothing.json",
    "inspect good.safetensors --layouts axes.json",
    "inspect good.safetensors --layouts sizes.json",
    "inspect good.safetensors --layouts deep.json",
    "compress",
    "compress absent --task good.py:task --keep 0.5",
    "compress good.safetensors",
    "compress good.safetensors --keep 0.5",
    "compress good.safetensors --task good.py:task",
    "compress good.safetensors --task nothing --keep 0.5",
    "compress good.safetensors --task good.py --keep 0.5",
    "compress other.safetensors --task good.py:task --keep 0.5",
    "compress nan.safetensors --task good.py:task --keep 0.5",
    "compress good.safetensors --task good.py:task --keep 0",
    "compress good.safetensors --task good.py:task --keep 1.5",
    "compress good.safetensors --task good.py:task --keep -1",
    "compress good.safetensors --task good.py:task --keep nan",
    "compress good.safetensors --task good.py:task --keep x",
    "compress good.safetensors --task good.py:task --size 0",
    "compress good.safetensors --task good.py:task --size nan",
    "compress good.safetensors --task good.py:task --bits 1",
    "compress good.safetensors --task good.py:task --bits 9",
    "compress good.safetensors --task good.py:task --bits x",
    "compress good.safetensors --task good.py:task --sparsity 1.5",
    "compress good.safetensors --task good.py:task --sparsity nan",
    "compress good.safetensors --task good.py:task --sparsity x",
    "compress good.safetensors --task good.py:task --sparsity 4:2",
    "compress good.safetensors --task good.py:task --sparsity 2:",
    "compress good.safetensors --task good.py:task --sparsity 0:0",
    "compress good.safetensors --task good.py:task --speedup 0",
    "compress good.safetensors --task good.py:task --speedup nan",
    "compress good.safetensors --task good.py:task --speedup -2",
    "compress good.safetensors --task good.py:task --max-drop nan",
    "compress good.safetensors --task good.py:task --max-drop -1",
    "compress good.safetensors --task good.py:task --keep 0.5 --size 0.5",
    "compress good.safetensors --task good.py:task --keep 0.5 --metric nothing",
    "compress good.safetensors --task good.py:task --keep 0.5 --better more",
    "compress good.safetensors --task good.py:task --keep 0.5 --batches 0",
    "compress good.safetensors --task good.py:task --keep 0.5 --batch 1",
    "compress good.safetensors --task good.py:task --keep 0.5 --by weight",
    "compress good.safetensors --task good.py:task --keep 0.5 --json x.html",
    "compress good.safetensors --task good.py:task --keep 0.5 --json absent/x.json",
    "compress good.safetensors --task good.py:task --keep 0.5 --out good.py",
    "compress good.safetensors --task good.py:task --keep 0.5 --out full",
    "compress good.safetensors --task good.py:task --keep 0.5 --out absent/er",
    "compress good.safetensors --task good.py:task --keep 0.5 --plan good.py",
    "compress good.safetensors --task good.py:task --keep 0.5 --plan folder",
    "compress good.safetensors --task good.py:task --keep 0.5 --plan good.safetensors",
    "compress good.safetensors --task good.py:task --calibrate empty.txt --keep 0.5",
    "compress good.safetensors --calibrate empty.txt --keep 0.5",
    "compress folder --calibrate absent.txt --keep 0.5",
    "compress folder --calibrate short.txt --keep 0.5",
    "demo --depth two",
    "demo --depth 2",
    "demo --classes 3",
    "demo --seconds 0",
    "demo --seed -1",
    "demo --out good.py",
    "bench nothing",
    "bench linalg --repeats 0",
    "bench linalg --json absent/x.json",
    "bench optim --freeze",
    "bench optim --calibrate",
    "bench linalg --diagnose nothing",
    "bench faults --diagnose nothing",
    "bench faults --diagnose absent:nothing",
    "bench faults --seeds x",
    "bench faults --cases absent.json",
    "doctor more",
]


def spoiled() -> dict[str, bytes]:
    """Files that hold no model, by their names."""
    good = safetensors.torch.save({"w": torch.ones(4, 4), "v": torch.ones(3)})
    size = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + size])

    def with_header(changed: object, data: bytes = bytes(76)) -> bytes:
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + data

    def entry(**changes: object) -> bytes:
        return with_header(header | {"w": header["w"] | changes})

    def torch_file(content: object) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        return buffer.getvalue()

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("a.txt", "text")
    arrays = io.BytesIO()
    np.savez(arrays, w=np.array([{"a": 1}], dtype=object))
    text = {"a.safetensors": b"", "b.safetensors": b"text", "c.safetensors": good[:20], "d.safetensors": good[:-1]}
    text |= {"e.safetensors": good + b"more", "f.safetensors": struct.pack("<Q", 2**62) + good[8:]}
    text |= {
        "g.safetensors": with_header(b"{"),
        "h.safetensors": with_header([]),
        "i.safetensors": with_header({"w": 3}),
    }
    text |= {
        "j.safetensors": entry(dtype="F33"),
        "k.safetensors": entry(shape=[-4, 4]),
        "l.safetensors": entry(shape=4),
    }
    text |= {"m.safetensors": entry(data_offsets=[0, 10**12]), "n.safetensors": entry(data_offsets=[64, 0])}
    text |= {"o.safetensors": entry(shape=[2**40, 2**40]), "p.safetensors": with_header({})}
    text |= {"q.safetensors": with_header(b'{"a":' * 3000 + b"1" + b"}" * 3000)}
    text |= {"r.safetensors": entry(data_offsets=["a", "b"]), "s.safetensors": with_header(b"\xff\xfe")}
    text |= {
        "a.pt": b"",
        "b.pt": b"text",
        "c.pt": torch_file(3),
        "d.pt": torch_file(torch.ones(3)),
        "e.pt": torch_file({}),
    }
    text |= {"g.pt": pickle.dumps({"w": Path("a")}), "h.pt": archive.getvalue()}
    text |= {
        "i.pt": torch_file({"w": torch.ones(4, 4)})[:300],
        "j.pt": pickle.dumps(3),
        "k.pt": b"PK\x03\x04" + bytes(50),
    }
    text |= {"l.pt": torch_file({1: torch.ones(4, 4)})[:-40], "m.bin": b"\x80\x02", "n.pth": torch_file("text")}
    text |= {"a.npz": arrays.getvalue(), "b.npz": b"PK", "c.npy": b"\x93NUMPY", "d.npz": archive.getvalue()}
    text |= {"a.gguf": b"GGUF" + bytes(20), "a.onnx": b"\x08\x07", "a.json": b"{}", "a.h5": b"\x89HDF\r\n\x1a\n"}
    return text


# Folders that hold no model, by what is in them.
FOLDERS = {
    "config alone": {"config.json": "{}"},
    "an index that is no JSON": {"model.safetensors.index.json": "{"},
    "an index of nothing": {"model.safetensors.index.json": "{}"},
    "an index of a list": {"model.safetensors.index.json": "[]"},
    "an index of numbers": {"model.safetensors.index.json": '{"weight_map": {"w": 3}}'},
    "an index of absent files": {"model.safetensors.index.json": '{"weight_map": {"w": "absent.safetensors"}}'},
    "an index that leaves": {"model.safetensors.index.json": '{"weight_map": {"w": "../good.safetensors"}}'},
    "a model of text": {"model.safetensors": "text"},
    "a distributed one": {".metadata": "text"},
    "an adapter alone": {"adapter_config.json": "{}", "adapter_model.safetensors": "text"},
}

# Folders of `--out`, by what is in them beside a good run's files: None takes one away.
RUNS = {
    "a checkpoint of text": {"checkpoint.safetensors": b"text"},
    "an empty checkpoint": {"checkpoint.safetensors": b""},
    "a checkpoint of others": {"checkpoint.safetensors": "good.safetensors"},
    "a checkpoint of a tree": {"checkpoint.safetensors": "tree.safetensors"},
    "a checkpoint that is a folder": {"checkpoint.safetensors": None},
    "a model of text": {"model.safetensors": b"text"},
    "a model of others": {"model.safetensors": "good.safetensors"},
    "a model that is a folder": {"model.safetensors": None},
    "metrics of text": {"metrics.jsonl": b"text"},
    "metrics of numbers": {"metrics.jsonl": b"3\n"},
    "metrics that are a folder": {"metrics.jsonl": None},
    "metrics of bytes": {"metrics.jsonl": b"\xff\xfe"},
    "two checkpoints of text": {"checkpoint.safetensors": b"text", "checkpoint.previous.safetensors": b"text"},
    "a pipe": {"checkpoint.safetensors": "fifo"},
}

CHANGED = {
    "another optimizer": ["--optimizer", "sgd"],
    "another rate": ["--lr", "0.5"],
    "another budget": ["--steps", "9"],
    "another schedule": ["--schedule", "cosine"],
    "another seed": ["--seed", "3"],
    "a penalty": ["--regularize", "l1=1e-3"],
    "an average": ["--ema", "0.9"],
}

# Of torchrun.
RANK = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29999"}
ENVIRONMENTS = {
    "a world of text": {"WORLD_SIZE": "two"},
    "a world below zero": {"WORLD_SIZE": "-2"},
    "a world too large": RANK | {"WORLD_SIZE": "9" * 30},
    "a world alone": {"WORLD_SIZE": "2"},
    "a rank of text": RANK | {"RANK": "first"},
    "a rank below zero": RANK | {"RANK": "-1"},
    "a rank too large": RANK | {"RANK": "7"},
    "a port of text": RANK | {"MASTER_PORT": "x"},
    "a port too large": RANK | {"MASTER_PORT": "99999"},
}


def make(folder: Path) -> None:
    """Write the files that the cases name."""
    wrong = [
        f"def {_name(field, what)}():\n    return task({field}={value})\n"
        for field, values in FIELDS.items()
        if field != "forward"
        for what, value in values.items()
    ]
    wrong += [
        f"def {_name('forward', what)}():\n    return task(model=lambda: Net({value}))\n"
        for what, value in FIELDS["forward"].items()
    ]
    for error, value in ERRORS.items():
        wrong += [
            f"def {_name(field, 'raises ' + error)}():\n    return task({field}={value})\n"
            for field in ("model", "train_batches", "evaluate", "objective")
        ]
        wrong.append(f"def {_name('forward', 'raises ' + error)}():\n    return task(model=lambda: Net({value}))\n")
        wrong.append(
            f"def {_name('backward', 'raises ' + error)}():\n"
            f"    hooked = lambda out: out.register_hook({value}) and out\n"
            "    return task(model=lambda: Net(hooked))\n"
        )
    (folder / "good.py").write_text("\n".join([GOOD, *wrong]))
    for name, text in TASK_FILES.items():
        (folder / f"{name}_task.py").write_bytes(text.encode())
    (folder / "latin_task.py").write_bytes(b"x = '\xe9'\n")
    for name, text in CONFIGS.items():
        (folder / f"{name}.toml").write_text(text)
    (folder / "latin.toml").write_bytes(b"steps = '\xe9'\n")
    (folder / "spoiled").mkdir()
    for name, data in spoiled().items():
        (folder / "spoiled" / name).write_bytes(data)
    for number, content in enumerate(FOLDERS.values()):
        place = folder / f"folder{number}"
        place.mkdir()
        for name, text in content.items():
            (place / name).write_text(text)
    for name, content in {"empty": "", "short": "ab", "same": "a" * 5000}.items():
        (folder / f"{name}.txt").write_text(content)
    layouts = {"list": [1], "numbers": {"*": 3}, "nothing": {"*.nothing": "o i -> o i"}, "axes": {"*": "a b -> c d"}}
    layouts |= {"sizes": {"*.0.weight": "(o 0) i -> o i"}}
    for name, value in layouts.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "deep.json").write_text("[" * 100_000)
    for name in ("folder", "folder.py", "full"):
        (folder / name).mkdir()
    (folder / "full" / "mine").write_text("mine")
    for name in ("fifo", "fifo.py"):
        os.mkfifo(folder / name)
    for name in ("dangling", "dangling.py"):
        (folder / name).symlink_to("nowhere/at/all")
    body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).state_dict()
    weights = {f"body.{name}": value for name, value in body.items()}
    save_tensors(folder / "good.safetensors", weights)
    save_tensors(folder / "half.safetensors", dict(list(weights.items())[:2]))
    save_tensors(folder / "other.safetensors", {"w": torch.eye(3)})
    save_tensors(folder / "vectors.safetensors", {"w": torch.ones(3)})
    save_tensors(folder / "nan.safetensors", {name: value * torch.nan for name, value in weights.items()})
    save_tree(folder / "tree.safetensors", {"steps": 3, "model": weights})
    _runs(folder)


def _runs(folder: Path) -> None:
    """Write folders of runs: an unfinished one, and such as are spoiled."""

    class Stop(BaseException):
        pass

    def stop(run: gm.Run, share: float) -> None:
        if run.steps == 3:
            raise Stop

    here = Path.cwd()
    os.chdir(folder)
    try:
        gm.train(load("good.py:task"), steps=6, optimizer="adamw", out="unfinished", on_step=stop)
    except Stop:
        pass
    finally:
        os.chdir(here)
    for number, content in enumerate(RUNS.values()):
        place = folder / f"run{number}"
        place.mkdir()
        for name, value in content.items():
            if value is None:
                (place / name).mkdir()
            elif value == "fifo":
                os.mkfifo(place / name)
            else:
                (place / name).write_bytes(value if isinstance(value, bytes) else (folder / value).read_bytes())


def _name(field: str, what: str) -> str:
    return f"{field}_{what}".replace(" ", "_").replace(".", "_").replace("-", "_")


def _cases() -> dict[str, list[str]]:
    cases = {f"train {flag}={value[:20]!r}": train(flag, value) for flag, values in FLAGS.items() for value in values}
    for flag in ("--steps", "--epochs", "--seconds"):
        for value in FLAGS[flag]:
            cases[f"train {flag}={value[:20]!r}"] = ["train", "good.py:task", flag, value]
    for name in CONFIGS:
        given = train() if not CONFIGS[name].lstrip("[").startswith("steps") else ["train", "good.py:task"]
        cases[f"config: {name}"] = [*given, "--config", f"{name}.toml"]
    cases |= {command: command.split(" ") for command in COMMANDS}
    for name in [*TASK_FILES, "latin"]:
        cases[f"task file: {name}"] = train(task=f"{name}_task.py:task")
    for field, values in FIELDS.items():
        for what in values:
            more = ["--html", "x.html"] * (field == "pictures")
            cases[f"task: {field} {what}"] = ["train", f"good.py:{_name(field, what)}", *ENDED, *more]
    for field in ("model", "forward", "backward", "objective", "train_batches", "evaluate"):
        for error in ERRORS:
            cases[f"task: {field} raises {error}"] = ["train", f"good.py:{_name(field, 'raises ' + error)}", *ENDED]
    for field in ("forward", "objective", "train_batches"):
        for error in ("an error", "sys.exit", "a BaseException", "recursion", "no text"):
            name = f"good.py:{_name(field, 'raises ' + error)}"
            cases[f"inspect: {field} raises {error}"] = ["inspect", name]
            cases[f"compress: {field} raises {error}"] = ["compress", name, "--keep", "0.5"]
            cases[f"train auto: {field} raises {error}"] = ["train", name, "--steps", "3", "--lr", "auto"]
    for name in spoiled():
        cases[f"inspect {name}"] = ["inspect", f"spoiled/{name}"]
        cases[f"compress {name}"] = ["compress", f"spoiled/{name}", "--task", "good.py:task", "--keep", "0.5"]
    for number, name in enumerate(FOLDERS):
        cases[f"inspect a folder: {name}"] = ["inspect", f"folder{number}"]
        cases[f"compress a folder: {name}"] = ["compress", f"folder{number}", "--task", "good.py:task", "--keep", "0.5"]
    for number, name in enumerate(RUNS):
        cases[f"run: {name}"] = train("--out", f"run{number}")
        cases[f"resume: {name}"] = train("--out", f"run{number}", "--resume")
    common = [
        "train",
        "good.py:task",
        "--steps",
        "6",
        "--optimizer",
        "adamw",
        "--init",
        "default",
        "--out",
        "unfinished",
    ]
    cases["run: an unfinished one"] = common
    for name, more in CHANGED.items():
        cases[f"resume: {name}"] = [*common, "--resume", *more]
    return cases


CASES = _cases()
