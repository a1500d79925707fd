"""Paths for the libraries that go to a bucket by themselves, through etils and gcsfs.

Orbax (for what is not an array), TFDS and JAX's compilation cache do; all else is in
files.py.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import pathlib
import sys
import time
from typing import Any

from supcon_jax.storage import files

logger = logging.getLogger(__name__)


def as_path(path: files.Path) -> pathlib.Path:
    """A path, or what stands for one of a bucket and can do the same.

    Raises:
      ValueError: it is in a bucket, and gcsfs is not installed.
    """
    if not files.is_remote(path):
        return pathlib.Path(files.absolute(path))
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(
            f"{os.fspath(path)} needs the package gcsfs: pip install gcsfs, or "
            "'supcon_jax[gcs]'"
        )
    _set_up_gcsfs()
    from etils import epath

    return epath.Path(files.absolute(path))  # type: ignore[return-value]


@functools.cache
def _set_up_gcsfs() -> None:
    # etils takes TensorFlow's files where TensorFlow is installed, and remembers whether
    # it is from its first look at any path.
    os.environ["EPATH_USE_TF"] = "0"
    if gpath := sys.modules.get("etils.epath.gpath"):
        gpath._is_tf_installed.cache_clear()
    # An experiment of gcsfs that asks for the kind of each bucket, with other credentials.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec
    import gcsfs
    from gcsfs.retry import is_retriable

    class WholeFile(gcsfs.core.GCSFile):
        """Sends what fits a block in one request, which may be sent again as it is.

        gcsfs opens a session to send parts, and a bucket that loses it refuses them.
        """

        def _initiate_upload(self) -> None:
            if self.buffer.tell() >= self.blocksize:
                super()._initiate_upload()

        def _upload_chunk(self, final: bool = False) -> bool:
            if self.location is None and final and self.autocommit:
                self._simple_upload()
                return True
            return super()._upload_chunk(final)

    class PatientFileSystem(gcsfs.GCSFileSystem):
        """gcsfs, which gives a bucket up after half a minute, as patient as we are.

        It keeps no listings: others write to the same folders, tensorstore for one.
        """

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"use_listings_cache": False})

        def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            options["block_size"] = options.get("block_size") or self.default_block_size
            options["consistency"] = options.get("consistency") or self.consistency
            return WholeFile(self, path, mode, **options)

        async def _request(self, *args: Any, **options: Any) -> Any:
            start = time.monotonic()
            while True:
                try:
                    return await super()._request(*args, **options)
                except Exception as error:
                    waited = time.monotonic() - start
                    if not is_retriable(error) or waited > files.PATIENCE_S:
                        raise

    # What it logs as errors is tried again, or raised.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    for name in ("gs", "gcs"):  # etils asks for the second
        fsspec.register_implementation(name, PatientFileSystem, clobber=True)
