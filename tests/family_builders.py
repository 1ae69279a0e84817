"""How the families are built: models of public libraries, tiny and at random, and batches of each library's own kind.

Nothing is downloaded. A model is built and its batch drawn from a seed, and the global generator is left as it was.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 96
LENGTH = 12
SAMPLES = 6
NUM_CLASSES = 5
SIZE = 32


@dataclass(frozen=True)
class Family:
    """One model of one library.

    Args:
        name: of the row.
        library: that has to be installed.
        make: the model.
        make_batch: a batch as the library's users have it.
        loss: `(model, batch) -> scalar mean`.
        small: whether it belongs to the part that the quick tests run.
    """

    name: str
    library: str
    make: Callable[[], nn.Module]
    make_batch: Callable[[], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    small: bool = False

    def model(self, seed: int = 0) -> nn.Module:
        """The model from a seed, in evaluation mode, so that no dropout hides what a step does."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.make().float().eval()

    def batch(self, seed: int = 0) -> Any:
        """The batch from a seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            return self.make_batch()


def library(name: str) -> Any:
    """A library, imported, after torchvision, which the others import too where it is installed."""
    if importlib.util.find_spec("torchvision"):
        import_torchvision()
    module = importlib.import_module(name)
    if name == "transformers":
        module.utils.logging.set_verbosity_error()
        module.utils.logging.disable_progress_bar()
    return module


@cache
def import_torchvision() -> None:
    """Imports torchvision also where its compiled operators do not fit the installed torch.

    The wheels of the package index are compiled against CUDA. Beside a CPU build of torch their operators are missing,
    which no model needs; only what registers them must be passed over.
    """
    register = torch.library.register_fake

    def register_known(op: Any, *args: Any, **kwargs: Any) -> Any:
        return (lambda f: f) if str(op).startswith("torchvision::") else register(op, *args, **kwargs)

    torch.library.register_fake = register_known
    try:
        importlib.import_module("torchvision")
    finally:
        torch.library.register_fake = register


# ---- losses and batches --------------------------------------------------------------------------------------------


def own_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The loss that the model computes itself from the batch's labels."""
    return model(**batch).loss


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    output = model(batch[0])
    scores = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(scores.flatten(0, -2), batch[1].flatten())


def squared_error(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "target"}
    return F.mse_loss(model(**inputs).sample, batch["target"])


def tokens() -> dict[str, Tensor]:
    """Tokens of lengths that differ, padded on the right."""
    ids = torch.randint(3, VOCABULARY, (SAMPLES, LENGTH))
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH] * (SAMPLES - 2) + [LENGTH - 3, LENGTH - 5])[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def text() -> dict[str, Tensor]:
    """For language models: each token is a label, padding is none."""
    batch = tokens()
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def full_text() -> dict[str, Tensor]:
    """The same without padding, for models that take no mask."""
    ids = torch.randint(3, VOCABULARY, (SAMPLES, LENGTH))
    return {"input_ids": ids, "labels": ids}


def masked_text() -> dict[str, Tensor]:
    """For masked language models: some tokens are hidden, and only they are labels."""
    batch = tokens()
    hidden = (torch.rand(SAMPLES, LENGTH) < 0.3) & (batch["attention_mask"] == 1)
    hidden[:, 0] = True
    labels = batch["input_ids"].masked_fill(~hidden, -100)
    return batch | {"input_ids": batch["input_ids"].masked_fill(hidden, 2), "labels": labels}


def classified_text() -> dict[str, Tensor]:
    return tokens() | {"labels": torch.randint(0, NUM_CLASSES, (SAMPLES,))}


def images(size: int = SIZE, channels: int = 3) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(SAMPLES, channels, size, size),
        "labels": torch.randint(0, NUM_CLASSES, (SAMPLES,)),
    }


def pairs(size: int = SIZE) -> tuple[Tensor, Tensor]:
    batch = images(size)
    return batch["pixel_values"], batch["labels"]


def captions() -> dict[str, Any]:
    return tokens() | {"pixel_values": images()["pixel_values"], "return_loss": True}


def speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(SAMPLES, 8, 24), "labels": torch.randint(3, VOCABULARY, (SAMPLES, LENGTH))}


def waves() -> dict[str, Tensor]:
    return {
        "input_values": torch.randn(SAMPLES, 400),
        "attention_mask": torch.ones(SAMPLES, 400, dtype=torch.long),
        "labels": torch.randint(3, 20, (SAMPLES, 4)),
    }


def next_tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH + 1))
    return ids[:, :-1], ids[:, 1:]


def noisy() -> dict[str, Any]:
    """For diffusion: a noisy image, the time, and the noise."""
    shape = (SAMPLES, 3, 16, 16)
    batch = {"sample": torch.randn(shape), "timestep": torch.randint(0, 1000, (SAMPLES,))}
    return batch | {"target": torch.randn(shape)}


def noisy_classes() -> dict[str, Any]:
    """The same for a model that is told the class of the image."""
    batch = {"hidden_states" if name == "sample" else name: value for name, value in noisy().items()}
    return batch | {"class_labels": torch.randint(0, 10, (SAMPLES,))}


# ---- models --------------------------------------------------------------------------------------------------------


