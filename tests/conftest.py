"""Two CPU devices, so that sharding is something to test; before JAX starts."""

from __future__ import annotations

import jax

jax.config.update("jax_num_cpu_devices", 2)
