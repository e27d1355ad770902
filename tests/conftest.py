"""Every test runs with strict dtype promotion: a silent promotion to float32 is a bug here."""

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