def transformers_model(cls: str, config: str, numbers: dict[str, Any]) -> nn.Module:
    transformers = library("transformers")
    return getattr(transformers, cls)(getattr(transformers, config)(**numbers))


def hf(
    name: str, cls: str, config: str, batch: Callable[[], Any] = text, *, small: bool = False, **numbers: Any
) -> Family:
    """A row of transformers: a class, its config, and the numbers that differ from those of `SMALL`."""
    return Family(name, "transformers", partial(transformers_model, cls, config, numbers), batch, own_loss, small)


def timm_model(name: str, **numbers: Any) -> nn.Module:
    return library("timm").create_model(name, num_classes=NUM_CLASSES, **numbers)


def mixer() -> nn.Module:
    library("timm")
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(NUM_CLASSES, SIZE, patch_size=8, num_blocks=2, embed_dim=32)


def timm_row(name: str, call: str, size: int = SIZE, **numbers: Any) -> Family:
    return Family(name, "timm", partial(timm_model, call, **numbers), partial(pairs, size), cross_entropy)


def inverted_residuals(version: int) -> nn.Module:
    """torchvision's MobileNets with few blocks."""
    library("torchvision")
    if version == 2:
        from torchvision.models import MobileNetV2

        return MobileNetV2(NUM_CLASSES, width_mult=0.25, inverted_residual_setting=[[1, 16, 1, 1], [4, 24, 2, 2]])
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    blocks = [
        InvertedResidualConfig(16, 3, 32, 16, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(16, 3, 48, 24, True, "HS", 1, 1, 1.0),
    ]
    return MobileNetV3(blocks, 32, NUM_CLASSES)


def efficient_net() -> nn.Module:
    library("torchvision")
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 32, 16, 1), MBConvConfig(4, 3, 2, 16, 24, 2)]
    return EfficientNet(blocks, 0.0, num_classes=NUM_CLASSES, last_channel=64)


def shuffle_net() -> nn.Module:
    return library("torchvision").models.ShuffleNetV2([1, 1, 1], [8, 16, 32, 32, 64], num_classes=NUM_CLASSES)


def dense_net() -> nn.Module:
    return library("torchvision").models.DenseNet(8, (2, 2), 16, num_classes=NUM_CLASSES)


def google_net() -> nn.Module:
    """Two of GoogLeNet's modules, whose branches are convolutions of different sizes."""
    library("torchvision")
    from torchvision.models.googlenet import BasicConv2d, Inception

    return nn.Sequential(
        BasicConv2d(3, 16, kernel_size=7, stride=2, padding=3),
        Inception(16, 8, 8, 16, 4, 8, 8),
        nn.MaxPool2d(3, stride=2),
        Inception(40, 8, 8, 16, 4, 8, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, NUM_CLASSES),
    )


def regnet() -> nn.Module:
    library("torchvision")
    from torchvision.models.regnet import BlockParams, RegNet

    return RegNet(BlockParams.from_init_params(2, 16, 8.0, 2.0, 8, se_ratio=0.25), NUM_CLASSES, stem_width=16)


def diffusers_model(cls: str, **numbers: Any) -> nn.Module:
    return getattr(library("diffusers"), cls)(**numbers)


def autoencoded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["sample"]).sample, batch["sample"])


def adapted(cls: str, config: str, numbers: dict[str, Any], targets: list[str], **options: Any) -> nn.Module:
    """A frozen model with a LoRA adapter, whose B starts at zero, as PEFT does it."""
    peft = library("peft")
    lora = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(transformers_model(cls, config, numbers), lora)


class RecurrentLM(nn.Module):
    """A language model of torch's LSTM or GRU."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.rnn = cell(24, 32, num_layers=2, batch_first=True)
        self.decoder = nn.Linear(32, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.rnn(self.embed(ids))[0])


class GraphNetwork(nn.Module):
    """Nodes of one graph, classified: graph convolution, then attention over neighbors."""

    def __init__(self) -> None:
        super().__init__()
        layers = library("torch_geometric.nn")
        self.conv1 = layers.GCNConv(8, 16)
        self.conv2 = layers.GATv2Conv(16, 8, heads=2)
        self.conv3 = layers.SAGEConv(16, NUM_CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.conv1(x, edge_index).relu()
        x = self.conv2(x, edge_index).relu()
        return self.conv3(x, edge_index)


def graph() -> Any:
    x, edges = torch.randn(20, 8), torch.randint(0, 20, (2, 60))
    return library("torch_geometric.data").Data(x=x, edge_index=edges, y=torch.randint(0, NUM_CLASSES, (20,)))


def node_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch.x, batch.edge_index), batch.y)


class SentenceEncoder(nn.Module):
    """As sentence-transformers has MiniLM: BERT without its pooler in use, the mean over tokens, length one."""

    def __init__(self, numbers: dict[str, Any]) -> None:
        super().__init__()
        self.bert = transformers_model("BertModel", "BertConfig", numbers)

    def forward(self, **batch: Tensor) -> Tensor:
        hidden = self.bert(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def two_sentences() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return tokens(), tokens()


def contrastive(model: nn.Module, batch: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Tensor:
    """Each sentence shall be nearest to its partner: the model runs twice."""
    first, second = (model(**side) for side in batch)
    return F.cross_entropy(20 * first @ second.T, torch.arange(SAMPLES))
