"""What was measured: one row for each matrix, for each module of the forward pass, for each direction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """The measurements of one matrix W of the network; what was not measured is `None`.

    In a comparison of two checkpoints W is the difference W₁ − W₂.

    Attributes:
        name: of the parameter; a matrix inside a fused tensor has the part's name in brackets.
        kind: the layer's class, or `"vector"`.
        shape: (m, n).
        depth: place in forward order, from 0.
        dtype: torch's name, `"float32"`.
        parameters: number of entries.
        singular_values: σ₁ ≥ σ₂ ≥ …, all of them or the few that are known.
        frobenius_norm: ‖W‖_F.
        spectral_norm: σ₁ of the matrix; for a convolution, of the reshaped kernel.
        condition: σ₁ / σ_min.
        stable_rank: ‖W‖_F² / σ₁².
        effective_rank: exp of the entropy of σᵢ² / ‖W‖_F².
        numerical_rank: number of σᵢ above rounding.
        gain: χ, the mean squared singular value of the Jacobian from this layer's input to the next layer's input.
        activation_rms: root mean square of the layer's input.
        gradient_rms: root mean square of the loss's gradient at the layer's output, per unit.
        note: what else must be known about these numbers.
        role: `"embedding"`, `"hidden"` or `"head"`.
        spectral_norm_error: bound on the error of `spectral_norm`.
        operator_norm: largest singular value of a convolution as a map of images.
        operator_norm_error: bound on the error of `operator_norm`.
        rank_90, rank_99: smallest ranks that hold 90 and 99 % of the energy ‖W‖_F², as an interval (low, high) whose
            ends are equal where all singular values are known.
        saving_99: share of the parameters that two factors of rank `rank_99` save.
        noise_edge: largest singular value that independent entries of this variance have in the limit.
        above_noise: number of singular values significantly beyond the noise edge.
        noise_p_value: probability of a σ₁ this large if the entries were independent.
        bulk_distance: largest difference of the spectrum's distribution function from Marchenko and Pastur's.
        tail_alpha: exponent of a power-law tail; `None` where the fit abstains.
        tail_interval: its 95 % interval.
        tail_size: number of eigenvalues in the tail.
        tail_note: why the fit abstains, or what its result means.
        zeros: number of entries that are exactly zero.
        overflow_float16, overflow_bfloat16: entries that a cast makes infinite.
        underflow_float16: entries that a cast makes zero.
        duplicate_of: name of an earlier matrix with the same entries, bit for bit.
        relative_change: ‖W₁ − W₂‖_F / ‖W₂‖_F.
        subspace_angle: largest angle in degrees between the leading right singular subspaces of W₁ and W₂.
        subspace_dim: dimension of these subspaces.
        method: how the singular values were computed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    depth: int
    dtype: str = ""
    parameters: int = 0
    singular_values: tuple[float, ...] = ()
    frobenius_norm: float | None = None
    spectral_norm: float | None = None
    condition: float | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    numerical_rank: int | None = None
    gain: float | None = None
    activation_rms: float | None = None
    gradient_rms: float | None = None
    note: str = ""
    role: str = ""
    spectral_norm_error: float | None = None
    operator_norm: float | None = None
    operator_norm_error: float | None = None
    rank_90: tuple[int, ...] | None = None
    rank_99: tuple[int, ...] | None = None
    saving_99: float | None = None
    noise_edge: float | None = None
    above_noise: int | None = None
    noise_p_value: float | None = None
    bulk_distance: float | None = None
    tail_alpha: float | None = None
    tail_interval: tuple[float, ...] | None = None
    tail_size: int | None = None
    tail_note: str = ""
    zeros: int | None = None
    overflow_float16: int | None = None
    underflow_float16: int | None = None
    overflow_bfloat16: int | None = None
    duplicate_of: str = ""
    relative_change: float | None = None
    subspace_angle: float | None = None
    subspace_dim: int | None = None
    method: str = ""


@dataclass(frozen=True)
class Place:
    """One call of a module as the first batch crossed it in training mode; what was not measured is `None`.

    Attributes:
        name: of the module.
        kind: its class.
        rms: root mean square of its output.
        variation: share of that which differs between samples: 0 where all samples get the same output.
        gradient: root mean square of the loss's gradient at the output of its matrix, per unit.
        gain: χ of its matrix, as in `Layer`.
        update: ‖ΔW‖_F / ‖W‖_F of its matrix in the optimizer's first step.
    """

    name: str
    kind: str = ""
    rms: float | None = None
    variation: float | None = None
    gradient: float | None = None
    gain: float | None = None
    update: float | None = None


@dataclass(frozen=True)
class Direction:
    """A leading singular vector of a layer, shown as an image or as tokens.

    Attributes:
        layer: name of the matrix.
        rank: 1 for the vector of σ₁, 2 for that of σ₂, …
        singular_value: σ of this vector.
        image: rows of pixels, where the vector is an image.
        tokens: the tokens at the positive and at the negative end, where the vector runs over a vocabulary.
    """

    layer: str
    rank: int
    singular_value: float
    image: tuple[tuple[float, ...], ...] = ()
    tokens: tuple[tuple[str, ...], ...] = ()
