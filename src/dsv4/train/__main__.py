"""``python -m dsv4.train RECIPE``, for launchers such as torchrun."""

import os

from ..errors import DSV4Error
from .launch import train_app

if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see cli.main
    try:
        train_app()
    except DSV4Error as e:
        raise SystemExit(str(e)) from e
