"""Sequences of tokens: copying, and the characters of a text, with a small transformer or an LSTM."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from gramian.errors import InputError, TaskError
from gramian.objective import Objective
from gramian.texts import read_text
from gramian.training import Task

__all__ = ["LSTM", "CausalTransformer", "chars", "copying"]

BATCH_SIZE, NUM_BATCHES = 32, 50


class CausalTransformer(nn.Module):
    """A small transformer that predicts the next token.

    Args:
        vocabulary: number of tokens.
        length: the longest sequence.
        width, num_layers, num_heads: of its layers.

    Raises: nothing of its own.
    Cost: that of `num_layers` of torch's encoder layers.
    Source: Vaswani et al. (1706.03762), with the norms before each part.

    >>> CausalTransformer(5, 8)(torch.zeros(2, 8, dtype=torch.long)).shape
    torch.Size([2, 8, 5])
    """

    def __init__(
        self, vocabulary: int, length: int, *, width: int = 64, num_layers: int = 2, num_heads: int = 4
    ) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, num_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """The scores of the token after each one, `(B, T, vocabulary)`."""
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.embed(tokens) + self.place(torch.arange(length, device=tokens.device))
        return self.head(self.layers(x, mask=mask, is_causal=True))


class LSTM(nn.Module):
    """A small recurrent network that predicts the next token.

    Args:
        vocabulary: number of tokens.
        width, num_layers: of its layers.

    Raises: nothing of its own.
    Cost: that of torch's LSTM, one token after the other.
    Source: Hochreiter & Schmidhuber, Long Short-Term Memory (1997).

    >>> LSTM(5)(torch.zeros(2, 8, dtype=torch.long)).shape
    torch.Size([2, 8, 5])
    """

    def __init__(self, vocabulary: int, *, width: int = 96, num_layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.LSTM(width, width, num_layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """The scores of the token after each one, `(B, T, vocabulary)`."""
        return self.head(self.layers(self.embed(tokens))[0])


# The models of `chars`, from the vocabulary and the length of the sequences.
MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "transformer": CausalTransformer,
    "lstm": lambda vocabulary, length: LSTM(vocabulary),
}


def copying(*, letters: int = 8, length: int = 10, gap: int = 10) -> Task:
    """Return a task of memory: random letters, a gap, and a mark after which the letters are to be repeated.

    The evaluation tells the share of letters that are repeated rightly; guessing gives one in `letters`.

    Args:
        letters: how many there are.
        length: how many are to be repeated.
        gap: the number of blanks between.
    Returns: the task; its batches are drawn anew in each epoch.
    Raises: nothing of its own.
    Cost: none.
    Source: Hochreiter & Schmidhuber, Long Short-Term Memory (1997), §5; Arjovsky et al. (1511.06464), §5.1.

    >>> x, y = copying().batches(1)[0]
    >>> x.shape == y.shape, int((y >= 0).sum(1)[0])
    (True, 10)
    """
    blank, mark = letters, letters + 1

    def draw(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        said = torch.randint(letters, (num, length), generator=generator)
        middle = torch.full((num, gap), blank)
        tokens = torch.cat([said, middle, torch.full((num, 1), mark), said], 1)
        labels = tokens[:, 1:].clone()
        labels[:, : length + gap] = -100  # nothing is asked before the mark
        return tokens[:, :-1], labels

    held_out = draw(256, torch.Generator().manual_seed(0))

    def batches(epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        return (draw(BATCH_SIZE, generator) for _ in range(NUM_BATCHES))

    def evaluate(model: nn.Module) -> dict[str, float]:
        tokens, labels = held_out
        asked = labels >= 0
        return {"accuracy": float((model(tokens).argmax(-1) == labels)[asked].float().mean())}

    def model() -> nn.Module:
        return CausalTransformer(letters + 2, 2 * length + gap)

    return Task(model, Objective.classification(), batches, evaluate, name="copying")


def chars(text: str | os.PathLike[str], *, length: int = 64, model: str = "transformer") -> Task:
    """Return a task of language: the next character of a text, of which the last tenth is held out.

    Args:
        text: path of a file of UTF-8 text.
        length: of the sequences, in characters.
        model: `"transformer"` or `"lstm"`, of about 110,000 and 160,000 parameters.
    Returns: the task; the evaluation tells the bits of a held-out character.
    Raises:
        InputError: another model.
        TaskError: the file cannot be read, or is too short.
    Cost: reading the file.
    Source: this library's own.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "text.txt")
    >>> file.write_text("to be or not to be, that is the question. " * 50)
    2100
    >>> chars(file).batches(1)[0].shape
    torch.Size([32, 65])
    """
    if model not in MODELS:
        raise InputError(f"chars: model must be one of {', '.join(MODELS)}; got {model!r}")
    try:
        content = read_text(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise TaskError(f"chars: cannot read {os.fspath(text)}: {reason}. Give a file of text") from None
    known = sorted(set(content))
    numbers = {char: number for number, char in enumerate(known)}
    tokens = torch.tensor([numbers[char] for char in content])
    cut = len(tokens) * 9 // 10
    train, test = tokens[:cut], tokens[cut:]
    if len(test) <= length + 1:
        raise TaskError(
            f"chars: {os.fspath(text)} has {len(tokens):,} characters; wanted more than {10 * (length + 2):,}"
        )

    def batches(epoch: int, generator: torch.Generator) -> Iterator[Tensor]:
        for _ in range(NUM_BATCHES):
            starts = torch.randint(len(train) - length, (BATCH_SIZE, 1), generator=generator)
            yield train[starts + torch.arange(length + 1)]

    held_out = test[: len(test) // (length + 1) * (length + 1)].view(-1, length + 1)[:64]

    def evaluate(network: nn.Module) -> dict[str, float]:
        scores = network(held_out[:, :-1])
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), held_out[:, 1:].flatten())
        return {"bits": float(loss / torch.log(torch.tensor(2.0)))}

    def made() -> nn.Module:
        return MODELS[model](len(known), length + 1)

    return Task(made, Objective.next_token(), batches, evaluate, name="chars", source=f"chars {Path(text).resolve()}")
