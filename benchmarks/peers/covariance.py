"""Mean and covariance as the peers compute them, each through its fastest public path.

What a library keeps of a covariance is put together again, so that it can be held against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from peers import packages

Covariance = Callable[[Tensor], np.ndarray]  # rows [N, D] float32 -> [D, D], divided by n


def torch_cov(rows: Tensor) -> np.ndarray:
    return torch.cov(rows.T, correction=0).cpu().numpy()


def numpy_cov(rows: Tensor) -> np.ndarray:
    return np.cov(rows.numpy(), rowvar=False, bias=True)


def numpy_cov_float32(rows: Tensor) -> np.ndarray:
    return np.cov(rows.numpy(), rowvar=False, bias=True, dtype=np.float32)


def empirical(module: str) -> Covariance:
    """Fit scikit-learn's estimator, or the replacement by Intel's extension."""

    def fit(rows: Tensor) -> np.ndarray:
        estimators = import_module(f"{module}.covariance")
        if module == "sklearn":
            return estimators.empirical_covariance(rows.numpy())
        return estimators.IncrementalEmpiricalCovariance().fit(rows.numpy()).covariance_

    return fit


def pca(module: str) -> Covariance:
    """Return a function that fits scikit-learn's PCA and returns the covariance that it keeps."""

    def fit(rows: Tensor) -> np.ndarray:
        estimator = import_module(f"{module}.decomposition").PCA(svd_solver="covariance_eigh")
        found = estimator.fit(rows.numpy())
        axes = found.components_.astype(np.float64)
        values = found.explained_variance_.astype(np.float64)
        return (axes.T * values) @ axes * (len(rows) - 1) / len(rows)

    return fit


def cuml_pca(rows: Tensor) -> np.ndarray:
    """Return the covariance of cuML's PCA of rows on the GPU."""
    import cupy
    from cuml.decomposition import PCA

    found = PCA(n_components=rows.shape[1], svd_solver="full").fit(cupy.from_dlpack(rows))
    axes, values = (cupy.asnumpy(x) for x in (found.components_, found.explained_variance_))
    return (axes.T * values) @ axes * (len(rows) - 1) / len(rows)


def cupy_cov(rows: Tensor) -> np.ndarray:
    import cupy

    return cupy.asnumpy(cupy.cov(cupy.from_dlpack(rows), rowvar=False, bias=True))


def faiss_pca(rows: Tensor) -> np.ndarray:
    """Return the covariance of faiss's PCAMatrix; below its limit it uses all rows."""
    import faiss

    columns = rows.shape[1]
    pca = faiss.PCAMatrix(columns, columns)
    pca.max_points_per_d = len(rows) // columns + 1
    pca.train(rows.numpy())
    axes = faiss.vector_to_array(pca.PCAMat).reshape(-1, columns)[:columns].astype(np.float64)
    values = faiss.vector_to_array(pca.eigenvalues)[:columns].astype(np.float64)
    return (axes.T * values) @ axes / len(rows)


def concept_erasure_fitter(rows: Tensor) -> np.ndarray:
    """Fit in float32 batches by a streaming Welford update; the concept has one column."""
    from concept_erasure import LeaceFitter

    kind = {"dtype": torch.float32, "device": rows.device}
    fitter = LeaceFitter(rows.shape[1], 1, **kind, shrinkage=False)
    for batch in rows.split(1 << 14):
        fitter.update(batch, batch[:, :1])
    return fitter.sigma_xx.double().cpu().numpy() * (len(rows) - 1) / len(rows)


class _AsTheyAre(torch.nn.Module):
    """Image encoder whose images are rows already."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.num_features = columns

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : self.num_features]


def torchmetrics_sums(rows: Tensor) -> np.ndarray:
    """Return the sums of torchmetrics' Frechet distance; its feature extractor returns the rows."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_AsTheyAre(rows.shape[1]))
    for batch in rows.split(1 << 14):
        metric.update(batch, real=True)
    return _of_sums(metric.real_features_sum, metric.real_features_cov_sum, len(rows))


def torcheval_sums(rows: Tensor) -> np.ndarray:
    """Return the sums of torcheval in float32; it expects images, so rows are [N, 3, 1, D / 3]."""
    from torcheval.metrics import FrechetInceptionDistance

    columns = rows.shape[1]
    metric = FrechetInceptionDistance(_AsTheyAre(columns), feature_dim=columns)
    images = torch.nn.functional.pad(rows, (0, -columns % 3)) if columns % 3 else rows
    for batch in images.split(1 << 14):
        metric.update(batch.view(len(batch), 3, 1, -1), is_real=True)
    return _of_sums(metric.real_sum, metric.real_cov_sum, len(rows))


def _of_sums(total: Tensor, products: Tensor, count: int) -> np.ndarray:
    mean = total.double() / count
    return (products.double() / count - torch.outer(mean, mean)).cpu().numpy()


_CPU = {
    "torch.cov": ("torch", "torch", torch_cov),
    "numpy.cov": ("numpy", "numpy", numpy_cov),
    "numpy.cov float32": ("numpy", "numpy", numpy_cov_float32),
    "empirical_covariance": ("scikit-learn", "sklearn", empirical("sklearn")),
    "PCA": ("scikit-learn", "sklearn", pca("sklearn")),
    "IncrementalEmpiricalCovariance": (
        "scikit-learn-intelex",
        "sklearnex.covariance",
        empirical("sklearnex"),
    ),
    "sklearnex PCA": ("scikit-learn-intelex", "sklearnex.decomposition", pca("sklearnex")),
    "PCAMatrix": ("faiss-cpu", "faiss", faiss_pca),
    "LeaceFitter": ("concept-erasure", "concept_erasure", concept_erasure_fitter),
    "FID sums": ("torchmetrics", "torchmetrics", torchmetrics_sums),
    "torcheval FID sums": ("torcheval", "torcheval.metrics", torcheval_sums),
}
_CUDA = {
    "torch.cov": ("torch", "torch", torch_cov),
    "cupy.cov": ("cupy", "cupy", cupy_cov),
    "cuML PCA": ("cuml", "cuml", cuml_pca),
    "LeaceFitter": ("concept-erasure", "concept_erasure", concept_erasure_fitter),
}


def installed(device: str = "cpu") -> packages.Found:
    """Return the peers that compute on this device."""
    return packages.installed(_CUDA if device == "cuda" else _CPU)
