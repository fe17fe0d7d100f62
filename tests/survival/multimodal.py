"""multimodal/train.py with the network of the tests, as a command."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from multimodal import train  # noqa: E402
from tests.multimodal.small import shrink  # noqa: E402

if __name__ == "__main__":
    shrink()
    train.main()
