"""supcon_jax's one program: python main.py --config=configs/digits.py

The same as `python -m supcon_jax`, and as `supcon-jax` where the package is installed.
"""

from supcon_jax.__main__ import run

if __name__ == "__main__":
    run()
