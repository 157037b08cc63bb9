"""What the scripts share. Import it before torch."""
import contextlib
import os

# How often a waiting OpenMP thread spins before it sleeps; OpenMP reads it when torch loads it. By default it spins on
# a core that another process needs: with one of two cores busy, a step takes four times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# For --deterministic; cuBLAS reads it once in a process, at its first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The commands of a notebook inherit its backend. Where that is not installed, matplotlib cannot be imported with it.
backend = os.environ.pop("MPLBACKEND", None)
import matplotlib

if backend is not None:  # for figures of the notebook itself
    os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = backend
