"""Make the four files of this folder: the first 12,000 training and the first 2,000 test images of Fashion-MNIST.

apt-get install dataset-fashion-mnist
python examples/data/fashion-mnist/make_subset.py /usr/share/datasets/fashion-mnist
"""

import gzip
import lzma
import struct
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEPT = {"train": 12_000, "t10k": 2_000}


def main(source: Path) -> None:
    for split, count in KEPT.items():
        for kind, header, row in (("images-idx3", 16, 28 * 28), ("labels-idx1", 8, 1)):
            data = gzip.decompress((source / f"{split}-{kind}-ubyte.gz").read_bytes())
            head = data[:4] + struct.pack(">I", count) + data[8:header]  # the second number of the header is the count
            packed = lzma.compress(head + data[header : header + count * row])
            (HERE / f"{split}-{kind}-ubyte.xz").write_bytes(packed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
