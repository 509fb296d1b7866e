"""Whitening, colouring and optimal transport: float64 algebra on covariances [D, D].

A map ``A`` acts on a column, ``z = A u``; on rows it is ``rows @ A.T``. With source y (text, say)
and target x (image), the maps of the family that need more than a trace are

- whitening-colouring (CORAL): ``A = S_x^1/2 S_y^-1/2``
- optimal transport (Bures): ``A = S_y^-1/2 (S_y^1/2 S_x S_y^1/2)^1/2 S_y^-1/2``
- blockwise: whitening-colouring on a subspace and its complement (arXiv 2602.07026, App F)

Matrices of any floating dtype and device come in; the algebra is done and returned in float64, by
eigendecomposition. An eigenvalue at or under ``floor`` times the largest is rounding, not spread:
it counts as zero, its direction is left out of every inverse (a pseudo-inverse), and one warning
says how many there were. The default floor is what rounding can do: ``D`` times the precision of
float64 for the decomposition, or ``sqrt(D)`` times the precision of the dtype that came in, for
entries that were rounded to it, whichever is larger.

What is no covariance (not [D, D], not finite, not symmetric, or with an eigenvalue below what
rounding explains) is refused with a ValueError, what is no floating tensor with a TypeError.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

_EPSILON = torch.finfo(torch.float64).eps
_BLOCKS = 32  # of rank/8 columns: the Krylov space has 4 directions for each one asked for
_LEAST_BLOCK = 4  # columns, for few directions of a flat spectrum
_SMALL = 1024  # up to this D eigh takes less than a second
_NOT_UNIT = 1e-5  # E|u|^2 of rows that were made unit length in float32 is nearer to 1


class Whitening(NamedTuple):
    """``matrix @ S @ matrix.T`` is the identity on the directions that were kept."""

    matrix: Tensor  # [D, D] float64, W
    inverse: Tensor  # [D, D] float64, W^-1; W^-1 W projects on what was kept: I if all were


def symmetric_root(covariance: Tensor) -> Tensor:
    """``S^1/2``, the symmetric positive semidefinite root [D, D] float64 of S [D, D]."""
    return _spectrum(covariance, 0.0).power(0.5)


def inverse_root(covariance: Tensor, *, floor: float | None = None) -> Tensor:
    """``S^-1/2``, [D, D] float64 and symmetric; directions under the floor are left out."""
    spectrum = _spectrum(covariance, floor)
    _warn_floored(spectrum.floored, len(covariance), spectrum.floor)
    return spectrum.power(-0.5)


def whitening(covariance: Tensor, kind: str = "zca", *, floor: float | None = None) -> Whitening:
    """A whitening matrix of S [D, D] and its inverse; with ``S = V L V'``, L descending:

    - ``"zca"``: ``W = V L^-1/2 V'``, symmetric, the one that moves rows least
    - ``"pca"``: ``W = L^-1/2 V'``, principal axes in order; rows of W that were left out are zero
    - ``"cholesky"``: ``W = C^-1`` with ``S = C C'``, both lower triangular if nothing is left out

    (Kessy, Lewin and Strimmer, arXiv 1512.00809; they take the triangular factor of ``S^-1``.)
    """
    if kind not in ("zca", "pca", "cholesky"):
        raise ValueError(f"whiten: kind={kind!r} is none of zca, pca, cholesky")
    spectrum = _spectrum(covariance, floor)
    _warn_floored(spectrum.floored, len(covariance), spectrum.floor)
    if kind == "zca":
        return Whitening(spectrum.power(-0.5), spectrum.power(0.5))
    factor = spectrum.factor(0.5)  # F [D, D], S = F F'
    if kind == "pca":
        return Whitening(spectrum.factor(-0.5).T.contiguous(), factor)
    # F' = Q R makes C = R' and W = Q' W_pca, with no inverse taken of anything small.
    q, r = torch.linalg.qr(factor.T)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r)
    matrix, inverse = (q * sign).T @ spectrum.factor(-0.5).T, r.T * sign
    full = spectrum.floored == 0
    return Whitening(matrix.tril() if full else matrix, inverse)


def coral(source: Tensor, target: Tensor, *, floor: float | None = None) -> Tensor:
    """``A = S_x^1/2 S_y^-1/2`` [D, D] float64, so that ``A S_y A' = S_x`` (source y, target x)."""
    y, x = _pair(source, target, floor)
    _warn_floored(y.floored, len(source), y.floor)
    return x.power(0.5) @ y.power(-0.5)


