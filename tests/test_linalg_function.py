"""The rule for a matrix function: what a row declares is what its methods get, and what the engine makes of answers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import gramian.linalg as gl
from cases import seeded
from gramian import random
from gramian.linalg import certificate as cert
from gramian.linalg.engine.escalation import Answer, Method
from gramian.linalg.engine.function import FUNCTIONS, MatrixFunction, evaluate, examples, methods_table, register


def answer(value, error=0.0, reason=0):
    count = len(value)
    error = torch.full((count,), error, dtype=torch.float64)
    return Answer(value, error, torch.zeros(count), torch.full((count,), reason, dtype=torch.long))


def function(*runs, domain="square", degree=1):
    """A function of those methods, in order of accuracy, each twice as cheap as the next."""
    methods = {
        f"method{i}": Method(run, torch.float64, 0.0, lambda m, n, i=i: {"eigh64": 2.0**i}, "tests")
        for i, run in enumerate(runs)
    }
    return MatrixFunction("f", methods, domain, degree, plain=lambda a: a, exact=lambda mp, a: a)


def call(f, a, **options):
    return evaluate(f, a, method=options.pop("method", "auto"), rtol=options.pop("rtol", None), **options)


SCALES = torch.tensor([1e-30, 1.0, 1e30])[:, None, None]


@pytest.mark.parametrize("degree", [0, 1, -2, Fraction(1, 2), Fraction(-1, 4)])
def test_a_homogeneous_function_sees_entries_below_one_and_its_value_follows_the_scale(degree):
    seen = []

    def run(x, *, rtol):
        seen.append(x)
        return answer(torch.full_like(x, 1.0) * x.abs() ** float(degree))

    a = SCALES.double() * torch.tensor([[3.0]], dtype=torch.float64)
    value, certificate = call(function(run, degree=degree), a)
    assert seen[0].abs().max() < 1
    assert torch.allclose(value, a ** float(degree), rtol=1e-12)
    assert certificate.converged.all()


def test_a_function_by_exponent_answers_at_the_scale_of_the_matrix():
    def run(x, *, exponent, rtol):
        return answer(x.log() + exponent.double()[:, None, None] * math.log(2), error=1e-12)

    a = SCALES.double() * torch.tensor([[3.0]], dtype=torch.float64)
    value, certificate = call(function(run, degree="by exponent"), a)
    assert torch.allclose(value, a.log(), rtol=1e-12)
    assert certificate.converged.all()


def test_an_unscaled_function_sees_the_matrices_as_they_are():
    seen = []

    def run(x, *, shift, rtol):
        seen.append((x, shift))
        return answer(x + 1)

    a = (SCALES * torch.tensor([[3.0]])).clone()
    a[1] = math.nan
    value, certificate = call(function(run, degree="unscaled"), a, damping=2.0)
    x, shift = seen[0]
    assert torch.equal(x[::2], a[::2].double())
    assert shift.tolist() == [2.0, 2.0, 2.0]
    assert torch.equal(value[::2], a[::2] + 1)
    assert certificate.converged.tolist() == [True, False, True]
    assert certificate.reasons[1] == "the matrix holds NaN or inf"


def test_a_method_that_declines_is_passed_over_and_the_last_is_not_asked_to():
    asked = []

    def declining(x, *, rtol):
        asked.append(rtol)

    def last(x, *, rtol):
        asked.append(rtol)
        return answer(x)

    _, certificate = call(function(declining, last), torch.eye(2).expand(3, 2, 2), rtol=1e-3)
    assert asked == [1e-3, math.inf]
    assert set(certificate.method_names) == {"method1"}


def test_only_matrices_that_failed_go_on_and_keep_the_better_answer():
    sizes = []

    def first(x, *, rtol):
        sizes.append(len(x))
        found = answer(x)
        found.error[1:] = torch.tensor([0.1, math.inf])
        return found

    def second(x, *, rtol):
        sizes.append(len(x))
        found = answer(2 * x)
        found.error[:] = torch.tensor([0.5, 0.0])
        return found

    a = torch.eye(2).expand(3, 2, 2).clone()
    value, certificate = call(function(first, second), a)
    assert sizes == [3, 2]
    assert certificate.method_names == ["method0", "method0", "method1"]
    assert certificate.converged.tolist() == [True, False, True]
    assert torch.equal(value, torch.stack([a[0], a[1], 2 * a[2]]))


def test_a_symmetric_domain_gives_the_symmetric_part_and_refuses_asymmetry():
    seen = []

    def run(x, *, dtype, rtol):
        seen.append((x, dtype))
        return answer(x)

    a = random.normal(2, 4, 4, generator=seeded(0))
    a[0] = a[0] + a[0].mT
    a[0, 0, 1] *= 1 + 1e-7  # rounding
    _, certificate = call(function(run, domain="definite"), a)
    x, dtype = seen[0]
    assert torch.equal(x, x.mT)
    assert dtype == torch.float32
    assert certificate.reasons == ["none", "the matrix is not symmetric, or not Hermitian"]


@pytest.mark.parametrize("domain", ["symmetric", "semidefinite", "definite"])
def test_every_symmetric_domain_hands_on_eigenvalues_of_both_signs(domain):
    a = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    f = function(lambda x, *, dtype, rtol: answer(x), domain=domain)
    assert f.symmetric
    assert torch.equal(call(f, a)[0], a)


def test_a_value_that_only_the_callers_dtype_cannot_hold_overflows():
    """Not one that is infinite or not certain already, and not one whose norm is infinite."""
    values = torch.tensor([1e300, 1e300, math.inf, math.nan, 3.0], dtype=torch.float64)[:, None, None].expand(5, 1, 2)
    error = torch.tensor([1e290, math.inf, 1.0, 1.0, 0.0], dtype=torch.float64)

    def run(x, *, rtol):
        return Answer(values, error, torch.zeros(5), torch.zeros(5, dtype=torch.long))

    _, certificate = call(function(run, degree="unscaled"), torch.ones(5, 1, 1))
    assert certificate.reason.tolist() == [cert.OVERFLOW, *[cert.INACCURATE] * 3, cert.NONE]
    _, certificate = call(function(run, degree="unscaled"), torch.ones(5, 1, 1, dtype=torch.float64))
    assert certificate.reason.tolist() == [*[cert.INACCURATE] * 4, cert.NONE]


def test_every_registered_function_is_public_and_in_the_table_of_the_docs():
    table = methods_table()
    for name, row in FUNCTIONS.items():
        assert {name, f"{name}_ex"} <= set(gl.__all__)
        assert f"`{name}`" in table
        for method, details in row.methods.items():
            assert f"`{method}`" in table
            assert details.purpose
    assert {name for _, name, _ in examples()} == set(FUNCTIONS)
    with pytest.raises(AssertionError):
        register(FUNCTIONS["inv"])
