"""Small programs beside main.py, run as `python -m supcon_jax.tools.NAME`."""
