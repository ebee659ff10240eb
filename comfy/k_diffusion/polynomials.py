"""Lagrange bases, from which multistep solvers get their coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from numpy.polynomial import polynomial


def lagrange_basis(nodes: Sequence[float]) -> list[numpy.ndarray]:
    """Coefficients, lowest power first, of the polynomials that are 1 at one node and 0 at the others."""
    basis = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        scale = numpy.prod([node - other for other in others])
        basis.append(polynomial.polyfromroots(others) / scale)
    return basis


def lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integrals of the basis polynomials from `start` to `end`."""
    antiderivatives = [polynomial.polyint(coefficients) for coefficients in lagrange_basis(nodes)]
    return [float(polynomial.polyval(end, p) - polynomial.polyval(start, p)) for p in antiderivatives]
