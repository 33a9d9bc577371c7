"""blogjax: the methods of a set of machine-learning blog posts as composable JAX.

Everything is imported from its own module, so that a project pays only for what it uses:

>>> from blogjax.diffusion import schedules
>>> float(schedules.linear_beta_schedule(1000).signal(0))
1.0

`blogjax.catalog` lists every post with its files.
"""

from blogjax._version import __version__

__all__ = ["__version__"]