def optimal_transport(source: Tensor, target: Tensor, *, floor: float | None = None) -> Tensor:
    """The symmetric positive semidefinite A [D, D] float64 with ``A S_y A' = S_x``.

    ``A = S_y^-1/2 (S_y^1/2 S_x S_y^1/2)^1/2 S_y^-1/2``, the map of least mean squared displacement
    between Gaussians (Knott and Smith, 1984). From singular values, which keeps the digits that
    forming the product would lose at a large condition number.
    """
    y, x = _pair(source, target, floor)
    _warn_floored(y.floored, len(source), y.floor)
    _, singular, right = torch.linalg.svd(x.factor(0.5).T @ y.factor(0.5))
    root = (y.factor(-0.5) @ right.T) * singular.sqrt()
    return _symmetric(root @ root.T)


def bures_distance(a: Tensor, b: Tensor) -> float:
    """Bures distance of covariances [D, D], not squared: a metric.

    ``d^2 = tr S_a + tr S_b - 2 tr (S_a^1/2 S_b S_a^1/2)^1/2``; with the squared distance of the
    means added it is the squared 2-Wasserstein distance of Gaussians. Taken as the least
    ``|F_a - F_b Q|_F`` over orthogonal Q, ``S = F F'``, which does not cancel where a is near b.
    """
    a, b = (spectrum.factor(0.5) for spectrum in _pair(a, b, 0.0, ("first", "second")))
    left, _, right = torch.linalg.svd(b.T @ a)
    return float((a - b @ (left @ right)).norm())


def blockwise(
    source: Tensor, target: Tensor, frame: Tensor, *, floor: float | None = None
) -> Tensor:
    """``A = U A_U U' + V A_V V'`` [D, D] float64, CORAL on each block (arXiv 2602.07026, App F).

    ``A_U = coral(U' S_y U, U' S_x U)`` with U = ``frame`` [D, q], orthonormal columns; V is its
    complement. The blocks of ``A S_y A'`` on U and on V are those of ``S_x``; what couples U to V
    is left as it comes. The floor is relative to the largest eigenvalue of each block.
    """
    wide_source, wide_target = _checked(source, "source"), _checked(target, "target")
    _expect_same_columns(source, target, ("source", "target"))
    u, floor = _checked_frame(frame, source), _floor(source, floor)
    v = torch.linalg.qr(u, mode="complete").Q[:, u.shape[1] :]
    result, floored = torch.zeros_like(wide_source), 0
    for basis in (u, v) if v.shape[1] else (u,):
        y = _spectrum(basis.T @ wide_source @ basis, floor, "source", source.dtype)
        x = _spectrum(basis.T @ wide_target @ basis, 0.0, "target", target.dtype)
        result += basis @ (x.power(0.5) @ y.power(-0.5)) @ basis.T
        floored += y.floored
    _warn_floored(floored, len(source), floor)
    return result


