"""Mean and covariance as the peers compute them, each through its fastest public path.

A peer that is not installed is named as missing (``pip install '.[bench-peers]'``).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

Covariance = Callable[[Tensor], np.ndarray]  # rows [N, D] float32 -> [D, D], divided by n


def torch_cov(rows: Tensor) -> np.ndarray:
    return torch.cov(rows.T, correction=0).numpy()


def numpy_cov(rows: Tensor) -> np.ndarray:
    return np.cov(rows.numpy(), rowvar=False, bias=True)


def numpy_cov_float32(rows: Tensor) -> np.ndarray:
    return np.cov(rows.numpy(), rowvar=False, bias=True, dtype=np.float32)


def sklearn_empirical(rows: Tensor) -> np.ndarray:
    from sklearn.covariance import empirical_covariance

    return empirical_covariance(rows.numpy())


def sklearn_pca(rows: Tensor) -> np.ndarray:
    """What PCA(svd_solver="covariance_eigh") kept, put together again."""
    from sklearn.decomposition import PCA

    count = len(rows)
    pca = PCA(svd_solver="covariance_eigh").fit(rows.numpy())
    parts = pca.components_.astype(np.float64)
    return (parts.T * pca.explained_variance_.astype(np.float64)) @ parts * (count - 1) / count


def faiss_pca(rows: Tensor) -> np.ndarray:
    """What PCAMatrix kept; with fewer rows than its limit it takes them all."""
    import faiss

    columns = rows.shape[1]
    pca = faiss.PCAMatrix(columns, columns)
    pca.max_points_per_d = len(rows) // columns + 1
    pca.train(rows.numpy())
    axes = faiss.vector_to_array(pca.PCAMat).reshape(-1, columns)[:columns].astype(np.float64)
    values = faiss.vector_to_array(pca.eigenvalues)[:columns].astype(np.float64)
    return (axes.T * values) @ axes / len(rows)


def concept_erasure_fitter(rows: Tensor) -> np.ndarray:
    """Its streaming Welford update in float32 batches; the sums for the concept are one column."""
    from concept_erasure import LeaceFitter

    fitter = LeaceFitter(rows.shape[1], 1, dtype=torch.float32, shrinkage=False)
    for batch in rows.split(1 << 14):
        fitter.update(batch, batch[:, :1])
    return fitter.sigma_xx.double().numpy() * (len(rows) - 1) / len(rows)


def torchmetrics_sums(rows: Tensor) -> np.ndarray:
    """What its Frechet distance accumulates, with a feature extractor that gives the rows."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    extractor = torch.nn.Identity()
    extractor.num_features = rows.shape[1]
    metric = FrechetInceptionDistance(feature=extractor)
    for batch in rows.split(1 << 14):
        metric.update(batch, real=True)
    mean = metric.real_features_sum / len(rows)
    second = metric.real_features_cov_sum / len(rows)
    return (second.double() - torch.outer(mean, mean).double()).numpy()


PEERS: dict[str, tuple[str, Covariance]] = {
    "torch.cov": ("torch", torch_cov),
    "numpy.cov": ("numpy", numpy_cov),
    "numpy.cov float32": ("numpy", numpy_cov_float32),
    "sklearn empirical_covariance": ("scikit-learn", sklearn_empirical),
    "sklearn PCA": ("scikit-learn", sklearn_pca),
    "faiss PCAMatrix": ("faiss-cpu", faiss_pca),
    "concept-erasure LeaceFitter": ("concept-erasure", concept_erasure_fitter),
    "torchmetrics FID sums": ("torchmetrics", torchmetrics_sums),
}
_MODULES = {"scikit-learn": "sklearn", "faiss-cpu": "faiss", "concept-erasure": "concept_erasure"}


def installed() -> tuple[dict[str, Covariance], list[str]]:
    """The peers that can be imported, with their versions in their names; and those that cannot."""
    found, missing = {}, []
    for name, (package, function) in PEERS.items():
        try:
            import_module(_MODULES.get(package, package))
            found[f"{name} ({package} {version(package)})"] = function
        except ImportError:
            missing.append(f"{name} ({package} is not installed)")
    return found, missing
