"""The demo's report: the verdict, then the pictures, then the tables."""

from __future__ import annotations

from gramian import report
from gramian.demo.story import CELLS, KEEP, NAMES, RATES, Story
from gramian.report import Document, Picture, Section, Series, Table, Tile

__all__ = ["document"]


def document(story: Story, *, plots: bool = True) -> Document:
    """The story as a page: the verdict, then the pictures, then the tables."""
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
    start = f"The network that did not learn ({untreated:.1%} of held-out digits) now reaches"
    if _learned(untreated, story):
        start = f"The network that reached {untreated:.1%} of held-out digits now reaches"
    return Document(
        title=f"A plain {story.depth}-layer tanh network on handwritten digits: {question}",
        verdict=f"{start} {trained:.1%}, {100 * (trained - story.accuracy_logistic):+.1f} points against logistic "
        f"regression; with {share:.0%} of its parameters, {story.accuracy_compressed:.1%}.",
        status="good" if good else "warning",
        tiles=[
            Tile(
                "Logistic regression", f"{story.accuracy_logistic:.1%}", "cross-validated; no hidden layer", "baseline"
            ),
            Tile("Untreated", f"{untreated:.1%}", "PyTorch's initialization, AdamW", "before"),
            Tile("Mended and trained", f"{trained:.1%}", "isometric initialization, Muon", "after"),
            Tile("Compressed", f"{story.accuracy_compressed:.1%}", f"{story.plan.parameters:,} parameters", "accent"),
        ],
        sections=sections,
        footer=f"seed {story.seed} · {story.seconds_each:g} s of training for each run · "
        f"{story.seconds:.0f} s in all · accuracy on the 30 % of the digits that were held out",
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
        ["logistic regression", "", None, None, f"{story.accuracy_logistic:.1%}"],
        *[
            [
                NAMES[i],
                NAMES[o],
                RATES[i, o][story.depth > 300],
                story.runs[i, o].steps,
                f"{story.accuracy((i, o)):.1%}",
            ]
            for i, o in CELLS
        ],
    ]
    return Section(
        "Which half of the cure does what",
        _which_half(story),
        [
            Picture(
                "Held-out accuracy by seconds of training",
                curves,
                x_label="seconds of training",
                y_label="held-out accuracy, %",
                reference=(100 * story.accuracy_logistic, f"logistic regression {story.accuracy_logistic:.1%}"),
                caption=f"Equal seconds for all four ({story.seconds_each:g} s); learning rates tuned beforehand, on "
                "other splits and digits held out for that, each optimizer on a grid of at least five.",
            ),
            Table(
                "The four runs and the baseline",
                ["initialization", "optimizer", "learning rate", "steps", "held-out accuracy"],
                rows,
                emphasis=[len(rows) - 1],
            ),
        ],
    )


def _learned(accuracy: float, story: Story) -> bool:
    """Whether an accuracy is above chance by more than the noise of 540 held-out digits."""
    return accuracy > 1 / story.classes + 0.1


def _which_half(story: Story) -> str:
    """What the 2 × 2 shows, in words that follow from its numbers."""
    by = {cell: story.accuracy(cell) for cell in CELLS}
    muon_alone, init_alone, both = (by[cell] for cell in CELLS[1:])

    def against(accuracy: float) -> str:
        return f"{accuracy:.1%}, {100 * (accuracy - story.accuracy_logistic):+.1f} points against logistic regression"

    gain = 100 * (both - init_alone)
    return " ".join((
        f"Muon with PyTorch's initialization ends at {against(muon_alone)}."
        if _learned(muon_alone, story)
        else f"A matrix optimizer alone does not help: Muon with PyTorch's initialization ends at {muon_alone:.1%}, "
        "because the input is lost in rounding on its way up.",
        f"Isometric initialization alone lets AdamW learn ({against(init_alone)})."
        if _learned(init_alone, story)
        else f"Isometric initialization alone is not enough for AdamW ({init_alone:.1%}).",
        f"Both together reach {against(both)};",
        f"in the same seconds Muon adds {gain:.1f} points." if gain > 0 else f"Muon adds nothing here ({gain:+.1f}).",
    ))  # fmt: skip


def _compression_section(story: Story) -> Section:
    assert story.plan is not None
    plan = story.plan
    trained = story.accuracy(CELLS[-1])
    names = list(plan.ranks)
    shapes = {name: spectrum.block.shape for name, spectrum in zip(names, plan.spectra, strict=True)}
    kept = [rank if rank is not None else min(shapes[name]) for name, rank in plan.ranks.items()]
    dense = sum(rank is None for rank in plan.ranks.values())
    rows: list[list[str | float | int | None]] = [
        ["as trained", plan.parameters_dense, story.bytes_trained, f"{trained:.1%}"],
        ["factored, no fine-tuning", plan.parameters, story.bytes_compressed, f"{story.accuracy_compressed:.1%}"],
        ["the nearest affine map", None, None, f"{story.accuracy_affine:.1%}"],
        ["logistic regression", None, None, f"{story.accuracy_logistic:.1%}"],
    ]
    disguise = f"The affine map nearest to the network's own scores reaches {story.accuracy_affine:.1%}: " + (
        "the network is no linear map in disguise."
        if trained - story.accuracy_affine > 0.01
        else "here the network does little that a linear map could not."
    )
    return Section(
        "Smaller",
        f"Every layer is factored where the loss notices least: the SVD of G^½ W A^½, one list of singular values for "
        f"all {len(names)} layers, one budget of {KEEP:.0%} of the parameters. {dense} layers stay dense. {disguise}",
        [
            Picture(
                "Rank kept by layer",
                [Series("rank kept", list(range(1, len(kept) + 1)), kept, role="after", style="bars")],
                x_label="layer",
                y_label="rank",
                reference=(float(min(shapes[names[len(names) // 2]])), "full rank"),
            ),
            Table("Compression", ["", "parameters", "bytes on disk", "held-out accuracy"], rows, emphasis=[1]),
        ],
    )


def _without_pictures(section: Section) -> Section:
    items = [item for item in section.items if isinstance(item, (Table, list))]
    return Section(section.heading, section.text, items)