class LowRank(NamedTuple):
    """``S ~ U diag(l) U' + rest (I - U U')``: the leading eigenpairs, and one number for the tail.

    For D in the thousands: rows are mapped by two products with U and no [D, D] matrix. ``rest``
    is the mean of the remaining eigenvalues, as in probabilistic PCA (Tipping and Bishop, 1999).
    """

    values: Tensor  # [rank] float64, descending; 0 at or under the floor
    vectors: Tensor  # [D, rank] float64, orthonormal columns
    rest: float  # 0 at or under the floor, or where rank = D

    @classmethod
    def of(
        cls, covariance: Tensor, rank: int, *, floor: float | None = None, seed: int = 0
    ) -> LowRank:
        """The leading ``rank`` eigenpairs of S [D, D], by eigh for a small D or a large rank.

        Otherwise from a block Krylov space (Golub and Underwood, 1977) that starts from ``seed``:
        4 rank products of S with a vector. Where the spectrum falls as ``i^-1/2`` or faster the
        eigenvalues are then exact to 1e-6; in a bulk of noise, whose leading directions mean
        nothing, the last come out low by up to a tenth. ``rest`` takes up what they miss.
        """
        checked, floor = _checked(covariance), _floor(covariance, floor)
        columns = len(checked)
        if not 1 <= rank <= columns:
            raise ValueError(f"whiten: rank={rank}, expected 1 to D = {columns}")
        if columns <= _SMALL or rank > columns / 8:
            values, vectors, *_ = _spectrum(covariance, 0.0)
            values, vectors = values[:rank], vectors[:, :rank]
        else:
            values, vectors = _leading_pairs(checked, rank, seed)
        rest = float(checked.trace() - values.sum()) / (columns - rank) if rank < columns else 0.0
        cut = floor * float(values[0])
        floored = int((values <= cut).sum()) + (columns - rank) * (rest <= cut)
        _warn_floored(floored, columns, floor)
        return cls(values.where(values > cut, 0.0), vectors, rest if rest > cut else 0.0)

    def root(self, rows: Tensor) -> Tensor:
        """Rows [N, D] through ``S^1/2``, in their dtype."""
        return self._power(rows, 0.5)

    def inverse_root(self, rows: Tensor) -> Tensor:
        """Rows [N, D] through ``S^-1/2``, in their dtype; zero directions are left out."""
        return self._power(rows, -0.5)

    def coral(self, rows: Tensor, target: LowRank) -> Tensor:
        """Rows [N, D] of this covariance through ``S_x^1/2 S_y^-1/2``, S_x the target's."""
        return target.root(self.inverse_root(rows))

    def _power(self, rows: Tensor, exponent: float) -> Tensor:
        if rows.dim() != 2 or rows.shape[1] != len(self.vectors):
            raise ValueError(
                f"whiten: rows are {list(rows.shape)}, expected [N, {len(self.vectors)}], the "
                "columns of the covariance; use rows of the same encoder"
            )
        dtype = torch.promote_types(rows.dtype, torch.float32)
        vectors = self.vectors.to(dtype)
        rest = self.rest**exponent if self.rest > 0 else 0.0
        inside = _power(self.values, exponent) - rest
        wide = rows.to(dtype)
        out = torch.addmm(wide, (wide @ vectors) * inside.to(dtype), vectors.T, beta=rest)
        return out.to(rows.dtype)


def shrinkage(
    covariance: Tensor,
    method: float | str | None,
    *,
    count: int | None = None,
    mean: Tensor | None = None,
    fourth_moment: float | None = None,
) -> float:
    """How far to shrink S [D, D] (divided by n) towards ``tr(S)/D I``, from 0 to 1.

    Args:
        method: None (0), the number itself, ``"oas"`` (Chen et al., arXiv 0907.4698, eq. 23
            without its terms ``2/D``, as scikit-learn has it) or ``"ledoit-wolf"`` (Ledoit and
            Wolf, 2004).
        count: rows n behind S; needed by both named methods.
        mean, fourth_moment: one of them is needed by Ledoit-Wolf, which takes
            ``m_4 = E|x - mu|^4``. Unit rows have ``|u - mu|^2 = 1 - 2 u.mu + |mu|^2 =
            T - 2 (u - mu).mu`` with ``T = tr S = 1 - |mu|^2``, hence ``m_4 = T^2 + 4 mu'S mu``
            exactly: the mean [D] is enough. Other rows need the number itself.

    Raises:
        ValueError: an unknown method, a number outside [0, 1], a missing argument, a mean of rows
            that were not unit length, or a fourth moment that no rows of this S can have.
    """
    if method is None:
        return 0.0
    if not isinstance(method, str):
        if 0 <= method <= 1:
            return float(method)
        raise ValueError(f"whiten: shrinkage {method}, expected a number in [0, 1]")
    if method not in ("oas", "ledoit-wolf"):
        raise ValueError(f"whiten: shrinkage {method!r} is none of oas, ledoit-wolf, a number")
    if count is None or count < 1:
        raise ValueError(f"whiten: shrinkage {method!r} needs the count of rows, got {count}")
    covariance = _checked(covariance)
    square, trace = float(covariance.square().sum()), float(covariance.trace())
    spread = square - trace**2 / len(covariance)  # |S - tr(S)/D I|_F^2
    if method == "oas":
        wanted = (square + trace**2) / (count + 1)
    else:
        fourth = _fourth_moment(covariance, trace, mean, fourth_moment)
        wanted = max(fourth - square, 0.0) / count  # E|S_n - E S_n|_F^2
    return min(wanted / spread, 1.0) if spread > 0 else 0.0


