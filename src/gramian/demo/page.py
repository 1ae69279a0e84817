"""The demo's report."""

from __future__ import annotations

from gramian import report
from gramian.demo.story import CELLS, KEEP, NAMES, RATES, Story
from gramian.report import Document, Picture, Section, Series, Table, Tile

__all__ = ["document"]


def document(story: Story, *, plots: bool = True) -> Document:
    """Return the demo's results as a page."""
    assert story.before is not None
    assert story.after is not None
    assert story.plan is not None
    trained, untreated = story.accuracy(CELLS[-1]), story.accuracy(CELLS[0])
    question = "odd or even?" if story.classes == 2 else "which digit?"
    share = story.plan.parameters / story.plan.parameters_dense
    good = trained > story.accuracy_logistic and story.accuracy_compressed >= trained - 0.01
    sections = [
        *report.compare(story.before, story.after, labels=("before", "after")),
        _training_section(story),
        _compression_section(story),
    ]
    if not plots:
        sections = [_without_pictures(section) for section in sections]
    start = f"The network that did not learn ({untreated:.1%} of held-out digits correct) now reaches"
    if _learned(untreated, story):
        start = f"The network that classified {untreated:.1%} of held-out digits correctly now reaches"
    return Document(
        title=f"A plain {story.depth}-layer tanh network on handwritten digits: {question}",
        verdict=f"{start} {trained:.1%}, {_against(trained, story)}; compressed to {share:.0%} of its "
        f"parameters, it reaches {story.accuracy_compressed:.1%}.",
        status="good" if good else "warning",
        tiles=[
            Tile(
                "Logistic regression", f"{story.accuracy_logistic:.1%}", "cross-validated; no hidden layer", "baseline"
            ),
            Tile("Untreated", f"{untreated:.1%}", "PyTorch's initialization, AdamW", "before"),
            Tile("Repaired and trained", f"{trained:.1%}", "isometric initialization, Muon", "after"),
            Tile("Compressed", f"{story.accuracy_compressed:.1%}", f"{story.plan.parameters:,} parameters", "accent"),
        ],
        sections=sections,
        footer=f"seed {story.seed} · {story.told_budget()} · "
        f"{story.seconds:.0f} s in total · accuracy on the 30 % of the digits that were held out",
    )


def _training_section(story: Story) -> Section:
    roles = {CELLS[0]: "before", CELLS[1]: "muted", CELLS[2]: "accent", CELLS[3]: "after"}
    curves = [
        Series(
            f"{NAMES[init]} + {NAMES[opt]}",
            [row["seconds"] for row in story.runs[init, opt].history],
            [100 * row["accuracy"] for row in story.runs[init, opt].history],
            role=roles[init, opt],  # type: ignore[arg-type]
        )
        for init, opt in CELLS
    ]
    rows: list[list[str | float | int | None]] = [
        ["logistic regression", "", 100 * story.accuracy_logistic, None, None],
        *[
            [
                NAMES[i],
                NAMES[o],
                100 * story.accuracy((i, o)),
                RATES[i, o][story.depth > 300],
                story.runs[i, o].steps,
            ]
            for i, o in CELLS
        ],
    ]
    return Section(
        "What each half of the repair does",
        _which_half(story),
        [
            Picture(
                "Held-out accuracy by seconds of training",
                curves,
                x_label="seconds of training",
                y_label="held-out accuracy, %",
                reference=(100 * story.accuracy_logistic, f"logistic regression {story.accuracy_logistic:.1%}"),
                caption=f"{story.told_budget()}. Learning rates were tuned beforehand on other splits of "
                "the data, on a grid of at least five for each optimizer.",
            ),
            Table(
                "The four runs and the baseline",
                ["initialization", "optimizer", "accuracy, %", "learning rate", "steps"],
                rows,
                emphasis=[len(rows) - 1],
            ),
        ],
    )


def _learned(accuracy: float, story: Story) -> bool:
    """Whether an accuracy is above chance by more than the sampling noise of 540 held-out digits."""
    return accuracy > 1 / story.classes + 0.1


def _against(accuracy: float, story: Story) -> str:
    """Return the difference from logistic regression in words."""
    points = 100 * (accuracy - story.accuracy_logistic)
    return f"{abs(points):.1f} points {'above' if points >= 0 else 'below'} logistic regression"


def _which_half(story: Story) -> str:
    """Return what the four runs show, in sentences that depend on their numbers."""
    by = {cell: story.accuracy(cell) for cell in CELLS}
    muon_alone, init_alone, both = (by[cell] for cell in CELLS[1:])

    gain = 100 * (both - init_alone)
    return " ".join((
        f"Muon with PyTorch's initialization reaches {muon_alone:.1%}, {_against(muon_alone, story)}."
        if _learned(muon_alone, story)
        else f"A matrix optimizer alone does not help: Muon with PyTorch's initialization reaches {muon_alone:.1%}, "
        "because the input is lost in rounding before it reaches the last layer.",
        f"With isometric initialization alone, AdamW learns: {init_alone:.1%}, {_against(init_alone, story)}."
        if _learned(init_alone, story)
        else f"Isometric initialization alone is not enough for AdamW ({init_alone:.1%}).",
        f"Both together reach {both:.1%}, {_against(both, story)}:",
        f"Muon adds {gain:.1f} points."
        if gain > 0
        else f"Muon adds nothing here ({gain:+.1f} points).",
    ))  # fmt: skip


def _compression_section(story: Story) -> Section:
    assert story.plan is not None
    plan = story.plan
    trained = story.accuracy(CELLS[-1])
    names = list(plan.ranks)
    shapes = {name: spectrum.shape for name, spectrum in zip(names, plan.spectra, strict=True)}
    kept = [rank if rank is not None else min(shapes[name]) for name, rank in plan.ranks.items()]
    dense = sum(rank is None for rank in plan.ranks.values())
    rows: list[list[str | float | int | None]] = [
        ["as trained", 100 * trained, plan.parameters_dense, story.bytes_trained],
        ["factored, no fine-tuning", 100 * story.accuracy_compressed, plan.parameters, story.bytes_compressed],
        ["the best affine approximation", 100 * story.accuracy_affine, None, None],
        ["logistic regression", 100 * story.accuracy_logistic, None, None],
    ]
    affine = f"The affine map that best approximates the network's scores reaches {story.accuracy_affine:.1%}: " + (
        "the network does more than a linear map could."
        if trained - story.accuracy_affine > 0.01
        else "here the network does little that a linear map could not."
    )
    return Section(
        "Compression",
        "Each layer W is replaced by two factors. The SVD of G^½ W A^½ chooses them, since it weighs errors by their "
        "effect on the loss. "
        f"All {len(names)} layers share one budget of {KEEP:.0%} of the parameters. "
        f"{dense or 'No'} layer{'s stay' if dense != 1 else ' stays'} dense. {affine}",
        [
            Picture(
                "Rank kept by layer",
                [Series("rank kept", list(range(1, len(kept) + 1)), kept, role="after", style="bars")],
                x_label="layer",
                y_label="rank",
                reference=(float(min(shapes[names[len(names) // 2]])), "full rank"),
            ),
            Table("Accuracy and size", ["", "accuracy, %", "parameters", "bytes on disk"], rows, emphasis=[1]),
        ],
    )


def _without_pictures(section: Section) -> Section:
    items = [item for item in section.items if isinstance(item, (Table, list))]
    return Section(section.heading, section.text, items)
