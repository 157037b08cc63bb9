"""What the scripts share. Import it before torch."""
import os

# How often a waiting OpenMP thread spins before it sleeps; OpenMP reads it when torch loads it. By default it spins on
# a core that another process needs: with one of two cores busy, a step takes four times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