def shrink(
    covariance: Tensor,
    method: float | str | None,
    *,
    count: int | None = None,
    mean: Tensor | None = None,
    fourth_moment: float | None = None,
) -> Tensor:
    """``(1 - r) S + r tr(S)/D I`` [D, D] float64, with r as in :func:`shrinkage`."""
    r = shrinkage(covariance, method, count=count, mean=mean, fourth_moment=fourth_moment)
    covariance = _checked(covariance)
    result = (1 - r) * covariance
    result.diagonal().add_(r * covariance.diagonal().mean())
    return result


class _Spectrum(NamedTuple):
    """``S = vectors diag(values) vectors'``; what lies at or under the floor is zero."""

    values: Tensor  # [D] float64, descending, not negative
    vectors: Tensor  # [D, D] float64
    floored: int
    floor: float

    def factor(self, exponent: float) -> Tensor:
        """F [D, D] with ``F F' = S^(2 exponent)``."""
        return self.vectors * _power(self.values, exponent)

    def power(self, exponent: float) -> Tensor:
        """``S^exponent``, symmetric to the last bit."""
        return _symmetric(self.factor(exponent) @ self.vectors.T)


def _spectrum(
    covariance: Tensor,
    floor: float | None,
    name: str = "covariance",
    rounded_to: torch.dtype | None = None,
) -> _Spectrum:
    checked, floor = _checked(covariance, name), _floor(covariance, floor)
    values, vectors = torch.linalg.eigh(checked)
    values, vectors = values.flip(0), vectors.flip(1)
    largest, least = max(float(values[0]), 0.0), float(values[-1])
    if least < -largest * torch.finfo(rounded_to or covariance.dtype).eps ** 0.5:
        raise ValueError(
            f"whiten: the {name} has the eigenvalue {least:.3g} (largest {largest:.3g}), expected "
            "none below zero; accumulate it in float64"
        )
    kept = values > floor * largest
    return _Spectrum(values.where(kept, 0.0), vectors, int((~kept).sum()), floor)


def _pair(
    source: Tensor,
    target: Tensor,
    floor: float | None,
    names: tuple[str, str] = ("source", "target"),
) -> tuple[_Spectrum, _Spectrum]:
    y, x = _spectrum(source, floor, names[0]), _spectrum(target, 0.0, names[1])
    _expect_same_columns(source, target, names)
    return y, x


def _expect_same_columns(source: Tensor, target: Tensor, names: tuple[str, str]) -> None:
    if len(source) != len(target):
        raise ValueError(
            f"whiten: the {names[0]} has {len(source)} columns, the {names[1]} {len(target)}; "
            "embed both with one encoder"
        )


