"""The fixed-frame theory: a decomposition of the gap of matched pairs into four parts.

arXiv 2602.07026, section 3 and appendices A to C. A frame is fitted once, on probe rows: ``U``, the
leading eigenvectors of ``S = S_x + S_y``, and its complement ``V``. It splits the difference
``D = x - y`` of pairs of unit rows, source (text) y and target (image) x, with ``m = E[D]``:

    D = beta + gamma + delta + zeta
    beta  = U U' m          principal modality bias        delta = U U' (D - m)
    gamma = V V' m          constant orthogonal bias       zeta  = V V' (D - m)

All arithmetic is float64; memory holds D x D matrices and one block of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._argument_checks import expect_one_width, expect_pairs, tensor_of
from ._one_thread import one_thread
from .moments import Moments, expect_one_encoder
from .ops.reference import unit
from .storage.paths import AnyPath
from .storage.tensor_file import tensors_of, write_with_digest

Pairs = Sequence[Tensor | np.ndarray[Any, Any]]  # (source, target), [N, D] each
_BLOCK_ROWS = 4096
_RIDGE = 1e-6  # of the coupling, as a share of the mean eigenvalue of S_delta
_SINGULAR = 1e-12  # an eigenvalue below this share of the largest counts as 0


@dataclass(frozen=True, eq=False)
class FixedFrame:
    """An orthonormal basis of R^D, split after ``rank`` columns, that later data do not move."""

    basis: Tensor  # [D, D] float64, eigenvectors of S_x + S_y, largest eigenvalue first
    values: Tensor  # [D] float64, the eigenvalues
    rank: int  # r, columns of U

    @classmethod
    @one_thread
    def fit(
        cls, source: Moments, target: Moments, *, energy: float = 0.9, rank: int | None = None
    ) -> FixedFrame:
        """Fit the frame of ``S = S_x + S_y`` (section 3) from moments with covariances.

        U takes the fewest leading eigenvectors that hold the share ``energy`` of ``tr S``, in
        (0, 1] (the paper gives no value), or ``rank`` of them, 1..D. Moments without a covariance
        or without spread are a ValueError.
        """
        expect_one_encoder("FixedFrame", source, target)
        total = target.covariance + source.covariance.to(target.mean.device)
        values, basis = torch.linalg.eigh(total)
        values, basis = values.flip(0).clamp(min=0), basis.flip(1).contiguous()
        if not 0 < energy <= 1 or (rank is not None and not 1 <= rank <= len(values)):
            raise ValueError(
                f"FixedFrame: got energy={energy} and rank={rank}, expected energy in (0, 1] and "
                f"rank None or 1..{len(values)}"
            )
        rounding = torch.finfo(torch.float64).eps * len(values) * (source.energy + target.energy)
        if not float(values.sum()) > rounding:
            raise ValueError("FixedFrame: the rows have no spread; fit on rows that differ")
        if rank is None:
            energies = values.cumsum(0)
            rank = int((energies < energy * energies[-1]).sum()) + 1
        return cls(basis, values, rank)

    @property
    def principal(self) -> Tensor:
        """The principal subspace U, [D, r]."""
        return self.basis[:, : self.rank]

    @property
    def complement(self) -> Tensor:
        """The complement V, [D, D - r]."""
        return self.basis[:, self.rank :]

    @property
    def energy(self) -> float:
        """The share of ``tr S`` in U, at least the threshold of :meth:`fit`."""
        return float(self.values[: self.rank].sum() / self.values.sum())

    def leak(self, other: FixedFrame) -> float:
        """Return ``|P_V P_Ut|_2 = sin theta(U_t, U)``, the sine of the largest principal angle.

        ``other`` is the frame of a checkpoint, fitted with ``rank=frame.rank``.
        """
        if not self.complement.numel():
            return 0.0
        across = self.complement.T @ other.principal.to(self.basis.device)
        return min(float(torch.linalg.matrix_norm(across, 2)), 1.0)

    def decompose(self, pairs: Pairs) -> Decomposition:
        """Split the gap of matched pairs ``(source, target)``, rows [N, D] each, N from 2.

        Rows that do not match, are zero or not finite are a ValueError.
        """
        moments = Moments(covariance=True, normalize=False)
        blocks = (torch.split(rows, _BLOCK_ROWS) for rows in _checked(pairs, len(self.values)))
        for y, x in zip(*blocks, strict=True):
            difference = unit(x.double()) - unit(y.to(x.device).double())
            moments.update(difference, bad_rows="keep")
        basis, r = self.basis.to(moments.mean.device), self.rank
        mean = basis.T @ moments.mean
        covariance = basis.T @ moments.covariance @ basis
        return Decomposition(
            frame=self,
            count=moments.count,
            energy=moments.energy,
            beta=basis[:, :r] @ mean[:r],
            gamma=basis[:, r:] @ mean[r:],
            delta_covariance=covariance[:r, :r],
            zeta_covariance=covariance[r:, r:],
            cross_covariance=covariance[r:, :r],
        )

    def save(self, path: AnyPath) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        tensors = {"basis": self.basis, "values": self.values, "rank": torch.tensor(self.rank)}
        write_with_digest(path, tensors, {"frame": "fixed"})

    @classmethod
    def load(cls, path: AnyPath) -> FixedFrame:
        """Read a file that :meth:`save` wrote; a ValueError names a file that is no frame."""
        expected = "a frame written by FixedFrame.save"
        with tensors_of(path, expected, "fit it again") as (tensors, _):
            return cls(tensors["basis"], tensors["values"], int(tensors["rank"]))


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The gap of pairs in a fixed frame (section 3, appendices A to C).

    Covariances are in the frame's coordinates, divided by N: r of U, then D - r of V.
    """

    frame: FixedFrame
    count: int  # N pairs
    energy: float  # E|D|^2
    beta: Tensor  # [D] P_U m, principal modality bias
    gamma: Tensor  # [D] P_V m, constant orthogonal bias
    delta_covariance: Tensor  # [r, r] S_delta = U' cov(D) U
    zeta_covariance: Tensor  # [D - r, D - r] S_zeta = V' cov(D) V
    cross_covariance: Tensor  # [D - r, r] V' cov(D) U = E[zeta delta']

    @property
    def energies(self) -> dict[str, float]:
        """Energies ``|beta|^2``, ``|gamma|^2``, ``E|delta|^2``, ``E|zeta|^2``; sum ``E|D|^2``."""
        return {
            "beta": float(self.beta.square().sum()),
            "gamma": float(self.gamma.square().sum()),
            "delta": float(self.delta_covariance.trace()),
            "zeta": float(self.zeta_covariance.trace()),
        }

    @property
    def coupling(self) -> Tensor:
        """The ridge regression of zeta on delta, ``L = Z D' (D D' + lambda I)^-1``, [D - r, r]."""
        s = self.delta_covariance
        ridge = _RIDGE * s.trace() / len(s) * torch.eye(len(s)).to(s)
        inverse: Tensor = torch.linalg.pinv(s + ridge, hermitian=True)
        return self.cross_covariance @ inverse

    @property
    def gamma_angle(self) -> float:
        """The angle, 0..90 degrees, of gamma and S_zeta's top eigenvector; NaN if either is 0."""
        length = float(self.gamma.norm())
        if not length > 0 or not float(self.zeta_covariance.trace()) > 0:
            return math.nan
        top = torch.linalg.eigh(self.zeta_covariance).eigenvectors[:, -1]
        along = self.frame.complement.to(top.device) @ top
        return math.degrees(math.acos(min(abs(float(along @ self.gamma)) / length, 1.0)))

    def summary(self) -> dict[str, float | int | None]:
        """Return plain numbers, ready for json; ``None`` where one is undefined or infinite."""
        energies, total = self.energies, sum(self.energies.values())
        numbers: dict[str, float | int] = {"pairs": self.count, "rank": self.frame.rank}
        numbers |= {"frame_energy": self.frame.energy, "difference_energy": self.energy}
        for name, value in energies.items():
            numbers[f"{name}_norm"] = math.sqrt(max(value, 0.0))  # of residuals: root mean square
            numbers[f"{name}_share"] = value / total if total > 0 else math.nan
        coupling, s = self.coupling, self.delta_covariance
        explained = 2 * (coupling * self.cross_covariance).sum() - ((coupling @ s) * coupling).sum()
        numbers |= {
            "delta_condition": _condition(s),
            "zeta_condition": _condition(self.zeta_covariance),
            "gamma_standard_error": math.sqrt(max(energies["zeta"], 0.0) / self.count),
            "gamma_angle": self.gamma_angle,
            "coupling_norm": float(torch.linalg.matrix_norm(coupling, 2)) if len(coupling) else 0.0,
            "coupling_r2": float(explained) / energies["zeta"] if energies["zeta"] else math.nan,
            "coupling_r2_chance": min(self.frame.rank / (self.count - 1), 1.0),
        }
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def _condition(covariance: Tensor) -> float:
    """Return the largest over the smallest eigenvalue, infinite where that is rounding."""
    values = torch.linalg.eigvalsh(covariance)
    if not len(values) or not float(values[-1]) > 0:
        return math.nan
    return float(values[-1] / values[0]) if values[0] > _SINGULAR * values[-1] else math.inf


def _checked(pairs: Pairs, columns: int) -> list[Tensor]:
    """Return source and target rows [N, columns] of pairs as tensors, or raise what is wrong."""
    if not isinstance(pairs, (list, tuple)) or len(pairs) != 2:
        raise ValueError(
            "FixedFrame: expected (source, target), the rows [N, D] of both sides, got a "
            f"{type(pairs).__name__}; give both and nothing else"
        )
    source, target = (tensor_of("FixedFrame", rows) for rows in pairs)
    expect_pairs("FixedFrame", source, target)
    expect_one_width("FixedFrame", ("a pair", source.shape[1]), ("the frame", columns))
    zero = (~target.any(dim=1)) | (~source.any(dim=1)).to(target.device)
    if bool(zero.any()):
        pair = int(zero.nonzero()[0])
        raise ValueError(f"FixedFrame: a row of pair {pair} is zero; leave the pair out")
    return [source, target]