def _leading_pairs(covariance: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ritz values [rank], descending, and vectors [D, rank] of a block Krylov space."""
    shape = len(covariance), max(math.ceil(rank / 8), _LEAST_BLOCK)
    generator = torch.Generator().manual_seed(seed)
    scale = float(covariance.diagonal().max())
    new = torch.zeros(shape, dtype=torch.float64, device=covariance.device)
    basis = new[:, :0]
    products = []
    for _ in range(_BLOCKS):
        # A pinch of noise: where the space closes early (equal eigenvalues) it goes on from that.
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(new.device)
        new = new + _EPSILON * scale * noise
        for _ in range(2):  # once is not enough where little is left of the columns
            new = torch.linalg.qr(new - basis @ (basis.T @ new)).Q
        basis = torch.cat([basis, new], dim=1)
        products.append(new := (new.T @ covariance).T)  # the order in which GEMM is fastest
    values, rotation = torch.linalg.eigh(_symmetric(basis.T @ torch.cat(products, dim=1)))
    return values[-rank:].flip(0), basis @ rotation[:, -rank:].flip(1)


def _fourth_moment(
    covariance: Tensor, trace: float, mean: Tensor | None, fourth_moment: float | None
) -> float:
    if (mean is None) == (fourth_moment is None):
        raise ValueError(
            "whiten: shrinkage 'ledoit-wolf' needs either the mean of unit rows or the "
            "fourth_moment E|x - mu|^4 of any rows"
        )
    if mean is None:
        if fourth_moment < trace**2 * (1 - _NOT_UNIT):
            raise ValueError(
                f"whiten: fourth_moment={fourth_moment:.3g}, expected E|x - mu|^4, which is at "
                f"least tr(S)^2 = {trace**2:.3g}; take both from the same rows"
            )
        return fourth_moment
    mean = mean.detach().to(covariance)
    energy = trace + float(mean.square().sum())
    if abs(energy - 1) > _NOT_UNIT:
        raise ValueError(
            f"whiten: the rows behind S and mean have E|u|^2 = {energy:.6g}, expected 1, that of "
            "unit rows; give their fourth_moment instead"
        )
    return trace**2 + 4 * float(mean @ covariance @ mean)


def _checked(covariance: Tensor, name: str = "covariance") -> Tensor:
    """S in float64 and symmetric to the last bit, or an error that says what is wrong with it."""
    if not isinstance(covariance, Tensor) or not covariance.is_floating_point():
        got = covariance.dtype if isinstance(covariance, Tensor) else type(covariance).__name__
        raise TypeError(f"whiten: expected the {name} as a floating tensor [D, D], got {got}")
    shape = list(covariance.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"whiten: the {name} is {shape}, expected [D, D]; give Moments.covariance")
    wide = covariance.detach().double()
    peak = max(abs(float(end)) for end in wide.aminmax())
    if not math.isfinite(peak):
        bad = int((~torch.isfinite(wide)).sum())
        raise ValueError(
            f"whiten: {bad} of {wide.numel()} entries of the {name} are not finite; leave NaN and "
            "infinite rows out of it"
        )
    skew = float((wide - wide.T).abs_().max())
    if skew > peak * torch.finfo(covariance.dtype).eps ** 0.5:
        raise ValueError(
            f"whiten: the {name} is not symmetric: entries differ by {skew:.3g} from their mirror "
            f"image, the largest is {peak:.3g}; give a covariance"
        )
    return _symmetric(wide)


def _checked_frame(frame: Tensor, covariance: Tensor) -> Tensor:
    """U [D, q] in float64 with orthonormal columns."""
    shape, columns = list(frame.shape), len(covariance)
    if len(shape) != 2 or shape[0] != columns or not 1 <= shape[1] <= columns:
        raise ValueError(f"whiten: the frame is {shape}, expected [{columns}, q], q from 1 to D")
    wide = frame.detach().double()
    off = float((wide.T @ wide - torch.eye(shape[1]).to(wide)).abs().max())
    if not off <= torch.finfo(frame.dtype).eps ** 0.5:
        raise ValueError(
            f"whiten: U'U of the frame is off the identity by {off:.3g}; give orthonormal columns"
        )
    return wide


def default_floor(covariance: Tensor) -> float:
    """The share of the largest eigenvalue of S [D, D] that rounding alone can make."""
    columns = len(covariance)
    return max(columns * _EPSILON, columns**0.5 * torch.finfo(covariance.dtype).eps)


def _floor(covariance: Tensor, floor: float | None) -> float:
    if floor is None:
        return default_floor(covariance)
    if not 0 <= floor < 1:
        raise ValueError(f"whiten: floor={floor}, expected a share of the largest eigenvalue")
    return floor


def _warn_floored(floored: int, columns: int, floor: float) -> None:
    if floored:
        warnings.warn(
            f"whiten: {floored} of {columns} directions have an eigenvalue at or under {floor:.1e} "
            "of the largest and are left out; shrink the covariance to keep them",
            RuntimeWarning,
            stacklevel=3,
        )


def _power(values: Tensor, exponent: float) -> Tensor:
    """``values^exponent`` where positive, else 0: the pseudo-inverse for a negative exponent."""
    return torch.where(values > 0, values**exponent, 0.0)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T).div_(2)
